"""Every planted fault is found, named and repaired on every layout, and sound data stays as it is."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data import broken_roots
from tests.data.broken_roots import CODES, NAMES, PAIR_LAYOUTS, PLANTED, Root, edited, write_root
from tests.golden.broken_input import LAYOUTS, WHOLE, bars
from vesselrl.data import repair
from vesselrl.data.check import DataReport, check_data, foreground_shares, render
from vesselrl.data.repair import repair_data
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.errors import DataError

# Faults that leave nothing to mend: the image, or the whole label, cannot be known.
LOST = {
    *("missing", "unreadable", "truncated", "same pixels", "odd length", "outside", "not finite"),
    *("other proportions", "size of words", "all foreground", "white mask", "broken run lengths"),
    *("thin", "twice around", "frames"),
}
# Without polygons the label is lost as well.
LOST_WITHOUT_POLYGONS = {"cut mask", "unreadable mask"}
# Faults after which the mask is another one.
OTHER_MASK = {"empty", "empty mask", "inverted mask", "soft mask", "disagreement"}


def check(root: Root) -> DataReport:
    """The report of a root; it shows no person, and training sees the same faults."""
    report, message = check_data(root.path), ""
    try:
        readable = any([(load_image(s), load_mask(s))[1].any() for s in find_samples(root.path)])
    except DataError as error:
        readable, message = False, str(error)
    shown = report.to_json() + render(report, limit=0) + message
    assert not [secret for secret in broken_roots.SECRETS if secret in shown]
    assert report.exit_code == (2 if any(f.severity == "error" for f in report.findings) else 0)
    assert json.loads(report.to_json())["exit_code"] == report.exit_code
    assert readable == (report.exit_code == 0)
    return report


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def repaired(root: Root) -> DataReport:
    """Repairs a root into `out` beside it, and checks what holds for every repair."""
    before, out = contents(root.path), root.path.parent / "out"
    out.mkdir()
    mode = out.stat().st_mode
    report = repair_data(root.path, out)
    assert contents(root.path) == before
    assert set(out.parent.iterdir()) == {root.path, out}
    assert out.stat().st_mode == mode
    shown = render(report, limit=0) + report.to_json()
    assert not [secret for secret in broken_roots.SECRETS if secret in shown]
    again = check_data(out)
    assert report.exit_code == again.exit_code == 0
    assert {finding.code for finding in again.findings} <= {"empty_mask", "mostly_foreground"}
    return report


def masks(root: Path) -> dict[str, np.ndarray]:
    return {sample.image_path.stem: load_mask(sample) for sample in find_samples(root)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_data_is_not_flagged_and_copied(tmp_path: Path, layout: str) -> None:
    root = write_root(tmp_path, layout)
    report, drawn = check(root), {root.image(number).stem: bars(number) for number in range(4)}
    # The nesting is worth knowing and no fault.
    assert {f.code for f in report.findings} == ({"nested_mask"} if layout == "nested" else set())
    assert not report.of("warning")
    from_files = 4 if layout in ("both", *PAIR_LAYOUTS) else 0
    assert (report.counts["images"], report.counts["masks_from_files"]) == (4, from_files)
    report = repaired(root)
    assert {f.code for f in report.findings} == ({"repaired"} if layout == "nested" else set())
    for found in (masks(root.path), masks(tmp_path / "out")):
        assert found.keys() == drawn.keys()
        assert all((found[name] == mask).all() for name, mask in drawn.items())
    for number in range(4):  # not a single byte of a sound image changes
        (copied,) = (tmp_path / "out" / "images").glob(f"{root.image(number).stem}.*")
        assert copied.read_bytes() == root.image(number).read_bytes()


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
    report = repaired(root)
    lost = name in LOST or (name in LOST_WITHOUT_POLYGONS and layout != "both")
    assert report.counts["images"] == (3 if lost else 4)
    found = masks(tmp_path / "out")
    for number in range(4) if name != "same pixels" else ():
        if number != 1 or not (lost or name in OTHER_MASK):
            assert (found[root.image(number).stem] == bars(number)).all()


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
    assert lines[1] == "warning: polygon of fewer than 3 points or without area, left out: 4"
    assert lines[-2:] == ["  … and 1 more; --json lists all", "0 errors, 4 warnings"]
    with edited(root.file) as content:
        for record in content:
            record.update(mask=[WHOLE], text=["vessel"])
    assert check_data(root.path).of("error")[0].message.startswith("All 4 masks are without background")
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
    text, rng = root.file.read_text(), random.Random(layout)
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
    assert min(outcomes.values()) > 2, "the mutations reach both outcomes"


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


def test_records_are_written_flat_with_a_text_each_and_those_of_one_image_joined(tmp_path: Path) -> None:
    root = write_root(tmp_path, "annotations")
    with edited(root.file) as content:
        mask = [[polygon] for polygon in content[0]["mask"]]
        content[0].update(mask=mask, text="artery", conversations=["kept"])
        content.append(content[1] | {"mask": [[0, 60, 9, 60, 9, 64, 0, 64]]})
    repaired(root)
    records = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [record["image"] for record in records] == [f"{name}.png" for name in NAMES]
    for record in records:
        assert len(record["text"]) == len(record["mask"]) > 0
        assert all(isinstance(value, float) for polygon in record["mask"] for value in polygon)
    assert (set(records[0]["text"]), records[0]["conversations"]) == ({"artery"}, ["kept"])
    expected = bars(1)
    expected[60:64, 0:9] = True
    assert (masks(tmp_path / "out")[NAMES[1]] == expected).all()


def test_an_unreadable_mask_is_not_an_empty_one(tmp_path: Path) -> None:
    root = write_root(tmp_path, "both", "unreadable mask")
    root.set_outlines([])  # nothing to stand in
    (left_out,) = (finding for finding in repaired(root).findings if finding.code == "left_out")
    assert left_out.record.split(" (")[0] == root.place()


def test_masks_of_two_values_are_not_thresholded_by_half(tmp_path: Path) -> None:
    root = write_root(tmp_path, "masks")
    Image.fromarray(bars(0).astype(np.uint8) * 7).save(root.mask(0))
    Image.fromarray(np.where(bars(1), 200, 100).astype(np.uint8)).save(root.mask(1))
    red = np.zeros((64, 64, 3), np.uint8)
    red[bars(2)] = (255, 0, 0)
    Image.fromarray(red).save(root.mask(2))
    repaired(root)
    for number in range(3):
        assert (masks(tmp_path / "out")[NAMES[number]] == bars(number)).all()


def keys(root: Path, aliases: Path | None = None) -> dict[str, str]:
    """Key by name of the image."""
    return {s.image_path.stem: s.key for s in find_samples(root, patient_aliases=aliases)}


@pytest.mark.parametrize("kind", ["known", "new", "impersonal"])
@pytest.mark.parametrize("number", range(4))
def test_the_copy_has_the_pseudonyms_of_the_data_root(tmp_path: Path, kind: str, number: int) -> None:
    """Whichever image is left out, and whether the data root has a mapping file, none yet, or needs none."""
    root, fresh = (write_root(tmp_path / name, "annotations") for name in ("old", "fresh"))
    with edited(root.file) as content:
        for index, record in enumerate(content if kind == "impersonal" else ()):
            root.image(index).rename(root.path / "images" / f"train_{index:03}.png")
            record["image"] = f"train_{index:03}.png"
        lost = Path(content[number]["image"]).stem
    before = keys((fresh if kind == "new" else root).path)
    with edited(root.file) as content:
        content[number]["mask"].append([1, 1, 9, 1, 9])
    report = repair_data(root.path, tmp_path / "out")
    assert (root.path / "patients.mapping.json").exists() == (kind == "known")
    (left_out,) = (finding for finding in report.findings if finding.code == "left_out")
    assert f"({before.pop(lost)})" in left_out.record
    # The report, the copy and the data root call every image the same.
    assert keys(tmp_path / "out") == before
    assert set(report.foreground) == set(before.values())


def test_an_alias_file_may_name_what_is_left_out(tmp_path: Path) -> None:
    root, csv = write_root(tmp_path, "annotations"), tmp_path / "a.csv"
    csv.write_text("\n".join(["file_name,patient", *(f"{name},x" for name in NAMES[:3])]))
    before = keys(root.path, csv)
    assert check_data(root.path, patient_aliases=csv).counts["patients"] == 2
    root.set_outlines([[1, 1, 9, 1, 9]])
    report = repair_data(root.path, tmp_path / "out", patient_aliases=csv)
    assert (report.exit_code, report.counts["images"], report.counts["patients"]) == (0, 3, 2)
    assert set(report.foreground) == {before[NAMES[number]] for number in (0, 2, 3)}
    csv.write_text(csv.read_text().replace(f"{NAMES[1]},x\n", ""))
    assert set(keys(tmp_path / "out", csv).values()) == set(report.foreground)


def test_what_is_refused_leaves_everything_as_it_was(tmp_path: Path) -> None:
    root = write_root(tmp_path / "around", "annotations")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    texts = (root.file.read_text(), re.sub(r"\[\[.*?\]\]", json.dumps([WHOLE]), root.file.read_text()), "[{")
    for text, out, message in (
        (texts[0], "full", "exists and is not empty"),
        (texts[0], "full/notes.txt", "exists and is not empty"),
        (texts[0], "around", "exists and is not empty"),
        (texts[0], "around/root/out", "overlaps the data root"),
        (texts[1], "out", "no image is left with a label"),
        (texts[2], "out", "not valid JSON"),
    ):
        root.file.write_text(text)
        before = contents(tmp_path)
        with pytest.raises(DataError, match=message):
            repair_data(root.path, tmp_path / out)
        assert contents(tmp_path) == before
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["copyfile", "save", "check_listing"])
def test_a_full_disk_leaves_nothing_and_shows_no_name(tmp_path: Path, monkeypatch, what: str) -> None:
    root = write_root(tmp_path, "annotations")

    def full(*args: object, **_: object) -> None:
        raise OSError(28, "No space left on device", str(args[1]))

    monkeypatch.setattr({"copyfile": repair.shutil, "save": Image.Image}.get(what, repair), what, full)
    before = contents(tmp_path)
    with pytest.raises((DataError, OSError), match="No space left on device") as caught:
        repair_data(root.path, tmp_path / "out")
    if what != "check_listing":
        assert re.match(r"annotations.json record \d \(P00\d_S1_F000\d\) cannot be copied", str(caught.value))
        assert not [secret for secret in broken_roots.SECRETS if secret in str(caught.value)]
        assert caught.value.__suppress_context__
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


@pytest.mark.parametrize(("side", "code"), [(1024, "scaled_label"), (1088, "label_size"), (3, "label_size")])
def test_a_label_of_far_more_or_fewer_pixels_is_refused(tmp_path: Path, side: int, code: str) -> None:
    for folder, size in (("images", 64), ("masks", side)):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.eye(size, dtype=np.uint8) * 255).save(tmp_path / folder / "1.png")
    assert code in {finding.code for finding in check_data(tmp_path).findings}
