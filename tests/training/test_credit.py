"""Credit assignment against brute force: flip one pixel or one region, score again."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from vesselrl.scoring.overlap import counts
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import MultiObjectiveReward, SimpleDiceReward, get_reward_function
from vesselrl.scoring.topology import topology
from vesselrl.training.credit import (
    ConstrainedReward,
    RolloutImage,
    assign_credit,
    choose_regions,
    overlap_credit,
)
from vesselrl.training.ppo import rollout_metrics

TRUTH = np.zeros((24, 24), bool)
TRUTH[10:13, 2:22] = TRUTH[3:12, 14:16] = True
GAP = np.zeros_like(TRUTH)
GAP[10:13, 6:9] = True
BROKEN = TRUTH & ~GAP
SPECK = np.zeros_like(TRUTH)
SPECK[20:22, 3:5] = True
PERFECT = 6.15  # the default reward of the truth


def noisy(seed: int) -> np.ndarray:
    return TRUTH ^ (np.random.default_rng(seed).random(TRUTH.shape) < 0.1)


def probability(greedy: np.ndarray, in_gap: float | None = None) -> np.ndarray:
    """So sure that no lower threshold shows anything else, except perhaps in the gap."""
    on = np.where(greedy, 0.95, 0.02).astype(np.float32)
    on[GAP] = on[GAP] if in_gap is None else in_gap
    return on


def credit_of(samples: np.ndarray, on: np.ndarray, reward, count: int, each=map, **post: float):
    """The credit, and its overlap and structure together."""
    samples, rng = samples.reshape(-1, *TRUTH.shape), np.random.default_rng(0)
    image = RolloutImage(samples, on, TRUTH, topology(TRUTH))
    result = assign_credit(image, reward, PostProcessing(**post), count, rng, each)
    return result, result.overlap + result.structure


@pytest.mark.parametrize("reward_type", ["multi_objective", "simple_dice", "recall_focused"])
@pytest.mark.parametrize("spec", ["default", "seed"])
def test_overlap_credit_is_exact(reward_type: str, spec: str) -> None:
    reward = get_reward_function(reward_type, spec=spec)

    def total(m: np.ndarray) -> float:
        return float(sum(reward.overlap_terms(*counts(m, TRUTH)[:3]).values()))

    for mask in (noisy(1), TRUTH, TRUTH & False):
        table = overlap_credit(reward, *counts(mask, TRUTH)[:3])
        for pixel in [(0, 0), (11, 5), (11, 20), (23, 23), (4, 14), (20, 3)]:
            on, off = mask.copy(), mask.copy()
            on[pixel], off[pixel] = True, False
            wanted = pytest.approx(total(on) - total(off), abs=1e-5)
            assert table[int(TRUTH[pixel]), int(mask[pixel])] == wanted


@pytest.mark.parametrize("reward_type", ["multi_objective", "simple_dice"])
def test_the_credit_of_a_region_adds_up_to_what_flipping_it_changes(reward_type: str) -> None:
    """A bar that closes a gap, and the smaller of the two components that it joins: R(with) - R(without)."""
    reward = get_reward_function(reward_type, custom=lambda pred, gt: float(pred.sum()) / 100)
    result, credit = credit_of(TRUTH, probability(BROKEN), reward, 9)
    in_threads = credit_of(TRUTH, probability(BROKEN), reward, 9, ThreadPoolExecutor(2).map)[1]
    assert np.array_equal(in_threads, credit)
    without = reward(BROKEN, TRUTH)[0]
    assert result.num_regions == 2
    assert credit[GAP].sum() == pytest.approx(reward(TRUTH, TRUTH)[0] - without, abs=1e-4)
    component = np.zeros_like(TRUTH)
    component[10:13, 2:6] = True
    worth = without - reward(BROKEN & ~component, TRUTH)[0]
    assert credit[component].sum() == pytest.approx(worth, abs=1e-4)
    # The user's term pays for every pixel; topology and length, where the reward has them, for much more.
    share = result.structure[GAP]
    assert (share > 0).all()
    assert (share > 0.011).all() == (reward_type == "multi_objective")


def test_region_credit_is_on_minus_off_whatever_the_greedy_mask_has() -> None:
    """A sample without a stretch that the greedy mask has, and a speck that no sample lacks."""
    result, _ = credit_of(BROKEN, probability(TRUTH), MultiObjectiveReward(), 4)
    assert result.num_regions == 1  # the tree itself is never flipped
    assert np.array_equal(result.structure > 0, GAP)
    result, _ = credit_of(TRUTH | SPECK, probability(TRUTH | SPECK), MultiObjectiveReward(), 4)
    assert result.num_regions == 1
    assert np.array_equal(result.structure < 0, SPECK)


@pytest.mark.parametrize("reward", [MultiObjectiveReward(), SimpleDiceReward()])
def test_a_bridge_earns_what_it_saves_from_removal(reward) -> None:
    """Components below 20 px are removed: the gap's 9 px bring back the 12 px behind it and earn them."""
    tree = PostProcessing(min_component_px=20).mask(probability(BROKEN))
    assert np.count_nonzero(BROKEN & ~tree) == 12
    # No sample closes the gap: a bridge does. The speck is removed before and after.
    greedy = BROKEN | SPECK
    result, credit = credit_of(greedy, probability(greedy, in_gap=0.3), reward, 9, min_component_px=20)
    # The bridge, once per level; the component that is removed anyway is not flipped.
    assert result.num_regions == 2
    wanted = reward(TRUTH, TRUTH)[0] - reward(tree, TRUTH)[0]
    assert credit[GAP].sum() == pytest.approx(wanted, abs=1e-4)
    assert result.greedy_reward == pytest.approx(reward(tree, TRUTH)[0], abs=1e-5)
    assert result.greedy_counts == counts(tree, TRUTH)[:3]
    # Pixels of the removed component keep their own credit, and it pays to put them back.
    assert (result.overlap[BROKEN & ~tree] > 0).all()
    assert not result.structure[greedy & ~tree].any()


