"""clDice and the scores of a mask by hand, recall by vessel width, the truth cache, and many masks."""

import json
import math
import threading

import cv2
import numpy as np
import pytest
from skimage.morphology import thin

from vesselrl.scoring import scores as module
from vesselrl.scoring.scores import (
    cached_truth,
    cldice,
    covered_by_discs,
    evaluation_scores,
    in_threads,
    recall_by_width,
    score_mask,
    score_masks,
    surface,
    surface_scores,
    width_map,
)
from vesselrl.scoring.topology import prototype_topology, topology
from vesselrl.synthetic.dataset import TARGET, draw_sequence

NAN = math.nan
EMPTY = np.zeros((30, 40), bool)
FULL = ~EMPTY
BAR = EMPTY.copy()
BAR[4:7, 5:35] = True
THIN, MEDIUM, THICK = 1, 2, 3


def random_pairs(number=12):
    for seed in range(number):
        rng = np.random.default_rng(seed)
        truth = cv2.GaussianBlur(rng.random((41, 53)).astype(np.float32), (0, 0), 3) > 0.5
        yield truth ^ (rng.random(truth.shape) < 0.15), truth


# (prediction, truth): dice iou recall precision specificity cldice tprec tsens length_ratio hd95 nsd
EMPTY_RULES = [
    (EMPTY, EMPTY, (1, 1, NAN, 1, 1, 1, 1, 1, 1, 0, 1)),
    (EMPTY, BAR, (0, 0, 0, 0, 1, 0, 0, 0, 0, 50, 0)),
    (BAR, EMPTY, (0, 0, NAN, 0, 1 - 90 / 1200, 0, 0, 0, NAN, 50, 0)),
    (FULL, FULL, (1, 1, 1, 1, NAN, 1, 1, 1, 1, 0, 1)),
    (np.roll(BAR, 5, 0), BAR, (0, 0, 0, 0, 1 - 90 / 1110, 0, 0, 0, 1, 5, 0)),  # they miss each other
]


@pytest.mark.parametrize(("pred", "truth", "expected"), EMPTY_RULES)
def test_empty_masks_follow_one_rule(pred, truth, expected):
    names = "dice iou recall precision specificity cldice tprec tsens length_ratio hd95 nsd".split()
    scores = evaluation_scores(pred, truth)
    assert [scores[name] for name in names] == pytest.approx(list(expected), nan_ok=True)
    assert cldice(pred, truth) == scores["cldice"]
    assert math.isnan(scores["recall_thin"]) == (truth is not BAR)


def test_cldice_is_its_formula_on_scikit_image_skeletons():
    for pred, truth in random_pairs():
        tprec = (thin(pred) & truth).sum() / thin(pred).sum()
        tsens = (thin(truth) & pred).sum() / thin(truth).sum()
        assert cldice(pred, truth) == pytest.approx(2 * tprec * tsens / (tprec + tsens), abs=1e-12)
        assert cldice(truth, pred) == pytest.approx(cldice(pred, truth), abs=1e-12)
        scores = score_mask(pred, truth)
        assert (scores["tprec"], scores["tsens"]) == pytest.approx((tprec, tsens))


def test_a_broken_line_and_a_loop_by_hand():
    """A line of 36 px with 10 px lost at its end and 2 in between: tprec 1, tsens 24/36."""
    truth = np.zeros((20, 40), bool)
    truth[10, 2:38] = True
    broken, looped = truth.copy(), truth.copy()
    broken[10, [12, 25]] = broken[10, 28:] = False
    scores = score_mask(broken, truth)
    assert (scores["beta0_error"], scores["beta1_error"], scores["length_ratio"]) == (2, 0, 24 / 36)
    assert scores["cldice"] == pytest.approx(2 * (24 / 36) / (1 + 24 / 36))
    assert scores["foreground"] == 24 / 800
    looped[5, 10:20] = looped[5:11, 10] = looped[5:11, 19] = True
    assert score_mask(looped, truth)["beta1_error"] == score_mask(truth, looped)["beta1_error"] == 1


def test_growing_the_truth_lowers_dice_and_cldice_step_by_step():
    truth = draw_sequence(TARGET, patient=1, sequence=1, num_frames=1, size=128)[0][1].astype(np.uint8)
    discs = [cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)) for size in (1, 5, 9, 17, 33)]
    rows = [score_mask(cv2.dilate(truth, disc), truth) for disc in discs]
    steps = np.array([[row["dice"], row["cldice"]] for row in rows])
    assert steps[0].tolist() == [1, 1]
    assert (np.diff(steps, axis=0) < 0).all()


def test_a_topology_of_another_mask_is_refused_and_a_given_one_is_used(monkeypatch):
    with pytest.raises(ValueError, match=r"size \(30, 39\), the mask has \(30, 40\)"):
        score_mask(BAR, BAR, topology(BAR[:, :-1]))
    with pytest.raises(ValueError, match="'zhang' thinning, not 'guo_hall'"):
        score_mask(BAR, BAR, prototype_topology(BAR))
    (pred, truth), *_ = random_pairs(1)
    expected, given, measured = score_mask(pred, truth), topology(truth), []
    monkeypatch.setattr(module, "topology", lambda mask: measured.append(mask) or topology(mask))
    assert score_mask(pred, truth, given) == expected
    assert [mask is pred for mask in measured] == [True]


# ---- Recall by vessel width


def bar(width):
    mask = np.zeros((40, 100), bool)
    mask[10 : 10 + width, 10:90] = True
    return mask


