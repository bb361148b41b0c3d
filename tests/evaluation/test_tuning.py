"""Threshold curve, calibration and grid of post-processing, against libraries and masks made one by one."""

import itertools

import numpy as np
import pytest
from scipy import ndimage
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score, precision_score, recall_score

from vesselrl.evaluation import tuning
from vesselrl.evaluation.tuning import (
    PredictedImage,
    best_postprocessing,
    calibration,
    count_pixels,
    read_threshold_curve,
)
from vesselrl.experiment.run_folder import write_json
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import MultiObjectiveReward


def picture(seed, shape=(37, 53)):
    """Probabilities that know something of the truth, with exact 0, 1 and values on thresholds among them."""
    generator = np.random.default_rng(seed)
    truth = generator.random(shape) < 0.2
    probabilities = generator.beta(np.where(truth, 3, 1), np.where(truth, 1.5, 4)).astype(np.float32)
    probabilities[0, :6] = [0, 1, 0.5, 0.01, 0.99, 0.35]
    return probabilities, truth


def curve_of(*pictures, patients=("P1", "P2")):
    counted = [tuning.counts_by_threshold(*one) for one in pictures]
    return tuning.threshold_curve(counted, patients[: len(pictures)])


@pytest.mark.parametrize("post", [PostProcessing(), PostProcessing(min_component_px=6)])
def test_the_curve_is_that_of_one_mask_per_threshold(post):
    """Of two patients, one with two images, of which one failed: empty at every threshold."""
    pictures = [picture(seed) for seed in range(3)]
    images = [PredictedImage(*one, patient) for one, patient in zip(pictures, "AAB", strict=True)]
    images[1] = images[1]._replace(probabilities=None)
    pictures[1] = np.zeros_like(pictures[1][0]), pictures[1][1]
    curve = tuning.tune(images, post, None).curve
    for point, threshold in list(zip(curve.points, tuning.THRESHOLDS, strict=True))[::7]:
        made = PostProcessing(threshold, post.min_component_px)
        for name, score in (("dice", f1_score), ("recall", recall_score), ("precision", precision_score)):
            each = [score(t.ravel(), made.mask(p).ravel(), zero_division=0) for p, t in pictures]
            assert getattr(point, name) == pytest.approx(((each[0] + each[1]) / 2 + each[2]) / 2)
    assert (curve.n_images, curve.n_patients, curve.n_failed) == (3, 2, 1)


def test_the_best_threshold():
    truth = np.zeros((8, 8), bool)
    truth[:4] = True
    faint = np.where(truth, 0.32, 0.1).astype(np.float32)  # perfect from 0.10 to 0.31
    faint[7] = 0.3  # ... and now for 0.30 and 0.31 only
    assert curve_of((faint, truth)).best[:2] == (0.31, 1.0)
    assert curve_of((truth.astype(np.float32), truth)).best.threshold == 0.5  # of equal ones the nearest


def test_a_stored_curve_is_read_back_and_a_damaged_one_named(tmp_path):
    """Of an empty truth, which counts in Dice and not in recall."""
    path = tmp_path / "test_base_thresholds.json"
    document = curve_of((np.zeros((4, 4)), np.zeros((4, 4), bool))).to_json()
    write_json(path, document)
    stored = read_threshold_curve(path)
    assert (stored["dice"], stored["chosen"], stored["n_images"]) == ([1.0] * 99, 0.5, 1)
    assert np.isnan(stored["recall"]).all()
    write_json(path, document | {"dice": [0.7]})
    with pytest.raises(ValueError, match="is no threshold curve"):
        read_threshold_curve(path)


def test_calibration_by_hand_and_by_scikit_learn():
    probabilities, truth = np.float32([[0.05, 0.05, 0.75, 0.75]]), np.array([[False, True, True, True]])
    result = calibration(count_pixels(probabilities, truth))
    # |0.05 - 0.5| and |0.75 - 1| for half of the pixels each
    assert result["expected_calibration_error"] == pytest.approx((0.45 + 0.25) / 2)
    pictures = [picture(seed) for seed in range(4)]
    parts = zip(*pictures, strict=True)
    probabilities, truth = (np.concatenate([one.ravel() for one in part]) for part in parts)
    observed, predicted = calibration_curve(truth, probabilities.astype(np.float64), n_bins=10)
    bins = calibration(sum(count_pixels(*one) for one in pictures))["bins"]
    assert [line["observed"] for line in bins] == pytest.approx(observed, abs=2e-3)
    assert [line["predicted"] for line in bins] == pytest.approx(predicted, abs=2e-3)
    with pytest.raises(ValueError, match="not logits"):
        count_pixels(np.full((2, 2), 1.5), np.zeros((2, 2), bool))


def predicted(seed, patient):
    """A cross with specks of noise, some of them likely vessel."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((40, 52), bool)
    truth[10 + seed : 14 + seed, 4:48] = truth[5:36, 20:24] = True
    noise = ndimage.gaussian_filter(rng.normal(size=truth.shape), 1.2)
    values = np.clip(0.25 + 0.5 * truth + 0.9 * noise, 0, 1)
    return PredictedImage(values.astype(np.float16), truth, patient)


def test_the_grid_is_that_of_every_candidate_scored_alone():
    thresholds, sizes = (0.3, 0.5, 0.7), (0, 4, 9, 500)
    images, reward = [predicted(1, "P1"), predicted(2, "P1"), predicted(3, "P2")], MultiObjectiveReward()
    images[1] = images[1]._replace(probabilities=None)  # failed
    rewards = tuning.score_postprocessing(images, reward, thresholds, sizes, (0.0, 0.2))

    def mean_reward(mask_of):
        each = [reward(mask_of(image.filled), image.truth)[0] for image in images]
        return pytest.approx(((each[0] + each[1]) / 2 + each[2]) / 2)  # the patient counts, not the image

    def by_scipy(probabilities):
        mask = probabilities.astype(np.float64) > threshold
        labels, num = ndimage.label(mask, np.ones((3, 3)))
        return mask & (np.bincount(labels.ravel(), minlength=num + 1)[labels] >= size)

    for threshold, size in itertools.product(thresholds, sizes):
        assert rewards[PostProcessing(threshold, size)] == mean_reward(by_scipy)
    for post, value in rewards.items():
        assert value == mean_reward(post.mask)
    assert len(rewards) == 24


def test_the_best_candidate_and_the_best_threshold_alone():
    rewards = [(0.3, 0, 1), (0.3, 10, 2), (0.3, 20, 5), (0.5, 0, 3), (0.5, 10, 4), (0.5, 20, 5), (0.7, 10, 5)]
    grid = {PostProcessing(t, size): float(reward) for t, size, reward in rewards}
    assert best_postprocessing(grid) == PostProcessing(0.5, 20)  # of three, the threshold nearest to 0.5
    closed = grid | {PostProcessing(0.5, 20, 0.1): 5.0, PostProcessing(0.5, 10, 0.2): 6.0}
    equal = {post: reward for post, reward in closed.items() if post.min_component_px == 20}
    assert best_postprocessing(equal) == PostProcessing(0.5, 20)  # gaps left open
    curve = tuning.ThresholdCurve((tuning.CurvePoint(0.4, 1, 1, 1),), 1, 1, 0)
    choices = {"tuned": PostProcessing(0.4, 7), "tuned_post": PostProcessing(0.5, 10, 0.2)}
    assert tuning.Tuning(PostProcessing(0.5, 7), curve, closed).choices == choices