@pytest.mark.parametrize(("close_gaps", "is_closed"), [(0.2, True), (0.4, False)])
def test_a_gap_that_is_closed_anyway_keeps_its_overlap_credit(close_gaps: float, is_closed: bool) -> None:
    """At 0.3 it is closed above 0.2 and left open above 0.4; only then a bridge earns the connection."""
    on = probability(BROKEN, in_gap=0.3)
    result, _ = credit_of(BROKEN, on, MultiObjectiveReward(), 9, close_gaps=close_gaps)
    assert (result.greedy_reward == pytest.approx(PERFECT, abs=1e-6)) == is_closed
    assert (result.structure[GAP] > 0).all() != is_closed
    assert result.structure[GAP].any() != is_closed
    assert (result.overlap[GAP] > 0).all()


def test_samples_are_scored_as_they_are_used_and_their_terms_add_up() -> None:
    """A speck of 4 px, off in the greedy mask, on in the sample: removed, it counts for nothing."""
    reward = MultiObjectiveReward()
    removed, _ = credit_of(TRUTH | SPECK, probability(TRUTH), reward, 9, min_component_px=20)
    assert removed.rewards == pytest.approx([PERFECT])
    assert removed.num_regions == 0
    assert not removed.structure.any()
    samples = np.stack([noisy(seed) for seed in range(3)])
    result, _ = credit_of(samples, probability(TRUTH), reward, 2)
    assert result.rewards == pytest.approx([reward(sample, TRUTH)[0] for sample in samples], abs=1e-6)
    assert sum(result.terms.values()) == pytest.approx(result.rewards)
    assert result.greedy_reward == pytest.approx(PERFECT, abs=1e-6)


def test_a_users_reward_earns_region_credit() -> None:
    """And its function is called, as docs/rewards.md promises, once per sample, greedy mask and region."""
    calls = []

    def corner(pred: np.ndarray, gt: np.ndarray) -> float:
        calls.append(1)
        return float(pred[:4, :4].all())

    sample = TRUTH.copy()
    sample[:4, :4] = True
    reward = SimpleDiceReward(custom=corner, custom_weight=2.0)
    result, credit = credit_of(sample, probability(TRUTH), reward, 4)
    assert len(calls) == 1 + 1 + result.num_regions == 3
    gained = reward(sample, TRUTH)[0] - reward(TRUTH, TRUTH)[0]
    assert 1 < gained < 2  # 2 for the corner, less what its 16 wrong pixels cost in Dice
    assert credit[:4, :4].sum() == pytest.approx(gained, abs=1e-4)
    assert np.count_nonzero(result.structure) == 16
    assert result.terms["custom"].tolist() == [2.0]


def chosen(samples: np.ndarray, greedy: np.ndarray, count: int, seed: int = 0, on: np.ndarray | None = None):
    on = greedy.astype(np.float32) if on is None else on
    return choose_regions(samples, greedy, on, count, np.random.default_rng(seed))


