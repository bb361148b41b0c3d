"""The prototype's golden values, the order of the default reward, the split into terms, custom functions."""

import functools
import math
import sys
import threading

import cv2
import numpy as np
import pytest
import torch

from vesselrl.errors import RewardError
from vesselrl.scoring import rewards
from vesselrl.scoring.rewards import (
    MultiObjectiveReward,
    RecallFocusedReward,
    SimpleDiceReward,
    score_or_skip,
)
from vesselrl.scoring.scores import Truth, score_mask
from vesselrl.scoring.topology import prototype_topology, topology

REWARD_TYPES = ("multi_objective", "simple_dice", "recall_focused")


def draw_tree(seed, size=256, thinnest=3, thickest=9, num_branches=10):
    """A random branching tree from the top edge downwards."""
    rng = np.random.default_rng(seed)
    canvas = np.zeros((size, size), np.uint8)
    places = [(size / 2, 0.0, np.pi / 2, thickest)]
    for branch in range(num_branches):
        x, y, angle, width = places[rng.integers(len(places))]
        if branch > 0:
            angle += rng.choice([-1, 1]) * rng.uniform(0.4, 1.1)
            width = max(thinnest, width - 2)
        for _ in range(size // 10 if branch > 0 else size // 5):
            end = x + 4 * np.cos(angle), y + 4 * np.sin(angle)
            cv2.line(canvas, (int(x), int(y)), (int(end[0]), int(end[1])), 1, width)
            x, y = end
            angle += rng.normal() * 0.12
            places.append((x, y, angle, width))
    return canvas.astype(bool)


def from_best_to_worst(truth):
    """Perfect, dilated 3x3, eroded 3x3, dilated 7x7, empty, all foreground."""
    image, squares = truth.astype(np.uint8), [np.ones((size, size), np.uint8) for size in (3, 7)]
    dilated_3, dilated_7 = (cv2.dilate(image, square) > 0 for square in squares)
    return [truth, dilated_3, cv2.erode(image, squares[0]) > 0, dilated_7, truth & False, truth | True]


TREE = draw_tree(0, size=128, thinnest=3, thickest=6, num_branches=6)
NOTHING = np.zeros_like(TREE)

# A plus sign with one arm cut, one arm end gone, and a false twig.
PLUS = np.zeros((40, 40), bool)
PLUS[18:23, 5:35] = PLUS[5:35, 18:23] = True
DAMAGED = PLUS.copy()
DAMAGED[18:23, 26:30] = DAMAGED[18:23, 12:14] = False
DAMAGED[2:4, 2:12] = True


def test_seed_equals_numbers_the_prototype_printed():
    """From the prototype's own code on these masks (it computes in float32)."""
    reward = MultiObjectiveReward(spec="seed")
    assert reward(TREE, TREE)[0] == pytest.approx(6.15, abs=1e-9)
    assert reward(NOTHING, TREE)[0] == pytest.approx(-4.90, abs=1e-9)
    assert reward(NOTHING, NOTHING)[0] == pytest.approx(-4.40, abs=1e-9)
    total, details = reward(DAMAGED, PLUS)
    assert total == pytest.approx(4.977946, abs=1e-5)
    scores = [details[name] for name in ("dice", "recall", "precision", "topology_term", "length_term")]
    assert scores == pytest.approx([0.9074074, 0.8909091, 0.9245283, 0.2 * 2.0, 0], abs=1e-6)
    assert reward(from_best_to_worst(PLUS)[3], PLUS)[0] == pytest.approx(4.056977, abs=1e-5)
    assert RecallFocusedReward(spec="seed")(DAMAGED, PLUS)[0] == pytest.approx(3.008586, abs=1e-5)
    assert SimpleDiceReward(spec="seed")(NOTHING, NOTHING)[0] == 0


@pytest.mark.parametrize(("spec", "guard"), [("seed", 0), ("default", 0.75 * 10 * 0.8 * 0.35)])
def test_recall_focused_by_hand(spec, guard):
    """Dice 2/3, recall 1/2 and 1: 0.3·10·Dice + 0.7·{30 below, 10 above}·(R - 0.85); guard of A 2, P 1/2."""
    truth, reward = np.array([[1, 1, 0, 0]]), RecallFocusedReward(spec=spec)
    assert reward([[1, 0, 0, 0]], truth)[0] == pytest.approx(3 * 2 / 3 + 0.7 * 30 * (0.5 - 0.85))
    assert reward(truth | 1, truth)[0] == pytest.approx(3 * 2 / 3 + 0.7 * 10 * (1 - 0.85) - guard)


TREES = [{"seed": seed} for seed in range(12)]
TREES += [{"seed": w, "thinnest": w, "thickest": w, "num_branches": 6} for w in range(3, 10)]


@pytest.mark.parametrize("tree", TREES)
def test_default_orders_masks_as_a_reader_would(tree):
    truth = draw_tree(**tree)
    totals = [MultiObjectiveReward()(mask, truth)[0] for mask in from_best_to_worst(truth)]
    assert -np.diff(totals).min() > (0.1 if "thinnest" in tree else 0.15), totals


def test_default_by_hand_for_a_broken_line():
    """20 px, two lost in the middle: 2 components for 1, 4 ends for 2, length 18 for 20, clDice 2·0.9/1.9."""
    truth = np.zeros((9, 30), bool)
    truth[4, 5:25] = True
    pred = truth.copy()
    pred[4, 14:16] = False
    total, details = MultiObjectiveReward()(pred, truth)
    expected = {"dice_term": 0.5 * 10 * 36 / 38, "recall_term": 0.2 * 5 * 0.05, "precision_term": 0}
    expected["topology_term"] = 0.2 * 5 * (0.4 * 2 / 3 + 0.4 + 0.2 * 3 / 5) * 18 / 19
    expected["length_term"] = -0.1 * 5 * (1 - 18 / 19 * 0.9)
    assert {name: details[name] for name in expected} == pytest.approx(expected)
    assert total == pytest.approx(4.736842 + 0.05 + 0.745263 - 0.073684, abs=1e-5)


def test_structure_pays_in_proportion_to_cldice():
    """Same counts and length as the truth, one of its two bars moved away: clDice 1/2 halves what it pays."""
    truth, pred = np.zeros((2, 60, 60), bool)
    truth[[10, 30], 5:45] = pred[[10, 50], 5:45] = True
    assert score_mask(pred, Truth(truth))["cldice"] == 0.5
    terms = MultiObjectiveReward().structure_terms(pred, truth)
    assert terms == {"topology": pytest.approx(0.5), "length": pytest.approx(-0.25)}


def area_error(pred, gt):
    value = -abs(int(pred.sum()) - int(gt.sum())) / gt.size
    pred[:] = gt  # it works on copies
    return value


@pytest.mark.parametrize("custom", [{}, {"custom": area_error, "custom_weight": 40}])
@pytest.mark.parametrize("spec", ["default", "seed"])
@pytest.mark.parametrize("reward_type", REWARD_TYPES)
def test_the_two_halves_add_up_to_the_call(reward_type, spec, custom):
    reward = rewards.get_reward_function(reward_type, spec=spec, **custom)
    for truth in (TREE, NOTHING):
        for pred in (*from_best_to_worst(TREE), np.roll(TREE, 9, axis=1)):
            tp, fp, fn = (pred & truth).sum(), (pred & ~truth).sum(), (~pred & truth).sum()
            halves = reward.overlap_terms(tp, fp, fn) | reward.structure_terms(pred, truth, topology(truth))
            total, details = reward(pred, truth)
            assert sum(halves.values()) == pytest.approx(total, abs=1e-9)
            terms = {name: value for name, value in details.items() if name.endswith("_term")}
            assert terms == pytest.approx({f"{name}_term": float(term) for name, term in halves.items()})
            assert {type(value) for value in (total, *details.values())} == {float}
            assert all(map(math.isfinite, details.values()))
            if custom:
                assert details["custom_term"] == pytest.approx(40 * area_error(pred.copy(), truth))


def test_arrays_of_counts_equal_flipping_every_pixel_by_hand():
    rng = np.random.default_rng(5)
    pred, truth = rng.random((7, 6)) < 0.4, rng.random((7, 6)) < 0.4
    tp, fp, fn = (float(np.sum(mask)) for mask in (pred & truth, pred & ~truth, ~pred & truth))
    # flipping on adds a pixel to tp or fp, flipping off takes it away
    change = np.where(pred, -1.0, 1.0)
    flipped = tp + change * truth, fp + change * ~truth, fn - change * truth
    terms = MultiObjectiveReward().overlap_terms(*flipped)
    total, t = sum(terms.values()), set(map(tuple, np.argwhere(truth)))
    assert total.shape == pred.shape
    for pixel in np.ndindex(pred.shape):
        p = set(map(tuple, np.argwhere(pred))) ^ {pixel}
        recall, precision = len(p & t) / len(t), len(p & t) / len(p)
        expected = 0.5 * 10 * 2 * len(p & t) / (len(p) + len(t))
        expected += 0.2 * (recall - 0.85) * (5 if recall >= 0.85 else 20)
        expected -= 0.75 * 10 * len(p) ** 2 / (len(p) ** 2 + len(t) ** 2) * max(0, 0.85 - precision)
        assert total[pixel] == pytest.approx(expected, abs=1e-12)


def test_weights_are_normalised_and_the_settings_of_a_run_make_any_reward():
    assert {*MultiObjectiveReward(1, 1, 1, 1).weights.values()} == {0.25}
    settings = {"recall_weight": 0.2, "recall_target": 0.8, "precision_weight": 0.5, "reward_spec": "seed",
                "reward_fn": "math:dist", "reward_fn_weight": 3.0, "epochs": 7}  # fmt: skip
    made = (rewards.make_reward(settings | {"reward_type": name}) for name in REWARD_TYPES)
    multi, simple, recall_focused = made
    assert (multi.recall_target, multi.precision_weight, multi.custom_weight) == (0.8, 0.5, 3.0)
    assert (simple.spec, simple.spec_version, simple.custom) == ("seed", 1, math.dist)
    assert recall_focused.recall_target == 0.8
    assert recall_focused.recall_weight == 0.7  # its own, not the 0.2 meant for multi_objective
    assert rewards.make_reward({}) == MultiObjectiveReward()


ZHANG = prototype_topology(TREE)
WRONG = [
    (lambda: rewards.get_reward_function(dice_wieght=1), "unknown reward option: dice_wieght.*dice_weight"),
    (lambda: MultiObjectiveReward(dice_weight=-0.1), "dice_weight must be at least 0, got -0.1"),
    (lambda: MultiObjectiveReward(length_weight=math.nan), "length_weight must be a finite number"),
    (lambda: RecallFocusedReward(precision_target=-1), "precision_target must be between 0 and 1"),
    (lambda: SimpleDiceReward(custom="my.py"), "custom must be a function .* got 'my.py'"),
    (lambda: SimpleDiceReward()(TREE, TREE[:, :-1]), "differ in size"),
    (lambda: SimpleDiceReward()(TREE, TREE * np.uint8(255)), "holds values from 0 to 255"),
    (lambda: MultiObjectiveReward()(TREE, TREE, topology(TREE[:50])), "the given topology has size"),
    (lambda: MultiObjectiveReward()(TREE, TREE, ZHANG), "'zhang' thinning, not 'guo_hall'"),
]


def test_wrong_settings_and_masks_are_refused():
    for make, message in WRONG:
        with pytest.raises(ValueError, match=message):
            make()


def test_a_custom_function_returns_any_finite_number_or_is_named_with_its_error():
    calls = []
    reward = SimpleDiceReward(custom=lambda pred, gt: calls.append(1) or 7.0, custom_weight=0)
    total, details = reward(TREE, TREE)
    assert reward.structure_terms(TREE, TREE) == {"custom": 0.0}  # shown, not paid for, asked once
    assert (total, details["custom_term"], details["custom_score"], len(calls)) == (10.0, 0.0, 7.0, 1)
    for value in (1, np.float32(1), np.array(1.0), torch.tensor(1.0)):
        assert SimpleDiceReward(custom=lambda *masks, value=value: value)(TREE, TREE)[0] == 11
    for value in (math.nan, math.inf, -1e31, None, "0.5", np.zeros(2), 1j):
        with pytest.raises(RewardError, match="<lambda> must return a finite number, got"):
            SimpleDiceReward(custom=lambda pred, gt, value=value: value)(TREE, TREE)
    with pytest.raises(RewardError, match=r"area_error.* failed with TypeError") as caught:
        SimpleDiceReward(custom=functools.partial(area_error, 1))(TREE, TREE)
    assert isinstance(caught.value.__cause__, TypeError)


class Unsure:
    """Fails in another way in every `period`-th call."""

    __qualname__ = "unsure"

    def __init__(self, period: int) -> None:
        self.period, self.num_calls = period, 0

    def __call__(self, pred: np.ndarray, gt: np.ndarray) -> float:
        self.num_calls += 1
        if self.num_calls % self.period:
            return 1.0
        if self.num_calls % 3 == 0:
            sys.exit("gone")
        return math.nan if self.num_calls % 2 else 1 / 0


def test_a_custom_function_may_fail_in_a_twentieth_of_its_calls_and_no_more():
    """One in 21 is skipped, for good; of one in 19 the sixth failure is the end."""
    reward = SimpleDiceReward(custom=Unsure(21))
    totals = [score_or_skip(reward, TREE, TREE)[0] for _ in range(840)]
    assert [total for total in totals if total != 11] == pytest.approx([math.nan] * 40, nan_ok=True)
    assert (reward.calls.num_calls, reward.calls.num_failed) == (840, 40)
    reward = SimpleDiceReward(custom=Unsure(19))
    with pytest.raises(RewardError, match=r"unsure .* 6 of 114 calls so far, more than 5% of the calls"):
        [score_or_skip(reward, TREE, TREE) for _ in range(200)]
    assert reward.calls.num_calls == 114


def test_a_custom_function_that_hangs_is_named_and_never_waited_for_again(monkeypatch):
    def endless(pred: np.ndarray, gt: np.ndarray) -> float:
        forever.wait()
        return 1.0

    forever = threading.Event()
    monkeypatch.setattr(rewards, "CALL_LIMIT_S", 0.05)
    reward = SimpleDiceReward(custom=endless)
    for _ in range(2):
        with pytest.raises(RewardError, match=r"endless has not returned within"):
            score_or_skip(reward, TREE, TREE)
        monkeypatch.setattr(rewards, "CALL_LIMIT_S", 1e6)
    forever.set()
