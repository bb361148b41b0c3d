"""The example of a reward of one's own in docs/examples: values worked out by hand."""

from pathlib import Path

import numpy as np
import pytest

from vesselrl.scoring.rewards import SimpleDiceReward, import_function

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
LOST = [
    ([], 0.0),
    ([(45, 55)], 2 * 0.45**2 - 1),  # a break in the middle
    ([(90, 100)], 0.9**2 - 1),  # an end: the same ten pixels cost a third
    ([(20, 30), (60, 70)], 0.2**2 + 2 * 0.3**2 - 1),
]


@pytest.mark.parametrize(("lost", "expected"), LOST)
def test_by_hand_on_a_bar(monkeypatch, lost, expected):
    """Side branches and false alarms do not matter."""
    monkeypatch.syspath_prepend(EXAMPLES)
    unbroken = import_function("longest_path:unbroken")
    truth, pred = np.zeros((2, 20, 110), bool)
    truth[10, 5:105] = pred[10, 5:105] = truth[2:10, 65] = pred[15:] = True
    for start, end in lost:
        pred[:15, 5 + start : 5 + end] = False
    assert unbroken(pred, truth) == pytest.approx(expected)
    _, details = SimpleDiceReward(custom=unbroken, custom_weight=3)(pred, truth)
    assert details["custom_term"] == pytest.approx(3 * expected)
    assert unbroken(pred, truth & False) == 0.0  # nothing to break
