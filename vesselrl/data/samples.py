"""Samples of a data root: its images with their masks, under the pseudonyms of their patients."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vesselrl.data.dicom import frames, is_dicom, locate
from vesselrl.data.formats import list_entries
from vesselrl.data.images import read_mask, read_oddities, read_rgb, read_size
from vesselrl.data.polygons import Outline, Size, rasterise, resize_mask, scale_polygons
from vesselrl.data.pseudonyms import Pseudonym
from vesselrl.data.records import CODES, Entry, Findings, Listing
from vesselrl.errors import DataError

logger = logging.getLogger(__name__)

LEAST_SEEN = 0.25  # share of the image; a smaller field of view is likely to be a mask of vessels
MOST_SCALED = 16  # a label of so many times the image's width, or its fraction, shows no vessel of a few px


@dataclass(frozen=True)
class Sample:
    """One image and its mask, in a file or in outlines; `repr` leaves out what can carry a person's name."""

    image_path: Path = field(repr=False)
    mask_path: Path | None = field(repr=False)
    # Without a mask file, in px of the image; none of them: an empty mask.
    outlines: tuple[Outline, ...] = field(repr=False, compare=False)
    record: str  # how messages name the sample
    # Pseudonyms: P001_S1_F0011, P001, P001_S1 and F0011.
    key: str
    patient: str
    sequence: str
    frame: str
    fov_path: Path | None = field(default=None, repr=False)


def find_samples(
    data_root: Path | str,
    patient_pattern: str | None = None,
    patient_aliases: Path | str | None = None,
    **places: str | None,
) -> list[Sample]:
    """All samples of a data root, ordered by key; headers of images and masks are read, pixels are not.

    Without `patient_pattern` and `patient_aliases` (see `vesselrl.data.patients`) the names of angiography
    exports are understood, and any other file is a patient of its own. `places`: image_dir, mask_dir and
    mask_suffix, see `list_entries`. The first fault is a DataError.
    """
    findings = Findings(strict=True)
    listing = list_entries(Path(data_root), findings, **places)
    aliases = listing.pseudonyms(patient_pattern, patient_aliases)
    entries = different_images(listing, aliases, findings)
    samples = [build_sample(entry, aliases[entry.name], findings) for entry in entries]
    for code in ("few_points", "scaled_label"):
        if found := findings.of(code):
            first = ", ".join(finding.record for finding in found[:5]) + (" …" if len(found) > 5 else "")
            total = sum(finding.count for finding in found)
            logger.warning("%s: %d, in %d records: %s", CODES[code], total, len(found), first)
    if extra := listing.extra_images:
        logger.warning("%d of %d images have no mask and are left out.", len(extra), len(listing.images))
    if extra := listing.extra_masks:
        logger.warning("%d of %d files in masks/ belong to no image.", len(extra), len(listing.masks))
    return sorted(samples, key=lambda sample: sample.key)


def load_image(sample: Sample) -> np.ndarray:
    """The image as uint8 (H, W, 3), RGB, upright; see `read_rgb` on deep ones."""
    return read_rgb(sample.image_path, sample.record)


def read_with_findings(path: Path, record: str, findings: Findings, file: str = "") -> np.ndarray:
    """The image as `load_image` reads it; what is odd about its file is added to `findings`."""
    oddities, pixels = read_oddities(path, record), read_rgb(path, record)
    for code, value in oddities.items():
        findings.add(code, record.removesuffix(": image"), file, value=value, brightest=pixels.max())
    return pixels


def read_image(path: Path, record: str) -> np.ndarray:
    """An image of no data root, as `load_image` reads it; what is odd about its file is logged."""
    findings = Findings()
    pixels = read_with_findings(path, record, findings)
    for finding in findings:
        if finding.code != "rotated_image":  # there is no label that must be turned as well
            logger.warning("%s", finding.message)
    return pixels


def load_mask(sample: Sample) -> np.ndarray:
    """The mask in the field of view, bool (H, W) of the size of the image; an empty mask is valid."""
    shape, fov = read_size(sample.image_path, sample.record)[::-1], load_fov(sample)
    if sample.mask_path is None:
        mask = rasterise(sample.outlines, shape)
    else:
        mask = resize_mask(read_mask(sample.mask_path, sample.record, broken="unreadable_mask"), shape)
    return mask if fov is None else mask & fov


def load_fov(sample: Sample) -> np.ndarray | None:
    """The field of view as bool (H, W), outside of which nothing counts; None: all of the image counts."""
    if (path := getattr(sample, "fov_path", None)) is None:  # a caller's own samples may have none
        return None
    record = f"{sample.record}: field of view"
    fov = read_mask(path, record, broken="unreadable_mask")
    if fov.mean() < LEAST_SEEN:
        shown = f"it shows {fov.mean():.0%} of the image"
        fault = f"{shown}, as a mask of vessels does. Put such masks into masks/."
        raise DataError(f"{record}: {fault}", "small_fov")
    return resize_mask(fov, read_size(sample.image_path, sample.record)[::-1])


