"""Many pictures on one sheet, each with the outline of its mask: what a training is really shown."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from vesselrl.data.annotations import find_samples
from vesselrl.data.augment import get_augmentation
from vesselrl.data.builtin import builtin_data
from vesselrl.data.check import foreground_shares
from vesselrl.data.dataset import VesselDataset
from vesselrl.data.privacy import LABELS
from vesselrl.data.splits import split_by_patient, take
from vesselrl.scoring.masks import as_mask

OUTLINE = (240, 228, 66)  # yellow: seen on grey and on red, and no colour of `overlay`
TILE_PX = 384
_CAPTION_PX, _GAP_PX = 22, 6
_PAPER, _INK = 255, (51, 51, 51)


def contact_sheet(items: Sequence[tuple[str, np.ndarray, np.ndarray]], columns: int = 4) -> np.ndarray:
    """Draw pictures in rows, the outline of the mask on each, its key below.

    Every picture is brought to the same width or height (384 px, the longer side) and centred in its tile.
    The outline runs just outside the mask, one pixel wide, so that the vessel itself stays visible. An empty
    mask has no outline.

    Args:
        items: (key, image uint8 (H, W, 3), mask bool (H, W)); the key is a pseudonym such as P001_S1_F0011.
        columns: pictures in a row, from 1.

    Returns:
        uint8 (H, W, 3), RGB, on white.

    Raises:
        ValueError: no items, no columns, sizes that differ, or a key that is no pseudonym (a sheet must not
            show a name).

    >>> item = ("P001_S1_F0001", np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), bool))
    >>> contact_sheet([item] * 3, columns=2).shape
    (830, 786, 3)
    """
    if not items:
        raise ValueError("There is nothing to show: got 0 pictures. Give at least one (key, image, mask).")
    if columns < 1:
        raise ValueError(f"columns is {columns}. Give a number from 1.")
    tiles = [_tile(*item, place=place) for place, item in enumerate(items, start=1)]
    columns = min(columns, len(tiles))
    blank = np.full_like(tiles[0], _PAPER)
    tiles += [blank] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    return np.pad(np.vstack(rows), ((_GAP_PX, 0), (_GAP_PX, 0), (0, 0)), constant_values=_PAPER)


def write_contact_sheet(
    data_root: str | None,
    output: str,
    num_images: int = 12,
    augment: str = "none",
    seed: int = 42,
    split_seed: int = 42,
    **names: str | None,
) -> Path:
    """Writes a sheet of training images of a split, as the first epoch shows them.

    It shows those that `--max_train_samples` would keep, chosen round the patients. With fewer than three
    patients there is no split, and the images are chosen from all.

    Args:
        data_root: data set; None: the built-in synthetic angiograms, drawn into `output` once.
        output: PNG file.
        num_images: how many.
        augment: name of the plan, none, light or strong.
        seed: of the augmentation.
        split_seed: of the split and the choice of images.
        **names: patient_pattern and patient_aliases, see `find_samples`.

    Raises:
        DataError: unusable data.
    """
    path = Path(output)
    samples = find_samples(data_root or builtin_data("output"), **names)
    if len({sample.patient for sample in samples}) >= 3:
        shares = foreground_shares(data_root, **names) if data_root else None
        samples = split_by_patient(samples, split_seed, shares=shares).train
    dataset = VesselDataset(
        take(samples, num_images, split_seed), augmentation=get_augmentation(augment), seed=seed
    )
    shown = (dataset.augmented(index, epoch=1) for index in range(len(dataset)))
    sheet = contact_sheet([(sample.key, image, mask) for image, mask, sample in shown])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
    return path


def outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with a line of one pixel round its mask, on the background pixels that touch it by a side."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    line = (cv2.dilate(mask.view(np.uint8), cross) > 0) & ~mask
    drawn = image.copy()
    drawn[line] = OUTLINE
    return drawn


def _tile(key: str, image: np.ndarray, mask: np.ndarray, place: int) -> np.ndarray:
    """One picture with its caption and the gap to the right of and below it."""
    if LABELS["files"].fullmatch(key) is None:
        raise ValueError(f"The caption of picture {place} is no pseudonym. Use the key of its sample.")
    mask = as_mask(mask)
    if image.shape != (*mask.shape, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"{key}: a uint8 image of shape {(*mask.shape, 3)} belongs to this mask: got {image.dtype} "
            f"{image.shape}. Give image and mask of one size."
        )
    factor = TILE_PX / max(mask.shape)
    size = [max(1, round(side * factor)) for side in mask.shape[::-1]]
    smooth = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    shown = cv2.resize(image, size, interpolation=smooth)
    share = cv2.resize(mask.view(np.uint8) * np.uint8(255), size, interpolation=smooth)
    shown = outlined(shown, share >= (64 if factor < 1 else 128))  # a thin vessel must not fall apart
    tile = np.full((TILE_PX + _CAPTION_PX + _GAP_PX, TILE_PX + _GAP_PX, 3), _PAPER, np.uint8)
    top, left = (TILE_PX - size[1]) // 2, (TILE_PX - size[0]) // 2
    tile[top : top + size[1], left : left + size[0]] = shown
    baseline = TILE_PX + _CAPTION_PX - 6
    cv2.putText(tile, key, (2, baseline), cv2.FONT_HERSHEY_SIMPLEX, 0.5, _INK, 1, cv2.LINE_AA)
    return tile
