"""The readers of all layouts: what they find, and how they name what is broken without naming a person."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.broken_roots import NAMES, encode_mask, write_root
from tests.golden.broken_input import bars
from vesselrl.data.check import check_data
from vesselrl.data.samples import Sample, find_samples, load_mask
from vesselrl.errors import DataError

SIZE = (16, 12)  # width, height
POINTS = [[2, 3], [6, 3], [6, 8], [2, 8]]  # rows 3 to 7, columns 2 to 5
SQUARE = [value for point in POINTS for value in point]
PERSON = "LI_MING(0123456789)_1-2_3_0A1B2C3D_frame_000011"


def square() -> np.ndarray:
    mask = np.zeros(SIZE[::-1], bool)
    mask[3:8, 2:6] = True
    return mask


def write_image(path: Path, values: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(SIZE[::-1], 90, np.uint8) if values is None else values).save(path)


def write_mask(path: Path, mask: np.ndarray | None = None, value: int = 255) -> None:
    write_image(path, (square() if mask is None else mask).astype(np.uint8) * value)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def record(name: str = "train_001.png", mask: object = (SQUARE,), **more: object) -> dict:
    return {"image": name, "mask": mask, "text": ["blood vessel"], **more}


def write_records(root: Path, *records: dict) -> Path:
    """A data root with an image for each record."""
    for item in records:
        write_image(root / "images" / item["image"])
    write_json(root / "annotations.json", records)
    return root


def failure(root: Path, pattern: str | None = None) -> str:
    """The message of the error that find_samples raises; it never shows the person."""
    with pytest.raises(DataError) as raised:
        find_samples(root, pattern)
    message = str(raised.value)
    assert not [secret for secret in ("LI_MING", "0123456789", "\n") if secret in message]
    return message


def pairs(root: Path) -> dict[str, str]:
    """Name of the label by name of the image."""
    return {sample.image_path.name: sample.mask_path.name for sample in find_samples(root)}


def test_polygons_of_both_nestings_become_one_target(tmp_path: Path) -> None:
    other = [10, 0, 12, 0, 12, 12, 10, 12]
    bars = [[x, 0, x + 0.7, 0, x + 0.7, 12, x, 12] for x in 0.7 * np.arange(21)]
    flat, nested = record("1.png", [SQUARE, other]), record("2.png", [[SQUARE], [other]], text="vessel")
    samples = find_samples(write_records(tmp_path, flat, nested, record("3.png", bars)))
    assert [sample.mask_path for sample in samples] == [None] * 3
    expected = square()
    expected[:, 10:12] = True
    stripes = np.zeros(SIZE[::-1], bool)
    stripes[:, :15] = True  # side by side the bars reach 14.7, past the centre of column 14
    found = {sample.image_path.stem: load_mask(sample) for sample in samples}
    for name, mask in (("1", expected), ("2", expected), ("3", stripes)):
        assert found[name].dtype == bool
        assert (found[name] == mask).all()


def test_image_field_with_and_without_folder(tmp_path: Path) -> None:
    write_records(tmp_path, record("a.png"), record("b.png"))
    write_image(tmp_path / "elsewhere" / "c.png")
    records = [record("images/a.png"), record("images\\b.png"), record("elsewhere/c.png")]
    (tmp_path / "annotations.json").write_text("\ufeff" + json.dumps(records), encoding="utf-8")
    paths = {sample.image_path for sample in find_samples(tmp_path)}
    assert paths == {tmp_path / "images/a.png", tmp_path / "images/b.png", tmp_path / "elsewhere/c.png"}


def test_points_are_skipped_with_a_counted_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [record(f"{PERSON}.png", [[3, 3], SQUARE]), record("train_002.png", [[1, 1], [2, 2]])]
    samples = find_samples(write_records(tmp_path, *records))
    assert "polygon with fewer than 3 points, left out: 3, in 2 records" in caplog.text
    assert "LI_MING" not in caplog.text
    assert sorted(int(load_mask(sample).sum()) for sample in samples) == [0, 20]


def shape(points: object = POINTS, kind: str | None = "polygon", **more: object) -> dict:
    return {"label": "artery", "points": points, "shape_type": kind, **more}


def labelme(root: Path, *shapes: object, **more: object) -> Sample:
    """The sample of a LabelMe file."""
    write_image(root / "images" / "001.png")
    content = {"shapes": list(shapes), "imageWidth": SIZE[0], "imageHeight": SIZE[1], **more}
    write_json(root / "json" / "001.json", content)
    (sample,) = find_samples(root)
    return sample


def test_labelme_polygons_are_one_target(tmp_path: Path) -> None:
    sample = labelme(tmp_path, shape(), shape([[10, 0], [12, 0], [12, 12], [10, 12]], None))
    expected = square()
    expected[:, 10:12] = True
    assert (load_mask(sample) == expected).all()
    assert sample.record == "json/001.json"


def test_labelme_rectangles_points_and_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = shape([[1, 1]], "point"), shape([[1, 1], [9, 9]], "line")
    sample = labelme(tmp_path, *lines, shape([[6, 8], [2, 3]], "rectangle"))
    assert (load_mask(sample) == square()).all()
    assert "left out: 2, in 1 records: json/001.json" in caplog.text


def test_labelme_mask_shape_keeps_its_hole(tmp_path: Path) -> None:
    ring = np.ones((5, 4), bool)
    ring[2, 1:3] = False
    buffer = io.BytesIO()
    Image.fromarray(ring.astype(np.uint8)).save(buffer, "PNG")  # LabelMe writes 0 and 1
    text = base64.b64encode(buffer.getvalue()).decode()
    expected = square()
    expected[5, 3:5] = False
    assert (load_mask(labelme(tmp_path, shape([[2, 3], [5, 7]], "mask", mask=text))) == expected).all()


def test_labelme_image_by_its_path(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "002.png")
    content = {"shapes": [shape()], "imagePath": "C:\\Users\\LI_MING\\002.png"}
    write_json(tmp_path / "json" / "label_of_2.json", content)
    assert [sample.image_path.name for sample in find_samples(tmp_path)] == ["002.png"]


def test_labelme_files_beside_the_images_and_masks(tmp_path: Path) -> None:
    for stem in ("001", "002", "003"):
        write_image(tmp_path / "images" / f"{stem}.png")
    write_json(tmp_path / "images" / "001.json", {"shapes": [shape()]})
    write_json(tmp_path / "images" / "002.json", {"shapes": [shape()]})
    write_mask(tmp_path / "masks" / "002_mask.png", ~square())  # goes before the shapes
    write_mask(tmp_path / "masks" / "003.png", ~square())  # has no shapes
    found = {sample.image_path.stem: load_mask(sample) for sample in find_samples(tmp_path)}
    for stem, mask in (("001", square()), ("002", ~square()), ("003", ~square())):
        assert (found[stem] == mask).all()


def coco(root: Path, *segmentations: object, file: str = "coco.json", **image: object) -> Sample:
    """The sample of a COCO file with one image."""
    write_image(root / "images" / "001.png")
    images = [{"id": 7, "file_name": "001.png", "width": SIZE[0], "height": SIZE[1]} | image]
    annotations = [{"image_id": 7, "category_id": k, "segmentation": s} for k, s in enumerate(segmentations)]
    write_json(root / file, {"images": images, "annotations": annotations, "categories": []})
    (sample,) = find_samples(root)
    return sample


@pytest.mark.parametrize("file", ["annotations.json", "coco.json", "annotations/instances_train2017.json"])
def test_coco_polygons_and_run_lengths_are_one_target(tmp_path: Path, file: str) -> None:
    bar = np.zeros(SIZE[::-1], bool)
    bar[:, 10:12] = True
    sample = coco(tmp_path, [SQUARE, [8, 0, 9, 0, 9, 12, 8, 12]], encode_mask(bar), file=file)
    expected = square() | bar
    expected[:, 8] = True
    assert (load_mask(sample) == expected).all()
    assert sample.record == f"{Path(file).name} image 0 (P001_S1_F0001)"
    assert not load_mask(coco(tmp_path, file=file)).any()  # without annotations: empty


def test_folders_with_matching_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = {"a.png": "a.png", "b.jpg": "b_mask.png", "c.TIF": "c.tif", "d.jpeg": "d.PNG"}
    for image, mask in expected.items():
        write_image(tmp_path / "images" / image)
        write_mask(tmp_path / "masks" / mask)
    for name in (".DS_Store", "._a.png", "notes.txt"):
        (tmp_path / "images" / name).write_text("")
    assert pairs(tmp_path) == expected
    assert all(load_mask(sample).sum() == 20 for sample in find_samples(tmp_path))
    assert caplog.text == ""


def test_images_without_mask_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abc":
        write_image(tmp_path / "images" / f"{name}.png")
    write_mask(tmp_path / "masks" / "b.png")
    write_mask(tmp_path / "masks" / "z.png")
    assert pairs(tmp_path) == {"b.png": "b.png"}
    assert "2 of 3 images have no mask and are left out" in caplog.text
    assert "1 of 2 files in masks/ belong to no image" in caplog.text


@pytest.mark.parametrize(
    ("image", "label", "others"),
    [
        ("images/{}_training.tif", "1st_manual/{}_manual1.gif",  # DRIVE, with the field of view
         ["mask/{}_training_mask.gif", "2nd_manual/{}_manual2.gif"]),
        ("images/Image_{}L.jpg", "labels/Image_{}L_1stHO.png", ["labels/Image_{}L_2ndHO.png"]),  # CHASE_DB1
        ("Image_{}L.jpg", "Image_{}L_1stHO.png", ["Image_{}L_2ndHO.png"]),
        ("{}.pgm", "{}_gt.pgm", []),  # DCA1
    ],
)  # fmt: skip
def test_public_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, image: str, label: str, others: list[str]
) -> None:
    for number in ("1", "2", "10"):
        write_image(tmp_path / image.format(number))
        write_mask(tmp_path / label.format(number))
        for other in others:
            write_mask(tmp_path / other.format(number), ~square())
    found = {s.image_path: s.mask_path for s in find_samples(tmp_path)}
    expected = {tmp_path / image.format(n): tmp_path / label.format(n) for n in ("1", "2", "10")}
    assert found == expected
    assert caplog.text == ""


def test_a_label_of_another_number_is_not_taken(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "21_training.png")
    write_image(tmp_path / "images" / "22_training.png")
    write_mask(tmp_path / "masks" / "21.png")
    write_mask(tmp_path / "masks" / "22_training.png")
    assert pairs(tmp_path) == {"22_training.png": "22_training.png"}


def test_folders_of_patients(tmp_path: Path) -> None:
    # The stem of c/001 alone would fit another patient's label.
    for image in ("a/001.png", "b/001.png", "c/002.png", "c/001.png"):
        write_image(tmp_path / "images" / image)
    for mask in ("a/001_mask.png", "b/001_mask.png", "002.png", "001.png"):
        write_mask(tmp_path / "masks" / mask, ~square() if mask.startswith("b") else None)
    folder = tmp_path / "images"
    found = {s.image_path.relative_to(folder).as_posix(): load_mask(s) for s in find_samples(tmp_path)}
    assert sorted(found) == ["a/001.png", "b/001.png", "c/002.png"]
    assert (found["a/001.png"] == square()).all()
    assert (found["b/001.png"] == ~square()).all()


@pytest.mark.parametrize("layout", ["annotations", "nested", "labelme", "coco", "rle"])
def test_mask_files_go_before_outlines_in_every_layout(tmp_path: Path, layout: str) -> None:
    root = write_root(tmp_path, layout)
    write_mask(root.path / "masks" / f"{NAMES[0]}.png", bars(3))
    write_mask(root.path / "masks" / f"{NAMES[3]}_mask.png", bars(2))
    write_mask(root.path / "masks" / f"{NAMES[3]}.png", value=7)  # not read: _mask comes first
    samples = {sample.image_path.stem: sample for sample in find_samples(root.path)}
    for name, number in ((NAMES[0], 3), (NAMES[1], 1), (NAMES[3], 2)):
        assert (load_mask(samples[name]) == bars(number)).all()


def test_the_record_list_is_read_first(tmp_path: Path) -> None:
    root = write_root(tmp_path, "annotations")
    write_json(root.file, json.loads(root.file.read_text())[:1])
    write_json(root.path / "json" / "x.json", {"shapes": []})
    write_json(root.path / "coco.json", {"images": [], "annotations": []})
    assert [sample.image_path.stem for sample in find_samples(root.path)] == [NAMES[0]]


CORNERS = [[1, 1], [3, 3]]
LIST, LABELME, COCO = "annotations.json", "json/001.json", "coco.json"
IMAGE = {"id": 1, "file_name": "train_001.png"}


@pytest.mark.parametrize(
    ("file", "content", "code", "message"),
    [
        ("nothing.txt", "", "unusable", "holds no annotations: neither annotations.json nor masks/"),
        ("masks/a.txt", "", "unusable", "holds no annotations: none of 1 images"),
        (LIST, '[{"image": "a.png",\n "mask": [[1, 2,]]}]', "bad_json", "line 2 column 17"),
        (LIST, '[{"image": "Müller.png"}]', "bad_json", "'utf-8' codec can't decode byte 0xfc"),
        (LIST, "[" * 100000, "bad_json", "annotations.json is not valid JSON"),
        (LIST, f"[{'9' * 5000}]", "bad_json", "annotations.json is not valid JSON"),
        (LIST, {"images": []}, "bad_json", "holds no list"),
        (LIST, [], "bad_json", "is an empty list"),
        (LIST, [[1, 2]], "bad_record", "record 0 has no text 'image'"),
        (LIST, [{"image": "a\0.png"}], "bad_record", "no usable file name"),
        (LIST, [{"image": "\ud800.png"}], "bad_record", "no usable file name"),
        (LIST, [{"image": "a" * 300}], "bad_record", "no usable file name"),
        (LIST, [{"image": "train_001.png"}], "missing_label", "has no 'mask', and masks/"),
        (LIST, [record(mask=[[0, 0, 700, 0, 700, 9]])], "outside_image", "(P001_S1_F0001): polygon 0"),
        (LIST, [record(mask=None)], "bad_record", "'mask' is null, not a list of polygons"),
        (LIST, [record(mask={"counts": ""})], "bad_record", "'mask' is an object, not a list"),
        (LIST, [record(mask="LI_MING.png")], "bad_record", "'mask' is a text, not a list"),
        (LIST, [record(mask=[POINTS])], "bad_polygon", "'mask' holds points as [x, y] pairs"),
        (LIST, [record(mask=SQUARE)], "bad_polygon", "'mask' holds a number where a polygon"),
        (LIST, [record(mask=[[0, 0, [4, 0], 4, 3]])], "bad_polygon", "mixes numbers and lists"),
        (LIST, [record(mask=[[[SQUARE]]])], "bad_polygon", "polygon 0 holds a list, not a number"),
        (LIST, [record(3)], "bad_record", "record 0 has no text 'image'"),
        (LIST, [record("  ")], "bad_record", "record 0 has no text 'image'"),
        (LIST, [record("images/..")], "bad_record", "'image' points outside the data root"),
        (LIST, [record("/etc/passwd")], "bad_record", "'image' points outside the data root"),
        (LIST, [record("..\\..\\x.png")], "bad_record", "'image' points outside the data root"),
        (LIST, [record(PERSON)], "missing_image", "record 0 (P001_S1_F0011): its image is missing"),
        (LIST, [record(), record()], "duplicate_record", "record 1 (P001_S1_F0001) names the same"),
        (LIST, [record(), record("images/train_001.png")], "duplicate_record", "as record 0."),
        (LABELME, [], "bad_json", "json/001.json has no list 'shapes'"),
        (LABELME, shape(CORNERS, "circle"), "bad_polygon", "is no polygon, rectangle or mask"),
        (LABELME, shape([*CORNERS, [3, 3, 3]]), "odd_length", "has a point of 3 coordinates"),
        (LABELME, shape([[1, 1], 3]), "bad_polygon", "holds a number where a point was expected"),
        (LABELME, shape("LI_MING"), "bad_polygon", "has no list 'points'"),
        (LABELME, {"shapes": ["LI_MING"]}, "bad_polygon", "is a text, not an object"),
        (LABELME, shape(CORNERS, "mask"), "bad_polygon", "its mask is null, no PNG in base64"),
        (LABELME, shape(CORNERS, "mask", mask="LI_MING!"), "bad_rle", "is a text, no PNG in base64"),
        (LABELME, shape(CORNERS, "mask", mask="aGVsbG8="), "unreadable_image", "is not an image"),
        (LABELME, shape([[1, 1]], "rectangle"), "bad_polygon", "has 1 corners where 2 were expected"),
        (COCO, [], "bad_json", "coco.json has no lists 'images' and 'annotations'"),
        (COCO, {"images": [], "annotations": {}}, "bad_json", "has no lists 'images' and"),
        (COCO, {"images": [], "annotations": []}, "bad_json", "coco.json names no images"),
        (COCO, {"images": [3], "annotations": []}, "bad_record", "coco.json image 0 has no 'id'"),
        (COCO, {"images": [{"id": 1}], "annotations": []}, "bad_record", "has no text 'file_name'"),
        (COCO, {"images": [], "annotations": [{"image_id": 5}]}, "missing_image", "to no image"),
        (COCO, {"images": [], "annotations": [3]}, "bad_record", "annotation 0 has no 'image_id'"),
        (COCO, {"images": [IMAGE, {"id": 1}], "annotations": []}, "duplicate_record", "as image 0"),
    ],
)
def test_broken_files(tmp_path: Path, file: str, content: object, code: str, message: str) -> None:
    write_image(tmp_path / "images" / ("001.png" if "json/" in file else "train_001.png"))
    content = {"shapes": [content]} if isinstance(content, dict) and "shape_type" in content else content
    (tmp_path / file).parent.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / file).write_bytes(text.encode("latin-1"))
    assert message in failure(tmp_path)
    report = check_data(tmp_path)
    assert report.exit_code == 2
    assert report.findings[0].code == code
    assert message in report.findings[0].message


def test_no_data_root_and_no_images(tmp_path: Path) -> None:
    assert "is not a folder" in failure(tmp_path / "nowhere")
    (tmp_path / "masks").mkdir()
    assert "has masks/ but no images/" in failure(tmp_path)


def test_two_images_of_one_name(tmp_path: Path) -> None:
    for name in ("images/a.png", "images/a.jpg", "masks/a.png"):
        write_mask(tmp_path / name)
    assert "file 2 in name order (P001_S1_F0001) has the name of images/ file 1 in name" in failure(tmp_path)
