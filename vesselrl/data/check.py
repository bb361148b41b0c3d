"""Looks at every record, image and mask of a data root and lists all faults in one go.

What is an error here is an error in training as well: both read through the same steps of
`vesselrl.data.annotations`. Nothing is written, the mapping file of pseudonyms neither: training gives the
same ones. `vesselrl.data.repair` writes a repaired copy.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from vesselrl.data.annotations import (
    Sample,
    build_sample,
    draw,
    is_repeated,
    list_entries,
    load_mask,
    name_patients,
    read_outlines,
)
from vesselrl.data.entries import LABEL_ENDINGS, Entry, FileNames, Listing
from vesselrl.data.findings import DataReport, Finding, Findings
from vesselrl.data.images import read_rgb, read_traits
from vesselrl.data.patients import Pseudonym
from vesselrl.data.privacy import MAPPING_FILE
from vesselrl.errors import DataError

MIN_AGREEMENT = 0.98  # Dice of a mask file with the polygons of its image


@dataclass(frozen=True)
class CheckedEntry:
    """What was found out about one entry."""

    findings: list[Finding]
    # Where the entry stands.
    file: str
    # None: an error keeps it from being used.
    sample: Sample | None
    # Share of the image that is vessel; None where the mask cannot be read.
    foreground: float | None = None
    # Dice of mask file and polygons; None where there is only one of them.
    agreement: float | None = None
    # Of the decoded pixels; empty where the image cannot be decoded.
    digest: str = ""


def check_data(
    root: Path | str,
    patient_pattern: str | None = None,
    patient_aliases: Path | str | None = None,
    mapping: Path | str | None = None,
    num_threads: int | None = None,
) -> DataReport:
    """All faults of a data root; every image and every mask is decoded.

    Args:
        root: data root in any layout that `find_samples` reads.
        patient_pattern: as for `find_samples`.
        patient_aliases: as for `find_samples`.
        mapping: as for `find_samples`, but only read.
        num_threads: how many files are read at the same time; None: one per core.
    """
    root, findings = Path(root), Findings()
    try:
        listing = list_entries(root, findings)
    except DataError as error:
        findings.caught(error)
        return DataReport(root, "", tuple(findings))
    try:
        mapping = mapping or root / MAPPING_FILE
        aliases = name_patients(listing, patient_pattern, patient_aliases, mapping, keep="nothing")
    except DataError as error:
        findings.caught(error, code="patients")
        return DataReport(root, listing.layout, tuple(findings))
    if patient_pattern is None:
        _check_folders(aliases, findings)
    return check_listing(root, listing, aliases, findings, num_threads)


def foreground_shares(root: Path | str, **names: str | None) -> dict[str, float] | None:
    """By key, the foreground shares that training stratifies its split by; None where a fault would stop it.

    Args:
        root: data root.
        **names: patient_pattern and patient_aliases, as for `find_samples`.
    """
    report = check_data(root, **names)
    return None if report.exit_code else report.foreground


def check_listing(
    root: Path,
    listing: Listing,
    aliases: Mapping[str, Pseudonym],
    findings: Findings,
    num_threads: int | None = None,
) -> DataReport:
    """The report of a data root whose entries are listed and named already.

    Args:
        root: data root.
        listing: its entries.
        aliases: pseudonym by name of entry.
        findings: what was found so far; more is added.
        num_threads: as for `check_data`.
    """
    shown = FileNames(root)
    first_places: dict[str, str] = {}
    entries = []
    for entry in listing.entries:
        repeats = Findings(file=entry.file)
        if not is_repeated(entry, aliases[entry.name], first_places, repeats):
            entries.append(entry)
        findings.extend(repeats)
    check = partial(_check_named, aliases, shown)
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        checked = list(pool.map(check, entries))
    for result in checked:
        findings.extend(result.findings)
    _check_left_over(listing, shown, findings)
    _check_duplicates(checked, findings)
    _check_classes(entries, findings)
    agreement = _check_agreement(checked, findings)
    counts = _count(checked, findings)
    foreground = {result.sample.key: result.foreground for result in checked if result.sample is not None}
    return DataReport(root, listing.layout, tuple(findings), counts, agreement, foreground)


def check_entry(entry: Entry, alias: Pseudonym, shown: FileNames) -> CheckedEntry:
    """Reads one image and its label completely."""
    record = entry.record(alias)
    findings = Findings(file=entry.file)
    sample = build_sample(entry, alias, findings)
    mask_file = shown.shown(entry.mask_path) if entry.mask_path else entry.file
    findings.items = [_name_file(item, entry, shown, mask_file) for item in findings]
    _check_text(entry, record, findings)
    digest = ""
    if entry.image_path is not None and not findings.of("unreadable_image"):
        digest = _check_image(entry.image_path, record, shown.shown(entry.image_path), findings)
    if sample is None:
        return CheckedEntry(findings.items, entry.file, None, digest=digest)
    try:
        mask = load_mask(sample)
    except DataError as error:
        code = "unreadable_mask" if error.code == "unreadable_image" else error.code
        findings.caught(error, record, mask_file, code)
        return CheckedEntry(findings.items, entry.file, None, digest=digest)
    foreground = _check_share(mask, record, mask_file, findings)
    agreement = None
    if entry.mask_path is not None and entry.read_label is not None:
        agreement = _compare_with_outlines(entry, mask, record, findings)
    usable = sample if digest else None
    return CheckedEntry(findings.items, entry.file, usable, foreground, agreement, digest)


def _check_named(aliases: Mapping[str, Pseudonym], shown: FileNames, entry: Entry) -> CheckedEntry:
    return check_entry(entry, aliases[entry.name], shown)


# ---- One entry


def _name_file(item: Finding, entry: Entry, shown: FileNames, mask_file: str) -> Finding:
    """The finding with the image or the mask file that it is about."""
    if item.code == "unreadable_image":
        return replace(item, file=shown.shown(entry.image_path))
    about_mask = item.code in ("unreadable_mask", "label_size", "scaled_label")
    return replace(item, file=mask_file) if about_mask else item


def _check_image(path: Path, record: str, file: str, findings: Findings) -> str:
    """The digest of the pixels; empty where they cannot be decoded."""
    try:
        traits = read_traits(path, f"{record}: image")
        pixels = read_rgb(path, f"{record}: image")
    except DataError as error:
        findings.caught(error, record, file)
        return ""
    if traits.orientation != 1:
        message = (
            f"{record}: the image is turned by its EXIF orientation {traits.orientation}. "
            "Make sure that its label was drawn on the turned image."
        )
        findings.warning("rotated_image", message, record, file)
    if traits.deep:
        message = (
            f"{record}: the image has 16 bits per pixel and becomes 8 by its full range; its brightest value "
            f"is {pixels.max()} of 255 then. Save it with 8 bits in the window you label in."
        )
        findings.warning("sixteen_bit_image", message, record, file)
    if traits.alpha:
        message = (
            f"{record}: the image has an alpha channel ({traits.mode}), which is dropped. Save it without."
        )
        findings.warning("alpha_image", message, record, file)
    return hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).hexdigest()


def _check_share(mask: np.ndarray, record: str, file: str, findings: Findings) -> float:
    """The share of foreground, with a warning where it is no share of vessels."""
    share = float(mask.mean())
    if share == 0:
        message = f"{record}: the mask is empty. Keep it only if the image shows no vessel."
        findings.warning("empty_mask", message, record, file)
    elif share == 1:
        message = f"{record}: the mask is all foreground. Label it again, or remove the record."
        findings.warning("all_foreground", message, record, file)
    elif share > 0.5:
        message = f"{record}: {share:.0%} of the mask is foreground. Is it inverted, or a field of view?"
        findings.warning("mostly_foreground", message, record, file)
    return share


def _check_text(entry: Entry, record: str, findings: Findings) -> None:
    """Whether `text` is a list with a text for each object of `mask`; training does not read it."""
    text, mask = entry.content.get("text", []), entry.content.get("mask")
    objects = [item for item in mask if isinstance(item, list)] if isinstance(mask, list) else []
    if any(isinstance(part, list) for item in objects for part in item[:1]):
        findings.info("nested_mask", f"{record}: polygons are nested one level deeper, by object.", record)
    if "text" not in entry.content:
        return
    if isinstance(text, str):
        message = f"{record}: 'text' is one string, not a list; it stands for all polygons."
        findings.info("text_string", message, record)
    elif not isinstance(text, list) or not all(isinstance(item, str) for item in text):
        message = f"{record}: 'text' is no list of texts. Training ignores it; correct it for other programs."
        findings.warning("bad_text", message, record)
    elif isinstance(mask, list) and len(text) != len(mask) and mask:
        numbers = f"{record}: {len(text)} texts for {len(mask)} objects in 'mask'"
        if len(text) == 1:
            # The usual form; a program that pairs texts with objects sees the first object only.
            findings.info("text_length", f"{numbers}; all objects are one target.", record)
        else:
            message = f"{numbers}. Training joins all objects; correct it for other programs."
            findings.warning("text_length", message, record)


def _compare_with_outlines(entry: Entry, mask: np.ndarray, record: str, findings: Findings) -> float | None:
    """Dice of the mask file with the outlines, which are not used; their faults are warnings."""
    unused = Findings(file=entry.file)
    height, width = mask.shape
    outlines = read_outlines(entry, (width, height), record, unused)
    for item in unused:
        message = f"{item.message} Not used: the mask file goes first."
        findings.extend([replace(item, severity="warning", message=message)])
    if unused.num_errors or not (outlines.polygons or outlines.rle):
        return None
    drawn = draw(outlines, mask.shape)
    size = int(drawn.sum() + mask.sum())
    dice = 2 * int((drawn & mask).sum()) / size if size else 1.0
    if dice < MIN_AGREEMENT:
        message = (
            f"{record}: mask file and polygons agree with Dice {dice:.3f} only. The mask file is used; "
            "make sure that it is the right one."
        )
        findings.warning("disagreement", message, record)
    return dice


# ---- The whole data root


def _check_folders(aliases: Mapping[str, Pseudonym], findings: Findings) -> None:
    """Sub-folders with several images, none of which shares its patient: each may be one patient's."""
    if len({alias.patient for alias in aliases.values()}) < len(aliases):
        return
    sizes = Counter(name.rpartition("/")[0] for name in aliases if "/" in name)
    shared = [size for size in sizes.values() if size > 1]
    if shared:
        message = (
            f"Each of {len(aliases)} images counts as a patient of its own, but {sum(shared)} of them share "
            f"{len(shared)} sub-folders. If a folder is a patient, give --patient_pattern "
            "'^(?P<patient>[^/]+)/', or the split may put that patient on two sides."
        )
        findings.warning("patients", message)


