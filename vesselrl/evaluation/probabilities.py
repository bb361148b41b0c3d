"""Pixels counted by their predicted probability: all that thresholds and calibration need of an image."""

from typing import NamedTuple

import numpy as np

# A pixel is vessel where its probability is above the threshold, compared in float32 as it was predicted.
THRESHOLDS = (np.arange(1, 100) / 100).astype(np.float32)
NUM_BINS = len(THRESHOLDS) + 1


class ProbabilityCounts(NamedTuple):
    """One image, or several added up: bin k holds the probabilities in (k/100, (k+1)/100], bin 0 also 0."""

    # Pixels of the true vessel, and of the background, int64 (100,).
    vessel: np.ndarray
    background: np.ndarray
    # Sum of the probabilities, float64 (100,).
    probability: np.ndarray

    def __add__(self, other: "ProbabilityCounts") -> "ProbabilityCounts":
        return ProbabilityCounts(*(a + b for a, b in zip(self, other, strict=True)))


def no_pixels() -> ProbabilityCounts:
    """The counts of no image at all, to add to."""
    return ProbabilityCounts(np.zeros(NUM_BINS, int), np.zeros(NUM_BINS, int), np.zeros(NUM_BINS))


def count_pixels(probabilities: np.ndarray, truth: np.ndarray) -> ProbabilityCounts:
    """Counts the pixels of one image by probability and truth.

    Args:
        probabilities: float32 (H, W) in [0, 1].
        truth: bool (H, W).

    Raises:
        ValueError: the shapes differ, or a value is no probability.

    >>> counts = count_pixels(np.array([[0.0, 0.25, 0.995]]), np.array([[False, True, True]]))
    >>> np.flatnonzero(counts.vessel).tolist(), np.flatnonzero(counts.background).tolist()
    ([24, 99], [0])
    """
    values = np.asarray(probabilities, dtype=np.float32)
    if values.shape != truth.shape:
        raise ValueError(
            f"The probabilities are {values.shape}, the true mask {truth.shape}. Both must have the size of "
            "the original image."
        )
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("Some probabilities are nan or outside 0 to 1. Give probabilities, not logits.")
    values, in_vessel = values.ravel(), truth.ravel()
    bins = np.searchsorted(THRESHOLDS, values, side="left")
    total = np.bincount(bins, minlength=NUM_BINS)
    vessel = np.bincount(bins[in_vessel], minlength=NUM_BINS)
    return ProbabilityCounts(vessel, total - vessel, np.bincount(bins, values, minlength=NUM_BINS))
