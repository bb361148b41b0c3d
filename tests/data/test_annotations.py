import json

import numpy as np
import pytest
from PIL import Image

from vesselrl.data.annotations import find_samples, load_image, load_mask
from vesselrl.data.polygons import mask_to_polygons
from vesselrl.errors import DataError

SIZE = (16, 12)  # width, height
SQUARE = [2, 3, 6, 3, 6, 8, 2, 8]  # rows 3 to 7, columns 2 to 5
PERSON = "LI_MING(0123456789)_1-2_3_0A1B2C3D_frame_000011"


def write_image(path, size=SIZE, mode="L", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 90).save(path, **options)


def write_mask(path, value=255, size=SIZE):
    """A mask file with SQUARE drawn by slicing."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[3:8, 2:6] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def write_root(root, records):
    """A data root with an image for each record that names one."""
    root.mkdir(exist_ok=True)
    for record in records:
        write_image(root / "images" / record["image"])
    (root / "annotations.json").write_text(json.dumps(records), encoding="utf-8")
    return root


def record(name="train_001.png", mask=(SQUARE,), **more):
    return {"image": name, "mask": list(mask), "text": ["blood vessel"], **more}


def failure(root, pattern=None):
    """The message of the error that find_samples raises; it never shows the person."""
    with pytest.raises(DataError) as raised:
        find_samples(root, pattern)
    message = str(raised.value)
    assert "LI_MING" not in message
    assert "0123456789" not in message
    assert "\n" not in message
    return message


# ---- annotations.json


def test_polygons_become_one_target(tmp_path):
    other = [10, 0, 12, 0, 12, 12, 10, 12]
    flat, nested = record("a_1.png", [SQUARE, other]), record("a_2.png", [[SQUARE], [other]], text="vessel")
    expected = np.zeros((12, 16), bool)
    expected[3:8, 2:6] = expected[:, 10:12] = True
    samples = find_samples(write_root(tmp_path, [flat, nested]))
    assert len(samples) == 2
    for sample in samples:
        assert sample.mask_path is None
        mask = load_mask(sample)
        assert mask.dtype == bool
        assert (mask == expected).all()


def test_twenty_one_polygons_are_one_sample(tmp_path):
    bars = [[x, 0, x + 0.7, 0, x + 0.7, 12, x, 12] for x in 0.7 * np.arange(21)]
    (sample,) = find_samples(write_root(tmp_path, [record(mask=bars)]))
    assert load_mask(sample)[:, :15].all()  # side by side they reach 14.7, past the centre of column 14
    assert not load_mask(sample)[:, 15:].any()


def test_image_field_with_and_without_folder(tmp_path):
    write_root(tmp_path, [record("a.png"), record("b.png")])
    write_image(tmp_path / "elsewhere" / "c.png")
    records = [record("images/a.png"), record("images\\b.png"), record("elsewhere/c.png")]
    (tmp_path / "annotations.json").write_text("\ufeff" + json.dumps(records), encoding="utf-8")
    paths = {sample.image_path for sample in find_samples(tmp_path)}
    assert paths == {tmp_path / "images/a.png", tmp_path / "images/b.png", tmp_path / "elsewhere/c.png"}


def test_mask_file_is_used_before_polygons(tmp_path):
    write_root(tmp_path, [record("a.png", [[0, 0, 800, 0, 800, 800]]), record("b.png", []), record("c.png")])
    write_mask(tmp_path / "masks" / "a_mask.png", 255)
    write_mask(tmp_path / "masks" / "b.png", 1)
    write_mask(tmp_path / "masks" / "c.png", 7)  # not read: c_mask.png comes first
    write_mask(tmp_path / "masks" / "c_mask.png")
    samples = {sample.image_path.stem: sample for sample in find_samples(tmp_path)}
    for sample in samples.values():
        assert sample.polygons is None
        assert load_mask(sample).sum() == 5 * 4
    assert samples["c"].mask_path.name == "c_mask.png"


def test_samples_know_pseudonyms_only(tmp_path):
    (sample,) = find_samples(write_root(tmp_path, [record(f"{PERSON}.jpg")]))
    assert (sample.key, sample.patient, sample.sequence, sample.frame) == (
        "P001_S1_F0011",
        "P001",
        "P001_S1",
        "F0011",
    )
    assert sample.record == "annotations.json record 0 (P001_S1_F0011)"
    assert "MING" not in repr(sample)


def test_order_of_records_does_not_matter(tmp_path):
    names = [f"{name}_frame_{i:06d}.png" for name in ("anna", "ben", "carla") for i in range(3)]
    forwards = find_samples(write_root(tmp_path, [record(name) for name in names]))
    write_root(tmp_path, [record(name) for name in reversed(names)])
    backwards = find_samples(tmp_path)
    assert [(s.key, s.image_path) for s in forwards] == [(s.key, s.image_path) for s in backwards]
    assert [s.key for s in forwards] == sorted(s.key for s in forwards)


def test_points_are_skipped_with_a_counted_warning(tmp_path, caplog):
    records = [record(f"{PERSON}.png", [[3, 3], SQUARE]), record("train_002.png", [[1, 1], [2, 2]])]
    samples = find_samples(write_root(tmp_path, records))
    assert "left out 3 polygons with fewer than 3 points, in 2 records" in caplog.text
    assert "LI_MING" not in caplog.text
    assert sorted(int(load_mask(sample).sum()) for sample in samples) == [0, 20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": [SQUARE, [1, 2, 3, 4, 5]]}, "record 1 (P001_S1_F0011): polygon 1 has 5 coordinates"),
        ({"mask": [[1, 2, float("nan"), 4, 5, 6]]}, "record 1 (P001_S1_F0011): polygon 0 holds nan"),
        ({"mask": [[0, 0, 700, 0, 700, 9]]}, "record 1 (P001_S1_F0011): polygon 0 has x = 700, outside"),
        ({"mask": None}, "record 1 (P001_S1_F0011): 'mask' is null"),
        ({"image": 3}, "record 1 has no text 'image'"),
        ({"image": "  "}, "record 1 has no text 'image'"),
        ({"image": "images/.."}, "record 1: 'image' points outside the data root"),
        ({"image": "/etc/passwd"}, "record 1: 'image' points outside the data root"),
        ({"image": "..\\..\\x.png"}, "record 1: 'image' points outside the data root"),
        ({"image": PERSON}, "record 1 (P001_S1_F0011): its image is missing in images/"),
    ],
)  # fmt: skip
def test_broken_record(tmp_path, change, message):
    write_root(tmp_path, [record("zhao_frame_000001.png"), record(f"{PERSON}.png")])
    records = [record("zhao_frame_000001.png"), record(f"{PERSON}.png") | change]
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    found = failure(tmp_path)
    assert found.startswith("annotations.json record 1")
    # Which of the two persons is P001 depends on a hash.
    assert message.replace("P001_S1_F0011", "?") in found.replace("P001_S1_F0011", "?").replace(
        "P002_S1_F0011", "?"
    )


def test_record_without_mask(tmp_path):
    write_root(tmp_path, [record()])
    (tmp_path / "annotations.json").write_text('[{"image": "train_001.png"}]')
    assert "record 0 (P001_S1_F0001) has no 'mask', and masks/ has no file for it" in failure(tmp_path)


@pytest.mark.parametrize("again", [f"{PERSON}.png", f"images/{PERSON}.png"])
def test_duplicate_records(tmp_path, again):
    write_root(tmp_path, [record(f"{PERSON}.png"), record("b_frame_1.png")])
    records = [record(f"{PERSON}.png"), record("b_frame_1.png"), record(again)]
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    message = failure(tmp_path)
    assert message.startswith("annotations.json record 2 (P00")
    assert "names the same image as record 0" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"image": "a.png",\n "mask": [[1, 2,]]}]', "not valid JSON: Expecting value at line 2, column 17"),
        ("", "not valid JSON"),
        ('{"images": []}', "holds no list"),
        ("[]", "is an empty list"),
        ("[[1, 2]]", "record 0 has no text 'image'"),
    ],
)
def test_broken_annotations(tmp_path, text, message):
    (tmp_path / "annotations.json").write_text(text)
    assert message in failure(tmp_path)


def test_annotations_in_another_encoding(tmp_path):
    (tmp_path / "annotations.json").write_bytes('[{"image": "Müller.png"}]'.encode("latin-1"))
    assert "annotations.json is not UTF-8 (byte 13)" in failure(tmp_path)


def test_no_root_and_no_annotations(tmp_path):
    assert "is not a folder" in failure(tmp_path / "nowhere")
    write_image(tmp_path / "images" / "a.png")
    assert "holds no annotations: neither annotations.json nor masks/" in failure(tmp_path)
    (tmp_path / "masks").mkdir()
    assert "holds no annotations: none of 1 images" in failure(tmp_path)


# ---- Folders of images and masks


def test_folders_with_matching_names(tmp_path, caplog):
    for name, mask in [("a.png", "a.png"), ("b.jpg", "b_mask.png"), ("c.TIF", "c.tif"), ("d.jpeg", "d.PNG")]:
        write_image(tmp_path / "images" / name)
        write_mask(tmp_path / "masks" / mask)
    (tmp_path / "images" / ".DS_Store").write_text("")
    (tmp_path / "images" / "._a.png").write_text("")
    (tmp_path / "images" / "notes.txt").write_text("")
    samples = find_samples(tmp_path)
    assert {s.image_path.name: s.mask_path.name for s in samples} == {
        "a.png": "a.png",
        "b.jpg": "b_mask.png",
        "c.TIF": "c.tif",
        "d.jpeg": "d.PNG",
    }
    assert len({sample.patient for sample in samples}) == 4
    assert all(load_mask(sample).sum() == 20 for sample in samples)
    assert caplog.text == ""


def test_images_without_mask_are_counted(tmp_path, caplog):
    for name in "abc":
        write_image(tmp_path / "images" / f"{name}.png")
    write_mask(tmp_path / "masks" / "b.png")
    write_mask(tmp_path / "masks" / "z.png")
    assert len(find_samples(tmp_path)) == 1
    assert "2 of 3 images have no mask and are left out" in caplog.text
    assert "1 of 2 files in masks/ belong to no image" in caplog.text


def test_two_images_of_one_name(tmp_path):
    write_image(tmp_path / "images" / "a.png")
    write_image(tmp_path / "images" / "a.jpg")
    write_mask(tmp_path / "masks" / "a.png")
    assert "images/ holds 2 files but only 1 different names" in failure(tmp_path)


def test_masks_without_images_folder(tmp_path):
    write_mask(tmp_path / "masks" / "a.png")
    assert "has masks/ but no images/" in failure(tmp_path)


@pytest.mark.parametrize(
    ("stem", "named"),
    [("train_001", "images/train_001.png"), (PERSON, "images/ file 1 in name order (P001_S1_F0011)")],
)
def test_mask_of_another_size_names_both(tmp_path, stem, named):
    write_image(tmp_path / "images" / f"{stem}.png")
    write_mask(tmp_path / "masks" / f"{stem}.png", size=(8, 12))
    assert failure(tmp_path).startswith(f"{named}: the mask has 8×12 px, its image 16×12 px.")


def test_patient_pattern(tmp_path):
    for name in ("test_11L", "test_11R", "test_12L"):
        write_image(tmp_path / "images" / f"{name}.png")
        write_mask(tmp_path / "masks" / f"{name}.png")
    patients = [s.patient for s in find_samples(tmp_path, r"_(?P<patient>\d+)(?P<frame>[LR])$")]
    assert sorted(patients) in (["P001", "P001", "P002"], ["P001", "P002", "P002"])
    assert "finds no patient in 3 of 3 file names" in failure(tmp_path, r"(?P<patient>x)")


# ---- Real images


def test_coronary80(shared_folder):
    samples = find_samples(shared_folder / "data" / "coronary80")
    assert len(samples) == len({s.patient for s in samples}) == 80
    assert load_image(samples[0]).shape == (300, 300, 3)
    assert np.mean([load_mask(s).mean() for s in samples]) == pytest.approx(0.056, abs=0.001)
    assert all(load_mask(sample).any() for sample in samples)


@pytest.mark.parametrize("pattern", [None, r"_(?P<patient>\d+)(?P<frame>[LR])$"])
def test_chase_db1(shared_folder, pattern):
    samples = find_samples(shared_folder / "data" / "chase_db1", pattern)
    assert len(samples) == 28
    assert len({s.patient for s in samples}) == 14
    assert load_image(samples[0]).shape == (960, 999, 3)
    assert np.mean([load_mask(s).mean() for s in samples]) == pytest.approx(0.069, abs=0.001)


@pytest.mark.parametrize("folder", ["coronary80", "chase_db1"])
def test_real_masks_survive_the_way_through_polygons(tmp_path, shared_folder, folder):
    originals = find_samples(shared_folder / "data" / folder)[:3]
    records = []
    for number, original in enumerate(originals):
        mask = load_mask(original)
        name = f"img_{number}.png"
        write_image(tmp_path / "images" / name, size=mask.shape[::-1])
        records.append(record(name, [polygon.ravel().tolist() for polygon in mask_to_polygons(mask)]))
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    for sample in find_samples(tmp_path):
        original = originals[int(sample.image_path.stem.removeprefix("img_"))]
        assert (load_mask(sample) == load_mask(original)).all()
