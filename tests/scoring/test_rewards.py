"""The prototype's golden values, the ordering of the default reward, and the split into terms."""

import math

import cv2
import numpy as np
import pytest
import torch

from vesselrl.evaluation.evaluate import describe_reward
from vesselrl.scoring import rewards
from vesselrl.scoring.metrics import cldice
from vesselrl.scoring.rewards import (
    MultiObjectiveReward,
    RecallFocusedReward,
    SimpleDiceReward,
    get_reward_function,
)
from vesselrl.scoring.topology import prototype_topology, topology

REWARD_TYPES = ("multi_objective", "simple_dice", "recall_focused")


def draw_tree(seed, size=256, thinnest=3, thickest=9, num_branches=10):
    """A random branching tree from the top edge downwards, 6 to 13 % foreground at 256 px."""
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


def dilated(mask, size):
    return cv2.dilate(mask.astype(np.uint8), np.ones((size, size), np.uint8)) > 0


def eroded(mask, size):
    return cv2.erode(mask.astype(np.uint8), np.ones((size, size), np.uint8)) > 0


def from_best_to_worst(truth):
    return {
        "perfect": truth,
        "dilated 3x3": dilated(truth, 3),
        "eroded 3x3": eroded(truth, 3),
        "dilated 7x7": dilated(truth, 7),
        "empty": np.zeros_like(truth),
        "all foreground": np.ones_like(truth),
    }


TREE = draw_tree(0, size=128, thinnest=3, thickest=6, num_branches=6)
NOTHING = np.zeros_like(TREE)

# A plus sign with one arm cut, one arm end gone, and a false twig.
PLUS = np.zeros((40, 40), bool)
PLUS[18:23, 5:35] = PLUS[5:35, 18:23] = True
DAMAGED = PLUS.copy()
DAMAGED[18:23, 26:30] = DAMAGED[18:23, 12:14] = False
DAMAGED[2:4, 2:12] = True


# ---- spec "seed": the prototype ----


def test_seed_golden_values_of_perfect_and_empty():
    reward = MultiObjectiveReward(spec="seed")
    assert reward(TREE, TREE)[0] == pytest.approx(6.15, abs=1e-9)
    assert reward(NOTHING, TREE)[0] == pytest.approx(-4.90, abs=1e-9)
    assert reward(NOTHING, NOTHING)[0] == pytest.approx(-4.40, abs=1e-9)


def test_seed_equals_numbers_the_prototype_printed():
    """From the prototype's own code on these masks (it computes in float32)."""
    reward = MultiObjectiveReward(spec="seed")
    total, details = reward(DAMAGED, PLUS)
    assert total == pytest.approx(4.977946, abs=1e-5)
    assert details["dice"] == pytest.approx(0.9074074, abs=1e-6)
    assert details["recall"] == pytest.approx(0.8909091, abs=1e-6)
    assert details["precision"] == pytest.approx(0.9245283, abs=1e-6)
    assert details["topology_term"] == pytest.approx(0.2 * 2.0, abs=1e-6)
    assert details["length_term"] == pytest.approx(0, abs=1e-6)
    assert reward(dilated(PLUS, 7), PLUS)[0] == pytest.approx(4.056977, abs=1e-5)
    assert RecallFocusedReward(spec="seed")(DAMAGED, PLUS)[0] == pytest.approx(3.008586, abs=1e-5)


def test_seed_keeps_the_prototypes_faults():
    """Bloated beats thin, extra length costs without bound, a nearly empty mask loses the topology term."""
    reward = MultiObjectiveReward(spec="seed")
    thin_truth = draw_tree(0, thinnest=3, thickest=3)
    assert reward(dilated(thin_truth, 7), thin_truth)[0] > reward(eroded(thin_truth, 3), thin_truth)[0]
    grid = np.zeros_like(PLUS)
    grid[::3] = grid[:, ::3] = True
    short = np.zeros_like(PLUS)
    short[20, 18:24] = True
    assert reward.structure_terms(grid, short)["length"] < -20
    assert reward.structure_terms(short, PLUS)["topology"] == pytest.approx(-1)


def test_seed_does_not_mistake_a_guo_hall_topology_for_its_own():
    reward = MultiObjectiveReward(spec="seed")
    pred = dilated(TREE, 3)
    expected = reward(pred, TREE)
    assert reward(pred, TREE, topology(TREE)) == expected
    assert reward(pred, TREE, prototype_topology(TREE)) == expected


