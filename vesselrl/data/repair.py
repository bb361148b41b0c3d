"""Writes copies of a data root: repaired, without what cannot be mended, or with new and corrected labels.

A copy has masks of two values, outlines and file names of the original; if repaired, upright 8-bit images.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from vesselrl.data.check import DataReport, check_entry, check_listing
from vesselrl.data.dicom import is_dicom, locate
from vesselrl.data.formats import ANNOTATIONS, list_entries
from vesselrl.data.images import is_nifti, read_mask, read_rgb, read_size
from vesselrl.data.pairing import below, fold, list_files, list_images
from vesselrl.data.polygons import Outline, Size, mask_to_polygons, resize_mask, scale_polygons
from vesselrl.data.pseudonyms import LABELS, MAPPING_FILE, Pseudonym, original_names
from vesselrl.data.records import CODES, DataFolder, Entry, Findings, Listing
from vesselrl.data.samples import build_sample, different_images, find_samples, load_image, load_mask
from vesselrl.data.splits import SPLIT_FILE, extend_split, read_split, write_split
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
    _check_new("--fix", out, root)
    listing = list_entries(root, Findings(), **places)
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in listing.entries:
        groups[entry.name].append(entry)
    with atomic_write(out) as copy:
        copy.mkdir()
        mapping = _copy_mapping(listing, copy)
        aliases = listing.pseudonyms(patient_pattern, patient_aliases, mapping=mapping, keep="all")
        write = partial(_write_group, copy, aliases, listing.folder)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            written = list(pool.map(write, groups.values()))
        first: dict[str, WrittenEntry] = {}
        for item in (item for item in written if item.content is not None):
            if (other := first.setdefault(item.digest, item)) is not item:
                item.content = None
                for file in item.files:
                    file.unlink(missing_ok=True)  # a frame is none of its own
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


def _copy_mapping(listing: Listing, copy: Path) -> Path:
    """The mapping file of a copy, which begins as that of the original, if there is one."""
    if listing.folder.mapping_file.exists():
        shutil.copy2(listing.folder.mapping_file, copy / MAPPING_FILE)
    return copy / MAPPING_FILE


def _check_new(option: str, out: Path, *roots: Path) -> None:
    """Refuses a folder for a copy that holds something, or overlaps what is copied."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"The folder of {option} exists and is not empty. Give a new one for the copy.")
    pairs = [(out.resolve(), root.resolve()) for root in roots]
    if any(one.is_relative_to(other) or other.is_relative_to(one) for one, other in pairs):
        raise DataError(f"The folder of {option} overlaps the data root. Give one beside it for the copy.")


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
    rewrite = bool(mended & _REWRITTEN_IMAGES) or is_nifti(first.image_path)
    written.files = _write_pair(copy, first, mask, written.record, rewrite)
    written.content = _content(first, written.files[0], mask)
    return written


def _write_pair(
    copy: Path, entry: Entry, mask: np.ndarray, record: str, rewrite: bool = False
) -> tuple[Path, Path]:
    """Writes image and mask file of an entry; the image as it is, or as it is read; its field of view."""
    image_file = copy / "images" / f"{entry.name}{'.png' if rewrite else entry.image_path.suffix}"
    mask_file, target = copy / "masks" / f"{entry.name}_mask.png", locate(image_file)[0]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if rewrite:
            pixels = read_rgb(entry.image_path, record)
            is_grey = (pixels == pixels[:, :, :1]).all()
            Image.fromarray(pixels[:, :, 0] if is_grey else pixels).save(image_file)
        elif not target.exists():  # a DICOM file of several frames comes with the first of them
            shutil.copyfile(locate(entry.image_path)[0], target)
        _write_mask(mask_file, mask)
        if entry.fov_path is not None:
            _write_mask(copy / "fov" / f"{entry.name}.png", read_mask(entry.fov_path, record))
    except OSError as error:  # its text holds the path
        fault = f"{record} cannot be copied ({error.strerror}). Make room, or give another folder."
        raise DataError(fault) from None
    return image_file, mask_file


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


def _content(entry: Entry, image: Path, mask: np.ndarray) -> dict:
    """The record of `annotations.json`: flat polygons with a text each, and its other fields."""
    polygons = [polygon.ravel().tolist() for polygon in mask_to_polygons(mask)]
    texts = entry.content.get("text")
    texts = texts if isinstance(texts, list) else [texts]
    text = next((item for item in texts if isinstance(item, str) and item.strip()), TEXT)
    is_record = entry.file == ANNOTATIONS and "image" in entry.content
    more = {key: value for key, value in entry.content.items() if is_record and key not in _OWN_FIELDS}
    return {"image": f"{entry.name}{image.suffix}", "mask": polygons, "text": [text] * len(polygons), **more}


