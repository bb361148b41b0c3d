"""HD95 and NSD against hand counts, brute force over all pairs, and MONAI."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from vesselrl.scoring import surface as module
from vesselrl.scoring.surface import border_of, hd95, nsd, surface, surface_scores

EMPTY = np.zeros((30, 40), bool)
BAR = EMPTY.copy()
BAR[10:13, 5:35] = True


def random_pairs(number=20):
    """Blobs with specks and holes, some of them on the image border; odd sizes."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        shape = 2 * rng.integers(8, 40, size=2) + 1
        truth = cv2.GaussianBlur(rng.random(shape).astype(np.float32), (0, 0), 3) > 0.5
        yield truth ^ (rng.random(shape) < 0.03), truth


def test_distances_by_hand():
    """Two bars of one row, 6 rows apart: every border pixel is 6 px from the other border."""
    row, other = EMPTY.copy(), EMPTY.copy()
    row[10, 5:35] = other[16, 5:35] = True
    assert hd95(row, other) == 6
    assert (nsd(row, other), nsd(row, other, 5.9), nsd(row, other, 6)) == (0, 0, 1)


def test_nsd_by_hand():
    """A row of 30 px against its first 10: 10 + 2 of the truth are within 2 px, all 10 of the prediction."""
    truth, pred = EMPTY.copy(), EMPTY.copy()
    truth[5, 5:35] = pred[5, 5:15] = True
    assert nsd(pred, truth) == pytest.approx((10 + 12) / (10 + 30))
    # 30 truth pixels at distance 0 (ten times), 1, 2, ... 20; 95 % of the way from the 1st to the 30th
    assert hd95(pred, truth) == pytest.approx(0.95 * 29 - 9)


def test_a_border_is_what_has_a_background_pixel_beside_it():
    square = np.zeros((7, 7), bool)
    square[1:6, 1:6] = True
    square[3, 3] = False
    # 16 px outer border; of the ring of 8 inside it, the 4 that share a side with the hole
    assert border_of(square).sum() == 20
    assert not border_of(square)[2, 2]
    assert border_of(np.ones((5, 6), bool)).sum() == 18


EMPTY_RULES = [(EMPTY, EMPTY, 0, 1), (EMPTY, BAR, 50, 0), (BAR, EMPTY, 50, 0), (BAR, BAR, 0, 1)]


@pytest.mark.parametrize(("pred", "truth", "distance", "agreement"), EMPTY_RULES)
def test_empty_masks_follow_one_rule(pred, truth, distance, agreement):
    """The diagonal of 30 x 40 px is 50."""
    assert (hd95(pred, truth), nsd(pred, truth)) == (distance, agreement)
    assert surface_scores(pred, surface(truth)) == {"hd95": distance, "nsd": agreement}


def test_every_distance_equals_brute_force():
    for pred, truth in random_pairs(8):
        borders = np.argwhere(border_of(pred)), np.argwhere(border_of(truth))
        distances = cdist(*borders)
        there, back = distances.min(axis=1), distances.min(axis=0)
        expected = max(np.percentile(there, 95), np.percentile(back, 95))
        assert hd95(pred, truth) == pytest.approx(expected, abs=1e-4)
        for tolerance in (0, 1, 2, 3.5):
            close = (there <= tolerance).sum() + (back <= tolerance).sum()
            assert nsd(pred, truth, tolerance) == pytest.approx(close / (len(there) + len(back)), abs=1e-9)


def test_without_numba_the_numbers_are_the_same(monkeypatch):
    compiled = np.array([(hd95(*pair), nsd(*pair)) for pair in random_pairs()])
    monkeypatch.setattr(module, "compiled_kernels", lambda: None)
    plain = np.array([(hd95(*pair), nsd(*pair)) for pair in random_pairs()])
    np.testing.assert_allclose(plain, compiled, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_hd95_and_nsd_equal_monai():
    hausdorff = pytest.importorskip("monai.metrics.hausdorff_distance").compute_hausdorff_distance
    surface_dice = pytest.importorskip("monai.metrics.surface_dice").compute_surface_dice
    for pred, truth in random_pairs():
        pair = [torch.tensor(mask)[None, None] for mask in (pred, truth)]
        theirs = hausdorff(*pair, include_background=True, percentile=95).item()
        assert hd95(pred, truth) == pytest.approx(theirs, abs=1e-4)
        for tolerance in (1.0, 2.0):
            theirs = surface_dice(*pair, [tolerance], include_background=True).item()
            assert nsd(pred, truth, tolerance) == pytest.approx(theirs, abs=1e-4)


def test_both_are_symmetric_and_do_not_depend_on_a_margin():
    for pred, truth in random_pairs(6):
        scores = hd95(pred, truth), nsd(pred, truth)
        assert (hd95(truth, pred), nsd(truth, pred)) == pytest.approx(scores, abs=1e-5)
        padded = np.pad(pred, ((0, 3), (7, 1))), np.pad(truth, ((0, 3), (7, 1)))
        assert (hd95(*padded), nsd(*padded)) == pytest.approx(scores, abs=1e-5)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="differ in size"):
        hd95(BAR, BAR[:, :-1])
    with pytest.raises(ValueError, match="0 to 255"):
        nsd(BAR, BAR.astype(np.uint8) * 255)
    with pytest.raises(ValueError, match="the truth's surface"):
        surface_scores(BAR, surface(BAR[:-1]))
    for tolerance in (-1, math.nan):
        with pytest.raises(ValueError, match="tolerance_px must be at least 0"):
            nsd(BAR, BAR, tolerance)


def test_the_last_bit_of_a_distance_map_does_not_matter() -> None:
    """OpenCV's map comes out with other last bits now and then; a score must not."""
    rng = np.random.default_rng(0)
    pred, truth = rng.random((2, 61, 70)) < 0.02
    known = surface(truth)
    shaken = replace(known, distance=np.nextafter(known.distance, np.float32(np.inf)))
    assert surface_scores(pred, shaken) == surface_scores(pred, known)
