"""Credit assignment against brute force: flip one pixel or one region, score again."""

import numpy as np
import pytest

from vesselrl.scoring.rewards import MultiObjectiveReward, SimpleDiceReward, get_reward_function
from vesselrl.scoring.topology import topology
from vesselrl.training.credit import (
    against_others,
    assign_credit,
    choose_regions,
    on_minus_off,
    overlap_counts,
    overlap_credit,
    spread,
)

EVEN = np.ones((24, 24), np.float32)  # every pixel is undecided


@pytest.fixture
def truth() -> np.ndarray:
    mask = np.zeros((24, 24), bool)
    mask[10:13, 2:22] = True
    mask[3:12, 14:16] = True
    return mask


def noisy(truth: np.ndarray, seed: int, share: float = 0.1) -> np.ndarray:
    return truth ^ (np.random.default_rng(seed).random(truth.shape) < share)


@pytest.mark.parametrize("reward_type", ["multi_objective", "simple_dice", "recall_focused"])
@pytest.mark.parametrize("spec", ["default", "seed"])
def test_overlap_credit_is_exact(truth: np.ndarray, reward_type: str, spec: str) -> None:
    reward = get_reward_function(reward_type, spec=spec)
    mask = noisy(truth, 1)
    table = overlap_credit(reward, *overlap_counts(mask, truth))

    def total(m: np.ndarray) -> float:
        return float(sum(reward.overlap_terms(*overlap_counts(m, truth)).values()))

    for i, j in [(0, 0), (11, 5), (11, 20), (23, 23), (4, 14), (20, 3)]:
        on, off = mask.copy(), mask.copy()
        on[i, j], off[i, j] = True, False
        assert table[int(truth[i, j]), int(mask[i, j])] == pytest.approx(total(on) - total(off), abs=1e-5)


def test_signs_for_dice(truth: np.ndarray) -> None:
    """A vessel pixel earns by being on, a background pixel by being off."""
    table = overlap_credit(SimpleDiceReward(), *overlap_counts(noisy(truth, 2), truth))
    assert (table[1] > 0).all()
    assert (table[0] < 0).all()


def test_overlap_credit_of_empty_and_perfect_masks(truth: np.ndarray) -> None:
    for mask in (np.zeros_like(truth), truth):
        assert np.isfinite(overlap_credit(MultiObjectiveReward(), *overlap_counts(mask, truth))).all()


def gap(truth: np.ndarray) -> np.ndarray:
    mask = np.zeros_like(truth)
    mask[10:13, 6:9] = True
    return mask


def test_region_credit_is_the_change_of_the_whole_region(truth: np.ndarray) -> None:
    """A bar that closes a gap: its pixels share R(with) - R(without) of the structure terms."""
    reward = MultiObjectiveReward()
    greedy = truth & ~gap(truth)
    wanted = sum(reward.structure_terms(truth, truth).values()) - sum(
        reward.structure_terms(greedy, truth).values()
    )
    assert wanted > 0
    result = assign_credit(
        truth[None], greedy, truth, topology(truth), reward, EVEN, 9, np.random.default_rng(0)
    )
    assert result.num_regions == 2  # the gap, and the smaller of the two pieces
    assert result.structure[gap(truth)] == pytest.approx(wanted, abs=1e-5)


def test_region_credit_of_a_lost_piece_is_on_minus_off(truth: np.ndarray) -> None:
    """The sample drops a piece that the greedy mask has; the credit still says what being ON is worth."""
    sample = truth & ~gap(truth)
    result = assign_credit(
        sample[None], truth, truth, topology(truth), MultiObjectiveReward(), EVEN, 4, np.random.default_rng(0)
    )
    assert result.num_regions == 1  # the tree itself is never flipped
    assert np.array_equal(result.structure > 0, gap(truth))


def test_a_speck_of_the_greedy_mask_is_tried_without_it(truth: np.ndarray) -> None:
    """No sample differs, yet the speck is found: R(on) - R(off) < 0."""
    greedy = truth.copy()
    greedy[20:22, 3:5] = True
    reward = MultiObjectiveReward()
    result = assign_credit(
        greedy[None], greedy, truth, topology(truth), reward, EVEN, 4, np.random.default_rng(0)
    )
    assert result.num_regions == 1
    assert np.array_equal(result.structure < 0, greedy & ~truth)


