"""Writes a repaired copy of a data root: what can be mended is, what cannot is left out and listed.

It has upright 8-bit images, masks of two values, outlines where it had some, and the same file names.
"""

import json
import os
import shutil
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vesselrl.data.check import DataReport, check_entry, check_listing
from vesselrl.data.dicom import is_dicom, locate
from vesselrl.data.formats import ANNOTATIONS, list_entries
from vesselrl.data.images import read_mask, read_rgb, read_size
from vesselrl.data.polygons import Outline, Size, mask_to_polygons, resize_mask, scale_polygons
from vesselrl.data.pseudonyms import MAPPING_FILE, Pseudonym
from vesselrl.data.records import CODES, DataFolder, Entry, Findings
from vesselrl.data.samples import load_mask
from vesselrl.errors import DataError
from vesselrl.experiment.run_folder import atomic_write

TEXT = "blood vessel"  # where a record has none
_REWRITTEN_IMAGES = {"rotated_image", "sixteen_bit_image", "alpha_image"}
# A person has to look at these; the copy has them as well.
_KEPT = {"empty_mask", "mostly_foreground"}
# Masks of which `read_mask` may guess the vessel.
_GUESSED = {"non_binary_mask", "ignore_mask", "numbered_mask", "palette_mask", "alpha_mask"}
# No errors, but the label, or the frame it was drawn on, is not sure.
_UNSURE = ("several_frames", "thin_polygon", "traced_twice")
_OWN_FIELDS = {"image", "mask", "text", "imageWidth", "imageHeight", "width", "height"}


@dataclass
class WrittenEntry:
    """One image of the copy."""

    record: str
    findings: Findings = field(default_factory=Findings)
    content: dict | None = None  # for annotations.json; None: it was left out
    files: tuple[Path, ...] = ()
    digest: str = ""


def repair_data(
    root: Path | str,
    out: Path | str,
    patient_pattern: str | None = None,
    patient_aliases: Path | str | None = None,
    **places: str | None,
) -> DataReport:
    """Writes a repaired copy that passes the check, with the same pseudonyms; the data root stays as it is.

    Arguments but for `out` are those of `find_samples`.

    A record is left out where its image or its whole label cannot be known: a broken image, a broken polygon
    (the rest would be a label with a gap), a mask without background, the second of two equal images. The
    report is that of the copy, after a finding for each record that was repaired or left out.
    """
    root, out = Path(root), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError("The folder of --fix exists and is not empty. Give a new one for the repaired copy.")
    inside, outside = out.resolve(), root.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise DataError("The folder of --fix overlaps the data root. Give one beside it for the copy.")
    listing = list_entries(root, Findings(), **places)
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in listing.entries:
        groups[entry.name].append(entry)
    with atomic_write(out) as copy:
        copy.mkdir()
        mapping = copy / MAPPING_FILE
        if listing.folder.mapping_file.exists():
            shutil.copy2(listing.folder.mapping_file, mapping)
        aliases = listing.pseudonyms(patient_pattern, patient_aliases, mapping=mapping, keep="all")
        write = partial(_write_group, copy, aliases, listing.folder)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            written = list(pool.map(write, groups.values()))
        first: dict[str, WrittenEntry] = {}
        for item in (item for item in written if item.content is not None):
            if (other := first.setdefault(item.digest, item)) is not item:
                item.content = None
                for file in item.files:
                    file.unlink()
                item.findings.add("left_out", item.record, why=f"it has the pixels of {other.record}.")
        if not (contents := [item.content for item in written if item.content is not None]):
            raise DataError("Nothing can be repaired: no image is left with a label that is sure.")
        if not listing.pairs:
            (copy / ANNOTATIONS).write_text(json.dumps(contents), encoding="utf-8")
        # Not `check_data`: the alias file may name images that are left out.
        findings = Findings()
        report = check_listing(list_entries(copy, findings), aliases, findings)
        if report.exit_code:
            raise DataError(f"The repaired copy still has faults: {report.of('error')[0].message}")
    done = [finding for item in written for finding in item.findings]
    return replace(report, findings=(*done, *report.findings))


