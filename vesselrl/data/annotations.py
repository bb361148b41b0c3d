"""Samples of a data root: which images there are, where their masks come from, and whose they are.

These layouts are read, the first that is there (see the module of each):

- `record_list`: `annotations.json`, a list of `{image, mask, text, …}`;
- `coco`: a COCO object, in `annotations.json` or under one of its usual names;
- `labelme`: LabelMe files in `json/` or beside the images;
- `folder_pairs`: images, and label files that belong to them by their names.

All polygons of an image are one target: their union. A mask file `masks/<stem>_mask.png` or
`masks/<stem>.png` is used instead of the polygons where there is one. A label of another size than its image
is scaled where the proportions agree, and refused where they do not.

Messages name a record as `annotations.json record 17 (P003_S1_F0011)`, counted from 0 as `jq '.[17]'` does,
and a file as `images/ file 3 in name order (P003_S1_F0011)`. The file name is shown only where it is a number
with an ordinary word, such as `images/train_001.png`: any other may be the name of a person.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from vesselrl.data.coco import coco_files, is_coco, list_coco, read_coco_files
from vesselrl.data.entries import Entry, Listing, Outlines, read_json
from vesselrl.data.findings import Findings
from vesselrl.data.folder_pairs import expected_layouts, list_pairs
from vesselrl.data.images import read_mask, read_rgb, read_size
from vesselrl.data.labelme import labelme_folder, list_labelme
from vesselrl.data.patients import Pseudonym, pseudonyms
from vesselrl.data.polygons import Size, rasterise, resize_mask, scale_polygons
from vesselrl.data.privacy import MAPPING_FILE
from vesselrl.data.record_list import FILE as ANNOTATIONS
from vesselrl.data.record_list import list_records
from vesselrl.data.run_lengths import RunLengths
from vesselrl.errors import DataError

__all__ = ["DataError", "Sample", "find_samples", "load_image", "load_mask", "rasterise"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One image and where its mask is: in a file or in outlines, exactly one of the two.

    `repr` leaves out what can carry the name of a person.
    """

    image_path: Path = field(repr=False)
    mask_path: Path | None = field(repr=False)
    # (N, 2) arrays of (x, y) in px from the image corner; none of them and no `rle`: an empty mask.
    polygons: tuple[np.ndarray, ...] | None = field(repr=False, compare=False)
    # How messages name the sample.
    record: str
    # Pseudonyms: P001_S1_F0011, P001, P001_S1 and F0011.
    key: str
    patient: str
    sequence: str
    frame: str
    # Run lengths of COCO, joined with the polygons; scaled when they are loaded.
    rle: tuple[RunLengths, ...] = field(default=(), repr=False, compare=False)


def find_samples(
    data_root: Path | str,
    patient_pattern: str | None = None,
    patient_aliases: Path | str | None = None,
    mapping: Path | str | None = None,
) -> list[Sample]:
    """All samples of a data root, ordered by key; headers of images and masks are read, pixels are not.

    Args:
        data_root: folder in one of the layouts above.
        patient_pattern: regular expression for the file names, with the group `patient` and, if there are
            such parts, `sequence` and `frame`. Without it the names of angiography exports are understood
            (see `vesselrl.data.patients`), and any other file is a patient of its own.
        patient_aliases: CSV file with the columns `file_name` and `patient`, see `vesselrl.data.aliases`.
        mapping: file that keeps the pseudonyms, so that added files change none, see `vesselrl.data.privacy`;
            None: `patients.mapping.json` in the data root. Names that carry no person have no such file.

    Raises:
        DataError: one line on what is wrong: no folder, no annotations, a record or a file that is broken.
    """
    findings = Findings(strict=True)
    listing = list_entries(Path(data_root), findings)
    mapping = mapping or Path(data_root) / MAPPING_FILE
    aliases = name_patients(listing, patient_pattern, patient_aliases, mapping)
    first_places: dict[str, str] = {}
    samples = [
        build_sample(entry, aliases[entry.name], findings)
        for entry in listing.entries
        if not is_repeated(entry, aliases[entry.name], first_places, findings)
    ]
    _log_summary(listing, findings)
    return sorted(samples, key=lambda sample: sample.key)


