"""Masks as they enter the package, the definitions behind every score, and all scores made of pixel counts.

One rule for empty masks: two empty masks agree (1), exactly one empty mask is a complete failure (0). Only
what has no meaning is nan: recall where there is nothing to find, specificity where there is no background.
"""

from typing import Any, NamedTuple

import numpy as np

# Stored with every result; results of different specifications are not compared. Raise `version` whenever a
# definition changes or a score is added.
METRIC_SPEC: dict[str, Any] = {
    "version": 2,
    "skeleton": "guo_hall",
    "foreground_connectivity": 8,
    "background_connectivity": 4,
    "padding": "background",
    "length": "skeleton pixels",
    "path_length": "side steps + sqrt(2) x diagonal steps that no side steps replace",
    "end": "skeleton pixel with exactly one 8-neighbour",
    "junction": "8-connected cluster of skeleton pixels with crossing number >= 3",
    "border": "foreground pixels with a background 4-neighbour; outside the image is background",
    "hd95": "larger of the two directed 95th percentiles (linear) between borders, px",
    "nsd": "share of both borders within nsd_tolerance_px of the other",
    "nsd_tolerance_px": 2.0,
    "calibre": "largest disc inside the truth over the nearest centreline pixel",
    "calibre_medium_from_px": 5,
    "calibre_thick_from_px": 9,
}


def as_mask(mask: Any, name: str = "mask") -> np.ndarray:
    """Return a mask, an array, nested list or tensor of bool or 0/1, as a contiguous bool array (H, W).

    One that is so already is not copied; all else is refused with a ValueError that calls it `name`.
    """
    if hasattr(mask, "detach"):  # a tensor; torch itself is never imported here
        mask = mask.detach().cpu()
        mask = (mask.float() if mask.is_floating_point() else mask).numpy()  # numpy has no bfloat16
    array = np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(f"{name} must be one two-dimensional (H, W) mask, got shape {array.shape}.")
    if array.size == 0:
        raise ValueError(f"{name} has no pixels, got shape {array.shape}. Check how it was loaded.")
    if array.dtype != np.bool_:
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{name} must be bool or 0/1, got dtype {array.dtype}. Convert it to bool.")
        if not np.all((array == 0) | (array == 1)):
            raise ValueError(
                f"{name} holds values from {array.min()} to {array.max()}, a mask holds only 0 and 1. Pass "
                f"{name} > 127 for a 0/255 image, {name} > 0.5 for probabilities."
            )
        array = array.astype(bool)
    return np.ascontiguousarray(array)


def as_mask_pair(pred: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return both masks as of `as_mask`; a ValueError for two sizes."""
    pred, truth = as_mask(pred, "pred"), as_mask(truth, "truth")
    if pred.shape != truth.shape:
        sizes = f"prediction {pred.shape}, truth {truth.shape} (H, W)"
        raise ValueError(f"masks differ in size: {sizes}. Resize the prediction to the size of the truth.")
    return pred, truth


class Counts(NamedTuple):
    """Pixels by agreement: true and false positive, false and true negative; they add up to H x W."""

    tp: int
    fp: int
    fn: int
    tn: int


def counts(pred: Any, truth: Any) -> Counts:
    """Count true and false positive and negative pixels of two bool or 0/1 masks (H, W)."""
    pred, truth = as_mask_pair(pred, truth)
    tp = int(np.count_nonzero(pred & truth))
    fp = int(np.count_nonzero(pred)) - tp
    fn = int(np.count_nonzero(truth)) - tp
    return Counts(tp, fp, fn, pred.size - tp - fp - fn)


def dice(pred: Any, truth: Any) -> float:
    """Overlap of two bool or 0/1 masks (H, W), 2·|P∩T| / (|P|+|T|), in [0, 1]."""
    return float(dice_from_counts(*counts(pred, truth)[:3]))


# ---- From counts: numbers or arrays of any shape, elementwise, float64 out ----


def dice_from_counts(tp: Any, fp: Any, fn: Any, empty: float = 1.0) -> np.ndarray:
    """Dice, 2·tp / (2·tp+fp+fn); `empty` where both masks are empty."""
    tp, fp, fn = _as_float(tp, fp, fn)
    return _ratio(2 * tp, 2 * tp + fp + fn, empty)


def recall_from_counts(tp: Any, fn: Any, empty: float = np.nan) -> np.ndarray:
    """Recall, tp / (tp+fn); `empty` where the truth is empty."""
    tp, fn = _as_float(tp, fn)
    return _ratio(tp, tp + fn, empty)


def precision_from_counts(tp: Any, fp: Any, fn: Any, empty: float = 1.0) -> np.ndarray:
    """Precision, tp / (tp+fp); `empty` where both masks are empty, 0 where only the prediction is."""
    tp, fp, fn = _as_float(tp, fp, fn)
    return _ratio(tp, tp + fp, np.where(fn == 0, empty, 0.0))


def overlap_scores(pixel_counts: Counts) -> dict[str, float]:
    """Dice, IoU, recall, precision and specificity of one pair of masks."""
    tp, fp, fn, tn = pixel_counts
    return {
        "dice": float(dice_from_counts(tp, fp, fn)),
        "iou": float(_ratio(tp, tp + fp + fn, 1.0)),
        "recall": float(recall_from_counts(tp, fn)),
        "precision": float(precision_from_counts(tp, fp, fn)),
        "specificity": float(_ratio(tn, tn + fp, np.nan)),
    }


def _as_float(*values: Any) -> tuple[Any, ...]:
    if all(isinstance(value, int | float) for value in values):
        return values  # single counts need no arrays: ten times faster
    return np.broadcast_arrays(*(np.asarray(value, np.float64) for value in values))


def _ratio(numerator: Any, denominator: Any, empty: Any) -> Any:
    """Divide, with `empty` where the denominator is 0."""
    if isinstance(denominator, int | float):
        return np.float64(numerator / denominator if denominator > 0 else empty)
    out = np.array(np.broadcast_to(empty, denominator.shape), np.float64)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)
