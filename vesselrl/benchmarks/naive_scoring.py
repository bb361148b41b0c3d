"""The obvious way to score a mask, with scikit-image and SciPy: what the scoring engine is compared with.

One mask after the other, every skeleton where it is needed, the truth again for every prediction. It takes
scikit-image's fastest skeleton, `skeletonize` (Zhang), so its centreline scores are not those of the engine;
overlap, pieces, loops, HD95 and NSD are the same numbers.
"""

from __future__ import annotations

import math

import numpy as np


def naive_scores(pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Overlap, clDice and differences in shape of two non-empty bool masks (H, W)."""
    tp = np.logical_and(pred, truth).sum()
    fp = np.logical_and(pred, ~truth).sum()
    fn = np.logical_and(~pred, truth).sum()
    tn = np.logical_and(~pred, ~truth).sum()
    shape, true_shape = _naive_shape(pred), _naive_shape(truth)
    return {
        "dice": 2 * tp / (2 * tp + fp + fn),
        "iou": tp / (tp + fp + fn),
        "recall": tp / (tp + fn),
        "precision": tp / (tp + fp),
        "specificity": tn / (tn + fp),
        "cldice": _naive_cldice(pred, truth),
        "beta0_error": abs(shape["pieces"] - true_shape["pieces"]),
        "beta1_error": abs(shape["loops"] - true_shape["loops"]),
        "ends_error": abs(shape["ends"] - true_shape["ends"]),
        "junctions_error": abs(shape["junctions"] - true_shape["junctions"]),
        "length_ratio": shape["length"] / true_shape["length"],
    }


def naive_surface_scores(pred: np.ndarray, truth: np.ndarray, tolerance_px: float) -> dict[str, float]:
    """hd95 and nsd of two non-empty bool masks (H, W), by SciPy's exact distance transform."""
    from scipy.ndimage import binary_erosion, distance_transform_edt

    border, true_border = pred ^ binary_erosion(pred), truth ^ binary_erosion(truth)
    to_truth = distance_transform_edt(~true_border)[border]
    to_pred = distance_transform_edt(~border)[true_border]
    close = np.sum(to_truth <= tolerance_px) + np.sum(to_pred <= tolerance_px)
    return {
        "hd95": max(np.percentile(to_truth, 95), np.percentile(to_pred, 95)),
        "nsd": close / (len(to_truth) + len(to_pred)),
    }


def _naive_cldice(pred: np.ndarray, truth: np.ndarray) -> float:
    from skimage.morphology import skeletonize

    skeleton, true_skeleton = skeletonize(pred), skeletonize(truth)
    tprec = np.sum(skeleton & truth) / np.sum(skeleton)
    tsens = np.sum(true_skeleton & pred) / np.sum(true_skeleton)
    return 2 * tprec * tsens / (tprec + tsens) if tprec + tsens > 0 else math.nan


def _naive_shape(mask: np.ndarray) -> dict[str, int]:
    import cv2
    from skimage.measure import label
    from skimage.morphology import skeletonize

    skeleton = skeletonize(mask)
    pixels = skeleton.astype(np.uint8)
    num_neighbours = (
        cv2.filter2D(pixels, -1, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT) - pixels
    )
    outside = np.pad(~mask, 1, constant_values=True)
    return {
        "length": skeleton.sum(),
        "pieces": label(mask, connectivity=2).max(),
        "loops": label(outside, connectivity=1).max() - 1,
        "ends": np.sum(skeleton & (num_neighbours == 1)),
        "junctions": np.sum(skeleton & (num_neighbours >= 3)),
    }
