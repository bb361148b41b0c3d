"""The repaired copy passes the check, keeps what is sound, and the data root stays as it was."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.broken_roots import NAMES, PLANTED, SECRETS, Root, edited, write_root
from tests.golden.broken_input import LAYOUTS, WHOLE, bars, deepen
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
# Faults after which the mask is another one.
OTHER_MASK = {"empty", "empty mask", "inverted mask", "soft mask", "disagreement"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def repaired(root: Root) -> DataReport:
    """Repairs a root into `out` beside it, and checks what holds for every repair."""
    before, out = contents(root.path), root.path.parent / "out"
    out.mkdir()
    mode = out.stat().st_mode
    report = repair_data(root.path, out)
    assert contents(root.path) == before
    assert report.root == out
    assert set(out.parent.iterdir()) == {root.path, out}
    assert out.stat().st_mode == mode
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
    root = write_root(tmp_path, layout)
    report = repaired(root)
    assert {f.code for f in report.findings} == ({"repaired"} if layout == "nested" else set())
    names = [root.image(number).stem for number in range(4)]
    found = masks(tmp_path / "out")
    assert sorted(found) == sorted(names)
    for number, name in enumerate(names):
        assert (found[name] == bars(number)).all()
        # Not a single byte of a sound image changes.
        (copied,) = (tmp_path / "out" / "images").glob(f"{name}.*")
        assert copied.read_bytes() == root.image(number).read_bytes()


@pytest.mark.parametrize(("layout", "name"), PLANTED)
def test_planted_fault(tmp_path: Path, layout: str, name: str) -> None:
    root = write_root(tmp_path, layout, name)
    report = repaired(root)
    lost = name in LOST or (name in LOST_WITHOUT_POLYGONS and layout != "both")
    assert report.counts["images"] == (3 if lost else 4)
    found = masks(tmp_path / "out")
    for number in range(4) if name != "same pixels" else ():
        if number != 1 or not (lost or name in OTHER_MASK):
            assert (found[root.image(number).stem] == bars(number)).all()


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


def test_images_are_written_upright_with_eight_bits(tmp_path: Path) -> None:
    root = write_root(tmp_path, "annotations", "turned")
    with Image.open(root.image(0)) as image:
        deepen(image).save(root.image(0))
    with Image.open(root.image(2)) as image:
        image.convert("RGBA").save(root.image(2))
    before = {sample.image_path.stem: load_image(sample) for sample in find_samples(root.path)}
    repaired(root)
    for sample in find_samples(tmp_path / "out"):
        with Image.open(sample.image_path) as image:
            assert image.mode == "L"
            assert not image.getexif()
        assert (load_image(sample) == before[sample.image_path.stem]).all()


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


def test_an_alias_file_may_name_what_is_left_out(tmp_path: Path, aliases) -> None:
    root, (one, two, three) = write_root(tmp_path, "annotations"), (f"{name},x" for name in NAMES[:3])
    before = keys(root.path, aliases(one, two, three))
    root.set_outlines([[1, 1, 9, 1, 9]])
    report = repair_data(root.path, tmp_path / "out", patient_aliases=aliases(one, two, three))
    assert (report.exit_code, report.counts["images"], report.counts["patients"]) == (0, 3, 2)
    assert set(report.foreground) == {before[NAMES[number]] for number in (0, 2, 3)}
    assert set(keys(tmp_path / "out", aliases(one, three)).values()) == set(report.foreground)


def test_what_is_refused_leaves_everything_as_it_was(tmp_path: Path) -> None:
    root = write_root(tmp_path / "around", "annotations")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    texts = (root.file.read_text(), re.sub(r"\[\[.*?\]\]", json.dumps([WHOLE]), root.file.read_text()), "[{")
    for text, out, message in (
        *[
            (texts[0], out, "exists and is not empty")
            for out in ("full", "full/notes.txt", "around/root", "around")
        ],
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
        assert not [secret for secret in SECRETS if secret in str(caught.value)]
        assert caught.value.__suppress_context__
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
