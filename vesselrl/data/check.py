"""The check of a data root: every record, image and mask is read, and all faults are listed in one go.

What is an error here is an error in training as well: both read through the same steps of
`vesselrl.data.samples`. Nothing is written, the mapping file of pseudonyms neither: training gives the same
ones. `vesselrl.data.repair` writes a repaired copy.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vesselrl.data import samples
from vesselrl.data.findings import DataReport, Findings
from vesselrl.data.formats import list_entries
from vesselrl.data.images import Traits, read_rgb, read_traits
from vesselrl.data.pseudonyms import Pseudonym, pseudonyms
from vesselrl.data.records import LABEL_ENDINGS, DataFolder, Entry, Listing
from vesselrl.errors import DataError
from vesselrl.scoring.overlap import dice

MIN_AGREEMENT = 0.98  # Dice of a mask file with the polygons of its image


@dataclass(frozen=True)
class CheckedEntry:
    """An entry whose image and label were read completely."""

    findings: Findings
    file: str  # where the entry stands
    sample: samples.Sample | None  # None: an error keeps it from being used
    foreground: float | None = None  # share of the image that is vessel; None: the mask cannot be read
    agreement: float | None = None  # Dice of mask file and polygons; None where there is only one of them
    digest: str = ""  # of the decoded pixels; empty where the image cannot be decoded


def check_data(
    root: Path | str, patient_pattern: str | None = None, patient_aliases: Path | str | None = None
) -> DataReport:
    """All faults of a data root; every image and mask is decoded. Arguments are those of `find_samples`."""
    findings, layout = Findings(), ""
    with findings.catching():
        listing = list_entries(Path(root), findings)
        layout, mapping = listing.layout, listing.folder.mapping_file
        with findings.catching(code="patients"):
            aliases = pseudonyms(listing.names, patient_pattern, patient_aliases, mapping, keep="nothing")
            if patient_pattern is None:
                _check_folders(aliases, findings)
            return check_listing(listing, aliases, findings)
    return DataReport(Path(root), layout, tuple(findings))


def foreground_shares(root: Path | str, **names: str | None) -> dict[str, float] | None:
    """Foreground shares by key, for the stratification of the split; None where a fault stops training."""
    report = check_data(root, **names)
    return None if report.exit_code else report.foreground


def check_listing(listing: Listing, aliases: Mapping[str, Pseudonym], findings: Findings) -> DataReport:
    """The report of a data root whose entries have pseudonyms already; adds to `findings`."""
    folder = listing.folder
    entries = list(samples.different_images(listing, aliases, findings))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = list(pool.map(lambda entry: check_entry(entry, aliases[entry.name], folder), entries))
    for result in checked:
        findings.extend(result.findings)
    usable = [result for result in checked if result.sample is not None]
    _check_left_over(listing, findings)
    _check_duplicates(usable, findings)
    _check_classes(entries, findings)
    agreement = _check_agreement(checked, findings)
    empty = sum(result.foreground == 0 for result in usable)
    if empty and empty == len(usable):
        message = f"All {empty} masks are empty. Check that masks or polygons mark the vessels."
        findings.error("empty_mask", message)
    num_from_files = sum(result.sample.mask_path is not None for result in usable)
    counts = {
        "images": len(usable),
        "patients": len({result.sample.patient for result in usable}),
        "sequences": len({result.sample.sequence for result in usable}),
        "masks_from_files": num_from_files,
        "masks_from_polygons": len(usable) - num_from_files,
        "empty_masks": empty,
        "scaled_labels": len(findings.of("scaled_label")),
    }
    foreground = {result.sample.key: result.foreground for result in usable}
    return DataReport(folder.path, listing.layout, tuple(findings), counts, agreement, foreground)


# ---- One entry


def check_entry(entry: Entry, alias: Pseudonym, folder: DataFolder) -> CheckedEntry:
    """Reads one image and its label completely."""
    record, findings = entry.record(alias), Findings(file=entry.file)
    sample = samples.build_sample(entry, alias, findings)
    mask_file = folder.shown(entry.mask_path) if entry.mask_path else entry.file
    image_file = folder.shown(entry.image_path) if entry.image_path else entry.file
    file_of = dict.fromkeys(("unreadable_mask", "label_size", "scaled_label"), mask_file)
    file_of["unreadable_image"] = image_file
    findings[:] = [replace(item, file=file_of.get(item.code, item.file)) for item in findings]
    _check_text(entry, record, findings)
    digest, mask, agreement = "", None, None
    if entry.image_path is not None and not findings.of("unreadable_image"):
        with findings.catching(record, image_file):
            traits = read_traits(entry.image_path, f"{record}: image")
            pixels = read_rgb(entry.image_path, f"{record}: image")
            for code, fault in _image_faults(traits, pixels):
                findings.warning(code, f"{record}: the image {fault}", record, image_file)
            content = repr(pixels.shape).encode() + pixels.tobytes()
            digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    if sample is not None:
        try:
            mask = samples.load_mask(sample)
        except DataError as error:
            code = "unreadable_mask" if error.code == "unreadable_image" else error.code
            findings.error(code, str(error), record, mask_file)
    if mask is None:
        return CheckedEntry(findings, entry.file, None, digest=digest)
    foreground = float(mask.mean())
    for code, fault in _mask_faults(foreground):
        findings.warning(code, f"{record}: {fault}", record, mask_file)
    if entry.mask_path is not None and entry.read_label is not None:
        agreement = _compare_with_outlines(entry, mask, record, findings)
    return CheckedEntry(findings, entry.file, sample if digest else None, foreground, agreement, digest)


def _image_faults(traits: Traits, pixels: np.ndarray) -> Iterator[tuple[str, str]]:
    if traits.orientation != 1:
        advice = "Make sure that its label was drawn on the turned image."
        yield "rotated_image", f"is turned by its EXIF orientation {traits.orientation}. {advice}"
    if traits.deep:
        brightest = f"its brightest value is {pixels.max()} of 255 then"
        advice = "Save it with 8 bits in the window you label in."
        fault = f"has 16 bits per pixel and becomes 8 by its full range; {brightest}. {advice}"
        yield "sixteen_bit_image", fault
    if traits.alpha:
        yield "alpha_image", f"has an alpha channel ({traits.mode}), which is dropped. Save it without."


def _mask_faults(foreground: float) -> Iterator[tuple[str, str]]:
    if foreground == 0:
        yield "empty_mask", "the mask is empty. Keep it only if the image shows no vessel."
    elif foreground == 1:
        yield "all_foreground", "the mask is all foreground. Label it again, or remove the record."
    elif foreground > 0.5:
        fault = f"{foreground:.0%} of the mask is foreground. Is it inverted, or a field of view?"
        yield "mostly_foreground", fault


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
    outlines = samples.read_outlines(entry, mask.shape[::-1], record, unused)
    for item in unused:
        message = f"{item.message} Not used: the mask file goes first."
        findings.append(replace(item, severity="warning", message=message))
    if unused.errors or not (outlines.polygons or outlines.rle):
        return None
    agreement = dice(outlines.draw(mask.shape), mask)
    if agreement < MIN_AGREEMENT:
        fault = f"mask file and polygons agree with Dice {agreement:.3f} only"
        advice = "The mask file is used; make sure that it is the right one."
        findings.warning("disagreement", f"{record}: {fault}. {advice}", record)
    return agreement


# ---- The whole data root


def _check_folders(aliases: Mapping[str, Pseudonym], findings: Findings) -> None:
    """Sub-folders with several images, none of which shares its patient: each may be one patient's."""
    sizes = Counter(name.rpartition("/")[0] for name in aliases if "/" in name)
    shared = [size for size in sizes.values() if size > 1]
    if shared and len({alias.patient for alias in aliases.values()}) == len(aliases):
        message = (
            f"Each of {len(aliases)} images counts as a patient of its own, but {sum(shared)} of them share "
            f"{len(shared)} sub-folders. If a folder is a patient, give --patient_pattern "
            "'^(?P<patient>[^/]+)/', or the split may put that patient into two subsets."
        )
        findings.warning("patients", message)


