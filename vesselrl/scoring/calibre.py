"""Recall by the width of the vessel: thin branches hold few pixels and vanish in any other score."""

from __future__ import annotations

from typing import Any

import numpy as np

from vesselrl.scoring.masks import as_mask
from vesselrl.scoring.metrics import recall_from_counts
from vesselrl.scoring.spec import METRIC_SPEC
from vesselrl.scoring.topology import topology

CALIBRES = ("thin", "medium", "thick")

# Diameters of the discs, in pixels. An odd disc sits on a pixel: a bar of 4 px is thin, one of 5 px is not.
MEDIUM_FROM_PX: int = METRIC_SPEC["calibre_medium_from_px"]
THICK_FROM_PX: int = METRIC_SPEC["calibre_thick_from_px"]


def calibre_map(truth: Any, skeleton: np.ndarray | None = None) -> np.ndarray:
    """Width class of every pixel of a truth: 0 background, 1 thin, 2 medium, 3 thick; uint8 (H, W).

    A centreline pixel is as wide as the largest disc that fits into the truth and covers it: thick from a
    diameter of 9 px, medium from 5 px. Every other pixel of the truth takes the class of the centreline pixel
    nearest to it, so the rough edge of a thick vessel is not called thin. Outside the image is background.

    Args:
        truth: bool or 0/1 (H, W).
        skeleton: `topology(truth).skeleton` if the caller has it already.

    Raises:
        ValueError: not a mask.

    An empty truth has an empty map.

    >>> bar = np.zeros((20, 40), bool)
    >>> bar[2:6, 5:35] = bar[8:18, 5:35] = True
    >>> [int(calibre_map(bar)[row, 20]) for row in (0, 2, 12)]
    [0, 1, 3]
    """
    from scipy.ndimage import distance_transform_edt

    truth = as_mask(truth, "truth")
    classes = np.zeros(truth.shape, np.uint8)
    if not truth.any():
        return classes
    if skeleton is None:
        skeleton = topology(truth).skeleton
    widths = np.ones(truth.shape, np.uint8)
    widths[covered_by_discs(truth, MEDIUM_FROM_PX)] = 2
    widths[covered_by_discs(truth, THICK_FROM_PX)] = 3
    nearest = distance_transform_edt(~skeleton, return_distances=False, return_indices=True)
    classes[truth] = widths[tuple(nearest)][truth]
    return classes


def covered_by_discs(mask: np.ndarray, diameter_px: int) -> np.ndarray:
    """Pixels of a bool mask (H, W) that some disc of an odd diameter inside the mask covers; bool (H, W).

    >>> covered_by_discs(np.ones((4, 9), bool), 5).any(), covered_by_discs(np.ones((3, 3), bool), 3).all()
    (np.False_, np.True_)
    """
    import cv2

    def distance(pixels: np.ndarray) -> np.ndarray:
        return cv2.distanceTransform(pixels.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)

    centres = distance(np.pad(mask, 1))[1:-1, 1:-1] > diameter_px / 2
    if not centres.any():
        return centres
    return distance(~centres) < diameter_px / 2


def recall_by_calibre(pred: Any, classes: np.ndarray) -> dict[str, float]:
    """Share of the thin, medium and thick truth that was found, each in [0, 1]; nan where a class is empty.

    Args:
        pred: bool or 0/1 (H, W).
        classes: `calibre_map(truth)`.

    Returns:
        recall_thin, recall_medium, recall_thick.

    Raises:
        ValueError: not a mask, or not of the size of the truth.
    """
    pred = as_mask(pred, "pred")
    if pred.shape != classes.shape:
        raise ValueError(
            f"prediction {pred.shape} and calibre map {classes.shape} differ in size (H, W). "
            "Pass calibre_map(truth) of the same image."
        )
    present = np.bincount(classes.ravel(), minlength=4)
    found = np.bincount(classes[pred], minlength=4)
    shares = recall_from_counts(found, present - found)
    return {f"recall_{name}": float(share) for name, share in zip(CALIBRES, shares[1:], strict=True)}
