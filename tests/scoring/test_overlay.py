import numpy as np
import pytest

from vesselrl.scoring.overlay import topology_errors


def bar(gap=(), rows=slice(9, 12), columns=slice(3, 57)):
    """A vessel 3 px wide, 54 px long, in 21 x 60 pixels, with columns left out."""
    mask = np.zeros((21, 60), bool)
    mask[rows, columns] = True
    mask[:, list(gap)] = False
    return mask


def test_a_perfect_and_an_empty_prediction_have_no_topology_errors():
    for pred in (bar(), np.zeros_like(bar())):
        found = topology_errors(pred, bar())
        assert found.breaks == ()
        assert found.false_pieces == ()


@pytest.mark.parametrize("width", [1, 2, 5, 20])
def test_a_gap_is_one_break_in_its_middle(width):
    found = topology_errors(bar(gap=range(20, 20 + width)), bar())
    assert len(found.breaks) == 1
    row, column = found.breaks[0]
    assert row == 10
    assert abs(column - (20 + (width - 1) / 2)) <= 0.5
    assert found.false_pieces == ()


def test_two_gaps_are_two_breaks():
    assert len(topology_errors(bar(gap=[*range(15, 19), *range(40, 44)]), bar()).breaks) == 2


def test_a_vessel_that_ends_early_is_not_broken():
    assert topology_errors(bar(gap=range(40, 60)), bar()).breaks == ()


def test_a_hole_or_a_detour_is_not_a_break():
    hole = bar()
    hole[10, 25:30] = False  # the sides rows 9 and 11 still join
    detour = bar(gap=range(20, 30))
    detour[12, 18:32] = True  # one px below the vessel: within reach
    far = bar(gap=range(20, 30))
    far[12:18, [19, 30]] = True
    far[17, 19:31] = True  # joins the two sides, but 7 px away
    assert topology_errors(hole, bar()).breaks == ()
    assert topology_errors(detour, bar()).breaks == ()
    assert len(topology_errors(far, bar()).breaks) == 1


def test_a_lost_side_branch_is_not_a_break_of_its_parent_but_a_gap_in_it_is():
    truth = bar()
    truth[:10, 29:32] = True
    lost = bar()
    gap = truth.copy()
    gap[4:7] = False
    assert topology_errors(lost, truth).breaks == ()
    (place,) = topology_errors(gap, truth).breaks
    assert place == (5, 30)


def test_an_opened_ring_is_a_break_though_it_stays_one_piece():
    ring = np.zeros((31, 31), bool)
    ring[3:28, 3:28] = True
    ring[6:25, 6:25] = False
    opened = ring.copy()
    opened[:7, 13:17] = False
    ((row, column),) = topology_errors(opened, ring).breaks
    assert row == 4
    assert 13 <= column <= 16


def test_false_pieces_are_those_that_touch_no_truth():
    pred = bar()
    pred[2:5, 8:11] = True  # apart: centre (3, 9)
    pred[0, 59] = pred[1, 58] = True  # one diagonal piece
    pred[12:15, 30] = True  # grows out of the vessel
    assert topology_errors(pred, bar()).false_pieces == ((0, 59), (3, 9))
    empty = np.zeros_like(pred)
    assert topology_errors(pred, empty).breaks == ()
    assert len(topology_errors(pred, empty).false_pieces) == 3


def test_at_the_border_and_by_symmetry():
    truth = np.zeros((5, 40), bool)
    truth[0] = True
    pred = truth.copy()
    pred[:, 18:21] = False
    assert topology_errors(pred, truth).breaks == ((0, 19),)
    assert topology_errors(pred[:, ::-1], truth[:, ::-1]).breaks == ((0, 20),)
    assert topology_errors(pred.T, truth.T).breaks == ((19, 0),)


def test_masks_of_other_size_are_refused():
    with pytest.raises(ValueError, match="differ in size"):
        topology_errors(np.zeros((4, 4), bool), np.zeros((4, 5), bool))