def _check_left_over(listing: Listing, findings: Findings) -> None:
    """Images and label files that belong to nothing."""
    for path in listing.extra_images:
        code, fault = "extra_image", "is named by no record and is left out. Add a record"
        if listing.pairs:
            code, fault = "missing_label", "has no label file and is left out. Add the label"
        file = listing.folder.shown(path)
        findings.warning(code, f"{file} {fault}, or remove the image.", file, file)
    stems = {path.stem for path in listing.images}
    for path in listing.extra_masks:
        code, fault = "extra_mask", "is used for no image. Remove it, if another label goes before it."
        if listing.pairs and not any(path.stem.removesuffix(ending) in stems for ending in LABEL_ENDINGS):
            code, fault = "missing_image", "is the label of no image. Add the image, or remove the label."
        file = listing.folder.shown(path)
        findings.warning(code, f"{file} {fault}", file, file)


def _check_duplicates(usable: list[CheckedEntry], findings: Findings) -> None:
    """Images with the same pixels under two names."""
    first: dict[str, str] = {}
    for result in usable:
        record = result.sample.record
        other = first.setdefault(result.digest, record)
        if other != record:
            fault = f"{record}: the image has the same pixels as {other}"
            advice = "Remove one, or the split may put the same image into two subsets."
            findings.warning("duplicate_image", f"{fault}. {advice}", record, result.file)


def _check_classes(entries: Iterable[Entry], findings: Findings) -> None:
    """Shapes of several classes, all of which become vessel."""
    classes = set()
    for entry in entries:
        for name, part in (("shapes", "label"), ("annotations", "category_id")):
            found = entry.content.get(name)
            items = [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
            classes |= {item[part] for item in items if isinstance(item.get(part), str | int)}
    if len(classes) > 1:
        text = f"The shapes have {len(classes)} classes, and all of them count as vessel. Remove the others."
        findings.warning("several_labels", text, count=len(classes))


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
