"""The one gate through which every mask enters: bool, two-dimensional, contiguous, or a clear error."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_mask(mask: Any, name: str = "mask") -> np.ndarray:
    """Return `mask` as a contiguous bool array of shape (H, W).

    Args:
        mask: (H, W) array, nested list or torch tensor (on any device) that holds only 0 and 1, or bool.
        name: what to call it in an error message.

    Returns:
        A bool array. A contiguous bool input is returned as it is, not copied.

    Raises:
        ValueError: not two-dimensional, without pixels, or with values other than 0 and 1
            ("truth holds values from 0 to 255 ... pass truth > 127").

    An empty mask (no foreground) is a valid mask.

    >>> as_mask([[0, 1], [1, 0]])
    array([[False,  True],
           [ True, False]])
    """
    array = _as_array(mask)
    if array.ndim != 2:
        raise ValueError(
            f"{name} must be two-dimensional (H, W), got shape {array.shape}. "
            "Pass one mask at a time, without batch or channel axes."
        )
    if array.size == 0:
        raise ValueError(
            f"{name} has no pixels, got shape {array.shape}. Check how it was cropped or loaded."
        )
    if array.dtype != np.bool_:
        array = _zero_one_to_bool(array, name)
    return np.ascontiguousarray(array)


def check_same_shape(pred: np.ndarray, truth: np.ndarray) -> None:
    """Refuse two masks of different size.

    Raises:
        ValueError: the shapes differ; the message gives both and says which one to resize.

    >>> check_same_shape(np.zeros((2, 3), bool), np.zeros((2, 3), bool))
    """
    if pred.shape != truth.shape:
        raise ValueError(
            f"prediction and truth differ in size: prediction {pred.shape}, truth {truth.shape} (H, W). "
            "Resize the prediction to the size of the truth, never the truth."
        )


def as_mask_pair(pred: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both masks through `as_mask` and `check_same_shape`, with the errors of either."""
    pred, truth = as_mask(pred, "pred"), as_mask(truth, "truth")
    check_same_shape(pred, truth)
    return pred, truth


def drop_small_components(mask: Any, min_px: int) -> np.ndarray:
    """The mask without its 8-connected components of fewer than `min_px` pixels, bool (H, W).

    Args:
        mask: bool or 0/1 (H, W); an empty mask stays empty.
        min_px: smallest component that is kept, in px; 0 and 1 keep all.

    Raises:
        ValueError: not a mask, or `min_px` is negative.

    >>> drop_small_components([[1, 1, 0, 1]], 2)
    array([[ True,  True, False, False]])
    """
    mask = as_mask(mask)
    if min_px < 0:
        raise ValueError(f"min_px is {min_px}. Give a number of pixels, 0 or more.")
    if min_px <= 1:
        return mask
    import cv2

    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    kept = stats[:, cv2.CC_STAT_AREA] >= min_px
    kept[0] = False  # the background
    return kept[labels]


def _as_array(mask: Any) -> np.ndarray:
    """A numpy view of an array, list or torch tensor; torch itself is never imported here."""
    if hasattr(mask, "detach"):
        mask = mask.detach().cpu()
        if mask.is_floating_point():
            mask = mask.float()  # numpy has no bfloat16
        mask = mask.numpy()
    return np.asarray(mask)


def _zero_one_to_bool(array: np.ndarray, name: str) -> np.ndarray:
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(f"{name} must be bool or 0/1, got dtype {array.dtype}. Convert it to bool first.")
    if not np.all((array == 0) | (array == 1)):
        raise ValueError(
            f"{name} holds values from {array.min()} to {array.max()}, a mask holds only 0 and 1. "
            f"Threshold it first: pass {name} > 127 for a 0/255 image, {name} > 0.5 for probabilities."
        )
    return array.astype(bool)
