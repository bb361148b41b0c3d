"""Samples of all layouts: what is found, masks that survive, and faults that are named without a person."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.draw import polygon2mask

from tests.data.broken_roots import encode_mask, flat_polygons
from tests.data.test_polygons import curved_vessel
from tests.golden import broken_input
from vesselrl.data.check import check_data
from vesselrl.data.samples import find_samples, load_mask
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


def write_mask(path: Path, mask: np.ndarray | None = None) -> None:
    write_image(path, (square() if mask is None else mask).astype(np.uint8) * 255)


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


def failure(root: Path) -> str:
    """The message of the error that find_samples raises; it never shows the person."""
    with pytest.raises(DataError) as raised:
        find_samples(root)
    message = str(raised.value)
    assert not [secret for secret in ("LI_MING", "0123456789", "\n") if secret in message]
    return message


def pairs(root: Path) -> dict[str, str]:
    """Path of the label by path of the image."""
    found = [(sample.image_path, sample.mask_path) for sample in find_samples(root)]
    return {str(image.relative_to(root)): str(mask.relative_to(root)) for image, mask in found}


def test_image_field_with_and_without_folder(tmp_path: Path) -> None:
    records = [record("images/a.png"), record("images\\b.png"), record("elsewhere/c.png")]
    for place in ("images/a.png", "images/b.png", "elsewhere/c.png"):
        write_image(tmp_path / place)
    write_json(tmp_path / "json" / "x.json", {"shapes": []})  # the list is read first
    write_json(tmp_path / "coco.json", {"images": [], "annotations": []})
    (tmp_path / "annotations.json").write_text("\ufeff" + json.dumps(records), encoding="utf-8")
    paths = {sample.image_path for sample in find_samples(tmp_path)}
    assert paths == {tmp_path / "images/a.png", tmp_path / "images/b.png", tmp_path / "elsewhere/c.png"}


def shape(points: object = POINTS, kind: str | None = "polygon", **more: object) -> dict:
    return {"label": "artery", "points": points, "shape_type": kind, **more}


def test_labelme_shapes_are_one_target(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = np.ones((5, 4), bool)
    ring[2, 1:3] = False
    buffer = io.BytesIO()
    Image.fromarray(ring.astype(np.uint8)).save(buffer, "PNG")  # LabelMe writes 0 and 1
    text = base64.b64encode(buffer.getvalue()).decode()
    shapes = [shape([[2, 3], [5, 7]], "mask", mask=text), shape([[12, 12], [10, 0]], "rectangle")]
    shapes += [shape([[14, 0], [15, 0], [15, 12], [14, 12]], None)]
    shapes += [shape([[1, 1]], "point"), shape([[1, 1], [9, 9]], "line")]
    write_image(tmp_path / "images" / "001.png")
    content = {"shapes": shapes, "imagePath": "C:\\Users\\LI_MING\\001.png"}
    write_json(tmp_path / "json" / "label_of_1.json", content)
    (sample,) = find_samples(tmp_path)
    expected = square()
    expected[5, 3:5], expected[:, 10:12], expected[:, 14] = False, True, True
    assert (load_mask(sample) == expected).all()
    assert "left out: 2, in 1 records: json/ file 1 in name order" in caplog.text


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


@pytest.mark.parametrize("file", ["annotations.json", "coco.json", "annotations/instances_train2017.json"])
def test_coco_polygons_and_run_lengths_are_one_target(tmp_path: Path, file: str) -> None:
    expected, bar = square(), np.zeros(SIZE[::-1], bool)
    expected[:, 8] = expected[:, 10:12] = bar[:, 10:12] = True
    images = [{"id": k, "file_name": f"{k}.png", "width": SIZE[0], "height": SIZE[1]} for k in (7, 9)]
    parts = ([SQUARE, [8, 0, 9, 0, 9, 12, 8, 12]], encode_mask(bar))
    annotations = [{"image_id": 7, "category_id": k, "segmentation": s} for k, s in enumerate(parts)]
    for image in images:
        write_image(tmp_path / "images" / image["file_name"])
    write_json(tmp_path / file, {"images": images, "annotations": annotations, "categories": []})
    samples = {sample.image_path.stem: sample for sample in find_samples(tmp_path)}
    assert (load_mask(samples["7"]) == expected).all()
    assert samples["7"].record.startswith(f"{Path(file).name} image 0 (P00")
    assert not load_mask(samples["9"]).any()  # without annotations: empty


def test_folders_with_matching_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = {"a.png": "a.png", "b.jpg": "b_mask.png", "c.TIF": "c.tif", "d.jpeg": "d.PNG"}
    expected = {f"images/{image}": f"masks/{mask}" for image, mask in expected.items()}
    for image, mask in expected.items():
        write_image(tmp_path / image)
        write_mask(tmp_path / mask)
    for name in (".DS_Store", "._a.png", "notes.txt"):
        (tmp_path / "images" / name).write_text("")
    assert pairs(tmp_path) == expected
    assert all(load_mask(sample).sum() == 20 for sample in find_samples(tmp_path))
    assert caplog.text == ""
    write_image(tmp_path / "images" / "e.png")
    write_mask(tmp_path / "masks" / "z.png")
    assert pairs(tmp_path) == expected
    assert "1 of 5 images have no mask and are left out" in caplog.text
    assert "1 of 5 files in masks/ belong to no image" in caplog.text


@pytest.mark.parametrize(
    "files",
    [
        "images/{}_training.tif 1st_manual/{}_manual1.gif mask/{}_mask.gif 2nd_manual/{}_manual2.gif",
        "images/Image_{}L.jpg labels/Image_{}L_1stHO.png labels/Image_{}L_2ndHO.png",
        "Image_{}L.jpg Image_{}L_1stHO.png Image_{}L_2ndHO.png",
        "{}.pgm {}_gt.pgm",
    ],
    ids=["DRIVE", "CHASE_DB1", "flat CHASE_DB1", "DCA1"],
)
def test_public_data(tmp_path: Path, caplog: pytest.LogCaptureFixture, files: str) -> None:
    image, label, *others = files.split()  # others: the field of view, and a second observer
    for number in ("1", "2", "10"):
        write_image(tmp_path / image.format(number))
        for name in (label, *others):
            write_mask(tmp_path / name.format(number))
    assert pairs(tmp_path) == {image.format(n): label.format(n) for n in ("1", "2", "10")}
    assert caplog.text == ""


def test_a_label_of_another_number_or_patient_is_not_taken(tmp_path: Path) -> None:
    # Neither 21 nor the stem of c/001 alone says whose label it is.
    for image in ("21_training", "22_training", "a/001", "b/001", "c/002", "c/001"):
        write_image(tmp_path / "images" / f"{image}.png")
    for mask in ("21", "22_training", "a/001_mask", "b/001_mask", "002", "001"):
        write_mask(tmp_path / "masks" / f"{mask}.png")
    expected = {"22_training": "22_training", "a/001": "a/001_mask", "b/001": "b/001_mask", "c/002": "002"}
    assert pairs(tmp_path) == {f"images/{a}.png": f"masks/{b}.png" for a, b in expected.items()}


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
        (LIST, [], "bad_json", "is an empty list"),
        (LIST, [{"image": "a\0.png"}], "bad_record", "no usable file name"),
        (LIST, [{"image": "train_001.png"}], "missing_label", "has no 'mask', and masks/"),
        (LIST, [record(mask=[[0, 0, 700, 0, 700, 9]])], "outside_image", "(P001_S1_F0001): polygon 0"),
        (LIST, [record(mask="LI_MING.png")], "bad_record", "'mask' is a text, not a list"),
        (LIST, [record(mask=[POINTS])], "bad_polygon", "'mask' holds points as [x, y] pairs"),
        (LIST, [record(mask=SQUARE)], "bad_polygon", "'mask' holds a number where a polygon"),
        (LIST, [record(mask=[[0, 0, [4, 0], 4, 3]])], "bad_polygon", "mixes numbers and lists"),
        (LIST, [record("/etc/passwd")], "bad_record", "'image' points outside the data root"),
        (LIST, [record(PERSON)], "missing_image", "record 0 (P001_S1_F0011): its image is missing"),
        (LIST, [record(), record("images/train_001.png")], "duplicate_record", "as record 0."),
        (LABELME, [], "bad_json", "json/001.json has no list 'shapes'"),
        (LABELME, shape(CORNERS, "cube"), "bad_polygon", "is no polygon, rectangle, circle or mask"),
        (LABELME, shape([*CORNERS, [3, 3, 3]]), "odd_length", "has a point of 3 coordinates"),
        (LABELME, shape("LI_MING"), "bad_polygon", "has no list 'points'"),
        (LABELME, {"shapes": ["LI_MING"]}, "bad_polygon", "is a text, not an object"),
        (LABELME, shape(CORNERS, "mask"), "bad_polygon", "its mask is null, no PNG in base64"),
        (LABELME, shape(CORNERS, "mask", mask="LI_MING!"), "bad_rle", "is a text, no PNG in base64"),
        (LABELME, shape(CORNERS, "mask", mask="aGVsbG8="), "unreadable_image", "is not an image"),
        (LABELME, shape([[1, 1]], "rectangle"), "bad_polygon", "has 1 corners where 2 or 4 were"),
        (COCO, {"images": [], "annotations": []}, "bad_json", "coco.json names no images"),
        (COCO, {"images": [3], "annotations": []}, "bad_record", "coco.json image 0 has no 'id'"),
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


def test_no_data_root_no_images_and_two_images_of_one_name(tmp_path: Path) -> None:
    assert "is not a folder" in failure(tmp_path / "nowhere")
    (tmp_path / "masks").mkdir()
    assert "has masks/ but no images/" in failure(tmp_path)
    for name in ("images/a.png", "images/a.jpg", "masks/a.png"):
        write_mask(tmp_path / name)
    assert "file 2 in name order (P001_S1_F0001) has the name of images/ file 1 in name" in failure(tmp_path)


def test_samples_show_no_person_and_have_a_fixed_order(tmp_path: Path) -> None:
    (sample,) = find_samples(write_records(tmp_path, record(f"{PERSON}.jpg")))
    assert (sample.record, sample.key) == ("annotations.json record 0 (P001_S1_F0011)", "P001_S1_F0011")
    assert "MING" not in repr(sample)
    names = [f"{name}_frame_{i:06d}.png" for name in ("anna", "ben", "carla") for i in range(3)]
    forwards = find_samples(write_records(tmp_path, *map(record, names)))
    backwards = find_samples(write_records(tmp_path, *map(record, names[::-1])))
    assert [(s.key, s.image_path) for s in forwards] == [(s.key, s.image_path) for s in backwards]
    assert [s.key for s in forwards] == sorted(s.key for s in forwards)


def export(root: Path, layout: str, mask: np.ndarray) -> None:
    """Writes a black image and its mask in a layout."""
    write_image(root / "images" / "001.png", np.zeros(mask.shape, np.uint8))
    size = dict(zip(("imageHeight", "imageWidth"), mask.shape, strict=True))
    flat = flat_polygons(mask)
    nested = [[polygon] for polygon in flat]
    if layout in ("flat", "nested"):
        value = nested if layout == "nested" else flat
        write_json(root / "annotations.json", [{"image": "001.png", "mask": value, **size}])
    elif layout == "labelme":
        write_json(root / "json" / "001.json", {"shapes": [*map(broken_input.shape, flat)], **size})
    elif layout.startswith("coco"):
        image = {"id": 1, "file_name": "001.png", "width": mask.shape[1], "height": mask.shape[0]}
        values = [encode_mask(mask)] if layout == "coco rle" else nested
        annotations = [{"image_id": 1, "segmentation": value} for value in values]
        write_json(root / "coco.json", {"images": [image], "annotations": annotations})
    else:
        write_mask(root / "masks" / "001_mask.png", mask)


@pytest.mark.parametrize("layout", ["flat", "nested", "labelme", "coco polygons", "coco rle", "mask file"])
def test_a_label_of_800_px_keeps_its_vessels_at_512_px(tmp_path: Path, layout: str) -> None:
    """Widths of 4 px at 512: the label is drawn on 800 px, the truth at 512 by another rasteriser."""
    outline = curved_vessel(4, 512)
    truth = polygon2mask((512, 512), outline[:, ::-1] - 0.5)
    large = polygon2mask((800, 800), (outline * 800 / 512)[:, ::-1] - 0.5)
    export(tmp_path, layout, large)
    (sample,) = find_samples(tmp_path)
    assert (load_mask(sample) == large).all()
    Image.new("L", (512, 512)).save(tmp_path / "images" / "001.png")
    (sample,) = find_samples(tmp_path)
    mask = load_mask(sample)
    assert mask.shape == (512, 512)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.93  # two rounds of whole pixels
    assert mask.sum() == pytest.approx(truth.sum(), rel=0.02)  # neither thicker nor thinner
    assert ndimage.label(mask, np.ones((3, 3)))[1] == 1  # and in one component