@pytest.mark.parametrize(
    ("width", "expected"),
    [(1, THIN), (3, THIN), (4, THIN), (5, MEDIUM), (6, MEDIUM), (8, MEDIUM), (9, THICK), (14, THICK)],
)
def test_the_whole_of_a_bar_has_the_class_of_its_width(width, expected):
    """Corners and ends too: they belong to the centreline, which stays clear of them."""
    np.testing.assert_array_equal(width_map(bar(width)), bar(width) * expected)


def test_a_branch_is_thin_and_its_trunk_is_thick_even_with_a_rough_edge():
    mask = bar(12)
    mask[22:38, 50:53] = mask[9, 12:88:4] = True
    classes = width_map(mask)
    assert (classes[26:38, 50:53] == THIN).all()
    assert (classes[10:22, 10:45] == THICK).all()
    assert (classes[mask] == THIN).sum() <= 3 * 16 + 12 + 19


def test_covered_pixels_are_a_morphological_opening():
    """Disc of diameter d: offsets with dx² + dy² < (d/2)²."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        mask = cv2.GaussianBlur(rng.random((61, 47)).astype(np.float32), (0, 0), 3) > 0.49
        for diameter in (3, 5, 9):
            ys, xs = np.mgrid[:diameter, :diameter] - diameter // 2
            disc = (ys**2 + xs**2 < (diameter / 2) ** 2).astype(np.uint8)
            opened = cv2.morphologyEx(np.pad(mask.astype(np.uint8), 10), cv2.MORPH_OPEN, disc)
            np.testing.assert_array_equal(covered_by_discs(mask, diameter), opened[10:-10, 10:-10] > 0)


def test_recall_by_hand():
    """Thin bar 3 x 30 found to a third, thick bar 10 x 30 found whole; nothing medium."""
    truth = np.zeros((40, 50), bool)
    truth[2:5, 10:40] = truth[15:25, 10:40] = True
    pred = truth.copy()
    pred[2:5, 20:40] = False
    pred[35:] = True  # false alarms do not matter to recall
    found = recall_by_width(pred, width_map(truth))
    assert found == pytest.approx(
        {"recall_thin": 1 / 3, "recall_medium": NAN, "recall_thick": 1}, nan_ok=True
    )
    with pytest.raises(ValueError, match="differ in size"):
        recall_by_width(pred[:-1], width_map(truth))
    for truth in (EMPTY, FULL, next(random_pairs())[1]):
        np.testing.assert_array_equal(width_map(truth) > 0, truth)


# ---- The truth cache and evaluation scores


def test_equal_content_shares_one_truth_and_other_content_does_not():
    mask = BAR.copy()
    known = cached_truth(mask)
    assert cached_truth(np.asfortranarray(mask.astype(np.uint8))) is known
    mask[0, 0] = True
    assert cached_truth(mask) is not known
    np.testing.assert_array_equal(known.mask, BAR)  # its own copy
    assert cached_truth(FULL).mask.shape == (30, 40)
    assert cached_truth(FULL.reshape(40, 30)).mask.shape == (40, 30)
    with pytest.raises(ValueError, match="truth holds values from 0 to 255"):
        cached_truth(BAR.astype(np.uint8) * 255)


def test_the_parts_of_a_truth_are_computed_once_and_only_when_asked_for(monkeypatch):
    module.clear_truth_cache()
    measured = []
    for name in ("topology", "surface", "width_map"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, n=name, f=real: measured.append(n) or f(*given))
    cached_truth(BAR)
    assert measured == []
    for shift in (0, 1, 2):
        evaluation_scores(np.roll(BAR, shift, axis=0), BAR)
    # each prediction's topology is measured too
    assert sorted(measured) == ["surface", *["topology"] * 4, "width_map"]


def test_evaluation_scores_are_the_single_functions():
    for pred, truth in random_pairs(4):
        scores = evaluation_scores(pred, truth)
        singles = score_mask(pred, truth) | surface_scores(pred, surface(truth))
        assert str(scores) == str(singles | recall_by_width(pred, width_map(truth)))
        assert all(type(score) is float for score in scores.values())
        json.dumps({name: score for name, score in scores.items() if score == score}, allow_nan=False)


# ---- Many masks


@pytest.mark.parametrize("num_threads", [1, 5, None])
@pytest.mark.parametrize("evaluation", [False, True])
def test_a_batch_is_its_masks_one_by_one(num_threads, evaluation):
    preds, truths = zip(*random_pairs(6), (FULL, BAR), strict=True)
    function = evaluation_scores if evaluation else score_mask
    expected = [function(pred, truth) for pred, truth in zip(preds, truths, strict=True)]
    scored = score_masks(preds, truths, evaluation=evaluation, num_threads=num_threads)
    assert str(scored) == str(expected)  # as text, so that nan equals nan
    assert score_masks([], [], num_threads=num_threads) == []


def test_wrong_masks_are_named_before_anything_is_scored():
    preds, truths = (list(masks) for masks in zip(*random_pairs(3), strict=True))
    with pytest.raises(ValueError, match="got 2 predictions for 3 truths"):
        score_masks(preds[:2], truths)
    with pytest.raises(ValueError, match=r"pred 2 is \(40, 53\), truth 2 is"):
        score_masks([*preds[:2], preds[2][:-1]], truths)
    with pytest.raises(ValueError, match="pred 1 holds values from 0 to 255"):
        score_masks([preds[0], preds[1] * np.uint8(255), preds[2]], truths)
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        score_masks(preds, truths, num_threads=0)


def test_threads_work_at_the_same_time_keep_the_order_and_raise_errors():
    both_here = threading.Barrier(2, timeout=20)
    assert in_threads(lambda number: both_here.wait() * 0 + number, [0, 1], num_threads=2) == [0, 1]
    for num_threads in (1, 3):
        with pytest.raises(ZeroDivisionError):
            in_threads(lambda number: 1 / (number - 2), range(5), num_threads=num_threads)
