"""Post-processing chosen on validation patients: threshold, smallest component, and closing of gaps.

Every combination of a small grid is scored by the mean over patients of a reward. Test images take no part.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np

from vesselrl.evaluation.statistics import patient_means
from vesselrl.scoring.gaps import FainterMask
from vesselrl.scoring.masks import drop_small_components
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.truth import known_truth

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SIZES_PX = (0, 20, 40, 80, 160)
GAP_LEVELS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


class PredictedImage(NamedTuple):
    """What a choice needs of one validation image."""

    # Floats in [0, 1], (H, W); None: the prediction failed and counts as an empty mask.
    probabilities: np.ndarray | None
    # Bool (H, W).
    truth: np.ndarray
    patient: str


@dataclass(frozen=True)
class PostProcessingGrid:
    """The mean reward over patients of every candidate."""

    rewards: dict[PostProcessing, float]

    def best(
        self, min_component_px: int | None = None, close_gaps: float | None = None
    ) -> tuple[PostProcessing, float]:
        """The candidate of highest reward, and that reward; of those with the size and level given, if any.

        Of equal ones the threshold nearest to 0.5, then the smallest size, then the smallest level is taken.
        """
        return max(
            (
                (one, reward)
                for one, reward in self.rewards.items()
                if min_component_px in (None, one.min_component_px) and close_gaps in (None, one.close_gaps)
            ),
            key=lambda pair: (
                pair[1], -abs(pair[0].threshold - 0.5), -pair[0].min_component_px, -pair[0].close_gaps,
            ),
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON: lists of threshold, size, level and reward."""
        return {"candidates": [[*astuple(one), reward] for one, reward in self.rewards.items()]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PostProcessingGrid":
        """The grid of `to_json`."""
        return cls({PostProcessing(*settings): reward for *settings, reward in values["candidates"]})


def score_postprocessing(
    images: Sequence[PredictedImage],
    reward: Callable[..., tuple[float, dict]],
    thresholds: Sequence[float] = THRESHOLDS,
    sizes_px: Sequence[int] = SIZES_PX,
    gap_levels: Sequence[float] = GAP_LEVELS,
) -> PostProcessingGrid:
    """Scores all candidates on validation images; a mask that a larger size leaves as it was is scored once.

    Args:
        images: of the validation side.
        reward: as `Reward`: (mask, truth, topology of the truth) -> (float, terms).
        thresholds: between 0 and 1.
        sizes_px: ascending from 0.
        gap_levels: 0 for gaps left open, and probabilities.

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
    scores = np.empty((len(thresholds), len(sizes_px), len(gap_levels), len(images)))
    for place, image in enumerate(images):
        topology = known_truth(image.truth).topology
        probabilities = known_probabilities(image)
        fainter = [FainterMask(probabilities, level) if level else None for level in gap_levels]
        for row, threshold in enumerate(thresholds):
            mask, num_scored = PostProcessing(threshold).mask(probabilities), -1
            for column, size in enumerate(sizes_px):
                # Of what a smaller size left, a larger one leaves what it leaves of the whole mask.
                mask = drop_small_components(mask, size)
                if (num_pixels := np.count_nonzero(mask)) != num_scored:
                    num_scored = num_pixels
                    closed = [mask if one is None else one.close(mask) for one in fainter]
                    score = [reward(one, image.truth, topology)[0] for one in closed]
                scores[row, column, :, place] = score
    patients = [image.patient for image in images]
    return PostProcessingGrid(
        {
            PostProcessing(threshold, size, level): float(
                np.mean([*patient_means(scores[row, column, layer], patients).values()])
            )
            for row, threshold in enumerate(thresholds)
            for column, size in enumerate(sizes_px)
            for layer, level in enumerate(gap_levels)
        }
    )


def known_probabilities(image: PredictedImage) -> np.ndarray:
    """The probabilities of one image; 0 everywhere where the prediction failed."""
    return np.zeros(image.truth.shape) if image.probabilities is None else image.probabilities