def _check_left_over(listing: Listing, shown: FileNames, findings: Findings) -> None:
    """Images and label files that belong to nothing."""
    for path in listing.extra_images:
        file = shown.shown(path)
        if listing.pairs:
            message = f"{file} has no label file and is left out. Add the label, or remove the image."
            findings.warning("missing_label", message, file, file)
        else:
            message = f"{file} is named by no record and is left out. Add a record, or remove the image."
            findings.warning("extra_image", message, file, file)
    stems = {path.stem for path in listing.images}
    for path in listing.extra_masks:
        file = shown.shown(path)
        if listing.pairs and not any(path.stem.removesuffix(ending) in stems for ending in LABEL_ENDINGS):
            message = f"{file} is the label of no image. Add the image, or remove the label."
            findings.warning("missing_image", message, file, file)
        else:
            message = f"{file} is used for no image. Remove it, if another label goes before it."
            findings.warning("extra_mask", message, file, file)


def _check_duplicates(checked: list[CheckedEntry], findings: Findings) -> None:
    """Images with the same pixels under two names."""
    first: dict[str, str] = {}
    for result in checked:
        if result.sample is None:
            continue
        record = result.sample.record
        if result.digest in first:
            message = (
                f"{record}: the image has the same pixels as {first[result.digest]}. "
                "Remove one, or the split may put the same image on two sides."
            )
            findings.warning("duplicate_image", message, record, result.file)
        first.setdefault(result.digest, record)


