"""Difficulty: what is measured on a truth, how it is ranked, and which samples an epoch may use."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vesselrl.data.dataset import Measures, measure, open_samples, rate_difficulty

Y, X = np.mgrid[:512, :512].astype(float)


def shaded(mask):
    return np.repeat(np.where(mask, 60, 100).astype(np.uint8)[:, :, None], 3, axis=2)


def line(angle_deg, width):  # of 300 px through the centre
    cosine, sine = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    along, across = cosine * (X - 256) + sine * (Y - 256), -sine * (X - 256) + cosine * (Y - 256)
    return (np.abs(across) < width / 2) & (np.abs(along) < 150)


@pytest.mark.parametrize("width", [3, 7, 15])
def test_a_straight_vessel(width):
    """Its width is found to about a pixel, and it is straight in every direction, staircase or not."""
    for angle in (0, 10, 22.5, 33, 45, 90, 120):
        mask = line(angle, width)
        found = measure(shaded(mask), mask)
        assert found.width_px == pytest.approx(width, abs=1.2)
        assert found.tortuosity == pytest.approx(1, abs=0.015)
        assert found.contrast == pytest.approx(40 / 255, abs=1e-4)


RADIUS = np.hypot(X - 256, Y - 256)
HALF_CIRCLE = (np.abs(RADIUS - 100) < 2.5) & (Y > 256)
RING = np.abs(RADIUS - 100) < 2.5


@pytest.mark.parametrize(
    ("mask", "expected"), [(HALF_CIRCLE, math.pi / 2), (RING, math.pi / 2), (line(20, 5) | line(100, 5), 1)]
)
def test_arc_over_chord_of_known_curves(mask, expected):
    found = measure(shaded(mask), mask)
    assert found.tortuosity == pytest.approx(expected, rel=0.04)
    big = np.kron(mask, np.ones((2, 2), bool))  # the same at twice the size
    twice = measure(shaded(big), big)
    assert twice.width_px == pytest.approx(found.width_px, abs=0.6)
    assert twice[1:] == pytest.approx(found[1:], rel=0.02)


def test_odd_masks_do_no_harm():
    for shape in ((1, 1), (1, 40), (3, 3), (64, 48)):
        one_pixel = np.zeros(shape, bool)
        assert measure(shaded(one_pixel), one_pixel) == Measures()
        one_pixel[-1, -1] = True
        noise = np.random.default_rng(0).random(shape) < 0.5
        for mask in (np.ones(shape, bool), one_pixel, one_pixel | noise):
            found = measure(shaded(mask), mask)
            assert found.width_px > 0
            assert 0 <= found.contrast <= 1 <= found.tortuosity < 10


def test_ranks_by_hand():
    """Contrast counts half, width and tortuosity a quarter each; ties share a rank; no vessels: 1."""
    samples = [
        Measures(8, 0.40, 1.1),  # easiest of the four in all
        Measures(4, 0.20, 1.3),  # thinness 2/3, faintness 2/3, tortuosity shared between 2/3 and 1
        Measures(2, 0.30, 1.2),  # thinness 1, faintness 1/3, tortuosity 1/3
        Measures(6, 0.10, 1.3),  # thinness 1/3, faintness 1, tortuosity as the second
        Measures(),
    ]
    expected = [0, (4 / 3 + 2 / 3 + 5 / 6) / 4, (2 / 3 + 1 + 1 / 3) / 4, (2 + 1 / 3 + 5 / 6) / 4, 1]
    assert rate_difficulty(samples) == pytest.approx(expected, abs=1e-5)
    for few, ratings in (([], []), ([4], [1]), ([0], [0]), ([0, 0, 0], [0.5, 0.5, 0.5])):
        assert rate_difficulty([samples[place] for place in few]) == ratings


@given(difficulties=st.lists(st.floats(0, 1), max_size=40), num_epochs=st.integers(1, 12))
def test_any_schedule(difficulties, num_epochs):
    """Never empty, never closing again, nothing easier left out, all open in the second half."""
    with pytest.raises(ValueError, match=r"epoch is 0\. Epochs are counted from 1\."):
        open_samples(difficulties, 0, num_epochs)
    before = set()
    for epoch in range(1, num_epochs + 1):
        indices = open_samples(difficulties, epoch, num_epochs)
        assert indices == sorted(set(indices))
        assert before <= set(indices)
        assert bool(indices) == bool(difficulties)
        closed = [difficulties[index] for index in set(range(len(difficulties))) - set(indices)]
        assert not closed or max(difficulties[index] for index in indices) <= min(closed)
        assert epoch <= num_epochs // 2 or not closed
        before = set(indices)