def test_regions_are_measured_against_the_others_of_their_kind() -> None:
    """By hand: additions 6, 1 and 2 of mass 1, 1 and 3; the means of the others are 7/4, 3 and 7/2."""
    gains, additions = np.array([6.0, 1.0, 2.0, 5.0]), np.array([True, True, True, False])
    masses = np.array([1.0, 1.0, 3.0, 2.0])
    result = against_others(gains, additions, masses)
    assert result == pytest.approx([4.25, -2.0, -1.5, 5.0])  # the lone removal keeps its gain
    assert against_others(gains[:0], additions[:0], masses[:0]).shape == (0,)


def test_gains_are_on_minus_off() -> None:
    """Score by area: flipping a region that is on loses its area, so being on is worth it either way."""
    greedy = np.zeros((2, 4), bool)
    greedy[:, :2] = True
    flipped = [{"area": float((greedy ^ region).sum()), "custom": 1.0} for region in (greedy, ~greedy)]
    present = {"area": float(greedy.sum()), "custom": 1.0}
    gains = on_minus_off(present, flipped, np.array([False, True]))
    assert gains.tolist() == [[4.0, 0.0], [4.0, 0.0]]


def test_regions_that_overlap_share_their_mean() -> None:
    left, both = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    left[:, :1], both[:, :2] = True, True
    credit = spread([left, both], np.array([6.0, 1.0]), (2, 4))
    assert credit.tolist() == [[3.5, 1.0, 0.0, 0.0]] * 2


def test_rewards_and_terms_add_up(truth: np.ndarray) -> None:
    reward = MultiObjectiveReward()
    samples = np.stack([noisy(truth, seed) for seed in range(3)])
    result = assign_credit(samples, truth, truth, topology(truth), reward, EVEN, 2, np.random.default_rng(0))
    for k, sample in enumerate(samples):
        assert result.rewards[k] == pytest.approx(reward(sample, truth)[0], abs=1e-6)
        assert sum(values[k] for values in result.terms.values()) == pytest.approx(result.rewards[k])
    assert result.greedy_reward == pytest.approx(6.15, abs=1e-6)


def test_a_users_reward_earns_region_credit(truth: np.ndarray) -> None:
    def corner(pred: np.ndarray, gt: np.ndarray) -> float:
        return float(pred[:4, :4].all())

    sample = truth.copy()
    sample[:4, :4] = True
    reward = SimpleDiceReward(custom=corner, custom_weight=2.0)
    result = assign_credit(
        sample[None], truth, truth, topology(truth), reward, EVEN, 4, np.random.default_rng(0)
    )
    assert result.custom[1, 1] == pytest.approx(2.0)
    assert not result.structure.any()
    assert result.terms["custom"].tolist() == [2.0]


def test_structure_is_scored_once_per_mask_and_once_per_region(truth: np.ndarray) -> None:
    """As docs/rewards.md promises to whoever brings a slow function: drawn masks, greedy mask, regions."""
    calls = []

    def counted(pred: np.ndarray, gt: np.ndarray) -> float:
        calls.append(1)
        return 0.0

    reward = SimpleDiceReward(custom=counted)
    masks = np.stack([noisy(truth, seed) for seed in range(3)])
    result = assign_credit(masks, truth, truth, topology(truth), reward, EVEN, 5, np.random.default_rng(0))
    assert result.num_regions == 5
    assert len(calls) == 3 + 1 + 5


def test_regions_are_connected_and_shared_between_components_and_departures() -> None:
    greedy = np.zeros((20, 20), bool)
    greedy[0:10, 0:10] = True  # the tree: more than half of the mask
    greedy[15, 15] = greedy[16, 16] = True  # 8-connected pair
    greedy[19, 0] = True
    sample = greedy.copy()
    sample[12, 2:6] = sample[5, 12] = True
    regions = choose_regions(sample[None], greedy, 9, np.random.default_rng(0))
    assert sorted(int(region.sum()) for region in regions) == [1, 1, 2, 4]
    pairs = [choose_regions(sample[None], greedy, 2, np.random.default_rng(seed)) for seed in range(20)]
    assert all([bool(greedy[region].all()) for region in pair] == [True, False] for pair in pairs)
    assert len(choose_regions(greedy[None], greedy, 2, np.random.default_rng(0))) == 2  # no departures
    assert choose_regions(sample[None], greedy, 0, np.random.default_rng(0)) == []
    assert (
        choose_regions(np.zeros((1, 3, 3), bool), np.zeros((3, 3), bool), 5, np.random.default_rng(0)) == []
    )
