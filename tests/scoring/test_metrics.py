"""Scores against hand counts, scikit-learn and MONAI, and the one rule for empty masks."""

import json
import math

import cv2
import numpy as np
import pytest
import torch
from skimage.morphology import thin
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from vesselrl.data.synthetic import TARGET, draw_sequence
from vesselrl.scoring import metrics
from vesselrl.scoring.metrics import (
    Counts,
    cldice,
    counts,
    dice,
    dice_from_counts,
    iou,
    precision,
    precision_from_counts,
    recall,
    recall_from_counts,
    score_mask,
    specificity,
)
from vesselrl.scoring.topology import prototype_topology, topology

EMPTY = np.zeros((12, 16), bool)
FULL = ~EMPTY
BAR = EMPTY.copy()
BAR[4:7, 2:14] = True


def random_pairs(number=12):
    for seed in range(number):
        rng = np.random.default_rng(seed)
        truth = cv2.GaussianBlur(rng.random((41, 53)).astype(np.float32), (0, 0), 3) > 0.5
        yield truth ^ (rng.random(truth.shape) < 0.15), truth


def test_counts_by_hand():
    pred = np.array([[1, 1, 0, 0, 1]], bool)
    truth = np.array([[1, 0, 1, 0, 1]], bool)
    assert counts(pred, truth) == Counts(tp=2, fp=1, fn=1, tn=1)
    assert counts(pred, ~truth) == Counts(tp=1, fp=2, fn=1, tn=1)


def test_scores_by_hand():
    """Prediction 3 px, truth 4 px, 2 in common, 20 px in all."""
    pred, truth = np.zeros((4, 5), bool), np.zeros((4, 5), bool)
    pred[0, :3] = True
    truth[0, 1:5] = True
    assert dice(pred, truth) == pytest.approx(4 / 7)
    assert iou(pred, truth) == pytest.approx(2 / 5)
    assert recall(pred, truth) == pytest.approx(2 / 4)
    assert precision(pred, truth) == pytest.approx(2 / 3)
    assert specificity(pred, truth) == pytest.approx(15 / 16)


def test_overlap_scores_equal_scikit_learn():
    for pred, truth in random_pairs():
        flat = truth.ravel(), pred.ravel()
        assert dice(pred, truth) == pytest.approx(f1_score(*flat), abs=1e-12)
        assert iou(pred, truth) == pytest.approx(jaccard_score(*flat), abs=1e-12)
        assert recall(pred, truth) == pytest.approx(recall_score(*flat), abs=1e-12)
        assert precision(pred, truth) == pytest.approx(precision_score(*flat), abs=1e-12)
        assert specificity(pred, truth) == pytest.approx(recall_score(*flat, pos_label=0), abs=1e-12)


@pytest.mark.slow
def test_dice_equals_monai():
    compute_dice = pytest.importorskip("monai.metrics.meandice").compute_dice
    for pred, truth in [*random_pairs(), (EMPTY, EMPTY), (BAR, EMPTY), (EMPTY, BAR)]:
        theirs = compute_dice(
            torch.tensor(pred)[None, None], torch.tensor(truth)[None, None], ignore_empty=False
        )
        assert dice(pred, truth) == pytest.approx(theirs.item(), abs=1e-6)


NAN = math.nan
# (prediction, truth): dice iou recall precision specificity cldice tprec tsens length_ratio
EMPTY_RULES = [
    (EMPTY, EMPTY, (1, 1, NAN, 1, 1, 1, 1, 1, 1)),
    (EMPTY, BAR, (0, 0, 0, 0, 1, 0, 0, 0, 0)),
    (BAR, EMPTY, (0, 0, NAN, 0, 1 - 36 / 192, 0, 0, 0, NAN)),
    (FULL, FULL, (1, 1, 1, 1, NAN, 1, 1, 1, 1)),
]


@pytest.mark.parametrize(("pred", "truth", "expected"), EMPTY_RULES)
def test_empty_masks_follow_one_rule(pred, truth, expected):
    names = "dice iou recall precision specificity cldice tprec tsens length_ratio".split()
    scores = score_mask(pred, truth)
    assert [scores[name] for name in names] == pytest.approx(list(expected), nan_ok=True)
    single = [function(pred, truth) for function in (dice, iou, recall, precision, specificity, cldice)]
    assert single == pytest.approx(list(expected[:6]), nan_ok=True)


def test_masks_that_miss_each_other_score_zero():
    scores = score_mask(np.roll(BAR, 5, axis=0), BAR)
    assert [scores[name] for name in ("dice", "cldice", "tprec", "tsens")] == [0, 0, 0, 0]


def test_cldice_is_its_formula_on_scikit_image_skeletons():
    for pred, truth in random_pairs():
        tprec = (thin(pred) & truth).sum() / thin(pred).sum()
        tsens = (thin(truth) & pred).sum() / thin(truth).sum()
        assert cldice(pred, truth) == pytest.approx(2 * tprec * tsens / (tprec + tsens), abs=1e-12)
        assert cldice(truth, pred) == pytest.approx(cldice(pred, truth), abs=1e-12)
        scores = score_mask(pred, truth)
        assert (scores["tprec"], scores["tsens"]) == pytest.approx((tprec, tsens))


