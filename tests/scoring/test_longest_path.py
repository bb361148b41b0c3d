"""The example of a reward of one's own in docs/examples: values worked out by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest

from vesselrl.scoring.rewards import SimpleDiceReward, import_function

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
TRUTH = np.zeros((20, 110), bool)
TRUTH[10, 5:105] = True


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import_function("longest_path:unbroken")
        yield sys.modules.pop("longest_path")


LOST = [
    ([], 0.0),
    ([(45, 55)], 2 * 0.45**2 - 1),  # a break in the middle
    ([(90, 100)], 0.9**2 - 1),  # an end: the same ten pixels cost a third
    ([(20, 30), (60, 70)], 0.2**2 + 2 * 0.3**2 - 1),
    ([(0, 100)], -1.0),
]


@pytest.mark.parametrize(("lost", "expected"), LOST)
def test_by_hand_on_a_bar(example, lost, expected):
    """Side branches and false alarms do not matter."""
    truth, pred = TRUTH.copy(), TRUTH.copy()
    truth[2:10, 65] = pred[15:] = True
    for start, end in lost:
        pred[:15, 5 + start : 5 + end] = False
    assert example.unbroken(pred, truth) == pytest.approx(expected)
    _, details = SimpleDiceReward(custom=example.unbroken, custom_weight=3)(pred, truth)
    assert details["custom_term"] == pytest.approx(3 * expected)
    assert example.unbroken(pred, truth & False) == 0.0  # nothing to break


def test_one_more_pixel_found_always_pays(example):
    pred, values = np.zeros_like(TRUTH), []
    for column in np.random.default_rng(0).permutation(np.arange(5, 105)):
        pred[10, column] = True
        values.append(example.unbroken(pred, TRUTH))
    assert (np.diff(values) > 0).all()