def different_images(listing: Listing, aliases: dict[str, Pseudonym], findings: Findings) -> Iterator[Entry]:
    """The entries without those whose image, or name of an image, an earlier one has, which is an error."""
    first_of: dict[str, Entry] = {}
    for entry in listing.entries:
        if (first := first_of.setdefault(entry.name, entry)) is entry:
            yield entry
            continue
        record = entry.record(aliases[entry.name])
        fault = f"has the name of {first.place} with another ending. Keep one file for each image."
        if first.image_path == entry.image_path:
            # `record 0` for `annotations.json record 0` where both places are in one file.
            other = first.place.removeprefix(f"{entry.place.split(' ')[0]} ")
            fault = f"names the same image as {other}. Join the two into one record."
        findings.error("duplicate_record", f"{record} {fault}", record, entry.file)


def build_sample(entry: Entry, alias: Pseudonym, findings: Findings) -> Sample | None:
    """The sample of an entry, from the headers of its files; None where an error keeps it from being one."""
    record, outlines, num_errors = entry.record(alias), (), len(findings.of("error"))
    with findings.catching(record):
        if entry.image_path is None:
            fault = "its image is missing in images/. Add the file, or remove the record."
            raise DataError(f"{record}: {fault}", "missing_image")
        size = read_size(entry.image_path, f"{record}: image")
        if entry.fov_path is not None:
            fov_size = read_size(entry.fov_path, f"{record}: field of view", "unreadable_mask")
            _check_size("field of view", fov_size, size, entry, record, findings)
        if entry.mask_path is not None:
            _check_frames(entry, record)
            mask_size = read_size(entry.mask_path, f"{record}: mask", "unreadable_mask")
            _check_size("mask", mask_size, size, entry, record, findings)
        elif entry.read_label is None:
            fault = "has no 'mask', and masks/ has no file for it. Add one of the two."
            raise DataError(f"{record} {fault}", "missing_label")
        else:
            outlines = read_outlines(entry, size, record, findings)
    if len(findings.of("error")) > num_errors:
        return None
    where = (entry.image_path, entry.mask_path, outlines, record)
    return Sample(*where, alias.key, alias.patient, alias.sequence, alias.frame, entry.fov_path)


def read_outlines(entry: Entry, size: Size, record: str, findings: Findings) -> tuple[Outline, ...]:
    """The outlines of an entry in px of its image, scaled where they were drawn on another size."""
    with findings.catching(record):
        drawn_on = entry.label_size or size
        if all(drawn in (None, own) for drawn, own in zip(drawn_on, size, strict=True)):
            drawn_on = size  # one of the two may be missing
        if not all(type(n) in (int, float) and n == n // 1 and 0 < n < 2**16 for n in drawn_on):
            fault = "width and height of the labelled image are no whole numbers of px. Correct them."
            raise DataError(f"{record}: {fault}", "label_size")
        drawn_on = tuple(map(int, drawn_on))
        _check_size("label", drawn_on, size, entry, record, findings)
        outlines = entry.read_label(drawn_on, record, findings)
        values = [outline for outline in outlines if isinstance(outline, np.ndarray)]
        if values and len(values) == len(outlines) and max(size) > 1 and np.concatenate(values).max() <= 1.05:
            fault = "look like shares of the image, from 0 to 1. Multiply them by its width and height"
            raise DataError(f"{record}: the coordinates {fault}; `data check --fix` does.", "shares")
        return scale_polygons(outlines, drawn_on, size)
    return ()


def _check_frames(entry: Entry, record: str) -> None:
    """Refuses a DICOM mask of more or fewer frames than its image has."""
    files = [locate(path)[0] for path in (entry.image_path, entry.mask_path)]
    counts = [len(frames(file)) for file in files if is_dicom(file)]
    if len({*counts}) > 1:
        fault = "the mask has {1} frames, its image {0}. Give one for each, or PNG files.".format(*counts)
        raise DataError(f"{record}: {fault}", "label_size")


def _check_size(kind: str, label: Size, image: Size, entry: Entry, record: str, findings: Findings) -> None:
    """Refuses a label of other proportions or of far more or fewer px, and warns where it is scaled."""
    sizes = f"{label[0]}×{label[1]} px, its image {image[0]}×{image[1]} px"
    if not are_proportional(label, image):
        advice = "It was cut or turned in between: bring it to the size of the image, or remove the record."
        turn = read_oddities(entry.image_path, f"{record}: image").get("rotated_image", 1)
        if turn >= 5 and are_proportional(label, image[::-1]):
            likely = f"The likely cause is the EXIF orientation {turn} of the image, which is stored lying"
            advice = f"{likely} and shown turned. Give size and label of the image as it is shown."
        raise DataError(f"{record}: the {kind} has {sizes}. {advice}", "label_size")
    if not 1 / MOST_SCALED <= label[0] / image[0] <= MOST_SCALED:
        advice = "One of the two is a preview: give both as they were made."
        raise DataError(f"{record}: the {kind} has {sizes}. {advice}", "label_size")
    if label != image:
        findings.add("scaled_label", record, sizes=sizes)


def are_proportional(one: Size, other: Size) -> bool:
    """Whether one size is the other one scaled, but for rounding to whole px."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other) / 2
