"""HD95 and NSD against hand counts, brute force over all pairs, and MONAI."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from vesselrl.scoring.scores import TOLERANCE_PX, border_of, surface, surface_scores

EMPTY = np.zeros((30, 40), bool)
BAR = EMPTY.copy()
BAR[10:13, 5:35] = True


def both(pred, truth, tolerance_px=TOLERANCE_PX):
    """(hd95, nsd)"""
    return tuple(surface_scores(pred, surface(truth), tolerance_px).values())


def random_pairs(number=20):
    """Blobs with specks and holes, some of them on the image border; odd sizes."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        shape = 2 * rng.integers(8, 40, size=2) + 1
        truth = cv2.GaussianBlur(rng.random(shape).astype(np.float32), (0, 0), 3) > 0.5
        noisy = truth ^ (rng.random(shape) < 0.03)
        yield (noisy, truth) if seed % 2 else (truth, noisy)  # either direction may be the larger one


def test_distances_by_hand():
    """Two bars of one row, 6 rows apart: every border pixel is 6 px from the other border."""
    row, other = EMPTY.copy(), EMPTY.copy()
    row[10, 5:35] = other[16, 5:35] = True
    assert [both(row, other, tolerance) for tolerance in (2, 5.9, 6)] == [(6, 0), (6, 0), (6, 1)]


def test_nsd_by_hand():
    """A row of 30 px against its first 10: 10 + 2 of the truth are within 2 px, all 10 of the prediction."""
    truth, pred = EMPTY.copy(), EMPTY.copy()
    truth[5, 5:35] = pred[5, 5:15] = True
    # 30 truth pixels at distance 0 (ten times), 1, 2, ... 20; 95 % of the way from the 1st to the 30th
    assert both(pred, truth) == pytest.approx((0.95 * 29 - 9, (10 + 12) / (10 + 30)))


def test_a_border_is_what_has_a_background_pixel_beside_it():
    square = np.zeros((7, 7), bool)
    square[1:6, 1:6] = True
    square[3, 3] = False
    # 16 px outer border; of the ring of 8 inside it, the 4 that share a side with the hole
    assert border_of(square).sum() == 20
    assert not border_of(square)[2, 2]
    assert border_of(np.ones((5, 6), bool)).sum() == 18


@pytest.mark.parametrize(
    ("pred", "truth", "expected"),
    [(EMPTY, EMPTY, (0, 1)), (EMPTY, BAR, (50, 0)), (BAR, EMPTY, (50, 0)), (BAR, BAR, (0, 1))],
)
def test_empty_masks_follow_one_rule(pred, truth, expected):
    """The diagonal of 30 x 40 px is 50."""
    assert both(pred, truth) == expected


def test_every_distance_equals_brute_force():
    for pred, truth in random_pairs(8):
        distances = cdist(np.argwhere(border_of(pred)), np.argwhere(border_of(truth)))
        there, back = distances.min(axis=1), distances.min(axis=0)
        hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
        for tolerance in (0, 1, 2, 3.5):
            close = (there <= tolerance).sum() + (back <= tolerance).sum()
            expected = hd95, close / (len(there) + len(back))
            assert both(pred, truth, tolerance) == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
def test_hd95_and_nsd_equal_monai():
    hausdorff = pytest.importorskip("monai.metrics.hausdorff_distance").compute_hausdorff_distance
    surface_dice = pytest.importorskip("monai.metrics.surface_dice").compute_surface_dice
    for pred, truth in random_pairs():
        pair = [torch.tensor(mask)[None, None] for mask in (pred, truth)]
        hd95 = hausdorff(*pair, include_background=True, percentile=95).item()
        for tolerance in (1.0, 2.0):
            nsd = surface_dice(*pair, [tolerance], include_background=True).item()
            assert both(pred, truth, tolerance) == pytest.approx((hd95, nsd), abs=1e-4)


def test_both_are_symmetric_and_do_not_depend_on_a_margin():
    for pred, truth in random_pairs(6):
        padded = np.pad(pred, ((0, 3), (7, 1))), np.pad(truth, ((0, 3), (7, 1)))
        assert both(truth, pred) == both(*padded) == pytest.approx(both(pred, truth), abs=1e-12)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="the truth's surface"):
        both(BAR, BAR[:, :-1])
    with pytest.raises(ValueError, match="pred holds values from 0 to 255"):
        both(BAR.astype(np.uint8) * 255, BAR)
    for tolerance in (-1, math.nan):
        with pytest.raises(ValueError, match="tolerance_px must be at least 0"):
            both(BAR, BAR, tolerance)


def test_the_last_bit_of_a_distance_map_does_not_matter() -> None:
    """OpenCV's map comes out with other last bits now and then; a score must not."""
    rng = np.random.default_rng(0)
    pred, truth = rng.random((2, 61, 70)) < 0.02
    known = surface(truth)
    shaken = replace(known, distance=np.nextafter(known.distance, np.float32(np.inf)))
    assert surface_scores(pred, shaken) == surface_scores(pred, known)
