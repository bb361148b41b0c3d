"""Threshold curve and calibration against scikit-learn, masks made one by one, and hand-made counts."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score, precision_score, recall_score

from vesselrl.evaluation.calibration import calibration
from vesselrl.evaluation.probabilities import THRESHOLDS, count_pixels
from vesselrl.evaluation.thresholds import (
    CurvePoint,
    ThresholdCurve,
    counts_by_threshold,
    sweep_thresholds,
    threshold_curve,
)
from vesselrl.scoring.postprocessing import PostProcessing


def picture(seed, shape=(37, 53)):
    """Probabilities that know something of the truth, with exact 0, 1 and values on thresholds among them."""
    generator = np.random.default_rng(seed)
    truth = generator.random(shape) < 0.2
    probabilities = generator.beta(np.where(truth, 3, 1), np.where(truth, 1.5, 4)).astype(np.float32)
    probabilities[0, :6] = [0, 1, 0.5, 0.01, 0.99, 0.35]
    return probabilities, truth


def test_the_curve_is_that_of_one_mask_per_threshold():
    pictures = [picture(seed) for seed in range(3)]
    curve = threshold_curve([counts_by_threshold(*one) for one in pictures], ["P1", "P1", "P2"])
    assert [point.threshold for point in curve.points] == [round(k / 100, 2) for k in range(1, 100)]
    for point, threshold in list(zip(curve.points, THRESHOLDS, strict=True))[::7]:
        for name, score in (("dice", f1_score), ("recall", recall_score), ("precision", precision_score)):
            each = [score(t.ravel(), (p > threshold).ravel(), zero_division=0) for p, t in pictures]
            assert getattr(point, name) == pytest.approx(((each[0] + each[1]) / 2 + each[2]) / 2)
    assert curve.default.threshold == 0.5
    assert (curve.n_images, curve.n_patients) == (3, 2)


def test_a_planted_best_threshold_is_found():
    truth = np.zeros((8, 8), bool)
    truth[:4] = True
    faint = np.where(truth, 0.32, 0.1).astype(np.float32)  # perfect from 0.10 to 0.31
    faint[7] = 0.3  # ... and now for 0.30 and 0.31 only
    curve = threshold_curve([counts_by_threshold(faint, truth)], ["P1"])
    assert (curve.best.threshold, curve.best.dice) == (0.31, 1.0)
    assert curve.default.dice == 0
    certain = threshold_curve([counts_by_threshold(truth.astype(np.float32), truth)], ["P1"])
    assert certain.best.threshold == 0.5  # all are equal; the nearest to 0.5


def test_masks_are_counted_as_they_are_used():
    """Vessel of 30 px at 0.9 and a true speck of 4 px at 0.6: without components below 20 px it is missed."""
    truth, values = np.zeros((20, 20), bool), np.full((20, 20), 0.05)
    truth[3:6, 2:12] = truth[14:16, 14:16] = True
    values[3:6, 2:12], values[14:16, 14:16] = 0.9, 0.6
    samples = [SimpleNamespace(patient="P1")]

    def best(min_component_px):
        return sweep_thresholds(
            lambda image: SimpleNamespace(probabilities=values),
            samples,
            lambda sample: (np.zeros((20, 20, 3), np.uint8), truth),
            post=PostProcessing(0.5, min_component_px),
        ).best

    assert (best(0).threshold, best(0).recall) == (0.5, 1)
    assert best(20).recall == 30 / 34
    found, _, missed = counts_by_threshold(values, truth, PostProcessing(min_component_px=20))
    assert set(found[:4]) == {34}  # the whole image is one component
    assert set(found[10:88]) == {30}
    assert set(found[95:]) == {0}
    assert set(found + missed) == {34}


def test_a_failed_prediction_is_empty_at_every_threshold():
    probabilities, truth = picture(1)
    images = {0: (probabilities, truth), 1: (None, truth)}
    samples = [SimpleNamespace(patient="P1", number=0), SimpleNamespace(patient="P2", number=1)]

    def predict(image):
        found = images[int(image[0, 0, 0])][0]
        return None if found is None else SimpleNamespace(probabilities=found)

    def load(sample):
        return np.full((*truth.shape, 3), sample.number, np.uint8), truth

    told = []
    curve = sweep_thresholds(predict, samples, load, lambda done, total: told.append((done, total)))
    alone = threshold_curve([counts_by_threshold(probabilities, truth)], ["P1"])
    assert told == [(1, 2), (2, 2)]
    assert curve.n_failed == 1
    assert curve.best.dice == pytest.approx(alone.best.dice / 2)
    assert curve.to_json()["chosen"] == alone.best.threshold


def test_empty_truths_count_in_dice_and_not_in_recall():
    nothing, truth = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    quiet = np.full((4, 4), 0.2, np.float32)
    curve = threshold_curve(
        [counts_by_threshold(quiet, nothing), counts_by_threshold(np.zeros((4, 4)), truth)], ["P1", "P2"]
    )
    assert curve.default.dice == 0.5  # both empty 1, failed 0
    assert curve.default.recall == 0
    assert np.isnan(threshold_curve([counts_by_threshold(quiet, nothing)], ["P1"]).default.recall)
    with pytest.raises(ValueError, match="no images to choose a threshold on"):
        threshold_curve([], [])


def test_calibration_by_hand():
    probabilities = np.array([[0.05, 0.05, 0.75, 0.75]], np.float32)
    truth = np.array([[False, True, True, True]])
    result = calibration(count_pixels(probabilities, truth), num_failed=2)
    # |0.05 - 0.5| and |0.75 - 1| for half of the pixels each
    assert result["expected_calibration_error"] == pytest.approx((0.45 + 0.25) / 2)
    assert (result["n_pixels"], result["n_failed"]) == (4, 2)
    low, high = result["bins"]
    assert (low["low"], low["high"], low["pixels"], low["observed"]) == (0.0, 0.1, 2, 0.5)
    assert (high["low"], high["high"], high["observed"]) == (0.7, 0.8, 1.0)
    assert high["predicted"] == pytest.approx(0.75)


def test_calibration_agrees_with_scikit_learn():
    pictures = [picture(seed) for seed in range(4)]
    counts = count_pixels(*pictures[0])
    for one in pictures[1:]:
        counts += count_pixels(*one)
    probabilities, truth = (
        np.concatenate([part.ravel() for part in side]) for side in zip(*pictures, strict=True)
    )
    observed, predicted = calibration_curve(truth, probabilities.astype(np.float64), n_bins=10)
    bins = calibration(counts)["bins"]
    assert [line["observed"] for line in bins] == pytest.approx(observed, abs=2e-3)
    assert [line["predicted"] for line in bins] == pytest.approx(predicted, abs=2e-3)
    assert sum(line["pixels"] for line in bins) == truth.size


def test_honest_probabilities_have_almost_no_calibration_error():
    generator = np.random.default_rng(3)
    probabilities = generator.random((400, 400)).astype(np.float32)
    truth = generator.random((400, 400)) < probabilities
    assert calibration(count_pixels(probabilities, truth))["expected_calibration_error"] < 0.01
    bold = count_pixels(np.where(probabilities > 0.5, 0.99, 0.01), truth)
    assert calibration(bold)["expected_calibration_error"] == pytest.approx(0.24, abs=0.01)


def test_what_is_no_probability_is_refused():
    truth = np.zeros((2, 2), bool)
    for value in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match="not logits"):
            count_pixels(np.full((2, 2), value), truth)
    with pytest.raises(ValueError, match=r"probabilities are \(2, 3\)"):
        count_pixels(np.zeros((2, 3)), truth)


def test_the_threshold_of_a_wanted_recall():
    points = [(0.2, 0.95, 0.5), (0.4, 0.85, 0.6), (0.5, 0.8, 0.7), (0.6, 0.8, 0.8), (0.8, float("nan"), 1.0)]
    curve = ThresholdCurve(tuple(CurvePoint(t, 0.7, recall, p) for t, recall, p in points), 3, 3, 0)
    assert curve.at_recall(0.91).threshold == 0.2
    assert curve.at_recall(0.88).threshold == 0.4
    assert curve.at_recall(0.1).threshold == 0.6  # as near as 0.5, and more precise
    nowhere = ThresholdCurve((CurvePoint(0.5, 1.0, float("nan"), 1.0),), 1, 1, 0)
    with pytest.raises(ValueError, match="no threshold can be chosen by recall"):
        nowhere.at_recall(0.8)
