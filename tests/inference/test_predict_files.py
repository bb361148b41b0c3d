"""Image files in, PNG files out: names, what is done already, shards, memory."""

import csv
import json
import stat
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.golden.broken_input import cut
from vesselrl.cli import main
from vesselrl.data.samples import find_samples
from vesselrl.errors import DataError, RunError
from vesselrl.inference import files as module
from vesselrl.inference.files import predict_files
from vesselrl.inference.predictor import Prediction, Predictor
from vesselrl.scoring.measurements import measurement_row, vessel_measurements
from vesselrl.scoring.postprocessing import PostProcessing

PERSON = "ZHANG_SAN(1234567890)_1-2_3_0A1B2C3D_frame_000011"


def save_picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(grey_levels()[..., None], 3, axis=2)).save(path)
    return path


def grey_levels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 72), dtype=np.uint8)


class Threshold:
    """A stand-in for a predictor: what is brighter than a level is vessel; counts its images."""

    def __init__(self, level: int = 128) -> None:
        self.level, self.num_images = level, 0

    def fingerprint(self) -> str:
        return str(self.level)

    def predict(self, image: np.ndarray) -> Prediction:
        self.num_images += 1
        bright = image[..., 0] > self.level
        return Prediction(bright, bright.astype(np.float32), bright.astype(np.float32), image)


def statuses(predictor: Threshold, *paths: Path) -> dict[str, str]:
    return {row["result"]: row["status"] for row in predict_files(predictor, *paths)}


def test_pixel_values_of_the_three_files(tmp_path: Path) -> None:
    grey = np.full((2, 3, 3), 100, np.uint8)
    probabilities = np.array([[0, 0.25, 0.5], [0.75, 1, 1e-5]], np.float32)
    prediction = Prediction(probabilities > 0.5, probabilities, np.zeros((2, 3), np.float32), grey)
    assert prediction.save(tmp_path / "heart.v2")["foreground"] == 2 / 6
    files = (tmp_path / f"heart.v2_{kind}.png" for kind in ("mask", "probability", "overlay"))
    mask, probability, overlay = map(np.asarray, map(Image.open, files))
    assert (mask.dtype, mask.tolist()) == (np.uint8, [[0, 0, 0], [255, 255, 0]])
    assert (probability.dtype, probability.tolist()) == (np.uint16, [[0, 16384, 32768], [49151, 65535, 1]])
    assert overlay.shape == (2, 3, 3)
    assert (overlay[1, 0] != 100).any()


def test_a_name_that_may_be_a_persons_becomes_a_pseudonym(tmp_path: Path, capsys) -> None:
    """With an ID or without; the second call keeps the pseudonyms though a file came in between."""
    folder, out, secrets = tmp_path / "in", tmp_path / "out", ("ZHANG", "1234567890", "ylva", "Qvarn")
    for name in (PERSON, "ylva", "Qvarn heart", "train_007"):
        save_picture(folder / f"{name}.png")
    cut(broken := save_picture(folder / "ylva broken.png"))
    rows = list(predict_files(Threshold(), folder, out))
    shown = [row["image"] for row in rows]
    assert (shown[0], shown[2]) == (f"image 1 of 5 in name order ({rows[0]['result']})", "train_007.png")
    assert rows[3]["reason"].startswith("the file is damaged")
    mapping = out / "patients.mapping.json"
    assert stat.S_IMODE(mapping.stat().st_mode) == 0o600
    assert all(secret in mapping.read_text() for secret in (PERSON, "ylva", "Qvarn heart"))
    others = [path for path in out.iterdir() if path != mapping]
    assert len(others) == 4 * 3 + 1
    written = "".join(path.name + path.read_bytes().decode("latin-1") for path in others)
    assert not any(secret in f"{written} {rows}" for secret in secrets)
    broken.unlink()
    save_picture(folder / "alva.png")
    again = statuses(Threshold(), folder, out)
    kept = {row["result"] for row in rows if row["status"] == "done"}
    assert kept == {name for name, status in again.items() if status == "kept"}
    assert sorted(again.values()) == ["done", *["kept"] * 4]