def test_regions_are_connected_and_shared_between_components_and_differences() -> None:
    greedy = np.zeros((20, 20), bool)
    greedy[0:10, 0:10] = True  # the tree: more than half of the mask
    greedy[15, 15] = greedy[16, 16] = True  # 8-connected pair
    greedy[19, 0] = True
    sample = greedy.copy()
    sample[12, 2:6] = sample[5, 12] = True
    assert sorted(int(region.sum()) for region in chosen(sample[None], greedy, 9)) == [1, 1, 2, 4]
    pairs = [chosen(sample[None], greedy, 2, seed) for seed in range(20)]
    assert all([bool(greedy[region].all()) for region in pair] == [True, False] for pair in pairs)
    assert len(chosen(greedy[None], greedy, 2)) == 2  # no differences
    assert chosen(sample[None], greedy, 0) == []
    assert chosen(np.zeros((1, 3, 3), bool), np.zeros((3, 3), bool), 5) == []


def test_bridges_cross_gaps_as_wide_as_the_low_threshold_mask_and_come_first_up_to_half() -> None:
    """A bar 5 px wide with a faint stretch of 6 px, and faint rims all along."""
    on = np.full((40, 60), 0.01, np.float32)
    on[17:24, 5:55] = 0.3  # 7 px wide at a low threshold
    on[18:23, 5:25] = on[18:23, 31:55] = 0.9
    greedy = on > 0.5
    sample = greedy.copy()
    sample[2, 2:6] = sample[35, 8] = True
    bridge, other, *rest = chosen(sample[None], greedy, 4, on=on)
    assert np.array_equal(bridge, other)  # the same one at both levels: 0.3 lies above 0.1 and 0.25
    assert bridge[17:24, 26:30].all()  # the whole gap but for its ends, with the rims
    assert not bridge[:, :22].any()
    assert not bridge[:, 34:].any()
    joined = [cv2.connectedComponents(m.astype(np.uint8))[0] - 1 for m in (greedy, greedy | bridge)]
    assert joined == [2, 1]
    assert [bool(greedy[region].any()) for region in rest] == [True, False]
    assert [bool(region[20, 28]) for region in chosen(sample[None], greedy, 2, on=on)] == [True, False]
    assert len(chosen(sample[None], greedy, 20, on=on)) == 2 + 1 + 2  # bridges, the smaller part, two bumps
    on[18:23, 25:31] = 0.9
    assert chosen(on[None] > 0.5, on > 0.5, 4, on=on) == []  # a lower threshold only widens


def test_constrained_overlap_is_dice_and_multiplier_times_score_above_the_bound() -> None:
    one = ConstrainedReward(MultiObjectiveReward(), {"recall": 0.8, "precision": 0.7})
    one.multipliers["precision"] = 2.0
    terms = one.overlap_terms(np.array([60.0]), np.array([20.0]), np.array([40.0]))
    assert terms == {
        "dice": pytest.approx(5 * 120 / 180),
        "recall_floor": 0.0,  # a constraint without a multiplier
        "precision_floor": pytest.approx(2.0 * (0.75 - 0.7)),
    }
    structure = one.structure_terms(BROKEN, TRUTH, topology(TRUTH))
    assert structure == MultiObjectiveReward().structure_terms(BROKEN, TRUTH)


# ---- A user's function that fails


@pytest.mark.parametrize("constrained", [False, True])
def test_where_a_users_function_fails_no_mask_of_the_image_has_its_term(constrained) -> None:
    """The credit is that of the reward without the function, with the same regions; the next image has it."""

    def custom(pred: np.ndarray, gt: np.ndarray) -> float:
        calls.append(1)
        if len(calls) == 5:
            raise OSError("gone")
        return float(pred.mean())

    calls: list[int] = []
    image = noisy(1), probability(noisy(2))
    plain, own = MultiObjectiveReward(), MultiObjectiveReward(custom=custom)
    if constrained:
        plain, own = (ConstrainedReward(one, {"recall": 0.9}, {"recall": 3.0}) for one in (plain, own))
    failed, expected = credit_of(*image, own, 8)[0], credit_of(*image, plain, 8)[0]
    assert len(calls) == 5
    assert failed.num_regions == expected.num_regions > 3
    for name in ("overlap", "structure", "rewards"):
        assert np.array_equal(getattr(failed, name), getattr(expected, name))
    assert "custom" not in failed.terms
    following, _ = credit_of(*image, own, 8)
    assert "custom" in following.terms
    metrics = rollout_metrics([failed, following])
    assert metrics["train/reward/custom"] == following.terms["custom"].mean()
