"""Distances between the borders of two masks: HD95 and NSD.

Definition, equal to MONAI's `compute_hausdorff_distance(percentile=95)` and `compute_surface_dice`: a border
pixel is a foreground pixel with a background pixel above, below, left or right of it; outside the image is
background. Other tools measure between surface elements on a half-pixel grid, which gives other numbers.
"""

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from vesselrl.scoring.overlap import METRIC_SPEC, as_mask

TOLERANCE_PX: float = METRIC_SPEC["nsd_tolerance_px"]


@dataclass(frozen=True, eq=False)
class Surface:
    """The border of one mask and how far every pixel is from it."""

    positions: np.ndarray  # flat positions of the border pixels, in reading order
    distance: np.ndarray  # float32 (H, W), exact, in pixels; of no meaning where the mask is empty


def surface(mask: Any) -> Surface:
    """Border and distance map of a mask, bool or 0/1 (H, W)."""
    border = border_of(as_mask(mask))
    distance = cv2.distanceTransform((~border).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return Surface(np.flatnonzero(border), distance)


def border_of(mask: np.ndarray) -> np.ndarray:
    """Foreground pixels with a background 4-neighbour, bool (H, W); outside the image is background."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    pixels = mask.view(np.uint8)
    return mask & ~cv2.erode(pixels, cross, borderType=cv2.BORDER_CONSTANT, borderValue=0).view(bool)


def surface_scores(pred: Any, truth: Surface, tolerance_px: float = TOLERANCE_PX) -> dict[str, float]:
    """HD95 and normalised surface Dice of one prediction, bool or 0/1 (H, W).

    hd95 is the larger of the two directed 95th percentiles, in pixels: 0 for two empty masks, the diagonal of
    the image for exactly one. nsd is the share of both borders within `tolerance_px` of the other one, in
    [0, 1]: 1 for two empty masks, 0 for exactly one.
    """
    from vesselrl.scoring.kernels import distances_to_border

    pred = as_mask(pred, "pred")
    if pred.shape != truth.distance.shape:
        raise ValueError(
            f"prediction {pred.shape} and the truth's surface {truth.distance.shape} differ in size (H, W). "
            "Pass surface(truth) of the same image."
        )
    if not tolerance_px >= 0:
        raise ValueError(f"tolerance_px must be at least 0, got {tolerance_px}.")
    border = border_of(pred)
    positions = np.flatnonzero(border)
    if positions.size == 0 or truth.positions.size == 0:
        both_empty = positions.size == truth.positions.size
        return {"hd95": 0.0 if both_empty else math.hypot(*pred.shape), "nsd": float(both_empty)}
    to_truth = _exact(truth.distance.ravel()[positions])
    to_pred = _exact(distances_to_border(border, truth.positions))
    num_close = np.count_nonzero(to_truth <= tolerance_px) + np.count_nonzero(to_pred <= tolerance_px)
    return {
        "hd95": float(max(np.percentile(to_truth, 95), np.percentile(to_pred, 95))),
        "nsd": float(num_close / (to_truth.size + to_pred.size)),
    }


def _exact(distances: np.ndarray) -> np.ndarray:
    """The same distances in float64: their squares are whole numbers, so the last bits follow from them.

    OpenCV's float32 map differs in its last bit from run to run.
    """
    return np.sqrt(np.rint(np.square(distances, dtype=np.float64)))
