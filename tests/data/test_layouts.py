"""The readers of LabelMe, COCO and pairs of files; annotations.json has its own tests."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycocotools_mask

from tests.data.broken_roots import NAMES, draw_mask, write_root
from vesselrl.data.annotations import Sample, find_samples, load_image, load_mask
from vesselrl.data.polygons import rasterise
from vesselrl.data.run_lengths import encode_mask, read_run_lengths
from vesselrl.errors import DataError

SIZE = (16, 12)  # width, height
SQUARE = [[2, 3], [6, 3], [6, 8], [2, 8]]


def square() -> np.ndarray:
    mask = np.zeros(SIZE[::-1], bool)
    mask[3:8, 2:6] = True
    return mask


def write_image(path: Path, values: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(SIZE[::-1], 90, np.uint8) if values is None else values).save(path)


def write_mask(path: Path, mask: np.ndarray | None = None) -> None:
    write_image(path, (square() if mask is None else mask).astype(np.uint8) * 255)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def shape(points: list = SQUARE, kind: str | None = "polygon", **more: object) -> dict:
    return {"label": "artery", "points": points, "shape_type": kind, **more}


def labelme(root: Path, *shapes: dict, stem: str = "001", size: tuple = SIZE, **more: object) -> Sample:
    """The sample of a LabelMe file."""
    write_image(root / "images" / f"{stem}.png")
    content = {"shapes": list(shapes), "imageWidth": size[0], "imageHeight": size[1], **more}
    write_json(root / "json" / f"{stem}.json", content)
    (sample,) = find_samples(root)
    return sample


def coco(root: Path, *segmentations: object, file: str = "coco.json", **image: object) -> Sample:
    """The sample of a COCO file with one image."""
    write_image(root / "images" / "001.png")
    images = [{"id": 7, "file_name": "001.png", "width": SIZE[0], "height": SIZE[1]} | image]
    annotations = [{"image_id": 7, "category_id": k, "segmentation": s} for k, s in enumerate(segmentations)]
    write_json(root / file, {"images": images, "annotations": annotations, "categories": []})
    (sample,) = find_samples(root)
    return sample


# ---- LabelMe


@pytest.mark.parametrize("kind", ["polygon", None])
def test_labelme_polygons_are_one_target(tmp_path: Path, kind: str | None) -> None:
    other = [[10, 0], [12, 0], [12, 12], [10, 12]]
    sample = labelme(tmp_path, shape(SQUARE, kind), shape(other, kind))
    expected = square()
    expected[:, 10:12] = True
    assert (load_mask(sample) == expected).all()
    assert sample.record == "json/001.json"


def test_labelme_rectangle(tmp_path: Path) -> None:
    assert (load_mask(labelme(tmp_path, shape([[6, 8], [2, 3]], "rectangle"))) == square()).all()


def test_labelme_points_and_lines_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sample = labelme(tmp_path, shape([[1, 1]], "point"), shape([[1, 1], [9, 9]], "line"), shape())
    assert (load_mask(sample) == square()).all()
    assert "left out 2 polygons" in caplog.text


def test_labelme_mask_shape_keeps_its_hole(tmp_path: Path) -> None:
    ring = np.ones((5, 4), bool)
    ring[2, 1:3] = False
    buffer = io.BytesIO()
    Image.fromarray(ring.astype(np.uint8)).save(buffer, "PNG")  # LabelMe writes 0 and 1
    text = base64.b64encode(buffer.getvalue()).decode()
    sample = labelme(tmp_path, shape([[2, 3], [5, 7]], "mask", mask=text))
    expected = square()
    expected[5, 3:5] = False
    assert (load_mask(sample) == expected).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (shape([[1, 1], [3, 3]], "circle"), "shape 0 is no polygon, rectangle or mask"),
        (shape([[1, 1], [3, 3, 3], [2, 2]]), "shape 0 has a point of 3 coordinates"),
        (shape([[1, 1], 3]), "shape 0 holds a number where a point was expected"),
        (shape("LI_MING"), "shape 0 has no list 'points'"),
        ("LI_MING", "shape 0 is a text, not an object"),
        (shape([[1, 1], [3, 3]], "mask"), "shape 0 is a mask without 'mask'"),
        (shape([[1, 1], [3, 3]], "mask", mask="LI_MING!"), "its mask is no base64"),
        (shape([[1, 1], [3, 3]], "mask", mask="aGVsbG8="), "its mask: the file is not an image"),
        (shape([[1, 1]], "rectangle"), "shape 0 has 1 corners where 2 were expected"),
    ],
)
def test_broken_labelme_shapes(tmp_path: Path, wrong: object, message: str) -> None:
    with pytest.raises(DataError) as raised:
        labelme(tmp_path, wrong)
    assert message in str(raised.value)
    assert str(raised.value).startswith("json/001.json")
    assert "LI_MING" not in str(raised.value)


def test_labelme_of_800_px_over_512_px(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outline = 60 + 300 * np.random.default_rng(0).random((7, 2))
    write_image(tmp_path / "images" / "001.png", np.zeros((512, 512), np.uint8))
    content = {"shapes": [shape((outline * 800 / 512).tolist())], "imageWidth": 800, "imageHeight": 800}
    write_json(tmp_path / "json" / "001.json", content)
    (sample,) = find_samples(tmp_path)
    assert (load_mask(sample) == rasterise([outline], (512, 512))).all()
    assert "scaled 1 labels to the size of their images: json/001.json" in caplog.text


def test_labelme_image_by_its_path(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "002.png")
    content = {"shapes": [shape()], "imagePath": "C:\\Users\\LI_MING\\002.png"}
    write_json(tmp_path / "json" / "label_of_2.json", content)
    (sample,) = find_samples(tmp_path)
    assert sample.image_path.name == "002.png"


def test_labelme_files_beside_the_images_and_masks(tmp_path: Path) -> None:
    for stem in ("001", "002", "003"):
        write_image(tmp_path / "images" / f"{stem}.png")
    write_json(tmp_path / "images" / "001.json", {"shapes": [shape()]})
    write_json(tmp_path / "images" / "002.json", {"shapes": [shape()]})
    whole = np.ones(SIZE[::-1], bool)
    write_mask(tmp_path / "masks" / "002_mask.png", whole)  # goes before the shapes
    write_mask(tmp_path / "masks" / "003.png", whole)  # has no shapes
    found = {sample.image_path.stem: load_mask(sample) for sample in find_samples(tmp_path)}
    assert (found["001"] == square()).all()
    assert found["002"].all()
    assert found["003"].all()


# ---- COCO


@pytest.mark.parametrize("file", ["annotations.json", "coco.json", "annotations/instances_train2017.json"])
def test_coco_polygons_and_run_lengths_are_one_target(tmp_path: Path, file: str) -> None:
    flat = [value for point in SQUARE for value in point]
    bar = np.zeros(SIZE[::-1], bool)
    bar[:, 10:12] = True
    sample = coco(tmp_path, [flat, [8, 0, 9, 0, 9, 12, 8, 12]], encode_mask(bar), file=file)
    expected = square() | bar
    expected[:, 8] = True
    assert (load_mask(sample) == expected).all()
    assert sample.record == f"{Path(file).name} image 0 (P001_S1_F0001)"


def test_coco_run_lengths_agree_with_pycocotools(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        mask = rng.random(rng.integers(1, 40, 2)) < rng.random()
        height, width = mask.shape
        flat = mask.ravel(order="F")
        edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [not flat[-1]]])))
        plain = {"size": [height, width], "counts": np.diff(edges, prepend=0).tolist()}
        for value in (plain, encode_mask(mask)):
            found = read_run_lengths(value, (width, height), "")
            assert (found.decode() == mask).all()
            packed = {"size": [height, width], "counts": found.counts}
            assert int(pycocotools_mask.area(packed)) == mask.sum()


def test_coco_run_lengths_of_another_size_are_scaled(tmp_path: Path) -> None:
    large = square().repeat(2, 0).repeat(2, 1)
    sample = coco(tmp_path, encode_mask(large), width=2 * SIZE[0], height=2 * SIZE[1])
    assert (load_mask(sample) == square()).all()


def test_coco_image_without_annotations_is_empty(tmp_path: Path) -> None:
    assert not load_mask(coco(tmp_path)).any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [], "annotations": {}}, "coco.json: 'images' and 'annotations' must be lists"),
        ({"images": [3], "annotations": []}, "coco.json image 0 has no 'id'"),
        ({"images": [{"id": 1}], "annotations": []}, "coco.json image 0 has no text 'file_name'"),
        ({"images": [], "annotations": [{"image_id": 5}]}, "annotation 0 belongs to no image"),
        ({"images": [], "annotations": [3]}, "annotation 0 has no 'image_id'"),
        ({"images": [{"id": 1, "file_name": "a"}, {"id": 1}], "annotations": []}, "same 'id' as image 0"),
        ({"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}, "its image is missing"),
    ],
)
def test_broken_coco_files(tmp_path: Path, content: dict, message: str) -> None:
    write_json(tmp_path / "coco.json", content)
    with pytest.raises(DataError) as raised:
        find_samples(tmp_path)
    assert message in str(raised.value)


def test_coco_needs_pycocotools_for_run_lengths_only(tmp_path: Path) -> None:
    root = write_root(tmp_path / "rle", "rle")
    plain = write_root(tmp_path / "coco", "coco")
    code = (
        "import sys\n"
        "sys.modules['pycocotools'] = None\n"
        "from vesselrl.data.annotations import DataError, find_samples, load_mask\n"
        f"print(len([load_mask(s) for s in find_samples({str(plain.path)!r})]))\n"
        "try:\n"
        f"    [load_mask(s) for s in find_samples({str(root.path)!r})]\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "4", "Run-length masks need the package pycocotools. Install it: python -m pip install pycocotools."
    ]  # fmt: skip


# ---- Pairs of files


def pairs(root: Path) -> dict[str, str]:
    """Name of the label by name of the image."""
    return {sample.image_path.name: sample.mask_path.name for sample in find_samples(root)}


def test_drive(tmp_path: Path) -> None:
    for number in (21, 22):
        write_image(tmp_path / "images" / f"{number}_training.tif")
        write_mask(tmp_path / "1st_manual" / f"{number}_manual1.gif")
        write_mask(tmp_path / "2nd_manual" / f"{number}_manual2.gif", ~square())
        write_mask(tmp_path / "mask" / f"{number}_training_mask.gif", ~square())  # the field of view
    assert pairs(tmp_path) == {f"{n}_training.tif": f"{n}_manual1.gif" for n in (21, 22)}
    assert all((load_mask(sample) == square()).all() for sample in find_samples(tmp_path))


@pytest.mark.parametrize(("images", "labels"), [("images/", "labels/"), ("", "")])
def test_chase(tmp_path: Path, images: str, labels: str, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("01L", "01R"):
        write_image(tmp_path / f"{images}Image_{name}.jpg")
        write_mask(tmp_path / f"{labels}Image_{name}_1stHO.png")
        write_mask(tmp_path / f"{labels}Image_{name}_2ndHO.png", ~square())
    assert pairs(tmp_path) == {f"Image_{n}.jpg": f"Image_{n}_1stHO.png" for n in ("01L", "01R")}
    assert caplog.text == ""


def test_dca1(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        write_image(tmp_path / f"{number}.pgm")
        write_mask(tmp_path / f"{number}_gt.pgm")
    assert pairs(tmp_path) == {f"{n}.pgm": f"{n}_gt.pgm" for n in (1, 2, 10)}


def test_a_label_of_another_number_is_not_taken(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "21_training.png")
    write_image(tmp_path / "images" / "22_training.png")
    write_mask(tmp_path / "masks" / "21.png")
    write_mask(tmp_path / "masks" / "22_training.png")
    assert pairs(tmp_path) == {"22_training.png": "22_training.png"}


def test_folders_of_patients(tmp_path: Path) -> None:
    for patient in ("a", "b"):
        write_image(tmp_path / "images" / patient / "001.png")
        write_mask(tmp_path / "masks" / patient / "001_mask.png", square() if patient == "a" else ~square())
    write_image(tmp_path / "images" / "c" / "002.png")
    write_image(tmp_path / "images" / "c" / "001.png")  # its stem alone would fit another patient's label
    write_mask(tmp_path / "masks" / "002.png")
    write_mask(tmp_path / "masks" / "001.png")
    found = {
        s.image_path.relative_to(tmp_path / "images").as_posix(): load_mask(s) for s in find_samples(tmp_path)
    }
    assert sorted(found) == ["a/001.png", "b/001.png", "c/002.png"]
    assert (found["a/001.png"] == square()).all()
    assert (found["b/001.png"] == ~square()).all()


def test_chase_db1_as_pairs(tmp_path: Path, shared_folder: Path) -> None:
    source = shared_folder / "data" / "chase_db1"
    for split in ("published", "flat"):
        for path in sorted((source / "images").iterdir()):
            name = "Image_" + path.stem.split("_")[1]
            folders = ("images", "1st_manual") if split == "published" else ("", "")
            for folder, file, suffix in (
                (folders[0], path, ""),
                (folders[1], source / "masks" / path.name, "_1stHO"),
            ):
                target = tmp_path / split / folder / f"{name}{suffix}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file)
        samples = find_samples(tmp_path / split, r"_(?P<patient>\d+)(?P<frame>[LR])$")
        assert len(samples) == 28
        assert len({sample.patient for sample in samples}) == 14
        number = {"test": 0, "train": 0}
        for sample in samples:
            name = sample.image_path.resolve().name
            number[name.split("_")[0]] += 1
            with Image.open(source / "masks" / name) as image:
                assert (load_mask(sample) == (np.asarray(image) > 0)).all()
        assert number == {"test": 8, "train": 20}
    assert load_image(samples[0]).shape == (960, 999, 3)


# ---- Which layout is read


def test_mask_files_go_before_outlines_in_every_layout(tmp_path: Path) -> None:
    for layout in ("annotations", "nested", "labelme", "coco", "rle"):
        root = write_root(tmp_path / layout, layout)
        (root.path / "masks").mkdir()
        Image.fromarray(draw_mask(3)).save(root.path / "masks" / f"{NAMES[0]}.png")
        found = {sample.image_path.stem: load_mask(sample) for sample in find_samples(root.path)}
        assert (found[NAMES[0]] == draw_mask(3)).all()
        assert (found[NAMES[1]] == draw_mask(1)).all()


def test_the_record_list_is_read_first(tmp_path: Path) -> None:
    root = write_root(tmp_path, "annotations")
    records = json.loads(root.file.read_text())
    root.file.write_text(json.dumps(records[:1]))
    write_json(tmp_path / "json" / "x.json", {"shapes": []})
    write_json(tmp_path / "coco.json", {"images": [], "annotations": []})
    assert [sample.image_path.stem for sample in find_samples(tmp_path)] == [NAMES[0]]
