"""Every planted fault is found and named on every layout, and sound data is not flagged."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data import broken_roots
from tests.data.broken_roots import CODES, NAMES, PAIR_LAYOUTS, PLANTED, Root, edited, write_root
from tests.golden.broken_input import LAYOUTS, bars
from vesselrl.data import records
from vesselrl.data.check import DataReport, check_data, foreground_shares, render
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.errors import DataError


def check(root: Root) -> DataReport:
    """The report of a root; it shows no person, and training sees the same faults."""
    report, message = check_data(root.path), ""
    try:
        readable = any([(load_image(s), load_mask(s))[1].any() for s in find_samples(root.path)])
    except DataError as error:
        readable, message = False, str(error)
    shown = report.to_json() + render(report, limit=0) + message
    assert not [secret for secret in broken_roots.SECRETS if secret in shown]
    assert {finding.code for finding in report.findings} <= set(records.CODES)
    assert report.exit_code == (2 if any(f.severity == "error" for f in report.findings) else 0)
    assert json.loads(report.to_json())["exit_code"] == report.exit_code
    assert readable == (report.exit_code == 0)
    return report


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_data_is_not_flagged(tmp_path: Path, layout: str) -> None:
    report = check(write_root(tmp_path, layout))
    # The nesting is worth knowing and no fault.
    assert {f.code for f in report.findings} == ({"nested_mask"} if layout == "nested" else set())
    assert not report.of("warning")
    from_files = 4 if layout in ("both", *PAIR_LAYOUTS) else 0
    assert (report.counts["images"], report.counts["masks_from_files"]) == (4, from_files)
    # The labels are those that were drawn.
    read = sorted(load_mask(sample).tobytes() for sample in find_samples(tmp_path / "root"))
    assert read == sorted(bars(number).tobytes() for number in range(4))


@pytest.mark.parametrize(("layout", "name"), PLANTED)
def test_planted_fault(tmp_path: Path, layout: str, name: str) -> None:
    root = write_root(tmp_path, layout, name)
    pairs, code, place = layout in PAIR_LAYOUTS, CODES[name], root.place()
    if name in ("extra", "extra mask") or (name == "missing" and pairs):
        # In pairs, a lonely label means that its image is missing.
        code = ("missing_label" if name == "extra" else "missing_image") if pairs else code
        place = " file "
    elif name == "duplicate record":
        place = root.place(4)
    found = [finding for finding in check(root).findings if finding.code != "nested_mask"]
    if layout == "both":  # what follows from a wrong mask beside polygons
        found = [f for f in found if f.code not in {"disagreement", "mean_disagreement"} - {code}]
    assert [finding.code for finding in found] == [code]
    assert place in found[0].record
    assert found[0].file
    assert found[0].message.startswith(found[0].record.split(" (")[0])


def test_all_faults_of_a_root_are_named_at_once(tmp_path: Path) -> None:
    root = write_root(tmp_path, "annotations")
    root.set_outlines([[1, 1, 9], [1, 1, 9, 1, 9, 9], [1, 1, 9, 1, 99, 9], [5, 5]])
    root.image(3).write_text("no image")
    found = [(finding.code, finding.message.partition(" (")[0]) for finding in check(root).findings]
    numbers = {"odd_length": 1, "outside_image": 1, "few_points": 1, "unreadable_image": 3}
    assert [code for code, _ in found] == list(numbers)
    assert all(text.startswith(f"annotations.json record {numbers[code]}") for code, text in found)


def test_disagreement_is_measured_per_image_and_unused_polygons_are_warnings(tmp_path: Path) -> None:
    root, mask = write_root(tmp_path, "both"), bars(1)
    almost, moved = mask.copy(), np.roll(mask, 3, axis=0)
    almost[tuple(np.argwhere(~mask)[0])] = True
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
    root.set_outlines([[0, 0, 800, 0, 800, 800]])
    (finding,) = check(root).findings
    assert (finding.severity, finding.code) == ("warning", "outside_image")
    assert "Not used: the mask file goes first." in finding.message


def test_faults_of_the_whole_root_and_the_text_that_groups_findings(tmp_path: Path) -> None:
    root = write_root(tmp_path / "classes", "labelme")
    with edited(root.file) as content:
        content["shapes"][0]["label"] = "catheter"
    (finding,) = check(root).findings
    assert (finding.severity, finding.code) == ("warning", "several_labels")
    root = write_root(tmp_path / "points", "annotations")
    with edited(root.file) as content:
        for record in content:
            record["mask"][1] = [5, 5]
    lines = render(check(root), limit=3).splitlines()
    assert lines[1] == "warning: polygon with fewer than 3 points, left out: 4"
    assert lines[-2:] == ["  … and 1 more; --json lists all", "0 errors, 4 warnings"]
    with edited(root.file) as content:
        for record in content:
            record.update(mask=[], text=[])
    assert check(root).of("error")[0].message.startswith("All 4 masks are empty")


STRANGE = (
    *(None, True, -1, 0, 1e308, 10**400, float("nan"), 2**63, "", "LI_MING", "../x", "\ud800", "a\0"),
    *([], [[]], {}, [1, 2, 3], [[1, 2]], [[[3, 4, 5, 6, 7, 8]]], {"size": [64, 64], "counts": "0000"}),
)


PARTS = (r'"[^"]*"(?=:)', r'"[^"]*"', r"\d[\d.]*", r"\[[^][]*\]", r"{[^{}]*}")


def mutate(text: str, rng: random.Random) -> str:
    """Replaces a value of a JSON text, or renames a field."""
    kinds = [list(re.finditer(kind, text)) for kind in PARTS]
    part = rng.choice(rng.choice([found for found in kinds if found]))
    is_field = text[part.end() : part.end() + 1] == ":"
    new = '"x"' if is_field else json.dumps(rng.choice(STRANGE))
    return text[: part.start()] + new + text[part.end() :]


@pytest.mark.parametrize("layout", ["annotations", "nested", "both", "labelme", "coco", "rle"])
def test_mutations_are_reported_and_never_crash(tmp_path: Path, layout: str) -> None:
    root = write_root(tmp_path, layout)
    if layout == "rle":  # a text leaves more mutations for the rest of the file
        with edited(root.file) as content:
            for number, annotation in enumerate(content["annotations"]):
                annotation["segmentation"] = broken_roots.encode_mask(bars(number))
    text = root.file.read_text()
    rng = random.Random(layout)
    outcomes = {True: 0, False: 0}
    for number in range(75):
        broken = text
        for _ in range(rng.choice((1, 1, 2, 5)) if number < 60 else 0):
            broken = mutate(broken, rng)
        if number >= 60:
            place = rng.randrange(len(text))
            broken = text[:place] + chr(rng.randrange(32, 127)) + text[place + 1 :]
        root.file.write_text(broken)
        outcomes[check(root).exit_code == 0] += 1
    # The mutations reach both outcomes.
    assert min(outcomes.values()) > 2


@pytest.mark.parametrize("layout", ["annotations", "masks"])
def test_pattern_and_aliases_reach_the_pseudonyms(tmp_path: Path, aliases, layout: str) -> None:
    root = write_root(tmp_path, layout).path
    csv = aliases(f"{NAMES[0]}.png,one", f"{NAMES[1]}.png,one")
    pattern = r"(?P<patient>frame)_(?P<frame>\d+)"
    for names, num_patients in (({}, 4), ({"patient_aliases": csv}, 3), ({"patient_pattern": pattern}, 1)):
        assert check_data(root, **names).counts["patients"] == num_patients
        assert len({sample.patient for sample in find_samples(root, **names)}) == num_patients
    report = check_data(root, patient_pattern="(?P<patient>xyz)")
    assert [finding.code for finding in report.findings] == ["patients"]


def test_the_check_writes_nothing_and_names_what_training_does(tmp_path: Path) -> None:
    root = write_root(tmp_path, "masks")
    before = sorted(root.path.rglob("*"))
    found = check_data(root.path).foreground
    assert sorted(root.path.rglob("*")) == before
    shares = {sample.key: load_mask(sample).mean() for sample in find_samples(root.path)}
    assert (root.path / "patients.mapping.json").is_file()
    assert check_data(root.path).foreground == foreground_shares(root.path) == found == shares
    root.mask(2).write_text("no mask")  # only usable samples have a share
    report = check(root)
    assert sorted(report.foreground.values()) == sorted(bars(number).mean() for number in (0, 1, 3))
    assert json.loads(report.to_json())["foreground"] == report.foreground
    assert foreground_shares(root.path) is None


@pytest.mark.parametrize("layout", ["annotations", "coco", "labelme"])
def test_a_file_that_may_not_be_read_is_named_without_its_path(tmp_path, monkeypatch, layout: str) -> None:
    root, read_text = write_root(tmp_path, layout), Path.read_text

    def refuse(path: Path, *args: object, **options: object) -> str:
        if path.suffix == ".json" and "mapping" not in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    report = check_data(root.path)
    first = report.of("error")[0]
    assert first.message.startswith("json/ file 1" if layout == "labelme" else root.file.name)
    assert "cannot be read (Permission denied)" in first.message
    assert not [secret for secret in broken_roots.SECRETS if secret in report.to_json()]