def _check_classes(entries: Iterable[Entry], findings: Findings) -> None:
    """Shapes of several classes, all of which become vessel."""
    classes = set()
    for entry in entries:
        for name, part in (("shapes", "label"), ("annotations", "category_id")):
            found = entry.content.get(name)
            items = [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
            classes |= {item[part] for item in items if isinstance(item.get(part), str | int)}
    if len(classes) > 1:
        message = (
            f"The shapes have {len(classes)} classes, and all of them count as vessel. Remove the others."
        )
        findings.warning("several_labels", message, count=len(classes))


def _check_agreement(checked: list[CheckedEntry], findings: Findings) -> dict[str, float] | None:
    """Mean of the Dice of mask files with polygons, with a warning where it is low."""
    values = [result.agreement for result in checked if result.agreement is not None]
    if not values:
        return None
    mean = sum(values) / len(values)
    if mean < MIN_AGREEMENT:
        message = (
            f"Mask files and polygons of {len(values)} images agree with a mean Dice of {mean:.3f}, less "
            f"than {MIN_AGREEMENT}. Find out which of them are right; the mask files are used."
        )
        findings.warning("mean_disagreement", message)
    return {"images": len(values), "mean": mean, "lowest": min(values)}


def _count(checked: list[CheckedEntry], findings: Findings) -> dict[str, int]:
    """What the report says about the size of the data; without anything to learn, an error is added."""
    usable = [result for result in checked if result.sample is not None]
    samples = [result.sample for result in usable]
    empty = sum(result.foreground == 0 for result in usable)
    if empty and empty == len(usable):
        message = f"All {empty} masks are empty. Check that masks or polygons mark the vessels."
        findings.error("empty_mask", message)
    return {
        "images": len(usable),
        "patients": len({sample.patient for sample in samples}),
        "sequences": len({sample.sequence for sample in samples}),
        "masks_from_files": sum(sample.mask_path is not None for sample in samples),
        "masks_from_polygons": sum(sample.mask_path is None for sample in samples),
        "empty_masks": empty,
        "scaled_labels": len(findings.of("scaled_label")),
    }
