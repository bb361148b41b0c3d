"""Writes a repaired copy of a data root: what can be mended is, what cannot is left out and listed.

The copy has `images/`, `masks/<stem>_mask.png`, and `annotations.json` with the same masks as polygons where
the data root had outlines. File names stay, because they tell the patients apart. Mended are:

- images of 16 bits, with alpha or turned by EXIF: written upright as 8-bit PNG;
- labels of another size than their image: drawn in the size of the image;
- masks with more than two values: thresholded at half of the range;
- polygons with fewer than three points: left out, as they enclose nothing;
- nested polygons, texts of the wrong form or number: written flat, one text for each polygon;
- polygons that differ from the mask file: drawn anew from the mask file;
- two records of one image: joined; two images with the same pixels: the first is kept.

A record is left out where its image or its whole label cannot be known: a broken image, a broken polygon (the
rest would be a label with a gap), a mask without background.
"""

import json
import shutil
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from os import cpu_count
from pathlib import Path

import numpy as np
from PIL import Image

from vesselrl.data.annotations import list_entries, load_mask, name_patients
from vesselrl.data.check import check_entry, check_listing
from vesselrl.data.entries import Entry, FileNames
from vesselrl.data.findings import CODES, DataReport, Finding, Findings
from vesselrl.data.images import read_rgb, read_size, threshold_mask
from vesselrl.data.patients import Pseudonym
from vesselrl.data.polygons import mask_to_polygons, resize_mask
from vesselrl.data.privacy import MAPPING_FILE
from vesselrl.data.record_list import FILE
from vesselrl.errors import DataError

TEXT = "blood vessel"  # where a record has none
_REWRITTEN_IMAGES = {"rotated_image", "sixteen_bit_image", "alpha_image"}
# A person has to look at these; the copy has them as well.
_KEPT = {"empty_mask", "mostly_foreground"}
_OWN_FIELDS = {"image", "mask", "text", "imageWidth", "imageHeight", "width", "height"}


@dataclass
class WrittenEntry:
    """One image of the copy."""

    findings: list[Finding]
    # For annotations.json; None: it was left out.
    content: dict | None = None
    files: tuple[Path, ...] = ()
    digest: str = ""
    record: str = ""


def repair_data(
    root: Path | str,
    out: Path | str,
    patient_pattern: str | None = None,
    patient_aliases: Path | str | None = None,
) -> DataReport:
    """Writes a repaired copy that passes the check; the data root stays as it is.

    A mapping file of pseudonyms goes with it, so that those of the images stay the same though some are left
    out. The copy appears under its name only when it is complete.

    Args:
        root: data root in any layout that `find_samples` reads.
        out: folder for the copy; it must not exist, or be empty.
        patient_pattern: as for `find_samples`.
        patient_aliases: as for `find_samples`.

    Returns:
        The check of the copy, after a finding for each record that was repaired or left out; pseudonyms are
        those of the copy everywhere.

    Raises:
        DataError: `out` is not empty or overlaps the data root, the list of records cannot be read, an image
            cannot be copied, or nothing usable is left.
    """
    root, out = Path(root), Path(out)
    _check_target(root, out)
    listing = list_entries(root, Findings())
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in listing.entries:
        groups[entry.name].append(entry)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial_copy = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        mapping = partial_copy / MAPPING_FILE
        if (root / MAPPING_FILE).exists():
            shutil.copy2(root / MAPPING_FILE, mapping)
        aliases = name_patients(listing, patient_pattern, patient_aliases, mapping, keep="all")
        write = partial(_write_group, partial_copy, aliases, FileNames(root))
        with ThreadPoolExecutor(cpu_count()) as pool:
            written = list(pool.map(write, groups.values()))
        _drop_copies(written)
        contents = [item.content for item in written if item.content is not None]
        if not contents:
            raise DataError(f"Nothing in {root} can be repaired: no image is left with a label that is sure.")
        if not listing.pairs:
            (partial_copy / FILE).write_text(json.dumps(contents), encoding="utf-8")
        # Not `check_data`: the alias file may name images that are left out.
        findings = Findings()
        report = check_listing(partial_copy, list_entries(partial_copy, findings), aliases, findings)
        if report.exit_code:
            raise DataError(f"The repaired copy still has faults: {report.of('error')[0].message}")
        partial_copy.chmod(0o755)
        if out.exists():
            out.rmdir()
        partial_copy.rename(out)
    finally:
        shutil.rmtree(partial_copy, ignore_errors=True)
    done = [finding for item in written for finding in item.findings]
    return replace(report, root=out, findings=(*done, *report.findings))


