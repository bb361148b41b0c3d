"""A reward of the user's own: added as one term, and every failure of it reported under its name."""

import functools
import math

import numpy as np
import pytest
import torch

from vesselrl.errors import RewardError
from vesselrl.scoring.rewards import MultiObjectiveReward, SimpleDiceReward, get_reward_function

REWARD_TYPES = ("multi_objective", "simple_dice", "recall_focused")

TREE = np.zeros((48, 64), bool)
TREE[20:24, 4:60] = TREE[24:44, 30:33] = True
WIDE = TREE | np.roll(TREE, 1, axis=0)
NOTHING = np.zeros_like(TREE)


def area_error(pred, gt):
    return -abs(int(pred.sum()) - int(gt.sum())) / gt.size


@pytest.mark.parametrize("reward_type", REWARD_TYPES)
def test_a_custom_function_is_one_more_term(reward_type):
    plain = get_reward_function(reward_type)
    mine = get_reward_function(reward_type, custom=area_error, custom_weight=40)
    pred = WIDE
    total, details = mine(pred, TREE)
    assert details["custom_term"] == pytest.approx(40 * area_error(pred, TREE))
    assert total == pytest.approx(plain(pred, TREE)[0] + details["custom_term"])
    assert mine.structure_terms(pred, TREE)["custom"] == details["custom_term"]


def test_a_custom_function_of_weight_0_is_shown_but_not_paid_for_and_asked_once() -> None:
    calls = []

    def counted(pred, gt):
        calls.append(1)
        return 7.0

    reward = SimpleDiceReward(custom=counted, custom_weight=0)
    total, details = reward(TREE, TREE)
    assert (total, details["custom_term"], details["custom_score"], len(calls)) == (10.0, 0.0, 7.0, 1)
    assert reward.structure_terms(TREE, TREE) == {"custom": 0.0}
    assert len(calls) == 1


@pytest.mark.parametrize("value", [1, 0.5, np.float32(2), np.array(3.0), torch.tensor(4.0)])
def test_a_custom_function_may_return_any_finite_number(value):
    reward = SimpleDiceReward(custom=lambda pred, gt: value)
    assert reward(TREE, TREE)[0] == pytest.approx(10 + float(value))


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.5", np.zeros(2), 1j])
def test_a_custom_function_that_returns_no_finite_number_is_named(value):
    def my_reward(pred, gt):
        return value

    with pytest.raises(RewardError, match="my_reward must return a finite number, got"):
        SimpleDiceReward(custom=my_reward)(TREE, TREE)


def test_a_custom_function_that_fails_is_named_and_its_error_kept():
    def my_reward(pred, gt):
        raise KeyError("branches")

    with pytest.raises(RewardError, match="my_reward failed with KeyError") as caught:
        SimpleDiceReward(custom=my_reward)(TREE, TREE)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RewardError, match="area_error"):
        SimpleDiceReward(custom=functools.partial(area_error, 1))(TREE, TREE)


def test_a_custom_function_cannot_change_the_masks():
    def greedy(pred, gt):
        pred[:] = gt
        return 0.0

    pred = NOTHING.copy()
    reward = MultiObjectiveReward(custom=greedy)
    assert reward(pred, TREE)[0] == MultiObjectiveReward()(pred, TREE)[0]
    assert not pred.any()
