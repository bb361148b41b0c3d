"""Layouts under their usual names, other names by --image_dir and the like, and pairs that are refused."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from tests.data import test_formats as formats
from tests.data.test_formats import SIZE, failure, pairs, record, shape, write_image, write_json, write_mask
from vesselrl.data.check import check_data
from vesselrl.data.repair import repair_data
from vesselrl.data.samples import find_samples, load_mask
from vesselrl.errors import DataError

# Image and label of one number; further files, white, that are no label of it.
LAYOUTS = {
    "STARE": "images/im{:04d}.ppm labels-ah/im{:04d}.ah.ppm labels-vk/im{:04d}.vk.ppm",
    "STARE in one folder": "images/im{:04d}.ppm labels/im{:04d}.ah.ppm labels/im{:04d}.vk.ppm",
    "HRF": "images/{:02d}_dr.JPG manual1/{:02d}_dr.tif mask/{:02d}_dr_mask.tif",
    "FIVES": "train/Original/{}_A.png train/Ground*truth/{}_A.png",
    "FIVES one level higher": "FIVES/train/Original/{}_A.png FIVES/train/Ground*truth/{}_A.png",
    "OCTA-500": "OCTA_6M/OCTA(FULL)/{}.bmp OCTA_6M/GroundTruth/{}.bmp",
    "OCTA-500, flat": "OCTA_6M/{}.bmp OCTA_6M/GT/{}.bmp",
    "XCAD": "train/images/{:03d}.png train/masks/{:03d}.png",
    "nnU-Net": "imagesTr/vessel_{:03d}_0000.png labelsTr/vessel_{:03d}.png",
    "nnU-Net renamed": "images/vessel_{:03d}_0000.png labels/vessel_{:03d}.png",
    "VOC": "JPEGImages/{}.jpg SegmentationClass/{}.png",
    "DRIVE": "DRIVE/training/images/{}_training.tif DRIVE/training/1st_manual/{}_manual1.gif "
    "DRIVE/training/mask/{}_training_mask.gif",
    "other case": "Images/Case_{}.PNG Masks/case_{}_MASK.png",
    "singular": "image/{}.png label/{}.png",
    "mask": "images/{}.png mask/{}.png",
    "unknown suffix": "images/{}.png masks/{}_vessels.png",
    "unknown prefix": "images/{}.png masks/M-{}.png",
    "other word": "images/img_{}.png masks/mask_{}.png",
    "other word at the end": "images/{}_image.png masks/{}_annotation.png",
    "one folder, hyphen": "{}.png {}-seg.png",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_usual_names(tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    image, label, *others = (file.replace("*", " ") for file in LAYOUTS[layout].split())
    numbers = (1, 2, 10, 12)
    for number in numbers:
        write_image(tmp_path / image.format(number))
        for name in (label, *others):
            write_mask(tmp_path / name.format(number), formats.square() | (name is not label))
    assert pairs(tmp_path) == {image.format(n): label.format(n) for n in numbers}
    assert caplog.text == ""
    assert all(load_mask(sample).sum() == 20 for sample in find_samples(tmp_path))
    assert check_data(tmp_path).exit_code == 0


def test_options_name_folders_and_ending(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_image(tmp_path / f"LI_MING/raw data/{number}.png", np.full(SIZE[::-1], 60 + number, np.uint8))
        write_mask(tmp_path / f"LI_MING/drawn/{number}_fov.png", ~formats.square())
        write_mask(tmp_path / f"LI_MING/drawn/{number}_vein.png")
    folders = {"image_dir": "LI_MING/raw data", "mask_dir": str(tmp_path / "LI_MING/drawn")}
    with pytest.raises(DataError, match=r"3 images in 2 ways.*--mask_suffix"):
        find_samples(tmp_path, **folders)
    for suffix in ("_vein", "_vein.png"):
        samples = find_samples(tmp_path, **folders, mask_suffix=suffix)
        assert [load_mask(sample).sum() for sample in samples] == [20, 20, 20]
    report = repair_data(tmp_path, tmp_path.with_name("copy"), **folders, mask_suffix="_vein")
    assert (report.counts["images"], report.exit_code) == (3, 0)
    assert check_data(tmp_path, **folders, mask_suffix="_vein").findings == ()
    with pytest.raises(DataError, match="--mask_dir nowhere is no folder"):
        find_samples(tmp_path, mask_dir="nowhere")
    with pytest.raises(DataError, match="lies outside the data root"):
        find_samples(tmp_path / "LI_MING", image_dir="..")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("images/1.png images/2.png masks/1_a.png masks/2_b.png", "images/ (2 .png), masks/ (2 .png)"),
        ("images/1.png images/2.png masks/11.png masks/12.png", "none of 2 images"),  # not 1 and 1
        ("images/1.png images/2.png masks/1_a.png masks/1_b.png masks/2_a.png masks/2_b.png", "in 2 ways"),
        ("images/x_0000.png images/x_0001.png labels/x.png", "none of 2 images"),  # two channels
        ("images/1.png masks/1_seg.png masks/1_gt.png", "<image>_gt and <image>_seg"),
        ("images/1_training.png images/1_test.png masks/1_manual1.png", "1 of 2 images have the label of"),
        ("images/a.png images/A.png masks/a_gt.png", "have the label of another image too"),
        ("images/a.png Images/b.png masks/a.png", "Images/ and images/ differ in spelling alone"),
        ("images/1.png masks/1.png 1st_manual/1.png", "labels in masks/ and 1st_manual/"),
        ("images/1_test.tif mask/1_test_mask.gif", "holds no annotations"),  # DRIVE's field of view
        ("LI_MING/images/1.png LI_MING/masks/2.png", "holds no annotations: none of 1 images"),
        ("LI_MING/1.png ZHAO_WEI/1.png", "folders of other names (2 .png)"),
        ("1.png 1_2.png 2.png 2_2.png", "It holds 4 .png"),  # frames, no labels
    ],
)  # fmt: skip
def test_what_is_not_sure_is_refused(tmp_path: Path, files: str, message: str) -> None:
    for file in files.split():
        write_mask(tmp_path / file)
    assert message in failure(tmp_path)


def coco(names: list[str], first_id: int = 1) -> dict:
    images = [{"id": k, "file_name": name} for k, name in enumerate(names, first_id)]
    annotations = [{"image_id": image["id"], "segmentation": [formats.SQUARE]} for image in images]
    return {"images": images, "annotations": annotations}


@pytest.mark.parametrize(
    ("file", "image", "written"),
    [
        ("result.json", "images/a-1.png", "images\\a-1.png"),
        ("result.json", "images/a-1.png", "images\\3/a-1.png"),
        ("result.json", "images/a-1.png", "..\\..\\label-studio\\media\\upload\\3\\a-1.png"),
        ("annotations/train.json", "images/1.png", "1.png"),
        ("annotations/instances_default.json", "images/default/1.png", "1.png"),
        ("annotations/instances_train2017.json", "train2017/1.png", "1.png"),
        ("LI_MING.json", "images/1.png", "data/set/images/1.png"),
        ("coco.json", "images/1.png", "C:\\Users\\LI_MING\\1.PNG"),
        ("coco.json", "images/a b.png", "https://host/bucket/a%20b.png?signature=1"),
        ("coco.json", "images/1.png", "/data/local-files/?d=images/1.png"),
        ("instances.json", "1.png", "1.png"),
    ],
)
def test_coco_under_any_name_with_any_path(tmp_path: Path, file: str, image: str, written: str) -> None:
    write_image(tmp_path / image)
    write_json(tmp_path / file, coco([written]))
    (sample,) = find_samples(tmp_path)
    assert sample.image_path == tmp_path / image
    assert load_mask(sample).sum() == 20
    assert "LI_MING" not in sample.record


def test_a_path_fits_one_image_or_none(tmp_path: Path) -> None:
    for image in ("p1/1.png", "p2/1.png", "p2/2.png"):
        write_image(tmp_path / "images" / image)
    for name, message in (("1.png", "fits 2 images"), ("p3/2.png", "its image is missing")):
        write_json(tmp_path / "annotations.json", [record(name)])
        assert message in failure(tmp_path)
    write_json(tmp_path / "annotations.json", [record("2.png"), record("old/p2/2.png")])
    assert "names the same image as record 0" in failure(tmp_path)


def test_names_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    composed = [f"case_\u00e9_{number}" for number in range(3)]
    for name in composed:
        write_image(tmp_path / "images" / f"{unicodedata.normalize('NFD', name)}.png")
        write_mask(tmp_path / "masks" / f"{name}_mask.png")
    assert len(pairs(tmp_path)) == 3
    write_json(tmp_path / "annotations.json", [record(f"{name}.png") for name in composed])
    assert len(pairs(tmp_path)) == 3


def test_subsets_of_an_export_are_read_together_those_of_published_pairs_are_not(tmp_path: Path) -> None:
    for number, subset in enumerate(("train", "valid", "test")):
        names = [f"case_{number}_{k}.jpg" for k in range(2)]
        for name in names:
            write_image(tmp_path / "export" / subset / name)
        write_json(tmp_path / "export" / subset / "_annotations.coco.json", coco(names))
        write_image(tmp_path / "pairs" / subset / "images" / "1.png")
        write_mask(tmp_path / "pairs" / subset / "masks" / "1.png")
    samples = find_samples(tmp_path / "export")
    assert len({sample.image_path for sample in samples}) == 6
    records = sorted(sample.record for sample in samples)
    assert records[0].startswith("test/_annotations.coco.json image 0 (")
    assert list(pairs(tmp_path / "pairs")) == ["train/images/1.png"]
    (finding,) = check_data(tmp_path / "pairs").of("warning")
    assert "not read: valid/ (1), test/ (1)." in finding.message
    (tmp_path / "export/valid/_annotations.coco.json").write_text("{")
    assert "valid/_annotations.coco.json is not valid JSON" in failure(tmp_path / "export")


@pytest.mark.parametrize("kind", ["float", "text", "one size"])
def test_coco_as_other_programs_write_it(tmp_path: Path, kind: str) -> None:
    content = coco(["1.png", "2.png"])
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        write_image(tmp_path / "images" / image["file_name"])
        if kind == "float":
            image["id"] = float(image["id"])
        elif kind == "text":
            annotation["image_id"] = str(annotation["image_id"])
        else:
            image["height"] = SIZE[1]
    write_json(tmp_path / "annotations.json", content)
    assert [load_mask(sample).sum() for sample in find_samples(tmp_path)] == [20, 20]


def test_coco_ids_of_two_kinds_and_half_a_size_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "1.png")
    content = coco(["1.png"])
    write_json(tmp_path / "annotations.json", content | {"annotations": [{"image_id": "a1"}]})
    assert "some ids are texts, others numbers" in failure(tmp_path)
    content["images"][0]["height"] = SIZE[1] // 2
    write_json(tmp_path / "annotations.json", content)
    assert "no whole numbers of px" in failure(tmp_path)


@pytest.mark.parametrize("file", ["annotations.json", "result.json", "project-1.json"])
def test_the_own_json_of_label_studio_is_named(tmp_path: Path, file: str) -> None:
    write_image(tmp_path / "images" / "1.png")
    write_json(tmp_path / file, [{"data": {"image": "/data/upload/1/LI_MING.png"}, "annotations": []}])
    assert "Label Studio's own JSON" in failure(tmp_path)


def test_x_anylabeling_beside_the_images_in_the_data_root(tmp_path: Path) -> None:
    corners = [[10, 0], [12, 0], [12, 12], [10, 12]]
    shapes = {"1": shape(corners, "rectangle"), "2": shape([[5.5, 6.5], [5.5, 9.6]], "circle")}
    shapes["3"] = shape([[15, 6], [15, 9]], "circle")  # a part of it lies outside
    for stem, item in shapes.items():
        write_image(tmp_path / f"{stem}.jpg")
        write_json(tmp_path / f"{stem}.json", {"shapes": [item], "imagePath": f"{stem}.jpg"})
    masks = {sample.image_path.stem: load_mask(sample) for sample in find_samples(tmp_path)}
    expected = np.zeros(SIZE[::-1], bool)
    expected[:, 10:12] = True
    assert (masks["1"] == expected).all()
    y, x = np.mgrid[: SIZE[1], : SIZE[0]] + 0.5
    assert (masks["2"] == ((x - 5.5) ** 2 + (y - 6.5) ** 2 < 3.1**2)).all()
    assert (masks["3"] == ((x - 15) ** 2 + (y - 6) ** 2 < 9)).all()
    write_json(tmp_path / "1.json", {"shapes": [shape([[30, 6], [30, 9]], "circle")]})
    assert "outside its image" in failure(tmp_path)