def _check_target(root: Path, out: Path) -> None:
    """Refuses a folder with content, and one inside the data root or around it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty. Give a new folder for the repaired copy.")
    inside, outside = out.resolve(), root.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise DataError(
            f"{out} overlaps the data root {root}. Give a folder beside it for the repaired copy."
        )


def _write_group(
    copy: Path, aliases: dict[str, Pseudonym], shown: FileNames, entries: list[Entry]
) -> WrittenEntry:
    """Writes image and mask of the entries of one image, or says why it is left out."""
    first = entries[0]
    record, findings = first.record(aliases[first.name]), Findings(file=first.file)
    # Two files of one name, such as a.png and a.jpg, are two images: the first is kept.
    same = [entry for entry in entries if entry.image_path == first.image_path]
    mended = {"duplicate_record"} if len(entries) > 1 else set()
    masks, digest = [], ""
    for entry in same:
        try:
            mask, codes, digest = _read_label(entry, aliases[entry.name], shown)
        except DataError as error:
            findings.warning("left_out", f"{record} is left out: {error}", record)
            return WrittenEntry(findings.items)
        masks.append(mask)
        mended |= codes
    mask = np.logical_or.reduce(masks)
    if mask.all():
        findings.warning("left_out", f"{record} is left out: its mask is all foreground.", record)
        return WrittenEntry(findings.items)
    if mended - _KEPT:
        words = "; ".join(CODES[code] for code in sorted(mended - _KEPT))
        findings.info("repaired", f"{record}: repaired: {words}.", record)

    mask_file = copy / "masks" / f"{first.name}_mask.png"
    try:
        image_file = _write_image(first, copy, record, bool(mended & _REWRITTEN_IMAGES))
        mask_file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8) * 255).save(mask_file)
    except OSError as error:  # its text holds the path
        message = f"{record} cannot be copied ({error.strerror}). Make room, or give another folder."
        raise DataError(message) from None
    content = _content(first, image_file.relative_to(copy / "images").as_posix(), mask)
    return WrittenEntry(findings.items, content, (image_file, mask_file), digest, record)


def _read_label(entry: Entry, alias: Pseudonym, shown: FileNames) -> tuple[np.ndarray, set[str], str]:
    """The whole label of an entry, the codes of what was found, and the digest of its image.

    Raises:
        DataError: image or label cannot be known; the first of its errors.
    """
    checked = check_entry(entry, alias, shown)
    errors = [finding for finding in checked.findings if finding.severity == "error"]
    codes = {finding.code for finding in checked.findings}
    if not errors:
        return load_mask(checked.sample), codes, checked.digest
    record = entry.record(alias)
    if checked.digest and {error.code for error in errors} == {"non_binary_mask"}:
        width, height = read_size(entry.image_path, record)
        return resize_mask(threshold_mask(entry.mask_path, record), (height, width)), codes, checked.digest
    if checked.digest and entry.mask_path is not None and entry.read_label is not None:
        mask, more, digest = _read_label(replace(entry, mask_path=None), alias, shown)
        if mask.any():
            return mask, codes | more, digest
    raise DataError(errors[0].message, errors[0].code)


def _write_image(entry: Entry, copy: Path, record: str, rewrite: bool) -> Path:
    """Copies an image file, or writes its pixels upright as 8-bit PNG."""
    suffix = ".png" if rewrite else entry.image_path.suffix
    path = copy / "images" / f"{entry.name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not rewrite:
        shutil.copyfile(entry.image_path, path)
        return path
    pixels = read_rgb(entry.image_path, record)
    is_grey = (pixels == pixels[:, :, :1]).all()
    Image.fromarray(pixels[:, :, 0] if is_grey else pixels).save(path)
    return path


def _content(entry: Entry, image: str, mask: np.ndarray) -> dict:
    """The record of `annotations.json`: flat polygons with a text each, and its other fields."""
    polygons = [polygon.ravel().tolist() for polygon in mask_to_polygons(mask)]
    text = entry.content.get("text")
    texts = [text] if isinstance(text, str) else text if isinstance(text, list) else []
    text = next((item for item in texts if isinstance(item, str) and item.strip()), TEXT)
    is_record = entry.file == FILE and "image" in entry.content
    fields = entry.content.items() if is_record else ()
    more = {key: value for key, value in fields if key not in _OWN_FIELDS}
    return {"image": image, "mask": polygons, "text": [text] * len(polygons), **more}


def _drop_copies(written: list[WrittenEntry]) -> None:
    """Removes images whose pixels an earlier image has already."""
    first: dict[str, str] = {}
    for item in written:
        if item.content is None:
            continue
        if item.digest in first:
            for file in item.files:
                file.unlink()
            item.content = None
            message = f"{item.record} is left out: it has the same pixels as {first[item.digest]}."
            item.findings.append(Finding("warning", "left_out", "", item.record, message))
        first.setdefault(item.digest, item.record)
