"""Distances between the borders of two masks: HD95 and NSD.

Definition, equal to MONAI's `compute_hausdorff_distance(percentile=95)` and `compute_surface_dice`: a border
pixel is a foreground pixel with a background pixel above, below, left or right of it (8-connected borders of
8-connected pieces; outside the image is background). Other tools measure between surface elements on a
half-pixel grid and weight them by length, which gives other numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from vesselrl.scoring.backend import compiled_kernels
from vesselrl.scoring.masks import as_mask, as_mask_pair
from vesselrl.scoring.spec import METRIC_SPEC

TOLERANCE_PX: float = METRIC_SPEC["nsd_tolerance_px"]


@dataclass(frozen=True, eq=False)
class Surface:
    """The border of one mask and how far every pixel is from it."""

    # bool (H, W)
    border: np.ndarray
    # flat positions of the border pixels, in reading order
    positions: np.ndarray
    # float32 (H, W), exact, in pixels; of no meaning where the mask is empty
    distance: np.ndarray


def surface(mask: Any) -> Surface:
    """Border and distance map of a mask, bool or 0/1 (H, W); what `hd95` and `nsd` need of the truth.

    Raises:
        ValueError: not a mask.

    >>> surface(np.ones((3, 3), bool)).distance.max()
    np.float32(1.0)
    """
    border = border_of(as_mask(mask))
    return Surface(border, np.flatnonzero(border), _distance_map(border))


def border_of(mask: np.ndarray) -> np.ndarray:
    """Foreground pixels with a background 4-neighbour, bool (H, W); outside the image is background.

    >>> border_of(np.ones((3, 3), bool)).sum()
    np.int64(8)
    """
    import cv2

    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    pixels = mask.view(np.uint8)
    return mask & ~cv2.erode(pixels, cross, borderType=cv2.BORDER_CONSTANT, borderValue=0).view(bool)


def hd95(pred: Any, truth: Any) -> float:
    """Hausdorff distance at the 95th percentile, in pixels: the larger of the two directed percentiles.

    Masks are bool or 0/1 (H, W). Two empty masks 0, exactly one empty mask the diagonal of the image.

    Raises:
        ValueError: not masks, or of different size.

    >>> row = np.array([[1, 0, 0, 0]], bool)
    >>> hd95(row, row[:, ::-1])
    3.0
    """
    pred, truth = as_mask_pair(pred, truth)
    return surface_scores(pred, surface(truth))["hd95"]


def nsd(pred: Any, truth: Any, tolerance_px: float = TOLERANCE_PX) -> float:
    """Normalised surface Dice, in [0, 1]: share of both borders within `tolerance_px` of the other one.

    Masks are bool or 0/1 (H, W). Two empty masks 1, exactly one empty mask 0.

    Raises:
        ValueError: not masks, or of different size, or a negative tolerance.

    >>> row = np.array([[1, 0, 0, 0]], bool)
    >>> nsd(row, row[:, ::-1]), nsd(row, row[:, ::-1], tolerance_px=3)
    (0.0, 1.0)
    """
    pred, truth = as_mask_pair(pred, truth)
    return surface_scores(pred, surface(truth), tolerance_px)["nsd"]


def surface_scores(pred: Any, truth: Surface, tolerance_px: float = TOLERANCE_PX) -> dict[str, float]:
    """hd95 and nsd of one prediction, bool or 0/1 (H, W), with one distance map; rules as in `hd95`, `nsd`.

    Raises:
        ValueError: not a mask, not of the size of the truth, or a negative tolerance.
    """
    pred = as_mask(pred, "pred")
    if pred.shape != truth.border.shape:
        raise ValueError(
            f"prediction {pred.shape} and the truth's surface {truth.border.shape} differ in size (H, W). "
            "Pass surface(truth) of the same image."
        )
    if not tolerance_px >= 0:
        raise ValueError(f"tolerance_px must be at least 0, got {tolerance_px}.")
    border = border_of(pred)
    positions = np.flatnonzero(border)
    pred_empty, truth_empty = positions.size == 0, truth.positions.size == 0
    if pred_empty or truth_empty:
        both = pred_empty and truth_empty
        return {"hd95": 0.0 if both else math.hypot(*pred.shape), "nsd": float(both)}
    to_truth = _exact(truth.distance.ravel()[positions])
    to_pred = _exact(_distances_to(border, truth.positions))
    num_close = np.count_nonzero(to_truth <= tolerance_px) + np.count_nonzero(to_pred <= tolerance_px)
    return {
        "hd95": float(max(np.percentile(to_truth, 95), np.percentile(to_pred, 95))),
        "nsd": float(num_close / (to_truth.size + to_pred.size)),
    }


def _distances_to(border: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Distance from each flat position to a border that is not empty, float32, in pixels."""
    kernels = compiled_kernels()
    if kernels is None:
        return _distance_map(border).ravel()[positions]
    return kernels.distances_to_border(border, positions)


def _exact(distances: np.ndarray) -> np.ndarray:
    """The same distances in float64: their squares are whole numbers, so the last bits follow from them.

    OpenCV's float32 map differs in its last bit from run to run.
    """
    return np.sqrt(np.rint(np.square(distances, dtype=np.float64)))


def _distance_map(border: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.distanceTransform((~border).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
