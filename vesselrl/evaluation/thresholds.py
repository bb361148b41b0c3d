"""The threshold above which a probability is vessel, chosen on validation patients.

All thresholds are scored from one pass: each image is reduced to tp, fp and fn at 0.01, ..., 0.99 of its
masks as they will be used, with the rest of the post-processing done. The best threshold has the highest mean
over patients of Dice; of equal ones the nearest to 0.5. Test images take no part in the choice.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vesselrl.evaluation.probabilities import THRESHOLDS, count_pixels
from vesselrl.evaluation.statistics import patient_means
from vesselrl.scoring.metrics import (
    counts,
    dice_from_counts,
    precision_from_counts,
    recall_from_counts,
)
from vesselrl.scoring.postprocessing import THRESHOLD_ONLY, PostProcessing

FORMAT = "vesselrl thresholds 1"
DEFAULT = 0.5
SCORES = ("dice", "recall", "precision")


@dataclass(frozen=True)
class CurvePoint:
    """Means over patients at one threshold; recall leaves out images without a true vessel (nan: all)."""

    threshold: float
    dice: float
    recall: float
    precision: float


@dataclass(frozen=True)
class ThresholdCurve:
    """Scores of one model on one set of images at every threshold.

    Attributes:
        points: one per threshold, ascending.
        n_images: images that entered, failed predictions (empty masks) among them.
        n_patients: their patients.
        n_failed: failed predictions.
    """

    points: tuple[CurvePoint, ...]
    n_images: int
    n_patients: int
    n_failed: int

    @property
    def best(self) -> CurvePoint:
        """The point with the highest Dice; of equal ones the nearest to 0.5."""
        return max(self.points, key=lambda point: (point.dice, -abs(point.threshold - DEFAULT)))

    @property
    def default(self) -> CurvePoint:
        """The point at 0.5."""
        return next(point for point in self.points if point.threshold == DEFAULT)

    def at_recall(self, recall: float) -> CurvePoint:
        """The point whose recall is nearest to `recall`; of equally near ones that of highest precision.

        Raises:
            ValueError: no image has a true vessel, so there is no recall.
        """
        defined = [point for point in self.points if not math.isnan(point.recall)]
        if not defined:
            raise ValueError("No image has a true vessel: no threshold can be chosen by recall.")
        return min(defined, key=lambda point: (abs(point.recall - recall), -point.precision))

    def to_json(self, side: str = "val") -> dict[str, Any]:
        """The curve, one list per score, and the choice; `side` is the side it was measured on."""
        return {
            "format": FORMAT,
            "side": side,
            "chosen": self.best.threshold,
            "chosen_by": "mean over patients of Dice",
            "n_images": self.n_images,
            "n_patients": self.n_patients,
            "n_failed": self.n_failed,
            "thresholds": [point.threshold for point in self.points],
            **{name: [getattr(point, name) for point in self.points] for name in SCORES},
        }


def read_sweep(path: Path) -> dict[str, Any]:
    """A stored `ThresholdCurve.to_json`; undefined scores (null) become nan.

    Returns:
        dict with `thresholds`, `dice`, `recall`, `precision` (lists of one length), `chosen`, and
        `side`, `n_images`, `n_patients` of the images it was measured on.

    Raises:
        ValueError: the file is damaged or incomplete; the message names it.
        FileNotFoundError: there is no such file.
    """
    place = f"{path.name} in {path.parent.name}"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        sweep = {name: stored[name] for name in ("side", "n_images", "n_patients")}
        sweep["chosen"] = float(stored["chosen"])
        sweep["thresholds"] = [float(value) for value in stored["thresholds"]]
        for name in SCORES:
            sweep[name] = [math.nan if value is None else float(value) for value in stored[name]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place} is no threshold sweep ({type(error).__name__}: {error}). Evaluate again."
        ) from error
    lengths = {name: len(sweep[name]) for name in ("thresholds", *SCORES)}
    if len(set(lengths.values())) > 1 or not sweep["thresholds"]:
        raise ValueError(f"{place} holds lists of unequal length or none: {lengths}. Evaluate again.")
    return sweep


def sweep_thresholds(
    predict: Callable[[np.ndarray], Any],
    samples: Sequence[Any],
    load: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    progress: Callable[[int, int], None] | None = None,
    post: PostProcessing = THRESHOLD_ONLY,
) -> ThresholdCurve:
    """Predicts every image once and scores all thresholds; a failed prediction is an empty mask at each.

    Args:
        predict: image uint8 (H, W, 3) -> object with `.probabilities`, (H, W), or None = failed.
        samples: validation samples, with `patient`.
        load: sample -> (image, true mask).
        progress: called with (images done, images in all) after every image.
        post: what is done to a mask after the threshold; its own threshold is not used.

    Raises:
        ValueError: no samples, or probabilities of the wrong shape or range.
    """
    counted = []
    num_failed = 0
    for sample in samples:
        image, truth = load(sample)
        prediction = predict(image)
        num_failed += prediction is None
        probabilities = np.zeros(truth.shape) if prediction is None else prediction.probabilities
        counted.append(counts_by_threshold(probabilities, truth, post))
        if progress is not None:
            progress(len(counted), len(samples))
    return threshold_curve(counted, [sample.patient for sample in samples], num_failed)


def counts_by_threshold(
    probabilities: np.ndarray, truth: np.ndarray, post: PostProcessing = THRESHOLD_ONLY
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tp, fp and fn, each (99,), of one image's masks at all `THRESHOLDS`.

    Args:
        probabilities: (H, W) in [0, 1].
        truth: bool (H, W).
        post: what is done to a mask after the threshold; its own threshold is not used.

    Raises:
        ValueError: the shapes differ, or a value is no probability.
    """
    by_probability = count_pixels(probabilities, truth)
    if post.changes_masks:
        masks = post.masks(probabilities, THRESHOLDS)
        tp, fp, fn = np.transpose([counts(mask, truth)[:3] for mask in masks])
        return tp, fp, fn
    # Threshold k leaves bins k + 1 and above as vessel.
    found, invented = (
        np.cumsum(part[::-1])[::-1] for part in (by_probability.vessel, by_probability.background)
    )
    return found[1:], invented[1:], found[0] - found[1:]


def threshold_curve(
    counted: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], patients: Sequence[str], num_failed: int = 0
) -> ThresholdCurve:
    """The curve of images that are counted already, one patient name per image.

    Args:
        counted: of `counts_by_threshold`.
        patients: the image's own.
        num_failed: failed predictions among them.

    Raises:
        ValueError: there is no image.
    """
    if not counted:
        raise ValueError(
            "There are no images to choose a threshold on. Use a split with validation patients."
        )
    tp, fp, fn = (np.stack(part) for part in zip(*counted, strict=True))
    scores = {
        "dice": dice_from_counts(tp, fp, fn),
        "recall": recall_from_counts(tp, fn),
        "precision": precision_from_counts(tp, fp, fn),
    }
    points = []
    for column, threshold in enumerate(THRESHOLDS):
        means = {name: _patient_mean(table[:, column], patients) for name, table in scores.items()}
        points.append(CurvePoint(round(float(threshold), 2), **means))
    return ThresholdCurve(tuple(points), len(counted), len(set(patients)), num_failed)


def _patient_mean(values: np.ndarray, patients: Sequence[str]) -> float:
    """Mean over patients of per-patient means, nan where nothing is defined."""
    means = list(patient_means(values, patients).values())
    return float(np.mean(means)) if means else float("nan")
