"""Test-time flips: the mean probability over an image and its three mirror images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# As seen, mirrored left to right, upside down, and both.
FLIPS = (
    (slice(None), slice(None)),
    (slice(None), slice(None, None, -1)),
    (slice(None, None, -1), slice(None)),
    (slice(None, None, -1), slice(None, None, -1)),
)


class FlippedPrediction(NamedTuple):
    """What `with_flips` predicts, both (H, W): mask bool, probabilities float32 in [0, 1]."""

    mask: np.ndarray
    probabilities: np.ndarray


def with_flips(
    predict: Callable[[np.ndarray], Any], threshold: float = 0.5
) -> Callable[[np.ndarray], FlippedPrediction | None]:
    """Asks another predictor four times; the mask is where the mean probability is above the threshold.

    The prediction fails (None) if one of the four does.

    Args:
        predict: image uint8 (H, W, 3) -> object with `.probabilities`, (H, W), or None = failed.
        threshold: probability above which a pixel is vessel.
    """

    def predict_four(image: np.ndarray) -> FlippedPrediction | None:
        total = np.zeros(image.shape[:2], np.float32)
        for flip in FLIPS:
            prediction = predict(np.ascontiguousarray(image[flip]))
            if prediction is None:
                return None
            total += prediction.probabilities[flip]
        mean = total / np.float32(len(FLIPS))
        return FlippedPrediction(mean > np.float32(threshold), mean)

    return predict_four
