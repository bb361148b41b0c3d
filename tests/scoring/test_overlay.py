"""Where the breaks and the false components of a prediction are, on drawn vessels."""

import numpy as np
import pytest

from vesselrl.scoring.overlay import HIT, INVENTED, MISSED, overlay, topology_errors


def bar(gap=(), *additions):
    """A vessel 3 px wide, 54 px long, in 21 x 60 pixels, with columns left out and places added."""
    mask = np.zeros((21, 60), bool)
    mask[9:12, 3:57] = True
    mask[:, list(gap)] = False
    for place in additions:
        mask[place] = True
    return mask


HOLE = bar()
HOLE[10, 25:30] = False  # rows 9 and 11 still join
DETOUR = bar(range(20, 30), np.s_[12, 18:32])  # one px below the vessel: within reach
FAR = bar(range(20, 30), np.s_[12:18, [19, 30]], np.s_[17, 19:31])  # joins both sides, but 7 px away
BRANCH = bar((), np.s_[:10, 29:32])
CUT_BRANCH = BRANCH.copy()
CUT_BRANCH[4:7] = False
ROW = np.ones((1, 60), bool)
RING = np.pad(np.pad(np.zeros((19, 19), bool), 3, constant_values=True), 3)
OPENED = RING.copy()
OPENED[:7, 13:16] = False  # a break though it stays one component


BREAKS = [
    (bar(), bar(), ()),
    (np.zeros_like(bar()), bar(), ()),
    *((bar(range(20, 20 + w)), bar(), ((10, 20 + (w - 1) // 2),)) for w in (1, 5, 21)),
    (bar([*range(15, 20), *range(40, 45)]), bar(), ((10, 17), (10, 42))),
    (bar(range(40, 60)), bar(), ()),  # ends early
    (HOLE, bar(), ()),
    (DETOUR, bar(), ()),
    (FAR, bar(), ((10, 24),)),
    (bar(), BRANCH, ()),  # a lost side branch
    (CUT_BRANCH, BRANCH, ((5, 30),)),
    (ROW & (np.arange(60) != 19), ROW, ((0, 19),)),  # at the border
    (OPENED, RING, ((4, 14),)),
]


@pytest.mark.parametrize(("pred", "truth", "breaks"), BREAKS)
def test_a_break_is_a_gap_in_a_vessel_found_on_both_sides(pred, truth, breaks):
    assert topology_errors(pred, truth).breaks == breaks
    flipped = topology_errors(pred.T, truth.T).breaks
    assert flipped == tuple(sorted((column, row) for row, column in breaks))


def test_false_components_are_those_that_touch_no_truth():
    # apart with its centre at (3, 9); one diagonal component; one that grows out of the vessel
    pred = bar((), np.s_[2:5, 8:11], np.s_[[0, 1], [59, 58]], np.s_[12:15, 30])
    assert topology_errors(pred, bar()).false_pieces == ((0, 59), (3, 9))
    assert len(topology_errors(pred, np.zeros_like(pred)).false_pieces) == 3


def test_loops_added_and_lost():
    full = np.ones((6, 6), bool)
    dotted = full.copy()
    dotted[[0, 2, 3], [3, 2, 3]] = (
        False  # a notch of the border is no hole, pixels that touch at a corner are two
    )
    assert topology_errors(dotted, full).wrong_loops == ((2, 2), (3, 3))
    assert topology_errors(OPENED, RING).wrong_loops == ((15, 15),)
    assert topology_errors(RING, np.roll(RING, 2, axis=0)).wrong_loops == ()


def test_the_colours_of_an_overlay():
    image, mask, truth = np.full((1, 4, 3), 100, np.uint8), np.array([[1, 1, 0, 0]]), np.array([[1, 0, 1, 0]])
    # With a truth over half of the grey.
    shades = [np.round(7.5 + 0.85 * np.array(colour)).tolist() for colour in (HIT, INVENTED, MISSED)]
    blue = np.round(15 + 0.85 * np.array(INVENTED)).tolist()
    np.testing.assert_array_equal(overlay(image, mask, truth)[0], [*shades, [50] * 3])
    np.testing.assert_array_equal(overlay(image, mask)[0], [blue, blue, [100] * 3, [100] * 3])
    assert (image == 100).all()
    with pytest.raises(ValueError, match="uint8 image of shape"):
        overlay(image[:, 1:], mask)
