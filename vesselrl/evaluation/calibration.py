"""Calibration: of the pixels called vessel with probability 0.7, are 70 % vessel?"""

from typing import Any

import numpy as np

from vesselrl.evaluation.probabilities import NUM_BINS, ProbabilityCounts

BINS = 10


def calibration(counts: ProbabilityCounts, num_failed: int = 0) -> dict[str, Any]:
    """Reliability curve and expected calibration error over all pixels of a set of images.

    Bin b of 10 holds the probabilities in (b/10, (b+1)/10], the first also 0. With n_b pixels in it, mean
    predicted probability p_b and share v_b of true vessel:

        expected calibration error = sum over b of n_b / n * |p_b - v_b|        (0 is perfect, at most 1)

    Background is most of an image, so the error is small for any model that leaves it alone; the curve says
    more. Pixels, not patients, are the unit here.

    Args:
        counts: sum over the images whose prediction did not fail.
        num_failed: failed predictions, which have no probabilities and are left out.

    Returns:
        `expected_calibration_error` (nan without pixels), `n_pixels`, `n_failed` and `bins`: for every bin
        that holds pixels `low`, `high`, `predicted`, `observed` and `pixels`.
    """
    vessel, background, probability = (part.reshape(BINS, NUM_BINS // BINS).sum(axis=1) for part in counts)
    pixels = vessel + background
    total = int(pixels.sum())
    bins = [
        {
            "low": number / BINS,
            "high": (number + 1) / BINS,
            "predicted": float(probability[number] / pixels[number]),
            "observed": float(vessel[number] / pixels[number]),
            "pixels": int(pixels[number]),
        }
        for number in np.flatnonzero(pixels).tolist()
    ]
    gaps = [line["pixels"] * abs(line["predicted"] - line["observed"]) for line in bins]
    return {
        "expected_calibration_error": sum(gaps) / total if total else float("nan"),
        "n_pixels": total,
        "n_failed": num_failed,
        "bins": bins,
    }
