"""Recall by the width of the vessel, on bars whose widths are known."""

import math

import cv2
import numpy as np
import pytest

from vesselrl.scoring.calibre import calibre_map, covered_by_discs, recall_by_calibre

THIN, MEDIUM, THICK = 1, 2, 3


def bar(width, length=80):
    mask = np.zeros((40, 100), bool)
    mask[10 : 10 + width, 10 : 10 + length] = True
    return mask


@pytest.mark.parametrize(
    ("width", "calibre"),
    [(1, THIN), (3, THIN), (4, THIN), (5, MEDIUM), (6, MEDIUM), (8, MEDIUM), (9, THICK), (14, THICK)],
)
def test_the_whole_of_a_bar_has_the_class_of_its_width(width, calibre):
    """Corners and ends too: they belong to the centreline, which stays clear of them."""
    mask = bar(width)
    classes = calibre_map(mask)
    assert set(np.unique(classes[mask])) == {calibre}
    assert not classes[~mask].any()


@pytest.mark.parametrize("width", [3, 7, 13])
def test_slanted_bars_have_nearly_the_class_of_their_width(width):
    for degrees in range(0, 180, 15):
        ys, xs = np.mgrid[:140, :140] - 70
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        mask = (np.abs(xs * c + ys * s) <= 55) & (np.abs(ys * c - xs * s) <= width / 2)
        classes = calibre_map(mask)[mask]
        expected = {3: THIN, 7: MEDIUM, 13: THICK}[width]
        assert (classes == expected).mean() > 0.95, degrees


def test_a_branch_is_thin_and_its_trunk_is_thick():
    mask = bar(12)
    mask[22:38, 50:53] = True
    classes = calibre_map(mask)
    assert (classes[26:38, 50:53] == THIN).all()
    assert (classes[10:22, 10:45] == THICK).all()
    assert (classes[mask] == THIN).sum() <= 3 * 16 + 12


def test_a_rough_edge_does_not_make_a_thick_vessel_thin():
    mask = bar(14)
    mask[9, 12:88:4] = True
    classes = calibre_map(mask)
    assert (classes[mask] == THICK).mean() > 0.97


def test_covered_pixels_are_a_morphological_opening():
    """Disc of diameter d: offsets with dx² + dy² < (d/2)²."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = cv2.GaussianBlur(rng.random((61, 47)).astype(np.float32), (0, 0), 3) > 0.49
        for diameter in (3, 5, 9):
            ys, xs = np.mgrid[:diameter, :diameter] - diameter // 2
            disc = (ys**2 + xs**2 < (diameter / 2) ** 2).astype(np.uint8)
            padded = np.pad(mask.astype(np.uint8), 10)
            opened = cv2.morphologyEx(padded, cv2.MORPH_OPEN, disc)[10:-10, 10:-10].astype(bool)
            np.testing.assert_array_equal(covered_by_discs(mask, diameter), opened)


def test_recall_by_hand():
    """Thin bar 3 x 30 found to a third, thick bar 10 x 30 found whole; nothing medium."""
    truth = np.zeros((40, 50), bool)
    truth[2:5, 10:40] = truth[15:25, 10:40] = True
    pred = truth.copy()
    pred[2:5, 20:40] = False
    pred[35:] = True  # false alarms do not matter to recall
    found = recall_by_calibre(pred, calibre_map(truth))
    assert found["recall_thin"] == pytest.approx(1 / 3)
    assert found["recall_thick"] == 1
    assert math.isnan(found["recall_medium"])


def test_classes_share_out_the_truth():
    rng = np.random.default_rng(3)
    truth = cv2.GaussianBlur(rng.random((80, 91)).astype(np.float32), (0, 0), 3) > 0.5
    classes = calibre_map(truth)
    np.testing.assert_array_equal(classes > 0, truth)
    assert recall_by_calibre(truth, classes) == {"recall_thin": 1, "recall_medium": 1, "recall_thick": 1}


def test_empty_and_full_masks():
    empty, full = np.zeros((20, 20), bool), np.ones((20, 20), bool)
    assert not calibre_map(empty).any()
    assert all(math.isnan(share) for share in recall_by_calibre(full, calibre_map(empty)).values())
    assert (calibre_map(full) == THICK).all()
    assert recall_by_calibre(empty, calibre_map(full))["recall_thick"] == 0


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="differ in size"):
        recall_by_calibre(bar(3)[:-1], calibre_map(bar(3)))
