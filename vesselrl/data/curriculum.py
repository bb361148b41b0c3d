"""Easy images first: how hard each sample is, and which samples are open in which epoch.

Difficulty = rank of faintness / 2 + rank of thinness / 4 + rank of tortuosity / 4, ranks over the data set
from 0 (easiest) to 1; contrast counts twice, because it says most about how well an image is segmented. An
empty mask has difficulty 1: shown early, it would teach to find nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from scipy.stats import rankdata

from vesselrl.data.samples import Sample
from vesselrl.scoring.measurements import UNIT_PX, branches, tortuosity
from vesselrl.scoring.overlap import as_mask
from vesselrl.scoring.topology import topology

FIRST_SHARE = 0.4  # of the samples, in the first epoch
_GAP_PX, _RING_PX = 1.0, 8.0  # the background of a vessel lies between these distances from it
_NEAR_PX = 24.0  # half the side of the square in which a vessel pixel looks for its background


class Measures(NamedTuple):
    """Vessel width, contrast in [0, 1] and tortuosity of one sample; all None where the mask is empty."""

    width_px: float | None = None
    contrast: float | None = None
    tortuosity: float | None = None


def measure(image: np.ndarray, mask: np.ndarray) -> Measures:
    """Measures the vessels of a mask (H, W) in an image (H, W, 3), in px where the shorter side has 512 px.

    - Width: median along the centreline of 2 · d − 1, with d the largest distance to the background among the
      pixel and its eight neighbours; outside the image is background.
    - Contrast: |mean over the vessel pixels of (mean grey of the background near by − own grey)| / 255, with
      the background 1 to 8 px beside any vessel and at most 24 px from the pixel; 0 without any.
    - Tortuosity: as in `vessel_measurements`, but 1 without any branch that is long enough.
    """
    mask = as_mask(mask)
    if image.shape != (*mask.shape, 3):
        raise ValueError(f"The image has the shape {image.shape}, its mask {mask.shape}. Load both together.")
    if not mask.any():
        return Measures()
    unit = min(mask.shape) / UNIT_PX
    skeleton = topology(mask).skeleton
    inside = cv2.distanceTransform(np.pad(mask, 1).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    ridge = cv2.dilate(inside, np.ones((3, 3)))[1:-1, 1:-1]
    width_px = float(np.median(2 * ridge[skeleton] - 1)) / unit
    contrast = _contrast(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), mask, unit)
    winding = tortuosity([path for path, _ in branches(skeleton)], unit)
    return Measures(round(width_px, 3), round(contrast, 5), 1.0 if math.isnan(winding) else round(winding, 5))


def _contrast(grey: np.ndarray, mask: np.ndarray, unit: float) -> float:
    distance = cv2.distanceTransform((~mask).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    ring = (distance > _GAP_PX * unit) & (distance <= max(_RING_PX * unit, 2))
    side = 2 * math.ceil(_NEAR_PX * unit) + 1
    share = cv2.blur(ring.astype(np.float32), (side, side), borderType=cv2.BORDER_CONSTANT)
    total = cv2.blur(np.where(ring, grey, 0).astype(np.float32), (side, side), borderType=cv2.BORDER_CONSTANT)
    known = mask & (share > 0.5 / side**2)
    return float(abs((total[known] / share[known] - grey[known]).mean())) / 255 if known.any() else 0.0


def rate_difficulty(measures: Sequence[Measures]) -> list[float]:
    """The difficulty of each sample in [0, 1], by ranks over all with vessels; a single one has 0."""
    vessels = [(-one.contrast, -one.width_px, one.tortuosity) for one in measures if one != Measures()]
    columns = np.reshape(vessels, (-1, 3)).T
    faint, thin, winding = ((rankdata(values) - 1) / max(1, len(values) - 1) for values in columns)
    known = iter(((2 * faint + thin + winding) / 4).tolist())
    return [1.0 if one.width_px is None else round(next(known), 6) for one in measures]


def difficulty_table(
    samples: Sequence[Sample], load: Callable[[Sample], tuple[np.ndarray, np.ndarray]]
) -> dict[str, dict[str, float | None]]:
    """Difficulty and measures of each sample by its key, ready for JSON; `calibre_px` is the vessel width."""
    found = [measure(*load(sample)) for sample in samples]
    names = ("difficulty", "calibre_px", *Measures._fields[1:])
    rows = zip(samples, rate_difficulty(found), found, strict=True)
    return {sample.key: dict(zip(names, (rating, *one), strict=True)) for sample, rating, one in rows}


def open_samples(difficulties: Sequence[float], epoch: int, num_epochs: int) -> list[int]:
    """Indices, ascending, of the samples that an epoch may use: the easiest share, until all are open.

    share(epoch) = 0.4 + 0.6 · (epoch − 1) / (num_epochs // 2), at most 1; their number is rounded up.
    Equal difficulties open in the order of their indices. Epochs count from 1.

    >>> [open_samples([0.9, 0.1, 0.5, 0.3], epoch, num_epochs=4) for epoch in (1, 2, 3)]
    [[1, 3], [1, 2, 3], [0, 1, 2, 3]]
    """
    if epoch < 1:
        raise ValueError(f"epoch is {epoch}. Epochs are counted from 1.")
    half = num_epochs // 2
    share = 1.0 if epoch > half else FIRST_SHARE + (1 - FIRST_SHARE) * (epoch - 1) / half
    num_open = math.ceil(round(share * len(difficulties), 6))
    easiest = sorted(range(len(difficulties)), key=lambda index: (difficulties[index], index))
    return sorted(easiest[:num_open])
