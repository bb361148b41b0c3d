"""Post-processing of probabilities, threshold and smallest component, chosen on validation patients.

Every pair of a small grid is scored by the mean over patients of a reward. Test images take no part in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vesselrl.evaluation.statistics import patient_means
from vesselrl.scoring.masks import drop_small_components
from vesselrl.scoring.truth import known_truth

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(4, 17))  # 0.2 to 0.8
SIZES_PX = (0, 10, 20, 40, 80, 160)


@dataclass(frozen=True)
class PostProcessing:
    """What makes a mask of probabilities: a threshold, then the removal of small components."""

    # Probability above which a pixel is vessel.
    threshold: float = 0.5
    # Smallest 8-connected component that is kept, in px; 0 keeps all.
    min_component_px: int = 0

    def mask(self, probabilities: np.ndarray) -> np.ndarray:
        """The mask, bool (H, W), of probabilities of that size."""
        return drop_small_components(probabilities > np.float32(self.threshold), self.min_component_px)


class PredictedImage(NamedTuple):
    """What a choice needs of one validation image."""

    # Floats in [0, 1], (H, W); None: the prediction failed and counts as an empty mask.
    probabilities: np.ndarray | None
    # Bool (H, W).
    truth: np.ndarray
    patient: str


@dataclass(frozen=True)
class PostProcessingGrid:
    """Mean reward over patients of every pair of threshold and smallest component.

    Attributes:
        thresholds: the rows.
        sizes_px: the columns, ascending from 0.
        rewards: (rows, columns).
    """

    thresholds: tuple[float, ...]
    sizes_px: tuple[int, ...]
    rewards: tuple[tuple[float, ...], ...]

    def best(self, size_px: int | None = None) -> tuple[PostProcessing, float]:
        """The pair of highest reward, and that reward; with a size given, the best threshold for it.

        Of equal pairs the threshold nearest to 0.5, then the smallest size, is taken.
        """
        pairs = [
            (self.rewards[row][column], -abs(threshold - 0.5), -size, threshold)
            for row, threshold in enumerate(self.thresholds)
            for column, size in enumerate(self.sizes_px)
            if size_px in (None, size)
        ]
        reward, _, negative_size, threshold = max(pairs)
        return PostProcessing(threshold, -negative_size), reward

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PostProcessingGrid":
        """The grid of `to_json`."""
        rewards = tuple(tuple(row) for row in values["rewards"])
        return cls(tuple(values["thresholds"]), tuple(values["sizes_px"]), rewards)


def score_postprocessing(
    images: Sequence[PredictedImage],
    reward: Callable[..., tuple[float, dict]],
    thresholds: Sequence[float] = THRESHOLDS,
    sizes_px: Sequence[int] = SIZES_PX,
) -> PostProcessingGrid:
    """Scores all pairs on validation images; a mask that a larger size leaves as it was is scored once.

    Args:
        images: of the validation side.
        reward: as `Reward`: (mask, truth, topology of the truth) -> (float, terms).
        thresholds: between 0 and 1.
        sizes_px: ascending from 0.

    Raises:
        ValueError: there is no image, or the sizes do not ascend from 0.
    """
    if not images:
        raise ValueError(
            "There are no images to choose post-processing on. Use a split with validation patients."
        )
    if list(sizes_px) != sorted({0, *sizes_px}):
        raise ValueError(
            f"sizes_px are {tuple(sizes_px)}. Give ascending numbers of pixels that start with 0."
        )
    scores = np.empty((len(thresholds), len(sizes_px), len(images)))
    for place, image in enumerate(images):
        topology = known_truth(image.truth).topology
        for row, threshold in enumerate(thresholds):
            mask, num_scored = predicted_mask(image, PostProcessing(threshold)), -1
            for column, size in enumerate(sizes_px):
                # Of what a smaller size left, a larger one leaves what it leaves of the whole mask.
                mask = drop_small_components(mask, size)
                if (num_pixels := np.count_nonzero(mask)) != num_scored:
                    score, num_scored = reward(mask, image.truth, topology)[0], num_pixels
                scores[row, column, place] = score
    patients = [image.patient for image in images]
    means = [[float(np.mean([*patient_means(cell, patients).values()])) for cell in row] for row in scores]
    return PostProcessingGrid(tuple(thresholds), tuple(sizes_px), tuple(map(tuple, means)))


def predicted_mask(image: PredictedImage, post: PostProcessing) -> np.ndarray:
    """The mask of one image; empty where the prediction failed."""
    if image.probabilities is None:
        return np.zeros(image.truth.shape, bool)
    return post.mask(image.probabilities)
