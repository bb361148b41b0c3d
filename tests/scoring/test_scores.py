"""The scores of a mask by hand and by other libraries, and the truth cache."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion, binary_opening
from scipy.spatial.distance import cdist
from skimage.morphology import thin

from tests.scoring.mask_edits import random_pairs
from vesselrl.scoring import scores
from vesselrl.scoring.scores import Truth, cached_truth, recall_by_width, score_mask

NAN = math.nan
EMPTY = np.zeros((30, 40), bool)
FULL = ~EMPTY
BAR = EMPTY.copy()
BAR[4:7, 5:35] = True
GREY = BAR * np.uint8(255)
THIN, MEDIUM, THICK = 1, 2, 3
EMPTIES = [
    (EMPTY, EMPTY, (1, 1, NAN, 1, 1, 1, 1, 1, 1, 0, 1)),
    (EMPTY, BAR, (0, 0, 0, 0, 1, 0, 0, 0, 0, 50, 0)),
    (BAR, EMPTY, (0, 0, NAN, 0, 1 - 90 / 1200, 0, 0, 0, NAN, 50, 0)),
    (FULL, FULL, (1, 1, 1, 1, NAN, 1, 1, 1, 1, 0, 1)),
    (np.roll(BAR, 5, 0), BAR, (0, 0, 0, 0, 1 - 90 / 1110, 0, 0, 0, 1, 5, 0)),  # they miss each other
]


@pytest.mark.parametrize(("pred", "truth", "expected"), EMPTIES)
def test_empty_masks_follow_one_rule(pred, truth, expected):
    """The diagonal of 30 x 40 px is 50."""
    names = "dice iou recall precision specificity cldice tprec tsens length_ratio hd95 nsd".split()
    found = scores.evaluation_scores(pred, truth)
    assert [found[name] for name in names] == pytest.approx(list(expected), nan_ok=True)
    assert math.isnan(found["recall_thin"]) == (truth is not BAR)


def test_cldice_is_its_formula_on_scikit_image_skeletons():
    for pred, truth in random_pairs():
        tprec = (thin(pred) & truth).sum() / thin(pred).sum()
        tsens = (thin(truth) & pred).sum() / thin(truth).sum()
        scores = score_mask(pred, Truth(truth))
        assert scores["cldice"] == pytest.approx(2 * tprec * tsens / (tprec + tsens), abs=1e-12)
        assert (scores["tprec"], scores["tsens"]) == pytest.approx((tprec, tsens))


def test_a_broken_line_and_a_loop_by_hand():
    """A line of 36 px with 10 px lost at its end and 2 in between: tprec 1, tsens 24/36."""
    truth = np.zeros((20, 40), bool)
    truth[10, 2:38] = True
    broken, looped = truth.copy(), truth.copy()
    broken[10, [12, 25]] = broken[10, 28:] = False
    scores = score_mask(broken, Truth(truth))
    assert (scores["beta0_error"], scores["beta1_error"], scores["length_ratio"]) == (2, 0, 24 / 36)
    assert scores["cldice"] == pytest.approx(2 * (24 / 36) / (1 + 24 / 36))
    assert scores["foreground"] == 24 / 800
    looped[5, 10:20] = looped[5:11, 10] = looped[5:11, 19] = True
    for pred, other in ((looped, truth), (truth, looped)):
        assert score_mask(pred, Truth(other))["beta1_error"] == 1


def bar(width):
    mask = np.zeros((40, 100), bool)
    mask[10 : 10 + width, 10:90] = True
    return mask


def test_the_whole_of_a_bar_has_the_class_of_its_width():
    """Corners and ends too: they belong to the centreline, which stays clear of them."""
    widths = {1: THIN, 3: THIN, 4: THIN, 5: MEDIUM, 6: MEDIUM, 8: MEDIUM, 9: THICK, 14: THICK}
    for width, expected in widths.items():
        np.testing.assert_array_equal(Truth(bar(width)).widths, bar(width) * expected)
    mask = bar(12)  # a trunk with a rough edge and a branch
    mask[22:38, 50:53] = mask[9, 12:88:4] = True
    classes = Truth(mask).widths
    assert (classes[26:38, 50:53] == THIN).all()
    assert (classes[10:22, 10:45] == THICK).all()
    assert (classes[mask] == THIN).sum() <= 3 * 16 + 12 + 19


def test_covered_pixels_are_a_morphological_opening():
    for diameter in (3, 5, 9):
        ys, xs = np.mgrid[:diameter, :diameter] - diameter // 2
        disc = ys**2 + xs**2 < (diameter / 2) ** 2
        for _, mask in random_pairs(10):
            np.testing.assert_array_equal(scores.covered_by_discs(mask, diameter), binary_opening(mask, disc))


def test_recall_by_hand():
    """Thin bar 3 x 30 found to a third, thick bar 10 x 30 found whole; nothing medium."""
    truth = np.zeros((40, 50), bool)
    truth[2:5, 10:40] = truth[15:25, 10:40] = True
    pred = truth.copy()
    pred[2:5, 20:40] = False
    pred[35:] = True  # false alarms do not matter to recall
    expected = {"recall_thin": 1 / 3, "recall_medium": NAN, "recall_thick": 1}
    assert recall_by_width(pred, Truth(truth)) == pytest.approx(expected, nan_ok=True)
    for truth in (EMPTY, FULL, next(random_pairs())[1]):
        np.testing.assert_array_equal(Truth(truth).widths > 0, truth)


def both(pred, truth, tolerance_px=scores.TOLERANCE_PX):
    """(hd95, nsd)"""
    return tuple(scores.surface_scores(pred, Truth(truth), tolerance_px).values())


def test_every_distance_equals_brute_force_in_both_directions_and_with_a_margin():
    row, other = np.zeros((2, 30, 40), bool)
    row[10, 5:35] = other[16, 5:35] = True
    assert [both(row, other, tolerance) for tolerance in (2, 5.9, 6)] == [(6, 0), (6, 0), (6, 1)]
    for pred, truth in random_pairs(8):
        distances = cdist(*(np.argwhere(mask & ~binary_erosion(mask)) for mask in (pred, truth)))
        there, back = distances.min(axis=1), distances.min(axis=0)
        hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
        for tolerance in (0, 1, 2, 3.5):
            close = (there <= tolerance).sum() + (back <= tolerance).sum()
            expected = hd95, close / (len(there) + len(back))
            assert both(pred, truth, tolerance) == pytest.approx(expected, abs=1e-9)
        padded = np.pad(pred, ((0, 3), (7, 1))), np.pad(truth, ((0, 3), (7, 1)))
        assert both(truth, pred) == both(*padded) == pytest.approx(both(pred, truth), abs=1e-12)


@pytest.mark.slow
def test_hd95_and_nsd_equal_monai():
    hausdorff = pytest.importorskip("monai.metrics.hausdorff_distance").compute_hausdorff_distance
    surface_dice = pytest.importorskip("monai.metrics.surface_dice").compute_surface_dice
    for pred, truth in random_pairs(20):
        pair = [torch.tensor(mask)[None, None] for mask in (pred, truth)]
        hd95 = hausdorff(*pair, include_background=True, percentile=95).item()
        for tolerance in (1.0, 2.0):
            nsd = surface_dice(*pair, [tolerance], include_background=True).item()
            assert both(pred, truth, tolerance) == pytest.approx((hd95, nsd), abs=1e-4)


def test_equal_content_shares_one_truth_and_other_content_does_not():
    mask = BAR.copy()
    known = cached_truth(mask)
    assert cached_truth(np.asfortranarray(mask.astype(np.uint8))) is known
    mask[0, 0] = True
    assert cached_truth(mask) is not known
    np.testing.assert_array_equal(known.mask, BAR)  # its own copy
    assert cached_truth(FULL).mask.shape == (30, 40)
    assert cached_truth(FULL.reshape(40, 30)).mask.shape == (40, 30)


WRONG = [
    (lambda: score_mask(BAR[:-1], Truth(BAR)), r"prediction \(29, 40\), truth \(30, 40\)"),
    (lambda: recall_by_width(BAR[:-1], Truth(BAR)), r"prediction \(29, 40\), truth \(30, 40\)"),
    (lambda: both(BAR, BAR[:, :-1]), r"prediction \(30, 40\), truth \(30, 39\)"),
    (lambda: both(GREY, BAR), "pred holds values from 0 to 255"),
    (lambda: cached_truth(GREY), "truth holds values from 0 to 255"),
]


def test_wrong_masks_and_settings_are_named():
    for call, message in WRONG:
        with pytest.raises(ValueError, match=message):
            call()
