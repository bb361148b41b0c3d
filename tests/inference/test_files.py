"""Image files in, PNG files out: sizes, modes, names, and files that cannot be used."""

import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vesselrl.cli import main
from vesselrl.errors import DataError
from vesselrl.inference.files import find_images, predict_files, write_prediction
from vesselrl.inference.predictor import Prediction, Predictor

PERSON = "ZHANG_SAN(1234567890)_1-2_3_0A1B2C3D_frame_000011"


def save_picture(path: Path, height: int = 40, width: int = 72, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def by_hand() -> Prediction:
    """2 x 3 pixels whose values can be followed into the files."""
    probabilities = np.array([[0, 0.25, 0.5], [0.75, 1, 1e-5]], np.float32)
    return Prediction(probabilities > 0.5, probabilities, np.zeros((2, 3), np.float32))


def test_pixel_values_of_the_three_files(tmp_path: Path) -> None:
    grey = np.full((2, 3, 3), 100, np.uint8)
    row = write_prediction(grey, by_hand(), tmp_path, "heart")
    assert row == {"mask": str(tmp_path / "heart_mask.png"), "foreground": 2 / 6}
    with Image.open(tmp_path / "heart_mask.png") as mask:
        assert mask.mode == "L"
        assert np.asarray(mask).tolist() == [[0, 0, 0], [255, 255, 0]]
    with Image.open(tmp_path / "heart_probability.png") as probability:
        assert probability.mode.startswith("I;16")
        assert np.asarray(probability).tolist() == [[0, 16384, 32768], [49151, 65535, 1]]
    with Image.open(tmp_path / "heart_overlay.png") as overlay:
        assert overlay.mode == "RGB"
        assert overlay.size == (3, 2)
        assert (np.asarray(overlay)[1, 0] != 100).any()


def test_results_do_not_carry_the_name_of_a_person(predictor: Predictor, tmp_path: Path) -> None:
    for name in (f"{PERSON}.png", "left heart.png"):
        save_picture(tmp_path / "in" / name)
    rows = list(predict_files(predictor, tmp_path / "in", tmp_path / "out"))
    names = sorted(path.name for path in (tmp_path / "out").glob("*_mask.png"))
    assert names == ["P001_S1_F0011_mask.png", "left heart_mask.png"]
    assert sorted(Path(row["mask"]).name for row in rows) == names
    mapping = tmp_path / "out" / "patients.mapping.json"
    assert stat.S_IMODE(mapping.stat().st_mode) == 0o600
    assert PERSON in mapping.read_text()  # the only place that knows


def test_a_single_file(predictor: Predictor, tmp_path: Path) -> None:
    file = save_picture(tmp_path / "in" / "heart.jpg")
    (row,) = predict_files(predictor, file, tmp_path / "out" / "deep")
    assert row["image"] == "heart.jpg"
    written = sorted((tmp_path / "out" / "deep").iterdir())
    assert [path.name for path in written] == ["heart_mask.png", "heart_overlay.png", "heart_probability.png"]
    for path in written:
        with Image.open(path) as picture:
            assert picture.size == (72, 40)
    with Image.open(file) as picture, Image.open(row["mask"]) as mask:
        expected = predictor.predict(np.asarray(picture)).mask
        assert (np.asarray(mask) == 255 * expected).all()
    assert row["foreground"] == pytest.approx(expected.mean())


def test_a_folder_in_name_order_with_progress(predictor: Predictor, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("b.PNG", "a.jpg", "c.tiff", ".hidden.png"):
        save_picture(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / "sub").mkdir()
    calls = []
    rows = list(predict_files(predictor, folder, tmp_path / "out", lambda *numbers: calls.append(numbers)))
    assert [row["image"] for row in rows] == ["a.jpg", "b.PNG", "c.tiff"]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert len(list((tmp_path / "out").iterdir())) == 9


def test_earlier_results_of_the_same_name_are_replaced(predictor: Predictor, tmp_path: Path) -> None:
    file = save_picture(tmp_path / "heart.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "heart_mask.png").write_text("old")
    (tmp_path / "out" / "other.txt").write_text("kept")
    list(predict_files(predictor, file, tmp_path / "out"))
    with Image.open(tmp_path / "out" / "heart_mask.png") as mask:
        assert mask.size == (72, 40)
    assert (tmp_path / "out" / "other.txt").read_text() == "kept"


def test_grey_and_16_bit_files_are_read_as_rgb(predictor: Predictor, tmp_path: Path) -> None:
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray((values >> 8).astype(np.uint8)).save(tmp_path / "grey.png")
    assert len(list(predict_files(predictor, tmp_path, tmp_path / "out"))) == 2


def test_same_stem_twice_is_refused_before_anything_is_written(predictor: Predictor, tmp_path: Path) -> None:
    for name in ("001.png", "002.png", "002.jpg"):
        save_picture(tmp_path / "in" / name)
    with pytest.raises(DataError, match=r"1 file names differ only by their ending: 002\.jpg and the next"):
        list(predict_files(predictor, tmp_path / "in", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("name", "shown"), [("img_002", "img_002.png"), (PERSON, "image 2 of 2 in name order")]
)
def test_an_unreadable_file_is_named_but_not_the_person(
    predictor: Predictor, tmp_path: Path, name: str, shown: str
) -> None:
    save_picture(tmp_path / "in" / "001.png")
    spoil(save_picture(tmp_path / "in" / f"{name}.png"))
    rows = predict_files(predictor, tmp_path / "in", tmp_path / "out")
    assert next(rows)["image"] == "001.png"
    with pytest.raises(DataError) as raised:
        next(rows)
    assert str(raised.value).startswith(f"{shown}: the file is damaged")
    assert "ZHANG" not in str(raised.value)
    assert len(list((tmp_path / "out").glob("*.png"))) == 3  # the first image's, complete


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no image; known endings are \.png"):
        find_images(tmp_path)


def test_the_output_folder_is_a_file(predictor: Predictor, tmp_path: Path) -> None:
    file = save_picture(tmp_path / "heart.png")
    with pytest.raises(DataError, match=r"Cannot write to .*heart\.png .*give another --output_dir"):
        list(predict_files(predictor, file, file))


def test_the_verb(
    lively_checkpoint: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = save_picture(tmp_path / "001.png")
    words = [
        "predict",
        "--base_model",
        lively_checkpoint,
        "--lora_weights",
        adapter,
        "--output_dir",
        tmp_path / "out",
    ]
    assert main([*map(str, words), "--image", str(file)]) == 0
    assert f"1 images written to {tmp_path / 'out'}" in capsys.readouterr().out.replace("\n", "")
    assert main([*map(str, words), "--image", str(tmp_path / "002.png")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --image {tmp_path / '002.png'} does not exist")