def load_image(sample: Sample) -> np.ndarray:
    """The image as uint8 (H, W, 3), RGB, upright; grey of 16 bits is scaled by its full range.

    Raises:
        DataError: the file is missing, damaged, cut short, or has more than 16 bits per pixel.
    """
    return read_rgb(sample.image_path, sample.record)


def load_mask(sample: Sample) -> np.ndarray:
    """The mask as bool (H, W) of the size of the image; an empty mask is valid.

    Raises:
        DataError: the mask file is damaged or has other values than 0 and 1, or 0 and 255.
    """
    width, height = read_size(sample.image_path, sample.record)
    if sample.mask_path is not None:
        return resize_mask(read_mask(sample.mask_path, sample.record), (height, width))
    return draw(Outlines(sample.polygons or (), sample.rle), (height, width))


def draw(outlines: Outlines, shape: tuple[int, int]) -> np.ndarray:
    """The union of polygons and run lengths as bool (H, W); polygons are in px of this shape."""
    mask = rasterise(outlines.polygons, shape)
    for rle in outlines.rle:
        mask |= resize_mask(rle.decode(), shape)
    return mask


# ---- Steps that reading and checking share


def list_entries(root: Path, findings: Findings) -> Listing:
    """The entries of a data root in the first layout that is there.

    Raises:
        DataError: there is no such folder, no layout was recognised, or its list cannot be read.
    """
    if not root.is_dir():
        raise DataError(f"The data root {root} is not a folder. Give the folder that holds images/.")
    if (root / ANNOTATIONS).is_file():
        content = read_json(root / ANNOTATIONS, ANNOTATIONS)
        if is_coco(content):
            return list_coco(root, [(ANNOTATIONS, content)], findings)
        return list_records(root, content, findings)
    if files := coco_files(root):
        return read_coco_files(root, files, findings)
    if folder := labelme_folder(root):
        return list_labelme(root, folder, findings)
    listing = list_pairs(root, findings)
    if listing is None:
        raise DataError(expected_layouts(root))
    return listing


def name_patients(
    listing: Listing,
    patient_pattern: str | None,
    patient_aliases: Path | str | None,
    mapping: Path | str | None,
    keep: Literal["nothing", "people", "all"] = "people",
) -> dict[str, Pseudonym]:
    """A pseudonym for the name of each entry; the arguments are those of `find_samples` and `pseudonyms`.

    Raises:
        DataError: the pattern, the file of aliases or the mapping file does not fit.
    """
    names = [entry.name for entry in listing.entries]
    return pseudonyms(names, patient_pattern, patient_aliases, mapping, keep)


def is_repeated(entry: Entry, alias: Pseudonym, first_places: dict[str, str], findings: Findings) -> bool:
    """Whether the image had an entry before, which is an error; `first_places` is kept up to date."""
    first = first_places.setdefault(entry.name, entry.place)
    if first == entry.place:
        return False
    record = entry.record(alias)
    other = _without_file(first, entry.place)
    message = f"{record} names the same image as {other}. Join the two into one record."
    findings.error("duplicate_record", message, record)
    return True


def build_sample(entry: Entry, alias: Pseudonym, findings: Findings) -> Sample | None:
    """The sample of an entry, from the headers of its files; None where an error keeps it from being one."""
    record = entry.record(alias)
    if entry.image_path is None:
        message = f"{record}: its image is missing in images/. Add the file, or remove the record."
        findings.error("missing_image", message, record)
        return None
    try:
        size = read_size(entry.image_path, f"{record}: image")
    except DataError as error:
        findings.caught(error, record)
        return None
    outlines = Outlines()
    if entry.mask_path is not None:
        if not _check_mask_size(entry.mask_path, size, record, findings):
            return None
    elif entry.read_label is None:
        message = f"{record} has no 'mask', and masks/ has no file for it. Add one of the two."
        findings.error("missing_label", message, record)
        return None
    else:
        before = findings.num_errors
        outlines = read_outlines(entry, size, record, findings)
        if findings.num_errors > before:
            return None
    polygons = outlines.polygons if entry.mask_path is None else None
    names = (alias.key, alias.patient, alias.sequence, alias.frame)
    return Sample(entry.image_path, entry.mask_path, polygons, record, *names, outlines.rle)


