"""How masks are made, chosen on validation images: the threshold by Dice, or all of it by the reward."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from vesselrl.evaluation.postprocessing_grid import PostProcessingGrid, PredictedImage, score_postprocessing
from vesselrl.evaluation.thresholds import ThresholdCurve, sweep_thresholds
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import Reward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuning:
    """What validation images say of one model.

    Attributes:
        post: how masks are made without tuning.
        curve: scores by threshold, with the rest of `post`.
        grid: reward by threshold, smallest component and closing of gaps; None: not asked for.
    """

    post: PostProcessing
    curve: ThresholdCurve
    grid: PostProcessingGrid | None

    @property
    def choices(self) -> dict[str, PostProcessing]:
        """Ending of the result's file -> how its masks are made."""
        chosen = {"tuned": replace(self.post, threshold=self.curve.best.threshold)}
        return chosen | ({} if self.grid is None else {"tuned_post": self.grid.best()[0]})

    def grid_json(self) -> dict[str, Any]:
        """Every candidate of the grid with its reward, and the choice."""
        best, reward = self.grid.best()
        chosen = {"side": "val", "chosen": asdict(best), "chosen_by": "mean over patients of the reward"}
        return chosen | {"reward": reward, "n_images": self.curve.n_images} | self.grid.to_json()


def tune(
    predict: Callable[[np.ndarray], Any],
    validation: Sequence[Any],
    load: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    post: PostProcessing,
    reward: Reward | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tuning:
    """Predicts every validation image once and scores what masks could be made of it.

    Args:
        predict: image uint8 (H, W, 3) -> object with `.probabilities`, (H, W), or None = failed.
        validation: samples with `patient`.
        load: sample -> (image, true mask).
        post: how masks are made without tuning.
        reward: what threshold, smallest component and closing of gaps are chosen for together; None: they
            are not. The probabilities of all images are kept for it.
        progress: called with (images done, images in all) after every image.

    Raises:
        ValueError: no samples, or probabilities of the wrong shape or range.
    """
    kept: list[np.ndarray | None] = []
    truths: list[np.ndarray] = []

    def predict_and_keep(image: np.ndarray) -> Any:
        prediction = predict(image)
        kept.append(None if prediction is None else prediction.probabilities)
        return prediction

    def load_and_keep(sample: Any) -> tuple[np.ndarray, np.ndarray]:
        image, truth = load(sample)
        truths.append(truth)
        return image, truth

    if reward is None:
        curve = sweep_thresholds(predict, validation, load, progress, post)
        return Tuning(post, curve, None)
    curve = sweep_thresholds(predict_and_keep, validation, load_and_keep, progress, post)
    logger.info("scoring every way of post-processing on %d validation images", len(validation))
    patients = [sample.patient for sample in validation]
    images = [PredictedImage(*parts) for parts in zip(kept, truths, patients, strict=True)]
    return Tuning(post, curve, score_postprocessing(images, reward))
