"""Post-processing chosen on validation: against scoring every candidate alone, ties, failed predictions."""

import itertools
import json

import numpy as np
import pytest
from scipy import ndimage

from vesselrl.evaluation.postprocessing_grid import (
    PostProcessingGrid,
    PredictedImage,
    score_postprocessing,
)
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import MultiObjectiveReward

THRESHOLDS, SIZES, LEVELS = (0.3, 0.5, 0.7), (0, 4, 9, 500), (0.0, 0.2)


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
    grid = score_postprocessing(images, reward, THRESHOLDS, SIZES, LEVELS)
    for threshold, size in itertools.product(THRESHOLDS, SIZES):
        each = []
        for image in images:
            mask = image.probabilities.astype(np.float64) > threshold
            labels, num = ndimage.label(mask, np.ones((3, 3)))
            areas = np.bincount(labels.ravel(), minlength=num + 1)
            each.append(reward(mask & (areas[labels] >= size), image.truth)[0])
        expected = ((each[0] + each[1]) / 2 + each[2]) / 2  # the patient counts, not the image
        assert grid.rewards[PostProcessing(threshold, size)] == pytest.approx(expected)
    for post, value in grid.rewards.items():
        each = [reward(post.mask(image.probabilities), image.truth)[0] for image in images]
        assert value == pytest.approx(((each[0] + each[1]) / 2 + each[2]) / 2)
    assert len(grid.rewards) == 24
    assert len({round(value, 6) for value in grid.rewards.values()}) > 12  # the candidates do differ


def test_the_best_pair_and_the_best_threshold_alone() -> None:
    rewards = [(0.3, 0, 1), (0.3, 10, 2), (0.3, 20, 5), (0.5, 0, 3), (0.5, 10, 4), (0.5, 20, 5), (0.7, 10, 5)]
    grid = PostProcessingGrid({PostProcessing(t, size): float(reward) for t, size, reward in rewards})
    assert grid.best() == (PostProcessing(0.5, 20), 5.0)  # of three, the threshold nearest to 0.5
    assert grid.best(0) == (PostProcessing(0.5, 0), 3.0)
    assert grid.best(10) == (PostProcessing(0.7, 10), 5.0)
    closed = grid.rewards | {PostProcessing(0.5, 20, 0.1): 5.0, PostProcessing(0.5, 10, 0.2): 6.0}
    assert PostProcessingGrid(closed).best() == (PostProcessing(0.5, 10, 0.2), 6.0)
    assert PostProcessingGrid(closed).best(20) == (PostProcessing(0.5, 20), 5.0)  # equal: gaps left open
    assert PostProcessingGrid(closed).best(10, 0.0) == (PostProcessing(0.7, 10), 5.0)
    equal = PostProcessingGrid({PostProcessing(0.5, size): 2.0 for size in (20, 10)})
    assert equal.best()[0].min_component_px == 10
    assert PostProcessingGrid.from_json(json.loads(json.dumps(PostProcessingGrid(closed).to_json()))) == (
        PostProcessingGrid(closed)
    )


def test_a_failed_prediction_is_an_empty_mask() -> None:
    truth = predicted(1, "P1").truth
    grid = score_postprocessing(
        [PredictedImage(None, truth, "P1")], MultiObjectiveReward(), (0.5,), (0, 10), (0.0, 0.1)
    )
    empty = MultiObjectiveReward()(np.zeros(truth.shape, bool), truth)[0]
    assert list(grid.rewards.values()) == pytest.approx([empty] * 4)


def test_what_cannot_be_tuned_on_is_refused() -> None:
    with pytest.raises(ValueError, match="There are no images"):
        score_postprocessing([], MultiObjectiveReward())
    with pytest.raises(ValueError, match="ascending numbers of pixels that start with 0"):
        score_postprocessing([predicted(1, "P1")], MultiObjectiveReward(), (0.5,), (10, 0))