def test_three_hundred_images_three_damaged_and_a_second_call(tmp_path: Path, monkeypatch, capsys) -> None:
    """Exit code 3; the second call looks at the three again and at nothing else; 1 where all are damaged."""
    folder, out, predictor = tmp_path / "in", tmp_path / "out", Threshold()
    folder.mkdir()
    Image.linear_gradient("L").resize((72, 40)).convert("RGB").save(folder / "000.png")
    picture = (folder / "000.png").read_bytes()
    damaged = picture[: len(picture) // 2]
    for number in range(1, 300):
        (folder / f"{number:03d}.png").write_bytes(picture if number % 100 != 50 else damaged)
    monkeypatch.setattr(Predictor, "from_pretrained", lambda *_, **__: predictor)
    command = ["predict", "--image", str(folder), "--output_dir", str(out)]
    assert main(command) == 3
    said = capsys.readouterr()
    assert said.out.startswith("297 images written")
    assert said.err.splitlines()[0] == "3 could not be done:"
    assert [line[:7] for line in said.err.splitlines()[1:]] == ["050.png", "150.png", "250.png"]
    listed = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert Counter(row["status"] for row in listed) == {"done": 297, "failed": 3}
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert len(times) == 3 * 297
    assert main(command) == 3
    assert "297 were done before and are kept" in capsys.readouterr().out
    assert predictor.num_images == 297
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (folder / "050.png").write_bytes(picture)
    for path in folder.glob("[12]50.png"):
        path.unlink()
    assert main(command) == 0
    assert predictor.num_images == 298
    for path in folder.iterdir():
        path.write_bytes(damaged)
    assert main(["predict", "--image", str(folder), "--output_dir", str(tmp_path / "none")]) == 1


def test_done_means_all_three_files_whole_of_this_image_and_these_settings(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(6):
        save_picture(folder / f"{number}.png")
    assert {*statuses(Threshold(), folder, out).values()} == {"done"}
    (out / "1_overlay.png").unlink()
    content = bytearray((out / "2_probability.png").read_bytes())
    content[-40] ^= 1
    (out / "2_probability.png").write_bytes(content)
    Image.new("RGB", (9, 9)).save(folder / "3.png")
    Image.new("L", (9, 9)).save(out / "4_mask.png")
    target = tmp_path / "elsewhere.png"
    (out / "5_mask.png").rename(target)
    (out / "5_mask.png").symlink_to(target)
    before = target.read_bytes()
    found = statuses(Threshold(), folder, out)
    assert found == dict(zip("012345", "kept done done replaced done done".split(), strict=True))
    assert target.read_bytes() == before
    assert not (out / "5_mask.png").is_symlink()
    assert {*statuses(Threshold(90), folder, out).values()} == {"replaced"}
    assert (np.asarray(Image.open(out / "0_mask.png")) == 255 * (grey_levels() > 90)).all()


def test_the_fingerprint_tells_models_prompts_and_settings_apart(
    predictor: Predictor, lively_checkpoint: Path, adapter: Path
) -> None:
    weight = predictor.model.lm.get_input_embeddings().weight.detach()
    prints = [predictor.fingerprint()]
    others = ({"prompt": "Where?"}, {"post": PostProcessing(0.4)}, {"flips": True})
    parts = predictor.model, predictor.processor
    prints += [Predictor(*parts, **other).fingerprint() for other in others]
    prints.append(Predictor.from_pretrained(lively_checkpoint, adapter, "cpu").fingerprint())
    saved = weight[:2].clone()
    for changed in (saved.flip(0), saved + torch.eye(*saved.shape) * 1e-6):
        weight[:2] = changed
        prints.append(predictor.fingerprint())
        weight[:2] = saved
    assert len({*prints}) == 7
    assert predictor.fingerprint() == prints[0]


def test_a_folder_in_name_order_with_progress(predictor: Predictor, tmp_path: Path) -> None:
    folder, out, calls = tmp_path / "in", tmp_path / "out" / "deep", []
    for name in ("02.PNG", "01.png", "03.tiff", ".hidden.png", "sub/04.png"):
        save_picture(folder / name)
    (folder / "notes.txt").write_text("no picture")
    rows = list(predict_files(predictor, folder, out, lambda *numbers: calls.append(numbers)))
    assert [row["image"] for row in rows] == ["01.png", "02.PNG", "03.tiff"]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert len(list(out.iterdir())) == 10
    expected = predictor.predict(np.asarray(Image.open(folder / "01.png"))).mask
    assert (np.asarray(Image.open(out / "01_mask.png")) == 255 * expected).all()
    assert rows[0]["foreground"] == pytest.approx(expected.mean())
    again = list(predict_files(predictor, folder, out, pixel_mm=0.5))
    assert [row["status"] for row in again] == ["kept"] * 3
    measured = measurement_row(vessel_measurements(expected))
    assert measured.items() <= rows[0].items()
    in_mm = {f"{name}_mm": measured[f"{name}_px"] / 2 for name in ("length", "mean_width", "max_width")}
    assert {name: again[0].pop(name) for name in in_mm} == pytest.approx(in_mm, abs=1e-4)
    assert again[0] == rows[0] | {"status": "kept"}
    with pytest.raises(ValueError, match="--pixel_mm is -1"):
        next(predict_files(predictor, folder, out, pixel_mm=-1.0))


def test_memory_stays_flat(tmp_path: Path, monkeypatch) -> None:
    """Kept for 80 pictures of 48 KB: less than six of them; where writing is slow, prediction waits."""
    predictor, unwritten, write = Threshold(), [], Prediction.save
    for number in range(100):
        Image.new("RGB", (128, 128), (number, 0, 0)).save(tmp_path / f"{number}.png")

    def write_slowly(*given) -> float:
        time.sleep(0.01)
        unwritten.append(predictor.num_images - len(unwritten))
        return write(*given)

    monkeypatch.setattr(Prediction, "save", write_slowly)
    rows = predict_files(predictor, tmp_path, tmp_path / "out")
    tracemalloc.start()
    used = [tracemalloc.get_traced_memory()[0] for _ in rows]
    tracemalloc.stop()
    # A few images wait at any time, now more, now fewer; 50 that stay would be 2.4 MB.
    assert np.median(used[60:90]) - np.median(used[10:40]) < 6 * 48_000
    assert 1 < max(unwritten) <= module.AHEAD + 2


def test_shards_at_once_give_what_one_run_gives(tmp_path: Path, capsys) -> None:
    """File by file and row by row; the one that ends last joins the lists, unless they are of two models."""
    folder, one, two = tmp_path / "in", tmp_path / "one", tmp_path / "two"
    for name in ("001", "002", PERSON, "004", "ylva", "006", "007"):
        save_picture(folder / f"{name}.png")
    cut(folder / "004.png")

    def contents(out: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in out.iterdir() if file.suffix != ".jsonl"}

    def run_shard(level: int, shard: str) -> list[dict]:
        return list(predict_files(Threshold(level), folder, two, shard=shard))

    for level, expected in ((128, "done"), (90, "replaced"), (90, "kept")):
        rows = list(predict_files(Threshold(level), folder, one))
        assert {row["status"] for row in rows} == {expected, "failed"}
        before = (two / "predictions.csv").read_bytes() if level != 128 else None
        with ThreadPoolExecutor() as pool:
            even, odd = pool.map(partial(run_shard, level), ("0/3", "2/3"))
        if expected != "kept":  # the list of shard 1 is missing, or of another model
            assert [file.read_bytes() for file in two.glob("predictions.csv")] == [before] * (level != 128)
        middle = run_shard(level, "1/3")
        assert [len(even), len(middle), len(odd)] == [3, 2, 2]
        assert sorted((*even, *middle, *odd), key=rows.index) == rows
        assert contents(two) == contents(one)
    with pytest.raises(ValueError, match=r"--shard is '3/3'; give i/n with i from 0 to n - 1"):
        run_shard(90, "3/3")
    assert main(["predict", "--image", str(folder), "--output_dir", str(two), "--shard", "00/2"]) == 2
    assert "--shard is '00/2'" in capsys.readouterr().err
    assert list(predict_files(Threshold(), folder / "001.png", tmp_path / "few", shard="1/2")) == []


def test_the_most_uncertain_come_first_and_label_files_are_left_alone(tmp_path: Path, caplog) -> None:
    """One minus the expected Dice, 1 − 2 p / (p + 1), is largest for the darkest; shards give the same."""

    class Unsure(Threshold):
        def predict(self, image: np.ndarray) -> Prediction:
            found = super().predict(image)
            return found._replace(probabilities=np.float32(image[0, 0, 0] / 255) * found.probabilities)

    folder, out, two = tmp_path / "in", tmp_path / "out", tmp_path / "two"
    folder.mkdir()
    for name, value in (("001", 204), ("002", 153), ("003", 255), ("004", 204), ("005", 0)):
        Image.new("L", (8, 6), value).save(folder / f"{name}.png")
    cut(folder / "004.png")
    assert len(list(predict_files(Unsure(), folder, out, formats=("labelme", "coco")))) == 5
    rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert [row["result"] for row in rows] == ["002", "001", "003", "005", "004"]
    doubts = [float(row["uncertainty"] or -1) for row in rows]
    assert doubts == pytest.approx([1 / 4, 1 / 9, 0, 0, -1], abs=1e-6)
    images = json.loads((out / "coco" / "instances.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["002.png", "001.png", "003.png", "005.png"]
    assert [len(samples) for samples in map(find_samples, (out / "labelme", out / "coco"))] == [4, 4]
    for shard in ("1/2", "0/2"):
        list(predict_files(Unsure(), folder, two, shard=shard, formats=("labelme", "coco")))
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert all((two / path).read_bytes() == content for path, content in files.items())
    (out / "labelme" / "001.json").write_text("corrected")
    (out / "labelme" / "002.json").unlink()
    rows = predict_files(Unsure(), folder, out, formats=["labelme"])
    again = {row["result"]: row["status"] for row in rows}
    assert again == {"004": "failed"} | dict.fromkeys(("001", "002", "003", "005"), "kept")
    assert "3 LabelMe files are there already and stay" in caplog.text
    assert (out / "labelme" / "001.json").read_text() == "corrected"
    assert (out / "labelme" / "002.json").read_bytes() == (two / "labelme" / "002.json").read_bytes()


def test_unusable_folders_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    """No message holds the path."""
    for name in ("001.png", "002.png", "002.jpg"):
        file = save_picture(tmp_path / "ylva" / name)
    (tmp_path / "ylva" / "empty").mkdir()
    for path, out, message in (
        (tmp_path / "ylva" / "nowhere", "out", "path of --image does not exist"),
        (tmp_path / "ylva" / "empty", "out", r"holds no image; known endings are \.png"),
        (file.parent, "out", r"1 file names differ only by their ending: 002\.jpg and the next"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            list(predict_files(Threshold(), path, tmp_path / out))
        assert "ylva" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match=r"Cannot write to .*002\.jpg.*[Gg]ive another --output_dir"):
        list(predict_files(Threshold(), file, file))
    (file.parent / "002.png").unlink()
    with pytest.raises(DataError, match="The images lie in the output folder"):
        list(predict_files(Threshold(), file.parent, file.parent))


def test_what_is_odd_about_a_file_is_logged(predictor: Predictor, tmp_path: Path, caplog) -> None:
    """The same twelve bits in 16 and in 8 give the same mask; of frames the first is used."""
    grey = np.asarray(Image.open(save_picture(tmp_path / "in" / "001.png")).convert("L")) // 2
    masks = {}
    for name, values in (("001", grey.astype(np.uint16) * 16), ("002", grey)):
        picture = Image.fromarray(values)
        frames = {"save_all": True, "append_images": [Image.new("L", picture.size)]} if name == "002" else {}
        picture.save(tmp_path / "in" / f"{name}.tif", **frames)
    (tmp_path / "in" / "001.png").unlink()
    for row in predict_files(predictor, tmp_path / "in", tmp_path / "out"):
        masks[row["image"]] = np.asarray(Image.open(tmp_path / "out" / f"{row['result']}_mask.png"))
    assert (masks["001.tif"] == masks["002.tif"]).all()
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("001.tif: 16-bit image")
    assert second.startswith("002.tif: file with several frames: 2.")