def test_seed_recall_focused_by_hand():
    """Dice 2/3, recall 1/2 and 1: 0.3·10·Dice + 0.7·{30 below, 10 above}·(R - 0.85)."""
    truth, reward = np.array([[1, 1, 0, 0]], bool), RecallFocusedReward(spec="seed")
    half, double = np.array([[1, 0, 0, 0]], bool), np.array([[1, 1, 1, 1]], bool)
    assert reward(half, truth)[0] == pytest.approx(3 * 2 / 3 + 0.7 * 30 * (0.5 - 0.85))
    assert reward(double, truth)[0] == pytest.approx(3 * 2 / 3 + 0.7 * 10 * (1 - 0.85))


# ---- spec "default": the repaired reward ----


@pytest.mark.parametrize("seed", range(12))
def test_default_orders_masks_as_a_reader_would(seed):
    truth = draw_tree(seed)
    scores = {
        name: MultiObjectiveReward()(mask, truth)[0] for name, mask in from_best_to_worst(truth).items()
    }
    steps = -np.diff(list(scores.values()))
    assert 0.05 < truth.mean() < 0.135
    assert steps.min() > 0.15, scores


@pytest.mark.parametrize("width", [3, 4, 5, 6, 7, 8, 9])
def test_default_ordering_at_every_width(width):
    truth = draw_tree(width, thinnest=width, thickest=width, num_branches=6)
    scores = {
        name: MultiObjectiveReward()(mask, truth)[0] for name, mask in from_best_to_worst(truth).items()
    }
    assert -np.diff(list(scores.values())).min() > 0.1, scores


def test_without_the_guard_the_ordering_is_lost():
    truth = draw_tree(1, thinnest=3, thickest=3)
    masks = from_best_to_worst(truth)
    unguarded = MultiObjectiveReward(precision_weight=0)
    assert unguarded(masks["dilated 7x7"], truth)[0] > unguarded(masks["eroded 3x3"], truth)[0]
    assert unguarded(masks["all foreground"], truth)[0] > unguarded(masks["empty"], truth)[0]


def test_default_by_hand_for_a_broken_line():
    """20 px, two lost in the middle: 2 pieces for 1, 4 ends for 2, length 18 for 20, clDice 2·1·0.9/1.9."""
    truth = np.zeros((9, 30), bool)
    truth[4, 5:25] = True
    pred = truth.copy()
    pred[4, 14:16] = False
    total, details = MultiObjectiveReward()(pred, truth)
    assert details["dice_term"] == pytest.approx(0.5 * 10 * 36 / 38)
    assert details["recall_term"] == pytest.approx(0.2 * 5 * 0.05)
    assert details["precision_term"] == 0
    assert details["topology_term"] == pytest.approx(0.2 * 5 * (0.4 * 2 / 3 + 0.4 + 0.2 * 3 / 5) * 18 / 19)
    assert details["length_term"] == pytest.approx(-0.1 * 5 * (1 - 18 / 19 * 0.9))
    assert total == pytest.approx(4.736842 + 0.05 + 0.745263 - 0.073684, abs=1e-5)


def test_default_guard_by_hand():
    """Precision 1/2 is 0.35 below the target of 0.85; twice the true area counts 4/5."""
    pred, truth = np.array([[1, 1, 1, 1]], bool), np.array([[1, 1, 0, 0]], bool)
    details = MultiObjectiveReward(precision_weight=0.6)(pred, truth)[1]
    assert details["precision_term"] == pytest.approx(-0.6 * 10 * 0.35 * 4 / 5)
    assert MultiObjectiveReward()(pred, pred)[1]["precision_term"] == 0


@pytest.mark.parametrize("reward_type", REWARD_TYPES)
def test_two_empty_masks_reach_the_maximum(reward_type):
    reward = get_reward_function(reward_type)
    best = {"multi_objective": 6.15, "simple_dice": 10.0, "recall_focused": 4.05}[reward_type]
    assert reward(NOTHING, NOTHING)[0] == pytest.approx(best)
    assert reward(TREE, TREE)[0] == pytest.approx(best)
    assert reward(TREE, NOTHING)[0] < best - 1


def test_default_terms_stay_in_their_bounds():
    rng = np.random.default_rng(0)
    grid = np.zeros_like(TREE)
    grid[::3] = grid[:, ::3] = True
    speck = np.zeros_like(TREE)
    speck[3, 3] = True
    noise = [rng.random(TREE.shape) < density for density in (0.001, 0.1, 0.5, 0.9)]
    masks = [TREE, NOTHING, ~NOTHING, grid, speck, *noise]
    bounds = {
        "dice": (0, 5),
        "recall": (-3.4, 0.15),
        "topology": (0, 1),
        "length": (-0.5, 0),
        "precision": (-6.375, 0),
    }
    for truth in masks:
        for pred in masks:
            total, details = MultiObjectiveReward()(pred, truth)
            for name, (low, high) in bounds.items():
                assert low - 1e-9 <= details[f"{name}_term"] <= high + 1e-9, name
            assert total <= 6.15 + 1e-9