def merge_data(
    old: Path | str,
    new: Path | str,
    output: Path | str,
    split_file: Path | str | None = None,
    patient_pattern: str | None = None,
    patient_aliases: Path | str | None = None,
    **places: str | None,
) -> dict[str, Any]:
    """Writes the old data with new labels: masks of `new` go before old ones of the same image.

    `new` is a data root of any layout, or a folder of `<image>_mask.png`. Its names may be pseudonyms that a
    mapping file in it or beside it explains, as in the folders of `predict`. Known patients keep pseudonyms
    and, with `split_file` or data_split.json in `old`, their subset; new ones join the subset that is
    furthest below its share. The other arguments are those of `find_samples` for `old`.

    Gives the numbers of `images`, `corrected` and `added` labels and `new_patients`, and the `split_file`.
    """
    old, new, out, strict = Path(old), Path(new), Path(output), Findings(strict=True)
    _check_new("--output", out, old, new)
    with _of("the old data"):
        listing = list_entries(old, strict, **places)
    with _of("the new labels"):
        names = original_names(new / MAPPING_FILE) or original_names(new.parent / MAPPING_FILE)
        labels = _pair_by_name(_list_labels(new), names, listing)
    with atomic_write(out) as copy:
        copy.mkdir()
        mapping = _copy_mapping(listing, copy)
        whose = patient_pattern, patient_aliases
        # First of the old data alone, so that they are the same.
        before = listing.pseudonyms(*whose, mapping=mapping, keep="all")
        entries = {entry.name: entry for entry in listing.entries} | labels
        joined = replace(listing, entries=[*entries.values()])
        aliases = joined.pseudonyms(*whose, mapping=mapping, keep="all")
        split, split_file = None, split_file or (old / SPLIT_FILE if (old / SPLIT_FILE).exists() else None)
        with _of("the old data"):
            kept = {entry.name: entry for entry in different_images(listing, before, strict)}
            if split_file is not None:
                samples = [build_sample(entry, before[name], strict) for name, entry in kept.items()]
                split = read_split(split_file, samples)
        contents = []
        for name, alias in aliases.items():
            entry = labels.get(name) or kept[name]
            with _of("the new labels" if name in labels else "the old data"):
                sample = build_sample(entry, alias, strict)
                _, mask = load_image(sample), load_mask(sample)
            image, _ = _write_pair(copy, entry, mask, sample.record)
            contents.append(_content(kept.get(name, entry), image, mask))
        if not listing.pairs:
            (copy / ANNOTATIONS).write_text(json.dumps(contents), encoding="utf-8")
        samples = find_samples(copy, patient_pattern, patient_aliases)
        if split is not None:
            write_split(copy / SPLIT_FILE, extend_split(split, samples))
    new_patients = {sample.patient for sample in samples} - {alias.patient for alias in before.values()}
    corrected, added = len(kept.keys() & labels), len(labels.keys() - kept)
    counts = {"images": len(samples), "corrected": corrected, "added": added}
    return {**counts, "new_patients": len(new_patients), "split_file": split and out / SPLIT_FILE}


@contextmanager
def _of(data: str) -> Iterator[None]:
    """Says in errors which of the data they are about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"In {data}: {error}", error.code) from None


def _list_labels(root: Path) -> list[Entry]:
    """The entries of new labels; those of a folder of masks alone have no image."""
    files = list_images(root, deep=False)
    stems = {file.stem for file in files}
    masks = [f for f in files if f.stem.endswith("_mask") and f.stem.removesuffix("_mask") not in stems]
    if not masks or list_files(root, (".json",), deep=False):
        return list_entries(root, Findings(strict=True)).entries
    shown = DataFolder(root).shown
    return [Entry(f.stem.removesuffix("_mask"), shown(f), None, mask_path=f) for f in masks]


def _pair_by_name(entries: list[Entry], names: Mapping[str, str], listing: Listing) -> dict[str, Entry]:
    """New labels by the name of their image in the old data, or their own; `names`: those of pseudonyms."""
    folder, images = listing.folder.image_folder, {}
    images |= {below(path, folder): path for path in listing.images if path.is_relative_to(folder)}
    images |= {entry.name: entry.image_path for entry in listing.entries}
    views = {entry.name: entry.fov_path for entry in listing.entries}
    by_name: dict[str, set[str]] = defaultdict(set)
    for name in images:
        by_name[fold(name)].add(name)
        by_name[fold(PurePosixPath(name).name)].add(name)
        by_name[fold(name.replace("/frame_", "_frame_"))].add(name)  # as results of DICOM frames are called
    found: dict[str, Entry] = {}
    for entry in entries:
        name, fault = names.get(entry.name, entry.name), ""
        name = str(PurePosixPath(name).with_suffix("")) if is_dicom(PurePosixPath(name)) else name
        fits = {name} if name in images else by_name.get(fold(name), {name})
        name = min(fits)
        if len(fits) > 1:
            fault = f"fits {len(fits)} images of the old data. Name it with its folder"
        elif name not in images and LABELS["files"].fullmatch(name):
            fault = f"is called by a pseudonym. Put the {MAPPING_FILE} of the predictions beside the folder"
        elif entry.name in names and name in images and not _are_equal(entry.image_path, images[name]):
            fault = f"shows another image than its {MAPPING_FILE} says. Put that of the predictions beside it"
        elif name in found:
            fault = f"and {found[name].place} are labels of the same image. Keep one of them"
        if fault:
            raise DataError(f"{entry.place} {fault}.")
        image = images.get(name, entry.image_path)
        found[name] = replace(entry, name=name, image_path=image, fov_path=views.get(name))
    return found


def _are_equal(one: Path | None, other: Path) -> bool:
    """Whether two images have the same pixels; the first may not be there."""
    return one is None or np.array_equal(*(read_rgb(path, "an image") for path in (one, other)))
