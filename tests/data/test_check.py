"""Every planted fault is found and named on every layout, and sound data is not flagged."""

import copy
import hashlib
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.broken_roots import (
    LAYOUTS,
    NAMES,
    PAIR_LAYOUTS,
    SECRETS,
    Root,
    draw_mask,
    expected,
    faults,
    flat_polygons,
    write_root,
)
from vesselrl.data.check import DataReport, check_data, foreground_shares, render
from vesselrl.data.records import CODES
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.errors import DataError
from vesselrl.synthetic.dataset import TARGET, draw_sequence

PLANTED = [(layout, name) for layout in LAYOUTS for name in faults(layout)]
# Warnings that follow from a wrong mask beside polygons.
CONSEQUENCES = {"disagreement", "mean_disagreement"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound data root of each layout; copy before use."""
    return {layout: write_root(tmp_path_factory.mktemp(layout) / "root", layout).path for layout in LAYOUTS}


def copy_root(sound: dict[str, Path], layout: str, folder: Path) -> Root:
    return Root(Path(shutil.copytree(sound[layout], folder / "root")), layout)


def check(root: Root | Path) -> DataReport:
    """The report of a root; it shows no person, and training sees the same faults."""
    path = root.path if isinstance(root, Root) else root
    report = check_data(path)
    shown = report.to_json() + render(report, limit=0)
    assert not [secret for secret in SECRETS if secret in shown]
    assert {finding.code for finding in report.findings} <= set(CODES)
    assert report.exit_code == (2 if any(f.severity == "error" for f in report.findings) else 0)
    assert json.loads(report.to_json())["exit_code"] == report.exit_code
    assert reads(path) == (report.exit_code == 0)
    return report


def reads(path: Path) -> bool:
    """Whether everything can be read for training."""
    try:
        masks = [(load_image(sample), load_mask(sample))[1] for sample in find_samples(path)]
    except DataError as error:
        message = str(error)
    else:
        return any(mask.any() for mask in masks)
    assert not [secret for secret in SECRETS if secret in message]
    return False


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_data_is_not_flagged(sound: dict[str, Path], layout: str) -> None:
    report = check(sound[layout])
    # The nesting is worth knowing and no fault.
    assert {f.code for f in report.findings} == ({"nested_mask"} if layout == "nested" else set())
    assert not report.of("warning")
    from_files = 4 if layout in ("both", *PAIR_LAYOUTS) else 0
    assert (report.counts["images"], report.counts["masks_from_files"]) == (4, from_files)
    # The labels are those that were drawn.
    drawn = sorted(hashlib.sha256(draw_mask(number)).hexdigest() for number in range(4))
    read = sorted(hashlib.sha256(load_mask(sample)).hexdigest() for sample in find_samples(sound[layout]))
    assert read == drawn


@pytest.mark.parametrize(("layout", "name"), PLANTED)
def test_planted_fault(sound: dict[str, Path], tmp_path: Path, layout: str, name: str) -> None:
    root = copy_root(sound, layout, tmp_path)
    faults(layout)[name][0](root, 2)
    code, place = expected(root, name, 2)
    found = [finding for finding in check(root).findings if finding.code != "nested_mask"]
    if layout == "both":
        found = [finding for finding in found if finding.code not in CONSEQUENCES or code in CONSEQUENCES]
    assert [finding.code for finding in found] == [code]
    assert place in found[0].record
    assert found[0].file
    assert found[0].message.startswith(found[0].record.split(" (")[0])


def test_all_faults_of_a_root_are_named_at_once(sound: dict[str, Path], tmp_path: Path) -> None:
    root = copy_root(sound, "annotations", tmp_path)
    faults("annotations")["truncated"][0](root, 3)
    root.set_label(1, [[1, 1, 9], *root.polygons(1), [1, 1, 9, 1, 99, 9], [5, 5]])
    found = [(finding.code, finding.message.partition(" (")[0]) for finding in check(root).findings]
    codes = ("odd_length", "outside_image", "few_points", "unreadable_image")
    records = [f"annotations.json record {number}" for number in (1, 1, 1, 3)]
    assert found == list(zip(codes, records, strict=True))


# ---- Mask files beside polygons


def test_disagreement_is_measured_per_image(sound: dict[str, Path], tmp_path: Path) -> None:
    root = copy_root(sound, "both", tmp_path)
    mask = draw_mask(1)
    row, column = np.argwhere(~mask)[0]
    almost, moved = mask.copy(), np.roll(mask, 3, axis=0)
    almost[row, column] = True
    Image.fromarray(almost).save(root.mask(1))
    assert check(root).findings == ()
    Image.fromarray(moved).save(root.mask(1))
    report = check(root)
    dice = 2 * (mask & moved).sum() / (mask.sum() + moved.sum())
    assert report.agreement == pytest.approx({"images": 4, "mean": (3 + dice) / 4, "lowest": dice})
    finding, of_all = report.findings
    assert (finding.severity, finding.code) == ("warning", "disagreement")
    assert finding.record.split(" (")[0] == "annotations.json record 1"
    assert f"Dice {dice:.3f}" in finding.message
    assert of_all.code == "mean_disagreement"


def test_faults_of_polygons_that_are_not_used_are_warnings(sound: dict[str, Path], tmp_path: Path) -> None:
    root = copy_root(sound, "both", tmp_path)
    root.set_label(0, [[0, 0, 800, 0, 800, 800]])
    (finding,) = check(root).findings
    assert (finding.severity, finding.code) == ("warning", "outside_image")
    assert "Not used: the mask file goes first." in finding.message


# ---- The whole data root


@pytest.mark.parametrize(
    ("files", "code", "message"),
    [
        ({}, "unusable", "holds no annotations"),
        ({"annotations.json": "[{]"}, "bad_json", "annotations.json is not valid JSON"),
        ({"annotations.json": "[" * 100000}, "bad_json", "annotations.json is nested too deeply"),
        ({"annotations.json": f"[{'9' * 5000}]"}, "bad_json", "holds a number that is too long"),
        ({"annotations.json": '[{"image": "a\\u0000.png"}]'}, "bad_record", "no usable file name"),
        ({"annotations.json": '[{"image": "\\ud800.png"}]'}, "bad_record", "no usable file name"),
        ({"annotations.json": json.dumps([{"image": "a" * 300}])}, "bad_record", "no usable file name"),
        ({"coco.json": '{"images": [], "annotations": []}'}, "bad_json", "coco.json names no images"),
        ({"coco.json": "[]"}, "bad_json", "so it is no COCO file"),
        ({"json/001.json": "[]"}, "bad_json", "json/001.json has no list 'shapes'"),
        ({"masks/a.txt": ""}, "unusable", "has masks/ but no images/"),
    ],
)
def test_unusable_root(tmp_path: Path, files: dict[str, str], code: str, message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    report = check(tmp_path)
    assert report.exit_code == 2
    assert report.findings[0].code == code
    assert message in report.findings[0].message


def test_all_masks_empty(sound: dict[str, Path], tmp_path: Path) -> None:
    root = copy_root(sound, "annotations", tmp_path)
    for number in range(4):
        root.set_label(number, [])
    report = check(root)
    assert report.of("error")[0].message.startswith("All 4 masks are empty")


def test_several_classes_are_reported_once(sound: dict[str, Path], tmp_path: Path) -> None:
    root = copy_root(sound, "labelme", tmp_path)
    root.change(1, lambda content: content["shapes"][0].update(label="catheter"))
    (finding,) = check(root).findings
    assert (finding.severity, finding.code) == ("warning", "several_labels")


def test_text_groups_findings_and_says_how_many(sound: dict[str, Path], tmp_path: Path) -> None:
    root = copy_root(sound, "annotations", tmp_path)
    for number in range(4):
        faults("annotations")["single point"][0](root, number)
    lines = render(check(root), limit=3).splitlines()
    assert lines[1] == "warning: polygon with fewer than 3 points, left out: 4"
    assert lines[-2:] == ["  … and 1 more; --json lists all", "0 errors, 4 warnings"]


# ---- Mutations


def nodes(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all parts of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from nodes(part, (*path, key))


STRANGE = (
    *(None, True, -1, 0, 1e308, 10**400, float("nan"), 2**63, "", "LI_MING", "../x", "\ud800", "a\0"),
    *([], [[]], {}, [1, 2, 3], [[1, 2]], [[[3, 4, 5, 6, 7, 8]]], {"size": [64, 64], "counts": "0000"}),
)


def mutate(value: object, rng: random.Random) -> object:
    """The value with one part replaced, removed or doubled."""
    path = rng.choice(list(nodes(value)))
    if not path:
        return copy.deepcopy(rng.choice(STRANGE))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    what = rng.random()
    if what < 0.7:
        parent[path[-1]] = copy.deepcopy(rng.choice(STRANGE))
    elif what < 0.85 or isinstance(parent, dict):
        del parent[path[-1]]
    else:
        parent.insert(path[-1], parent[path[-1]])
    return value


@pytest.mark.parametrize("layout", ["annotations", "nested", "both", "labelme", "coco", "rle"])
def test_mutations_are_reported_and_never_crash(sound: dict[str, Path], tmp_path: Path, layout: str) -> None:
    root = copy_root(sound, layout, tmp_path)
    file = root.path / "json" / f"{NAMES[1]}.json" if layout == "labelme" else root.file
    # A few points are enough, and leave more mutations for the rest of the file.
    if layout != "rle":
        for number in range(4):
            root.set_label(number, [[4, 4, 40, 4, 40, 9 + number], [2, 2, 9, 2, 9, 50]])
    text = file.read_text()
    rng = random.Random(layout)
    outcomes = {True: 0, False: 0}
    for _ in range(60):
        value = json.loads(text)
        for _ in range(rng.choice((1, 1, 2, 5))):
            value = mutate(value, rng)
        file.write_text(json.dumps(value))
        outcomes[check(root).exit_code == 0] += 1
    for _ in range(15):
        broken = list(text)
        broken[rng.randrange(len(text))] = chr(rng.randrange(32, 127))
        file.write_text("".join(broken))
        outcomes[check(root).exit_code == 0] += 1
    # The mutations reach both outcomes.
    assert min(outcomes.values()) > 2


# ---- Patients and time


def test_pattern_and_aliases_reach_the_pseudonyms(sound: dict[str, Path], tmp_path: Path) -> None:
    aliases = tmp_path / "aliases.csv"
    aliases.write_text(f"file_name,patient\n{NAMES[0]}.png,one\n{NAMES[1]}.png,one\n", encoding="utf-8")
    for layout in ("annotations", "masks"):
        root = copy_root(sound, layout, tmp_path / layout).path
        assert check_data(root).counts["patients"] == 4
        samples = find_samples(root, patient_aliases=aliases)
        assert check_data(root, patient_aliases=aliases).counts["patients"] == 3
        assert len({sample.patient for sample in samples}) == 3
        report = check_data(root, patient_pattern="(?P<patient>xyz)")
        assert [finding.code for finding in report.findings] == ["patients"]


def test_the_check_writes_nothing_and_names_what_training_does(
    sound: dict[str, Path], tmp_path: Path
) -> None:
    root = copy_root(sound, "masks", tmp_path)
    before = sorted(root.path.rglob("*"))
    found = check_data(root.path).foreground
    assert sorted(root.path.rglob("*")) == before
    shares = {sample.key: load_mask(sample).mean() for sample in find_samples(root.path)}
    assert (root.path / "patients.mapping.json").is_file()
    assert check_data(root.path).foreground == foreground_shares(root.path) == found == shares
    root.mask(2).write_text("no mask")  # only usable samples have a share
    report = check(root)
    assert sorted(report.foreground.values()) == sorted(draw_mask(number).mean() for number in (0, 1, 3))
    assert json.loads(report.to_json())["foreground"] == report.foreground
    assert foreground_shares(root.path) is None


@pytest.mark.parametrize("layout", ["annotations", "coco", "labelme"])
def test_a_file_that_may_not_be_read_is_named_without_its_path(
    sound: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    root = copy_root(sound, layout, tmp_path)
    read_text = Path.read_text

    def refuse(path: Path, *args: object, **options: object) -> str:
        if path.suffix == ".json" and "mapping" not in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    report = check_data(root.path)
    first = report.of("error")[0]
    assert first.message.startswith("json/ file 1" if layout == "labelme" else root.file.name)
    assert "cannot be read (Permission denied)" in first.message
    assert not [secret for secret in SECRETS if secret in report.to_json()]


def test_check_needs_less_than_a_fortieth_of_a_second_per_image(tmp_path: Path) -> None:
    """1,220 images in 30 s; here 61 images of 512 px, and CPU time, which other programs do not change."""
    image, mask = draw_sequence(TARGET, 1, 1, 1, 512)[0]
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    records = []
    for number in range(61):
        shift = tuple(rng.integers(-20, 21, 2))
        noise = rng.integers(0, 6, image.shape[:2])
        shifted = np.roll(image[:, :, 0], shift, (0, 1)).astype(int) + noise
        name = f"SYNTH({number % 4:010d})_S-1_1_0A1B2C3D_frame_{number:06d}.jpg"
        Image.fromarray(shifted.clip(0, 255).astype(np.uint8)).save(tmp_path / "images" / name, quality=95)
        polygons = flat_polygons(np.roll(mask, shift, (0, 1)))
        records.append({"image": name, "mask": polygons, "text": ["blood vessel"] * len(polygons)})
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    start = time.process_time()
    report = check_data(tmp_path)
    assert time.process_time() - start < 30 * 61 / 1220
    assert (report.counts["images"], report.findings) == (61, ())