def test_extra_junctions_cost_as_much_as_missing_ones():
    comb = np.zeros((40, 60), bool)
    comb[20, 5:55] = True
    full_comb = comb.copy()
    full_comb[5:20, 10:55:10] = True
    reward = MultiObjectiveReward()
    extra = reward.structure_terms(full_comb, comb)["topology"]
    missing = reward.structure_terms(comb, full_comb)["topology"]
    assert extra == pytest.approx(missing)
    assert extra < 0.65


def test_structure_pays_in_proportion_to_cldice():
    """Same counts and length as the truth, one of its two bars moved away: clDice 1/2 halves what it pays."""
    truth, pred = np.zeros((2, 60, 60), bool)
    truth[10, 5:45] = truth[30, 5:45] = True
    pred[10, 5:45] = pred[50, 5:45] = True
    assert cldice(pred, truth) == 0.5
    terms = MultiObjectiveReward().structure_terms(pred, truth)
    assert terms == {"topology": pytest.approx(0.5), "length": pytest.approx(-0.25)}


def test_a_result_tells_the_version_of_its_reward():
    described = describe_reward(MultiObjectiveReward())
    assert (described["spec"], described["spec_version"]) == ("default", 2)
    assert describe_reward(MultiObjectiveReward(spec="seed"))["spec_version"] == 1
    assert {described["spec_version"]} == {get_reward_function(name).spec_version for name in REWARD_TYPES}
    with pytest.raises(ValueError, match="unknown reward option: spec_version"):
        get_reward_function(spec_version=1)


# ---- the split into terms ----


def options_to_split():
    custom = {"custom": lambda pred, gt: float(pred.sum()) / 100, "custom_weight": 0.3}
    for reward_type in REWARD_TYPES:
        for spec in ("default", "seed"):
            yield reward_type, {"spec": spec}
            yield reward_type, {"spec": spec, **custom}


@pytest.mark.parametrize(("reward_type", "options"), list(options_to_split()))
def test_the_two_halves_add_up_to_the_call(reward_type, options):
    reward = get_reward_function(reward_type, **options)
    for truth in (TREE, NOTHING):
        for pred in (*from_best_to_worst(TREE).values(), np.roll(TREE, 9, axis=1)):
            tp, fp, fn = (pred & truth).sum(), (pred & ~truth).sum(), (~pred & truth).sum()
            overlap = {name: term.item() for name, term in reward.overlap_terms(tp, fp, fn).items()}
            structure = reward.structure_terms(pred, truth, topology(truth))
            total, details = reward(pred, truth)
            assert sum(overlap.values()) + sum(structure.values()) == pytest.approx(total, abs=1e-9)
            expected = {f"{name}_term": term for name, term in {**overlap, **structure}.items()}
            assert {name: details[name] for name in details if name.endswith("_term")} == pytest.approx(
                expected
            )


def expected_overlap(pred, truth, weight):
    """Dice, recall and guard of the default multi-objective reward, from sets of pixels."""
    p, t = set(map(tuple, np.argwhere(pred))), set(map(tuple, np.argwhere(truth)))
    dice = 2 * len(p & t) / (len(p) + len(t))
    recall, precision = len(p & t) / len(t), len(p & t) / len(p) if p else 1
    recall_term = (recall - 0.85) * (5 if recall >= 0.85 else 20)
    area_share = len(p) ** 2 / (len(p) ** 2 + len(t) ** 2)
    return 0.5 * 10 * dice + 0.2 * recall_term - weight * 10 * area_share * max(0, 0.85 - precision)


def test_arrays_of_counts_equal_flipping_every_pixel_by_hand():
    rng = np.random.default_rng(5)
    pred, truth = rng.random((7, 6)) < 0.4, rng.random((7, 6)) < 0.4
    reward = MultiObjectiveReward()
    tp, fp, fn = (float(np.sum(mask)) for mask in (pred & truth, pred & ~truth, ~pred & truth))
    # flipping on adds a pixel to tp or fp, flipping off takes it away
    change = np.where(pred, -1.0, 1.0)
    terms = reward.overlap_terms(tp + change * truth, fp + change * ~truth, fn - change * truth)
    total = sum(terms.values())
    assert total.shape == pred.shape
    for row, column in np.ndindex(pred.shape):
        flipped = pred.copy()
        flipped[row, column] ^= True
        expected = expected_overlap(flipped, truth, reward.precision_weight)
        assert total[row, column] == pytest.approx(expected, abs=1e-12)


def test_a_given_topology_changes_nothing_but_saves_a_measurement(monkeypatch):
    reward, pred = MultiObjectiveReward(), dilated(TREE, 3)
    expected, given = reward(pred, TREE), topology(TREE)
    measured = []
    monkeypatch.setattr(rewards, "topology", lambda mask: measured.append(mask) or topology(mask))
    assert reward(pred, TREE, given) == expected
    assert len(measured) == 1
    with pytest.raises(ValueError, match="the given topology has size"):
        reward(pred, TREE, topology(TREE[:50]))


