"""Predictions as labels: written for LabelMe and COCO, corrected, merged with the old data, trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from vesselrl.cli import main
from vesselrl.data.formats import coco, labelme
from vesselrl.data.repair import merge_data
from vesselrl.data.samples import Sample, find_samples, load_mask
from vesselrl.data.splits import read_split, split_by_patient, write_split
from vesselrl.errors import DataError
from vesselrl.scoring.overlap import dice

SUBSETS = ("train", "val", "test")


def vessel_tree() -> np.ndarray:
    """Curved vessels three px wide that cross and enclose holes, an island in a hole, some at the border."""
    y, x = np.mgrid[:96, :128]
    rings = [np.abs(np.hypot(y - 48, x - 50) - radius) < 1.5 for radius in (8, 20, 60)]
    waves = [np.abs(y - middle - 9 * np.sin(x / 9)) < 1.5 for middle in (2, 40, 60)]
    return np.any([*rings, *waves], axis=0)


def test_thin_vessels_with_holes_are_read_back_as_they_were(tmp_path: Path) -> None:
    """By this project's reader, and of COCO by pycocotools, with area and box; so is an empty mask."""
    masks = {"1": vessel_tree(), "2": np.zeros((40, 30), bool), "3": np.ones((9, 7), bool)}
    for folder in ("labelme", "coco/images"):
        (tmp_path / folder).mkdir(parents=True)
        for name, mask in masks.items():
            Image.fromarray(mask).save(tmp_path / folder / f"{name}.png")
    for name, mask in masks.items():
        (tmp_path / "labelme" / f"{name}.json").write_text(json.dumps(labelme(f"{name}.png", mask)))
    file = tmp_path / "coco" / "instances.json"
    file.write_text(json.dumps(coco((f"{name}.png", mask) for name, mask in masks.items())))
    for kind in ("labelme", "coco"):
        found = {sample.image_path.stem: load_mask(sample) for sample in find_samples(tmp_path / kind)}
        assert found.keys() == masks.keys()
        assert all(dice(found[name], mask) == 1 for name, mask in masks.items())
    oracle = COCO(str(file))
    boxes = [(one["image_id"], one["area"], one["bbox"]) for one in oracle.dataset["annotations"]]
    rows, columns = np.nonzero(masks["1"])
    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert boxes == [(1, masks["1"].sum(), box), (3, 63, [0, 0, 7, 9])]
    for one in oracle.dataset["annotations"]:
        assert (oracle.annToMask(one) == masks[str(one["image_id"])]).all()


@pytest.fixture
def old(angiograms: Path, tmp_path: Path) -> Path:
    """The first nine patients, one image of the first without a mask."""
    root = tmp_path / "old"
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
        for file in sorted((angiograms / kind).iterdir())[: 18 - 2 * (kind == "masks")]:
            shutil.copy(file, root / kind)
    shutil.copy(sorted((angiograms / "masks").iterdir())[17], root / "masks")
    return root


def by_name(samples: list[Sample]) -> dict[str, Sample]:
    return {sample.image_path.name: sample for sample in samples}


