"""Samples of a data root: which images there are, where their masks come from, and whose they are.

Two layouts are read:

- `annotations.json`, a list of `{image, mask, text, …}`, with the images in `images/`. `mask` holds polygons,
  flat or one level deeper, and all polygons of an image are one target: their union. A mask file
  `masks/<stem>_mask.png` or `masks/<stem>.png` is used instead of the polygons where there is one.
- No `annotations.json`: images in `images/` and masks of the same name in `masks/`.

Messages name a record as `annotations.json record 17 (P003_S1_F0011)`, counted from 0 as `jq '.[17]'` does,
and a file as `images/ file 3 in name order (P003_S1_F0011)`. The file name is shown only where it is a number
with an ordinary word, such as `images/train_001.png`: any other may be the name of a person.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from vesselrl.data.errors import DataError
from vesselrl.data.images import read_mask, read_rgb, read_size
from vesselrl.data.patients import Pseudonym, is_impersonal, pseudonyms
from vesselrl.data.polygons import parse_polygons, rasterise

__all__ = ["DataError", "Sample", "check_masks", "find_samples", "load_image", "load_mask", "rasterise"]

logger = logging.getLogger(__name__)

ANNOTATIONS = "annotations.json"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass(frozen=True)
class Sample:
    """One image and where its mask is: in a file or in polygons, exactly one of the two.

    `repr` leaves out what can carry the name of a person.
    """

    image_path: Path = field(repr=False)
    mask_path: Path | None = field(repr=False)
    # (N, 2) arrays of (x, y) in px from the image corner; none of them: an empty mask.
    polygons: tuple[np.ndarray, ...] | None = field(repr=False, compare=False)
    # How messages name the sample.
    record: str
    # Pseudonyms: P001_S1_F0011, P001, P001_S1 and F0011.
    key: str
    patient: str
    sequence: str
    frame: str


def find_samples(data_root: Path | str, patient_pattern: str | None = None) -> list[Sample]:
    """All samples of a data root, ordered by key; headers of images and masks are read, pixels are not.

    Args:
        data_root: folder with `images/` and `annotations.json` or `masks/`.
        patient_pattern: regular expression for the file names, with the group `patient` and, if there are
            such parts, `sequence` and `frame`. Without it the names of angiography exports are understood
            (see `vesselrl.data.patients`), and any other file is a patient of its own.

    Raises:
        DataError: one line on what is wrong: no folder, no annotations, a record or a file that is broken.
    """
    root = Path(data_root)
    if not root.is_dir():
        raise DataError(f"The data root {root} is not a folder. Give the folder that holds images/.")
    if (root / ANNOTATIONS).is_file():
        samples = _samples_from_records(root, _read_records(root / ANNOTATIONS), patient_pattern)
    elif (root / "masks").is_dir():
        samples = _samples_from_folders(root, patient_pattern)
    else:
        raise DataError(f"{root} holds no annotations: neither {ANNOTATIONS} nor masks/. Add one of them.")
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
    if sample.mask_path is not None:
        return read_mask(sample.mask_path, sample.record)
    width, height = read_size(sample.image_path, sample.record)
    return rasterise(sample.polygons or (), (height, width))


def check_masks(samples: Sequence[Sample]) -> list[str]:
    """Reads every mask once and returns the keys of the empty ones.

    Raises:
        DataError: a mask cannot be read, or all masks are empty, so there is nothing to learn.
    """
    empty = [sample.key for sample in samples if not load_mask(sample).any()]
    if samples and len(empty) == len(samples):
        raise DataError(f"All {len(samples)} masks are empty. Check that masks or polygons mark the vessels.")
    if empty:
        logger.warning("%d of %d masks are empty: %s", len(empty), len(samples), _some(empty))
    return empty


def _read_records(path: Path) -> list[dict]:
    """The records of annotations.json, each with the fields that are needed."""
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{ANNOTATIONS} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}. "
            "Correct it, or write it again."
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{ANNOTATIONS} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    if not isinstance(records, list):
        raise DataError(f'{ANNOTATIONS} holds no list. Write [{{"image": ..., "mask": ...}}, ...].')
    if not records:
        raise DataError(f"{ANNOTATIONS} is an empty list. Add a record for each image.")
    for index, record in enumerate(records):
        _check_image_field(record, f"{ANNOTATIONS} record {index}")
    return records


def _check_image_field(content: object, record: str) -> None:
    name = content.get("image") if isinstance(content, dict) else None
    if not isinstance(name, str) or not PurePosixPath(name).name.strip():
        raise DataError(f"{record} has no text 'image'. Name the image file there, or remove the record.")
    path = _path_below_images(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{record}: 'image' points outside the data root. Write the file name as it is in images/."
        )


def _samples_from_records(root: Path, records: list[dict], patient_pattern: str | None) -> list[Sample]:
    paths = [_path_below_images(record["image"]) for record in records]
    names = [str(path.with_suffix("")) for path in paths]
    aliases = pseudonyms(names, patient_pattern)
    masks = _list_masks(root / "masks")
    samples: list[Sample] = []
    first_index: dict[str, int] = {}
    num_skipped: dict[str, int] = {}
    for index, (name, path, content) in enumerate(zip(names, paths, records, strict=True)):
        alias = aliases[name]
        record = f"{ANNOTATIONS} record {index} ({alias.key})"
        if first_index.setdefault(name, index) != index:
            raise DataError(
                f"{record} names the same image as record {first_index[name]}. Join the two into one record."
            )
        image_path = next((p for p in (root / "images" / path, root / path) if p.is_file()), None)
        if image_path is None:
            raise DataError(f"{record}: its image is missing in images/. Add the file, or remove the record.")
        size = read_size(image_path, f"{record}: image")
        mask_path, polygons = masks.get(f"{path.stem}_mask", masks.get(path.stem)), None
        if mask_path is not None:
            _check_mask_size(mask_path, size, record)
        elif "mask" in content:
            polygons, num_skipped[alias.key] = parse_polygons(content["mask"], size, record)
        else:
            raise DataError(f"{record} has no 'mask', and masks/ has no file for it. Add one of the two.")
        samples.append(_sample(image_path, mask_path, polygons, record, alias))
    keys = [key for key, number in num_skipped.items() if number]
    if keys:
        text = "%s: left out %d polygons with fewer than 3 points, in %d records: %s"
        logger.warning(text, ANNOTATIONS, sum(num_skipped.values()), len(keys), _some(keys))
    return samples


def _samples_from_folders(root: Path, patient_pattern: str | None) -> list[Sample]:
    if not (root / "images").is_dir():
        raise DataError(f"{root} has masks/ but no images/. Put the images into images/.")
    images = _list_images(root / "images")
    masks = _list_masks(root / "masks")
    aliases = pseudonyms([path.stem for path in images], patient_pattern)
    if len(aliases) < len(images):
        raise DataError(
            f"images/ holds {len(images)} files but only {len(aliases)} different names without the ending. "
            "Keep one file for each image."
        )
    samples = []
    for number, image_path in enumerate(images, start=1):
        alias = aliases[image_path.stem]
        mask_path = masks.get(f"{image_path.stem}_mask", masks.get(image_path.stem))
        if mask_path is None:
            continue
        record = f"images/ file {number} in name order ({alias.key})"
        if is_impersonal(image_path.stem):
            record = f"images/{image_path.name}"
        _check_mask_size(mask_path, read_size(image_path, f"{record}: image"), record)
        samples.append(_sample(image_path, mask_path, None, record, alias))
    if not samples:
        raise DataError(
            f"{root} holds no annotations: none of {len(images)} images in images/ has a mask of the same "
            "name in masks/. Name the masks <image>_mask.png or <image>.png."
        )
    num_without = len(images) - len(samples)
    if num_without:
        logger.warning("%d of %d images have no mask and are left out.", num_without, len(images))
    num_unused = len(set(masks.values()) - {sample.mask_path for sample in samples})
    if num_unused:
        logger.warning("%d of %d files in masks/ belong to no image.", num_unused, len(set(masks.values())))
    return samples


def _sample(
    image_path: Path, mask_path: Path | None, polygons: tuple | None, record: str, alias: Pseudonym
) -> Sample:
    return Sample(
        image_path, mask_path, polygons, record, alias.key, alias.patient, alias.sequence, alias.frame
    )


def _path_below_images(name: str) -> PurePosixPath:
    """`a.jpg` for `a.jpg` and for `images/a.jpg`, with either kind of slash."""
    path = PurePosixPath(name.replace("\\", "/"))
    return PurePosixPath(*path.parts[1:]) if len(path.parts) > 1 and path.parts[0] == "images" else path


def _list_images(folder: Path) -> list[Path]:
    """The image files of a folder in the order of their names; hidden files are not images."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def _list_masks(folder: Path) -> dict[str, Path]:
    """Mask file by its name without the ending; PNG before the other formats."""
    files = _list_images(folder) if folder.is_dir() else []
    return {path.stem: path for path in sorted(files, key=lambda path: path.suffix.lower() == ".png")}


def _check_mask_size(mask_path: Path, size: tuple[int, int], record: str) -> None:
    mask_size = read_size(mask_path, f"{record}: mask")
    if mask_size != size:
        raise DataError(
            f"{record}: the mask has {mask_size[0]}×{mask_size[1]} px, its image {size[0]}×{size[1]} px. "
            "Bring the mask to the size of the image (nearest neighbour), or remove the record."
        )


def _some(keys: Iterable[str], limit: int = 5) -> str:
    """The first keys, and how many more there are."""
    keys = list(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
