"""Discs, bars and rings have the lengths and widths that they were drawn with."""

import math

import numpy as np
import pytest

from vesselrl.scoring.measurements import branches, measurement_row, vessel_measurements

Y, X = np.mgrid[:512, :512].astype(float)
RADIUS = np.hypot(X - 256, Y - 256)


def bar(length: float, width: float, degrees: float) -> np.ndarray:
    """A straight vessel through the middle."""
    angle = math.radians(degrees)
    along = (X - 256) * math.cos(angle) + (Y - 256) * math.sin(angle)
    across = (Y - 256) * math.cos(angle) - (X - 256) * math.sin(angle)
    return (abs(along) < length / 2) & (abs(across) < width / 2)


@pytest.mark.parametrize("degrees", [0, 10, 22.5, 30, 60, 90])
@pytest.mark.parametrize("width", [3, 7, 15])
def test_a_bar_is_as_long_and_wide_as_it_was_drawn(width: int, degrees: float) -> None:
    mask = bar(301, width, degrees)
    found = vessel_measurements(mask)
    assert found["length_px"] == pytest.approx(301, rel=0.02)
    assert found["mean_width_px"] == pytest.approx(mask.sum() / 301, rel=0.02)
    assert found["max_width_px"] == pytest.approx(width, abs=0.8)  # a slanted edge has steps of a pixel
    assert found["tortuosity"] == pytest.approx(1, abs=0.01)
    assert found["branch_points"] == 0


@pytest.mark.parametrize("width", [4, 8])
def test_an_even_width_is_measured_as_well_as_an_odd_one(width: int) -> None:
    mask = np.zeros((100, 400), bool)
    mask[40 : 40 + width, 50:350] = True
    found = vessel_measurements(mask)
    assert [found[name] for name in ("length_px", "mean_width_px", "max_width_px")] == [300, width, width]


@pytest.mark.parametrize("radius", [20, 60, 150])
def test_a_ring_has_its_circumference_and_is_half_as_straight_again(radius: int) -> None:
    found = vessel_measurements(abs(RADIUS - radius) < 3)
    assert found["length_px"] == pytest.approx(2 * math.pi * radius, rel=0.02)
    assert found["mean_width_px"] == pytest.approx(6, rel=0.02)
    assert found["tortuosity"] == pytest.approx(math.pi / 2, rel=0.02)  # of each half


@pytest.mark.parametrize("radius", [9.5, 30.5])
def test_the_largest_disc_gives_the_maximal_width(radius: float) -> None:
    mask = (radius > RADIUS) | bar(400, 3, 0)
    assert vessel_measurements(mask)["max_width_px"] == pytest.approx(2 * radius, rel=0.02)
    assert vessel_measurements(radius > RADIUS)["length_px"] == pytest.approx(2 * radius, rel=0.02)


def test_branches_meet_in_the_middle_and_loops_count_once() -> None:
    cross = bar(301, 5, 0) | bar(301, 5, 90)
    found = vessel_measurements(cross)
    assert found["length_px"] == pytest.approx(602, rel=0.02)
    assert found["branch_points"] == 1
    # A ring with a stalk: the circumference and the stalk from the ring's middle line on.
    stalk = (abs(RADIUS - 60) < 2.5) | ((abs(Y - 256) < 2.5) & (X > 316) & (X < 450))
    found = vessel_measurements(stalk)
    assert found["length_px"] == pytest.approx(2 * math.pi * 60 + 134, rel=0.02)
    assert found["branch_points"] == 1
    assert found["tortuosity"] == pytest.approx((2 * math.pi * 60 + 134) / (240 + 134), rel=0.02)


def test_an_empty_mask_specks_and_noise() -> None:
    empty = vessel_measurements(np.zeros((20, 30), bool))
    assert [*empty.values()][:4] == [0, 0, 0, 0]
    assert math.isnan(empty["tortuosity"])
    speck = np.zeros((20, 30), bool)
    speck[4:6, 7:9] = True
    assert vessel_measurements(speck)["length_px"] == 2
    for shape in ((1, 1), (1, 40), (3, 3), (64, 48)):
        for share in (0.3, 0.6, 1.0):
            mask = np.random.default_rng(0).random(shape) < share
            found = vessel_measurements(mask)
            assert math.isfinite(found["length_px"])
            assert (found["length_px"] > 0) == mask.any()
            whole = np.concatenate([path for path, _ in branches(mask)] or [np.zeros((0, 2))])
            assert np.isfinite(whole).all()


def test_a_row_has_mm_where_the_pixel_is_known() -> None:
    found = {"length_px": 200.0, "mean_width_px": 4.0, "max_width_px": 6.5, "tortuosity": math.nan}
    row = measurement_row(found, 0.25)
    assert row == found | {"tortuosity": None, "length_mm": 50, "mean_width_mm": 1, "max_width_mm": 1.625}
    assert measurement_row(measurement_row(found)) == found | {"tortuosity": None}