def test_predicted_corrected_merged_and_trained_on(
    angiograms: Path, old: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The ninth patient's two images, one had no mask, and the tenth patient, who is new, get new masks."""
    before, shots = by_name(find_samples(old)), tmp_path / "shots"
    split = split_by_patient(list(before.values()), seed=1)
    write_split(tmp_path / "data_split.json", split)
    shots.mkdir()
    files = sorted((angiograms / "images").iterdir())[16:]
    for file in files:
        shutil.copy(file, shots)
    out, merged, model = tmp_path / "out", tmp_path / "merged", ["--model_path", str(tiny_checkpoint)]
    options = ["--image", str(shots), "--output_dir", str(out), "--format", "labelme"]
    assert main(["predict", *model, *options]) == 0
    names = json.loads((out / "patients.mapping.json").read_text())["readings"][""]["files"]
    drawn = {}
    for number, file in enumerate(sorted((out / "labelme").glob("*.json"))):
        label, top = json.loads(file.read_text()), 8 + 9 * number
        label["shapes"] = [{"label": "vessel", "points": [[4, top], [60, top], [60, top + 3], [4, top + 3]]}]
        file.write_text(json.dumps(label))
        drawn[f"{names[file.stem]}.png"] = np.pad(np.ones((3, 56), bool), ((top, 61 - top), (4, 4)))
    assert drawn.keys() == {file.name for file in files}
    places = [str(old), str(out / "labelme"), "--output", str(merged)]
    assert main(["data", "merge", *places, "--split_file", str(tmp_path / "data_split.json")]) == 0
    said = capsys.readouterr().out
    assert "20 images: 1 with a new mask, 3 added, 1 new patients." in said
    assert f"--data_root {merged} --split_file {merged}/data_split.json" in said
    after = by_name(find_samples(merged))
    assert {name: after[name].key for name in before} == {name: one.key for name, one in before.items()}
    for name, sample in after.items():
        expected = drawn[name] if name in drawn else load_mask(before[name])
        assert np.array_equal(load_mask(sample), expected), name
    for file in (old / "images").iterdir():
        assert file.read_bytes() == (merged / "images" / file.name).read_bytes()
    new = read_split(merged / "data_split.json", after.values())
    for subset in SUBSETS:
        assert set(split.patients(subset)) <= set(new.patients(subset))
    assert sum(len(getattr(new, subset)) for subset in SUBSETS) == 20
    assert after[files[-1].name].patient in new.patients("train")  # 13 of 17 images were there
    options = ["--data_root", str(merged), "--split_file", str(merged / "data_split.json")]
    runs = tmp_path / "runs"
    assert main(["train", "--preset", "debug", *model, *options, "--output_dir", str(runs)]) == 0
    (run,) = runs.glob("sa2va_lora_ppo_*")
    assert json.loads((run / "data_split.json").read_text())["patients"]["test"] == new.patients("test")


def corrected(folder: Path, name: str, mask: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    Image.fromarray(mask).save(folder / f"{name}_mask.png")
    return folder


def test_masks_alone_are_labels_of_the_old_images(old: Path, tmp_path: Path) -> None:
    """In another case too; without a split there is none; the old data stay as they are."""
    stem, mask = sorted(old.glob("images/*"))[0].stem, np.eye(64, dtype=bool)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    done = merge_data(old, corrected(tmp_path / "new", stem.lower(), mask), tmp_path / "merged")
    assert done == {"images": 17, "corrected": 1, "added": 0, "new_patients": 0, "split_file": None}
    assert (load_mask(by_name(find_samples(tmp_path / "merged"))[f"{stem}.png"]) == mask).all()
    assert before == {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}


def test_numbers_of_impersonal_files_stay_and_records_keep_their_fields(tmp_path: Path) -> None:
    """P001 would be another picture with more of them, as numbers follow a hash of the names."""
    for folder, numbers in (("old", range(6)), ("new", range(5, 9))):
        (tmp_path / folder / "images").mkdir(parents=True)
        for number in numbers:
            Image.new("L", (8, 8), 9 * number).save(tmp_path / folder / "images" / f"train_{number}.png")
        records = [{"image": f"train_{n}.png", "mask": [[1, 1, n, 1, n, 7]], "ward": n} for n in numbers[1:]]
        (tmp_path / folder / "annotations.json").write_text(json.dumps(records))
    before = by_name(find_samples(tmp_path / "old"))
    done = merge_data(tmp_path / "old", tmp_path / "new", tmp_path / "merged")
    assert (done["corrected"], done["added"], done["new_patients"]) == (0, 3, 3)
    after = by_name(find_samples(tmp_path / "merged"))
    assert {name: after[name].key for name in before} == {name: one.key for name, one in before.items()}
    records = json.loads((tmp_path / "merged" / "annotations.json").read_text())
    assert {record["image"]: record["ward"] for record in records}["train_5.png"] == 5


def of_another_mapping(new: Path, name: str) -> None:
    """A label by a pseudonym, with the mapping of other data, where that stands for another image."""
    new.mkdir()
    key = next(one.key for one in find_samples(new.parent / "old") if one.image_path.stem == name)
    shutil.copy(new.parent / "old" / "patients.mapping.json", new)
    Image.new("L", (64, 64), 7).save(new / f"{key}.png")
    (new / f"{key}.json").write_text(json.dumps(labelme(f"{key}.png", np.eye(64, dtype=bool))))


FAULTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "size": (
        lambda new, name: corrected(new, name, np.eye(9, 64, dtype=bool)),
        r"In the new labels: .*: the mask has 64×9 px, its image 64×64 px",
    ),
    "twice": (
        lambda new, name: [corrected(new, one, np.eye(64, dtype=bool)) for one in (name, name.upper())],
        "are labels of the same image",
    ),
    "no image": (
        lambda new, name: corrected(new, "P001_S9_F0001", np.eye(64, dtype=bool)),
        r"is called by a pseudonym\. Put the patients\.mapping\.json of the predictions beside",
    ),
    "damaged": (
        lambda new, name: (new.mkdir(), (new / f"{name}_mask.png").write_bytes(b"\x89PNG")),
        "In the new labels: .*the file is not an image",
    ),
    "mapping": (of_another_mapping, r"shows another image than its patients\.mapping\.json says"),
    "nothing": (lambda new, name: new.mkdir(), "In the new labels: The data root holds no annotations"),
    "split": (
        lambda new, name: corrected(new, name, np.eye(64, dtype=bool)),
        r"In the old data: There is no split data_split\.json",
    ),
    "there": (
        lambda new, name: corrected(new.parent / "merged", name, np.eye(64, dtype=bool)),
        "The folder of --output exists and is not empty",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(old: Path, tmp_path: Path, fault) -> None:
    make, message = FAULTS[fault]
    make(tmp_path / "new", sorted(old.glob("images/*"))[0].stem)
    there = sorted(tmp_path.rglob("*"))
    split = tmp_path / "no" / "data_split.json" if fault == "split" else None
    with pytest.raises(DataError, match=message) as caught:
        merge_data(old, tmp_path / "new", tmp_path / "merged", split)
    assert "ZHANG" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == there
