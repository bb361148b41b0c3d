"""Post-processing chosen on validation: against scoring every pair by hand, ties, and failed predictions."""

import numpy as np
import pytest
from scipy import ndimage

from vesselrl.evaluation.postprocessing import (
    PostProcessing,
    PostProcessingGrid,
    PredictedImage,
    score_postprocessing,
)
from vesselrl.scoring.rewards import MultiObjectiveReward

THRESHOLDS, SIZES = (0.3, 0.5, 0.7), (0, 4, 9, 500)


def predicted(seed: int, patient: str) -> PredictedImage:
    """A drawn cross with specks of noise, some of them likely vessel."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((40, 52), bool)
    truth[10 + seed : 14 + seed, 4:48] = truth[5:36, 20:24] = True
    noise = ndimage.gaussian_filter(rng.normal(size=truth.shape), 1.2)
    values = np.clip(0.25 + 0.5 * truth + 0.9 * noise, 0, 1)
    return PredictedImage(values.astype(np.float16), truth, patient)


def test_the_grid_is_that_of_every_pair_scored_alone() -> None:
    images = [predicted(1, "P1"), predicted(2, "P1"), predicted(3, "P2")]
    reward = MultiObjectiveReward()
    grid = score_postprocessing(images, reward, THRESHOLDS, SIZES)
    for row, threshold in enumerate(THRESHOLDS):
        for column, size in enumerate(SIZES):
            each = []
            for image in images:
                mask = image.probabilities.astype(np.float64) > threshold
                labels, num = ndimage.label(mask, np.ones((3, 3)))
                areas = np.bincount(labels.ravel(), minlength=num + 1)
                each.append(reward(mask & (areas[labels] >= size), image.truth)[0])
            expected = ((each[0] + each[1]) / 2 + each[2]) / 2  # the patient counts, not the image
            assert grid.rewards[row][column] == pytest.approx(expected)
    assert len({round(value, 6) for row in grid.rewards for value in row}) > 6  # the pairs do differ


def test_the_best_pair_and_the_best_threshold_alone() -> None:
    grid = PostProcessingGrid(
        (0.3, 0.5, 0.7), (0, 10, 20), ((1.0, 2.0, 5.0), (3.0, 4.0, 5.0), (3.0, 5.0, 1.0))
    )
    assert grid.best() == (PostProcessing(0.5, 20), 5.0)  # of three, the threshold nearest to 0.5
    assert grid.best(0) == (PostProcessing(0.5, 0), 3.0)
    assert grid.best(10) == (PostProcessing(0.7, 10), 5.0)
    equal = PostProcessingGrid((0.5,), (0, 10, 20), ((1.0, 2.0, 2.0),))
    assert equal.best()[0].min_component_px == 10
    assert PostProcessingGrid.from_json(grid.to_json()) == grid


def test_a_failed_prediction_is_an_empty_mask() -> None:
    truth = predicted(1, "P1").truth
    grid = score_postprocessing([PredictedImage(None, truth, "P1")], MultiObjectiveReward(), (0.5,), (0, 10))
    empty = MultiObjectiveReward()(np.zeros(truth.shape, bool), truth)[0]
    assert grid.rewards == ((pytest.approx(empty), pytest.approx(empty)),)


def test_what_cannot_be_tuned_on_is_refused() -> None:
    with pytest.raises(ValueError, match="There are no images"):
        score_postprocessing([], MultiObjectiveReward())
    with pytest.raises(ValueError, match="ascending numbers of pixels that start with 0"):
        score_postprocessing([predicted(1, "P1")], MultiObjectiveReward(), (0.5,), (10, 0))