def _write_group(
    copy: Path, aliases: dict[str, Pseudonym], folder: DataFolder, entries: list[Entry]
) -> WrittenEntry:
    """Writes image and mask of the entries of one image, or says why it is left out."""
    first, alias, mask = entries[0], aliases[entries[0].name], False
    written = WrittenEntry(first.record(alias))
    mended = {"duplicate_record"} if len(entries) > 1 else set()
    try:
        # Two files of one name, such as a.png and a.jpg, are two images: the first is kept.
        for entry in (entry for entry in entries if entry.image_path == first.image_path):
            label, codes, written.digest = _read_label(entry, alias, folder)
            mask = mask | label
            mended |= codes - _KEPT
        if mask.all():
            raise DataError("its mask is all foreground.")
        if "few_points" in mended and not mask.any():
            raise DataError("nothing that was drawn encloses an area.")
    except DataError as error:
        written.findings.add("left_out", written.record, first.file, why=error)
        return written
    if is_dicom(first.image_path):  # copied as it is: its header says whose it is
        mended -= _REWRITTEN_IMAGES
    if mended:
        what = "; ".join(CODES[code] for code in sorted(mended))
        written.findings.add("repaired", written.record, first.file, severity="info", what=what)
    rewrite = bool(mended & _REWRITTEN_IMAGES)
    image_file = copy / "images" / f"{first.name}{'.png' if rewrite else first.image_path.suffix}"
    mask_file, (source, frame) = copy / "masks" / f"{first.name}_mask.png", locate(first.image_path)
    target = locate(image_file)[0] if frame else image_file
    written.files = (mask_file,) if frame else (mask_file, image_file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if rewrite:
            pixels = read_rgb(first.image_path, written.record)
            is_grey = (pixels == pixels[:, :, :1]).all()
            Image.fromarray(pixels[:, :, 0] if is_grey else pixels).save(image_file)
        elif not target.exists():
            shutil.copyfile(source, target)
        _write_mask(mask_file, mask)
        if first.fov_path is not None:
            _write_mask(copy / "fov" / f"{first.name}.png", read_mask(first.fov_path, written.record))
    except OSError as error:  # its text holds the path
        fault = f"{written.record} cannot be copied ({error.strerror}). Make room, or give another folder."
        raise DataError(fault) from None
    written.content = _content(first, image_file.relative_to(copy / "images").as_posix(), mask)
    return written


def _write_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def _read_label(entry: Entry, alias: Pseudonym, folder: DataFolder) -> tuple[np.ndarray, set[str], str]:
    """The whole label of an entry, the codes of what was found, and the digest of its image."""
    checked = check_entry(entry, alias, folder)
    faults, codes = checked.findings.of("error"), {finding.code for finding in checked.findings}
    unsure = [finding for code in _UNSURE for finding in checked.findings.of(code)]
    if not faults and not unsure:
        return load_mask(checked.sample), codes, checked.digest
    kinds = {fault.code for fault in (*faults, *unsure)}
    if checked.digest and kinds == {"shares"}:
        scaled = replace(entry, read_label=partial(_read_shares, entry), label_size=None)
        mask, more, digest = _read_label(scaled, alias, folder)
        return mask, codes | more, digest
    if checked.digest and entry.mask_path is not None and len(kinds) == 1 and kinds <= _GUESSED:
        try:
            mask = read_mask(entry.mask_path, entry.record(alias), guess=True)
            return resize_mask(mask, read_size(entry.image_path, "")[::-1]), codes, checked.digest
        except DataError as error:
            faults = [replace(faults[0], message=str(error))]
    if checked.digest and entry.mask_path is not None and entry.read_label is not None:
        mask, more, digest = _read_label(replace(entry, mask_path=None), alias, folder)
        if mask.any():
            return mask, codes | more, digest
    fault = (*faults, *unsure)[0]
    raise DataError(fault.message, fault.code)


def _read_shares(entry: Entry, size: Size, record: str, findings: Findings) -> list[Outline]:
    """Outlines in shares of an image, as if they were drawn on one pixel, in px."""
    return list(scale_polygons(entry.read_label((1, 1), record, findings), (1, 1), size))


def _content(entry: Entry, image: str, mask: np.ndarray) -> dict:
    """The record of `annotations.json`: flat polygons with a text each, and its other fields."""
    polygons = [polygon.ravel().tolist() for polygon in mask_to_polygons(mask)]
    texts = entry.content.get("text")
    texts = texts if isinstance(texts, list) else [texts]
    text = next((item for item in texts if isinstance(item, str) and item.strip()), TEXT)
    is_record = entry.file == ANNOTATIONS and "image" in entry.content
    more = {key: value for key, value in entry.content.items() if is_record and key not in _OWN_FIELDS}
    return {"image": image, "mask": polygons, "text": [text] * len(polygons), **more}
