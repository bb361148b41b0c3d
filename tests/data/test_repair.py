"""The repaired copy passes the check, keeps what is sound, and the data root stays as it was."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.broken_roots import LAYOUTS, NAMES, SECRETS, WHOLE, Root, draw_mask, faults, write_root
from vesselrl.data import repair
from vesselrl.data.check import DataReport, check_data, render

from vesselrl.data.repair import repair_data
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.errors import DataError

# Faults that leave nothing to mend: the image, or the whole label, cannot be known.
LOST = {
    *("missing", "unreadable", "truncated", "same pixels", "odd length", "outside", "not finite"),
    *("other proportions", "size of words", "all foreground", "white mask", "broken run lengths"),
}
# Without polygons the label is lost as well.
LOST_WITHOUT_POLYGONS = {"cut mask", "unreadable mask"}


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def repaired(root: Root, out: Path) -> DataReport:
    """Repairs a root and checks what holds for every repair."""
    before = digests(root.path)
    report = repair_data(root.path, out)
    assert digests(root.path) == before
    assert report.root == out
    assert set(out.parent.iterdir()) == {root.path, out}
    shown = render(report, limit=0) + report.to_json()
    assert not [secret for secret in SECRETS if secret in shown]
    again = check_data(out)
    assert report.exit_code == again.exit_code == 0
    assert {finding.code for finding in again.findings} <= {"empty_mask", "mostly_foreground"}
    return report


def masks(root: Path) -> dict[str, np.ndarray]:
    return {sample.image_path.stem: load_mask(sample) for sample in find_samples(root)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_data_is_copied(tmp_path: Path, layout: str) -> None:
    root = write_root(tmp_path / "root", layout)
    report = repaired(root, tmp_path / "out")
    assert {f.code for f in report.findings} == ({"repaired"} if layout == "nested" else set())
    names = [root.image(number).stem for number in range(4)]
    found = masks(tmp_path / "out")
    assert sorted(found) == sorted(names)
    for number, name in enumerate(names):
        assert (found[name] == draw_mask(number)).all()
        # Not a single byte of a sound image changes.
        (copied,) = (tmp_path / "out" / "images").glob(f"{name}.*")
        assert copied.read_bytes() == root.image(number).read_bytes()


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout in LAYOUTS for name in faults(layout)]
)
def test_planted_fault(tmp_path: Path, layout: str, name: str) -> None:
    root = write_root(tmp_path / "root", layout)
    faults(layout)[name][0](root, 2)
    report = repaired(root, tmp_path / "out")
    lost = name in LOST or (name in LOST_WITHOUT_POLYGONS and layout != "both")
    assert report.counts["images"] == (3 if lost else 4)
    found = masks(tmp_path / "out")
    same = {"empty", "empty mask", "inverted mask"}
    for number in range(4) if name != "same pixels" else ():
        stem = root.image(number).stem
        if number == 2 and (lost or name in same):
            continue
        assert (found[stem] == draw_mask(number)).all()


@pytest.mark.parametrize("layout", ["annotations", "labelme", "coco"])
def test_records_are_written_flat_with_a_text_each(tmp_path: Path, layout: str) -> None:
    root = write_root(tmp_path / "root", layout)
    nested = {
        "text": "artery",
        "conversations": ["kept"],
        "mask": [[polygon] for polygon in root.polygons(0)],
    }
    if layout == "annotations":
        root.change(0, lambda content: content.update(nested))
    repaired(root, tmp_path / "out")
    records = json.loads((tmp_path / "out" / "annotations.json").read_text())
    names = sorted(NAMES) if layout == "labelme" else NAMES
    assert [record["image"] for record in records] == [f"{name}.png" for name in names]
    for record in records:
        assert all(isinstance(value, float) for polygon in record["mask"] for value in polygon)
        assert len(record["text"]) == len(record["mask"])
    if layout == "annotations":
        assert (set(records[0]["text"]), records[0]["conversations"]) == ({"artery"}, ["kept"])


def test_images_are_written_upright_with_eight_bits(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", "annotations")
    faults("annotations")["16 bits"][0](root, 0)
    faults("annotations")["turned"][0](root, 1)
    faults("annotations")["RGBA"][0](root, 2)
    before = {sample.image_path.stem: load_image(sample) for sample in find_samples(root.path)}
    repaired(root, tmp_path / "out")
    for sample in find_samples(tmp_path / "out"):
        with Image.open(sample.image_path) as image:
            assert image.mode == "L"
            assert not image.getexif()
        assert (load_image(sample) == before[sample.image_path.stem]).all()


def test_two_records_of_one_image_are_joined(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", "annotations")
    records = json.loads(root.file.read_text())
    records.append(records[1] | {"mask": [[0, 60, 9, 60, 9, 64, 0, 64]]})
    root.file.write_text(json.dumps(records))
    repaired(root, tmp_path / "out")
    expected = draw_mask(1)
    expected[60:64, 0:9] = True
    assert (masks(tmp_path / "out")[NAMES[1]] == expected).all()


def test_polygons_stand_in_for_a_broken_mask_file(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", "both")
    root.mask(1).write_text("no mask")
    root.mask(3).write_text("no mask")
    root.set_label(3, [])  # nothing to stand in: an unreadable mask is not an empty one
    report = repaired(root, tmp_path / "out")
    assert (masks(tmp_path / "out")[NAMES[1]] == draw_mask(1)).all()
    assert [f.record.split(" (")[0] for f in report.findings if f.code == "left_out"] == [root.place(3)]


def test_masks_of_two_values_are_not_thresholded_by_half(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", "masks")
    Image.fromarray(draw_mask(0).astype(np.uint8) * 7).save(root.mask(0))
    soft = np.where(draw_mask(1), 200, 100).astype(np.uint8)
    Image.fromarray(soft).save(root.mask(1))
    red = np.zeros((64, 64, 3), np.uint8)
    red[draw_mask(2)] = (255, 0, 0)
    Image.fromarray(red).save(root.mask(2))
    repaired(root, tmp_path / "out")
    for number in range(3):
        assert (masks(tmp_path / "out")[NAMES[number]] == draw_mask(number)).all()


# ---- Pseudonyms


def keys(root: Path, aliases: Path | None = None) -> dict[str, str]:
    """Key by name of the image."""
    return {s.image_path.stem: s.key for s in find_samples(root, patient_aliases=aliases)}


def check_keys(report: DataReport, before: dict[str, str], out: Path, lost: str) -> None:
    """The report, the copy and the data root call every image the same."""
    after = keys(out)
    assert after.items() == {name: key for name, key in before.items() if name != lost}.items()
    assert set(report.foreground) == set(after.values())
    (left_out,) = (finding for finding in report.findings if finding.code == "left_out")
    assert f"({before[lost]})" in left_out.record


@pytest.mark.parametrize("kind", ["known", "new", "impersonal"])
@pytest.mark.parametrize("number", range(4))
def test_the_copy_has_the_pseudonyms_of_the_data_root(tmp_path: Path, kind: str, number: int) -> None:
    """Whichever image is left out, and whether the data root has a mapping file, none yet, or needs none."""
    root, fresh = (write_root(tmp_path / name, "annotations") for name in ("root", "fresh"))
    lost = NAMES[number]
    for index in range(4 if kind == "impersonal" else 0):
        root.image(index).rename(root.path / "images" / f"train_{index:03}.png")
        root.change(index, lambda record, index=index: record.update(image=f"train_{index:03}.png"))
        lost = f"train_{number:03}"
    before = keys((fresh if kind == "new" else root).path)
    faults("annotations")["odd length"][0](root, number)
    report = repair_data(root.path, tmp_path / "out")
    assert (root.path / "patients.mapping.json").exists() == (kind == "known")
    check_keys(report, before, tmp_path / "out", lost)


def test_an_alias_file_may_name_what_is_left_out(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", "annotations")
    aliases = tmp_path / "aliases.csv"
    aliases.write_text(f"file_name,patient\n{NAMES[0]},x\n{NAMES[1]},x\n{NAMES[2]},x\n")
    before = keys(root.path, aliases)
    faults("annotations")["odd length"][0](root, 1)
    report = repair_data(root.path, tmp_path / "out", patient_aliases=aliases)
    assert (report.exit_code, report.counts["images"], report.counts["patients"]) == (0, 3, 2)
    assert set(report.foreground) == {before[NAMES[number]] for number in (0, 2, 3)}
    aliases.write_text(f"file_name,patient\n{NAMES[0]},x\n{NAMES[2]},x\n")
    assert set(keys(tmp_path / "out", aliases).values()) == set(report.foreground)


# ---- The folder of the copy


def test_a_folder_with_content_and_one_in_or_around_the_data_root_are_refused(tmp_path: Path) -> None:
    root = write_root(tmp_path / "around" / "root", "masks")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = digests(tmp_path)
    for out in (tmp_path / "out", tmp_path / "out" / "notes.txt", root.path, tmp_path / "around"):
        with pytest.raises(DataError, match="exists and is not empty"):
            repair_data(root.path, out)
    with pytest.raises(DataError, match="overlaps the data root"):
        repair_data(root.path, root.path / "out")
    assert digests(tmp_path) == before


def test_an_empty_folder_is_used_and_can_be_read_by_others(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", "masks")
    (tmp_path / "out").mkdir()
    mode = (tmp_path / "out").stat().st_mode
    repaired(root, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == mode


def test_an_interrupted_repair_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_root(tmp_path / "root", "annotations")
    before = digests(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repair, "_drop_copies", full)
    with pytest.raises(OSError, match="No space"):
        repair_data(root.path, tmp_path / "out")
    assert digests(tmp_path) == before


@pytest.mark.parametrize("what", ["copyfile", "save"])
def test_a_full_disk_is_reported_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    root = write_root(tmp_path / "root", "annotations")

    def full(*args: object, **_: object) -> None:
        raise OSError(28, "No space left on device", str(args[1]))

    monkeypatch.setattr(*((repair.shutil, what) if what == "copyfile" else (Image.Image, what)), full)
    with pytest.raises(DataError, match=r"cannot be copied \(No space left on device\)") as caught:
        repair_data(root.path, tmp_path / "out")
    assert re.match(r"annotations.json record \d \(P00\d_S1_F000\d\)", str(caught.value))
    assert not [secret for secret in SECRETS if secret in str(caught.value)]
    assert caught.value.__suppress_context__
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_nothing_to_repair(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", "annotations")
    for number in range(4):
        root.set_label(number, [WHOLE])
    with pytest.raises(DataError, match="no image is left with a label"):
        repair_data(root.path, tmp_path / "out")
    root.file.write_text("[{")
    with pytest.raises(DataError, match="not valid JSON"):
        repair_data(root.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
