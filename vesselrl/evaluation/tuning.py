"""Chooses on validation images how masks are made: the threshold by Dice, all post-processing by reward."""

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vesselrl.evaluation.statistics import patient_mean
from vesselrl.experiment.run_folder import MALFORMED, read_object
from vesselrl.scoring.overlap import counts, dice_from_counts, precision_from_counts, recall_from_counts
from vesselrl.scoring.postprocessing import LowThresholdMask, PostProcessing, drop_small_components
from vesselrl.scoring.rewards import Reward, score_or_skip
from vesselrl.scoring.scores import cached_truth

logger = logging.getLogger(__name__)

FORMAT = "vesselrl thresholds 1"
SCORES = ("dice", "recall", "precision")
# A pixel is vessel where its probability is above the threshold, compared in float32 as it was predicted.
THRESHOLDS = (np.arange(1, 100) / 100).astype(np.float32)
NUM_BINS = len(THRESHOLDS) + 1
CALIBRATION_BINS = 10
# The candidates of `score_postprocessing`.
GRID_THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SIZES_PX = (0, 20, 40, 80, 160)
GAP_LEVELS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


def count_pixels(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Counts the pixels of one image, both (H, W), by probability; the counts of several images add up.

    The rows of the result, float64 (3, 100), are vessel pixels, background pixels and the sum of
    probabilities; column k holds probabilities in (k/100, (k+1)/100], column 0 also 0.
    """
    values = np.asarray(probabilities, dtype=np.float32)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("Some probabilities are nan or outside 0 to 1. Give probabilities, not logits.")
    values, in_vessel = values.ravel(), truth.ravel()
    bins = np.searchsorted(THRESHOLDS, values, side="left")
    total = np.bincount(bins, minlength=NUM_BINS)
    vessel = np.bincount(bins[in_vessel], minlength=NUM_BINS)
    return np.stack([vessel, total - vessel, np.bincount(bins, values, minlength=NUM_BINS)])


def calibration(counted: np.ndarray, num_failed: int = 0) -> dict[str, Any]:
    """Reliability curve and expected calibration error over the pixels of a set of images.

    Bin b of 10 holds n_b pixels with probabilities in (b/10, (b+1)/10], of mean p_b and a share v_b of true
    vessel: expected calibration error = sum over b of n_b / n * |p_b - v_b|, nan without pixels.
    """
    vessel, background, probability = counted.reshape(3, CALIBRATION_BINS, -1).sum(axis=2)
    pixels = vessel + background
    num_pixels, bins = int(pixels.sum()), []
    for number in np.flatnonzero(pixels).tolist():
        line = {"low": number / CALIBRATION_BINS, "high": (number + 1) / CALIBRATION_BINS}
        line["predicted"] = float(probability[number] / pixels[number])
        line["observed"] = float(vessel[number] / pixels[number])
        bins.append(line | {"pixels": int(pixels[number])})
    gaps = [line["pixels"] * abs(line["predicted"] - line["observed"]) for line in bins]
    error = sum(gaps) / num_pixels if num_pixels else math.nan
    return {"expected_calibration_error": error, "n_pixels": num_pixels, "n_failed": num_failed, "bins": bins}


class CurvePoint(NamedTuple):
    """Means over patients at one threshold; recall leaves out images without a true vessel (nan: all)."""

    threshold: float
    dice: float
    recall: float
    precision: float


@dataclass(frozen=True)
class ThresholdCurve:
    """Scores of one model at every threshold, ascending; a failed prediction counts as an empty mask."""

    points: tuple[CurvePoint, ...]
    n_images: int
    n_patients: int
    n_failed: int

    @property
    def best(self) -> CurvePoint:
        """The point with the highest Dice; of equal ones the nearest to 0.5."""
        return max(self.points, key=lambda point: (point.dice, -abs(point.threshold - 0.5)))

    def to_json(self) -> dict[str, Any]:
        """The curve of validation images, one list per score, and the choice."""
        chosen = {"chosen": self.best.threshold, "chosen_by": "mean over patients of Dice"}
        counted = {"n_images": self.n_images, "n_patients": self.n_patients, "n_failed": self.n_failed}
        columns = dict(zip(("thresholds", *SCORES), map(list, zip(*self.points, strict=True)), strict=True))
        return {"format": FORMAT, "side": "val"} | chosen | counted | columns


def read_threshold_curve(path: Path) -> dict[str, Any]:
    """Reads the numbers and the subset of a stored `ThresholdCurve.to_json`; undefined scores become nan."""
    names, stored = ("thresholds", *SCORES), read_object(path, "Evaluate again.")
    try:
        curve = {name: stored[name] for name in ("side", "n_images", "n_patients")}
        points = np.array([*zip(*(stored[name] for name in names), strict=True)], dtype=np.float64)
        return curve | {"chosen": float(stored["chosen"])} | dict(zip(names, points.T.tolist(), strict=True))
    except MALFORMED as error:
        place, why = f"{path.name} in {path.parent.name}", f"{type(error).__name__}: {error}"
        raise ValueError(f"{place} is no threshold curve ({why}). Evaluate again.") from error


def counts_by_threshold(
    probabilities: np.ndarray, truth: np.ndarray, post: PostProcessing | None = None
) -> np.ndarray:
    """Counts tp, fp and fn, (3, 99), of one image's masks at all `THRESHOLDS`, with the rest of `post`."""
    vessel, background, _ = count_pixels(probabilities, truth)
    if post and post.changes_masks:
        return np.transpose([counts(mask, truth)[:3] for mask in post.masks(probabilities, THRESHOLDS)])
    # Threshold k leaves bins k + 1 and above as vessel.
    found, invented = (np.cumsum(part[::-1])[::-1] for part in (vessel, background))
    return np.stack([found[1:], invented[1:], found[0] - found[1:]])


def threshold_curve(
    counted: Sequence[np.ndarray], patients: Sequence[str], num_failed: int = 0
) -> ThresholdCurve:
    """Averages the scores of `counts_by_threshold`, one per image with its patient, over patients."""
    tp, fp, fn = np.stack(counted, axis=1)
    scores = dice_from_counts(tp, fp, fn), recall_from_counts(tp, fn), precision_from_counts(tp, fp, fn)
    means = [[patient_mean(column, patients) for column in table.T] for table in scores]
    thresholds = [round(float(threshold), 2) for threshold in THRESHOLDS]
    points = tuple(CurvePoint(*values) for values in zip(thresholds, *means, strict=True))
    return ThresholdCurve(points, len(counted), len(set(patients)), num_failed)


class PredictedImage(NamedTuple):
    """One validation image: probabilities (H, W), None = failed; true mask, bool (H, W); patient."""

    probabilities: np.ndarray | None
    truth: np.ndarray
    patient: str

    @property
    def filled(self) -> np.ndarray:
        """The probabilities; 0 everywhere where the prediction failed, which counts as an empty mask."""
        return np.zeros(self.truth.shape) if self.probabilities is None else self.probabilities


def best_postprocessing(rewards: Mapping[PostProcessing, float]) -> PostProcessing:
    """The candidate of highest reward; of equal ones that of the threshold nearest to 0.5 that does least."""
    return max(
        rewards, key=lambda p: (rewards[p], -abs(p.threshold - 0.5), -p.min_component_px, -p.close_gaps)
    )


def score_postprocessing(
    images: Sequence[PredictedImage],
    reward: Reward,
    thresholds: Sequence[float] = GRID_THRESHOLDS,
    sizes_px: Sequence[int] = SIZES_PX,
    gap_levels: Sequence[float] = GAP_LEVELS,
) -> dict[PostProcessing, float]:
    """Mean reward over patients of all candidates; sizes ascend from 0, the gap level 0 leaves gaps open."""
    candidates = itertools.product(thresholds, sizes_px, gap_levels)
    rewards: dict[PostProcessing, list[float]] = {PostProcessing(*settings): [] for settings in candidates}
    for image in images:
        topology = cached_truth(image.truth).topology
        low_masks = [LowThresholdMask(image.filled, level) if level else None for level in gap_levels]
        for threshold in thresholds:
            mask, num_scored = PostProcessing(threshold).mask(image.filled), -1
            for size in sizes_px:
                # Of what a smaller size left, a larger one leaves what it leaves of the whole mask.
                mask = drop_small_components(mask, size)
                if (num_pixels := np.count_nonzero(mask)) != num_scored:  # else it is scored already
                    num_scored = num_pixels
                    closed = [mask if low is None else low.close(mask) for low in low_masks]
                    scores = [score_or_skip(reward, one, image.truth, topology)[0] for one in closed]
                for level, score in zip(gap_levels, scores, strict=True):
                    rewards[PostProcessing(threshold, size, level)].append(score)
    patients = [image.patient for image in images]
    return {post: patient_mean(values, patients) for post, values in rewards.items()}


@dataclass(frozen=True)
class Tuning:
    """Scores of one model on validation images by post-processing, and the choices made from them."""

    post: PostProcessing  # how masks are made without tuning
    curve: ThresholdCurve  # by threshold, with the rest of `post`
    grid: dict[PostProcessing, float] | None  # rewards of all post-processing, if asked for

    @property
    def choices(self) -> dict[str, PostProcessing]:
        """Ending of the result's file -> how its masks are made."""
        chosen = {"tuned": replace(self.post, threshold=self.curve.best.threshold)}
        return chosen if self.grid is None else chosen | {"tuned_post": best_postprocessing(self.grid)}

    def grid_json(self) -> dict[str, Any]:
        """Every candidate of the grid with its reward, and the choice."""
        best = best_postprocessing(self.grid)
        chosen = {"side": "val", "chosen": asdict(best), "chosen_by": "mean over patients of the reward"}
        candidates = [[*astuple(post), reward] for post, reward in self.grid.items()]
        return chosen | {"reward": self.grid[best], "n_images": self.curve.n_images, "candidates": candidates}


def tune(images: Iterable[PredictedImage], post: PostProcessing, reward: Reward | None) -> Tuning:
    """Scores the masks that post-processing could make of validation images, which a reward alone keeps."""
    counted, patients, kept, num_failed = [], [], [], 0
    for image in images:
        counted.append(counts_by_threshold(image.filled, image.truth, post))
        patients.append(image.patient)
        num_failed += image.probabilities is None
        if reward is not None:
            kept.append(image)
    curve = threshold_curve(counted, patients, num_failed)
    if reward is None:
        return Tuning(post, curve, None)
    logger.info("scoring all post-processing on %d validation images", len(kept))
    return Tuning(post, curve, score_postprocessing(kept, reward))