def read_outlines(entry: Entry, size: Size, record: str, findings: Findings) -> Outlines:
    """The outlines of an entry in px of its image, scaled where they were drawn on another size."""
    try:
        label_size = size if entry.label_size is None else _checked_size(entry.label_size, size, record)
        outlines = entry.read_label(label_size, record, lambda error: findings.caught(error, record))
    except DataError as error:
        findings.caught(error, record)
        return Outlines()
    if outlines.num_skipped:
        message = f"{record}: {outlines.num_skipped} polygons with fewer than 3 points enclose nothing."
        findings.warning("few_points", message, record, count=outlines.num_skipped)
    if label_size == size:
        return outlines
    _warn_scaled(label_size, size, record, findings)
    return Outlines(scale_polygons(outlines.polygons, label_size, size), outlines.rle)


def _checked_size(written: object, size: Size, record: str) -> Size:
    """The size a label was drawn on, if it is one and has the proportions of the image."""
    if not all(type(side) in (int, float) and side == side // 1 and 0 < side < 2**16 for side in written):
        raise DataError(
            f"{record}: width and height of the labelled image are no whole numbers of px. Correct them.",
            "label_size",
        )
    width, height = (int(side) for side in written)
    if not _same_proportions((width, height), size):
        raise DataError(
            f"{record}: the label was drawn on {width}×{height} px, its image has {size[0]}×{size[1]} px, in "
            "other proportions. It was cut or turned in between: label it again, or remove the record.",
            "label_size",
        )
    return width, height


def _check_mask_size(mask_path: Path, size: Size, record: str, findings: Findings) -> bool:
    """Whether a mask file has the size of its image, or its proportions, so that it can be scaled."""
    try:
        mask_size = read_size(mask_path, f"{record}: mask")
    except DataError as error:
        findings.caught(error, record, code="unreadable_mask")
        return False
    if not _same_proportions(mask_size, size):
        message = (
            f"{record}: the mask has {mask_size[0]}×{mask_size[1]} px, its image {size[0]}×{size[1]} px. "
            "Bring the mask to the size of the image (nearest neighbour), or remove the record."
        )
        findings.error("label_size", message, record)
        return False
    if mask_size != size:
        _warn_scaled(mask_size, size, record, findings)
    return True


def _same_proportions(one: Size, other: Size) -> bool:
    """Whether one size is the other one scaled, but for rounding to whole px."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other) / 2


def _warn_scaled(old: Size, new: Size, record: str, findings: Findings) -> None:
    message = f"{record}: the label has {old[0]}×{old[1]} px, its image {new[0]}×{new[1]} px; it is scaled."
    findings.warning("scaled_label", message, record)


def _without_file(first: str, place: str) -> str:
    """`record 0` for `annotations.json record 0` where both places are in one file."""
    file = place.split(" ")[0]
    return first.removeprefix(f"{file} ")


def _log_summary(listing: Listing, findings: Findings) -> None:
    """One line for each kind of thing that reading has left out or changed."""
    few, scaled = findings.of("few_points"), findings.of("scaled_label")
    if few:
        text = "%s: left out %d polygons with fewer than 3 points, in %d records: %s"
        number = sum(finding.count for finding in few)
        logger.warning(text, listing.layout, number, len(few), _some(finding.record for finding in few))
    if scaled:
        text = "scaled %d labels to the size of their images: %s"
        logger.warning(text, len(scaled), _some(finding.record for finding in scaled))
    extra_images, extra_masks = listing.extra_images, listing.extra_masks
    if extra_images:
        text = "%d of %d images have no mask and are left out."
        logger.warning(text, len(extra_images), len(listing.images))
    if extra_masks:
        logger.warning("%d of %d files in masks/ belong to no image.", len(extra_masks), len(listing.masks))


def _some(keys: Iterable[str], limit: int = 5) -> str:
    """The first keys, and how many more there are."""
    keys = list(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