def test_nothing_is_measured_where_no_weight_asks_for_it(monkeypatch):
    monkeypatch.setattr(rewards, "topology", None)
    reward = MultiObjectiveReward(topology_weight=0, length_weight=0)
    assert reward.structure_terms(TREE, TREE) == {"topology": 0.0, "length": 0.0}


# ---- contract ----


@pytest.mark.parametrize("spec", ["default", "seed"])
@pytest.mark.parametrize("reward_type", REWARD_TYPES)
def test_every_reward_returns_a_float_and_a_dict_of_floats(reward_type, spec):
    reward = get_reward_function(reward_type, spec=spec)
    for pred in (TREE, NOTHING, torch.from_numpy(dilated(TREE, 3)).float(), TREE.astype(np.uint8)):
        total, details = reward(pred, TREE)
        assert type(total) is float
        assert {"dice", "recall", "precision", "dice_term"} <= details.keys()
        assert all(type(value) is float and math.isfinite(value) for value in details.values())
        assert sum(value for name, value in details.items() if name.endswith("_term")) == pytest.approx(total)
    assert total == pytest.approx(reward(TREE, TREE)[0])


def test_simple_dice_reports_recall_and_precision():
    pred, truth = np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 1, 1]], bool)
    total, details = SimpleDiceReward()(pred, truth)
    assert total == pytest.approx(10 * 2 / 5)
    assert (details["recall"], details["precision"]) == pytest.approx((1 / 3, 1 / 2))
    assert SimpleDiceReward(spec="seed")(NOTHING, NOTHING)[0] == 0


def test_weights_are_normalised_and_positional_as_in_the_prototype():
    reward = MultiObjectiveReward(1, 1, 1, 1, 0.9)
    assert reward.weights == {"dice": 0.25, "recall": 0.25, "topology": 0.25, "length": 0.25}
    assert reward.recall_target == 0.9
    scaled, standard = MultiObjectiveReward(5, 2, 2, 1), MultiObjectiveReward()
    assert scaled(DAMAGED, PLUS)[0] == pytest.approx(standard(DAMAGED, PLUS)[0])


def test_one_set_of_options_serves_all_rewards():
    options = {
        "dice_weight": 0.5,
        "recall_weight": 0.2,
        "topology_weight": 0.2,
        "length_weight": 0.1,
        "recall_target": 0.8,
        "precision_target": 0.7,
        "precision_weight": 0.5,
        "spec": "seed",
        "custom": None,
        "custom_weight": 1.0,
    }
    multi, simple, recall_focused = (get_reward_function(name, **options) for name in REWARD_TYPES)
    assert (multi.recall_target, multi.precision_weight) == (0.8, 0.5)
    assert isinstance(simple, SimpleDiceReward)
    assert recall_focused.recall_target == 0.8
    assert recall_focused.recall_weight == 0.7  # its own, not the 0.2 meant for multi_objective


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: get_reward_function("dice"),
            "unknown reward_type 'dice'.*multi_objective, simple_dice, recall_focused",
        ),
        (lambda: get_reward_function(dice_wieght=1), "unknown reward option: dice_wieght.*dice_weight"),
        (lambda: MultiObjectiveReward(spec="v2"), "unknown reward spec 'v2'.*default, seed"),
        (lambda: MultiObjectiveReward(dice_weight=-0.1), "dice_weight must be at least 0, got -0.1"),
        (
            lambda: MultiObjectiveReward(length_weight=math.nan),
            "length_weight must be a finite number, got nan",
        ),
        (lambda: MultiObjectiveReward(0, 0, 0, 0), "dice_weight, .*length_weight are all 0"),
        (lambda: MultiObjectiveReward(recall_target=85), "recall_target must be between 0 and 1, got 85"),
        (lambda: RecallFocusedReward(precision_target=-1), "precision_target must be between 0 and 1"),
        (lambda: MultiObjectiveReward(precision_weight=-1), "precision_weight must be at least 0"),
        (lambda: SimpleDiceReward(custom="my.py"), "custom must be a function .* got 'my.py'"),
        (lambda: SimpleDiceReward(custom_weight="1"), "custom_weight must be a finite number, got '1'"),
    ],
)
def test_wrong_settings_are_refused_with_the_choices(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("reward_type", REWARD_TYPES)
def test_masks_are_checked(reward_type):
    reward = get_reward_function(reward_type)
    with pytest.raises(ValueError, match="differ in size"):
        reward(TREE, TREE[:, :-1])
    with pytest.raises(ValueError, match="holds values from 0 to 255"):
        reward(TREE, TREE.astype(np.uint8) * 255)