def test_cldice_of_a_lost_half_by_hand():
    """A one-pixel line of 20 px, of which 15 are predicted: tprec 1, tsens 15/20."""
    truth = np.zeros((5, 30), bool)
    truth[2, 5:25] = True
    pred = truth.copy()
    pred[2, 20:] = False
    assert cldice(pred, truth) == pytest.approx(2 * 0.75 / 1.75)


def test_cldice_alone_can_be_fooled_by_painting_everything():
    """Why the documentation says: never use it alone."""
    truth = np.zeros((64, 64), bool)
    truth[30:36] = True
    full = np.ones_like(truth)
    assert cldice(full, truth) == 1.0
    assert dice(full, truth) < 0.2


def test_growing_the_truth_lowers_dice_and_cldice_step_by_step():
    truth = draw_sequence(TARGET, patient=1, sequence=1, num_frames=1, size=128)[0][1].astype(np.uint8)
    dices, cldices = [], []
    for radius in (0, 2, 4, 8, 16):
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        scores = score_mask(cv2.dilate(truth, disc), truth)
        dices.append(scores["dice"])
        cldices.append(scores["cldice"])
    assert dices[0] == cldices[0] == 1
    assert all(np.diff(dices) < 0)
    assert all(np.diff(cldices) < 0)
    assert cldices[-1] < 0.95


def test_score_mask_equals_the_single_functions():
    functions = (dice, iou, recall, precision, specificity, cldice)
    for pred, truth in random_pairs(4):
        scores = score_mask(pred, truth)
        assert (
            list(scores)
            == (
                "dice iou recall precision specificity cldice tprec tsens "
                "beta0_error beta1_error length_ratio foreground"
            ).split()
        )
        for function in functions:
            assert scores[function.__name__] == function(pred, truth)
        assert scores["foreground"] == pytest.approx(pred.mean())
        assert all(type(score) is float for score in scores.values())
        json.dumps(scores, allow_nan=False)


def test_broken_line_and_closed_gap_are_counted():
    truth = np.zeros((20, 40), bool)
    truth[10, 2:38] = True
    broken = truth.copy()
    broken[10, [12, 25]] = False
    scores = score_mask(broken, truth)
    assert (scores["beta0_error"], scores["beta1_error"]) == (2, 0)
    assert scores["length_ratio"] == pytest.approx(34 / 36)
    looped = truth.copy()
    looped[5, 10:20] = looped[5:11, 10] = looped[5:11, 19] = True
    assert score_mask(looped, truth)["beta1_error"] == score_mask(truth, looped)["beta1_error"] == 1
    assert score_mask(looped, looped)["beta1_error"] == 0


def test_a_given_truth_topology_is_used_not_recomputed(monkeypatch):
    (pred, truth), *_ = random_pairs(1)
    expected, given = score_mask(pred, truth), topology(truth)
    measured = []
    monkeypatch.setattr(metrics, "topology", lambda mask, _: measured.append(mask) or topology(mask))
    assert score_mask(pred, truth, given) == expected
    assert [mask is pred for mask in measured] == [True]


def test_a_topology_of_another_mask_is_refused():
    with pytest.raises(ValueError, match=r"size \(12, 15\), the mask has \(12, 16\)"):
        score_mask(BAR, BAR, topology(BAR[:, :-1]))
    with pytest.raises(ValueError, match="'zhang' thinning, not 'guo_hall'"):
        score_mask(BAR, BAR, prototype_topology(BAR))


@pytest.mark.parametrize("function", [counts, dice, iou, recall, precision, specificity, cldice, score_mask])
def test_every_score_refuses_two_sizes_and_grey_values(function):
    with pytest.raises(ValueError, match="differ in size"):
        function(BAR, BAR[:, :-1])
    with pytest.raises(ValueError, match="0 to 255"):
        function(BAR, BAR.astype(np.uint8) * 255)


def test_tensors_are_accepted():
    assert dice(torch.from_numpy(BAR).float(), torch.from_numpy(BAR)) == 1.0


def test_scores_from_arrays_of_counts():
    tp, fp, fn = np.array([2, 0, 0, 0]), np.array([1, 0, 3, 0]), np.array([1, 0, 0, 4])
    np.testing.assert_allclose(dice_from_counts(tp, fp, fn), [4 / 6, 1, 0, 0])
    np.testing.assert_allclose(dice_from_counts(tp, fp, fn, empty=0), [4 / 6, 0, 0, 0])
    np.testing.assert_allclose(recall_from_counts(tp, fn), [2 / 3, NAN, NAN, 0])
    np.testing.assert_allclose(recall_from_counts(tp, fn, empty=1), [2 / 3, 1, 1, 0])
    np.testing.assert_allclose(precision_from_counts(tp, fp, fn), [2 / 3, 1, 0, 0])
    assert dice_from_counts(tp, 1, 0).shape == (4,)
