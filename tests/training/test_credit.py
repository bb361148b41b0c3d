"""Credit assignment against brute force: flip one pixel or one region, score again."""

import numpy as np
import pytest

from vesselrl.scoring.rewards import MultiObjectiveReward, SimpleDiceReward, get_reward_function
from vesselrl.scoring.topology import topology
from vesselrl.training.credit import Credit, assign_credit, choose_regions, overlap_counts, overlap_credit
from vesselrl.training.ppo import scaled_credit


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


def test_region_credit_is_the_change_of_the_whole_region(truth: np.ndarray) -> None:
    """One region: a bar that closes a gap. Its pixels share R(with) - R(without) of the structure terms."""
    reward = MultiObjectiveReward()
    greedy = truth.copy()
    greedy[10:13, 6:9] = False
    sample = truth.copy()  # closes the gap
    result = assign_credit(sample[None], greedy, truth, topology(truth), reward, 4, np.random.default_rng(0))
    wanted = sum(reward.structure_terms(truth, truth).values()) - sum(
        reward.structure_terms(greedy, truth).values()
    )
    assert wanted > 0
    assert result.num_regions == 1
    assert np.array_equal(result.structure[0] != 0, sample ^ greedy)
    assert result.structure[0][11, 7] == pytest.approx(wanted, abs=1e-5)


def test_region_credit_of_a_lost_piece_is_on_minus_off(truth: np.ndarray) -> None:
    """The sample drops a piece that the greedy mask has; the credit still says what being ON is worth."""
    reward = MultiObjectiveReward()
    sample = truth.copy()
    sample[10:13, 6:9] = False
    result = assign_credit(sample[None], truth, truth, topology(truth), reward, 4, np.random.default_rng(0))
    assert result.structure[0][11, 7] > 0


def test_rewards_and_terms_add_up(truth: np.ndarray) -> None:
    reward = MultiObjectiveReward()
    samples = np.stack([noisy(truth, seed) for seed in range(3)])
    result = assign_credit(samples, truth, truth, topology(truth), reward, 2, np.random.default_rng(0))
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
    result = assign_credit(sample[None], truth, truth, topology(truth), reward, 4, np.random.default_rng(0))
    assert result.structure[0][1, 1] == pytest.approx(2.0)
    assert result.terms["custom"].tolist() == [2.0]


def test_weights_balance_overlap_against_structure() -> None:
    """By hand: shares are the normalised weights; a custom weight of 1 counts like the rest together."""

    def custom(pred: np.ndarray, gt: np.ndarray) -> float:
        return 0.0

    assert MultiObjectiveReward().structure_share == pytest.approx(0.3)
    assert MultiObjectiveReward(topology_weight=0, length_weight=0).structure_share == 0
    assert MultiObjectiveReward(dice_weight=0, recall_weight=0).structure_share == pytest.approx(1)
    assert MultiObjectiveReward(custom=custom).structure_share == pytest.approx(1.3 / 2)
    assert SimpleDiceReward().structure_share == 0
    assert SimpleDiceReward(custom=custom, custom_weight=-3).structure_share == pytest.approx(0.75)
    overlap, structure = np.full((1, 1, 2), 4.0, np.float32), np.array([[[6.0, 0.0]]], np.float32)
    credit = Credit(overlap, structure, np.ones(1), {}, 0.0, 1)
    total = scaled_credit(credit, (2.0, 3.0), structure_share=0.25, structure_weight=2.0)
    assert total.tolist() == [[[0.75 * 2 + 2 * 0.25 * 2, 0.75 * 2]]]
    assert scaled_credit(credit, (0.0, 0.0), 0.25, 2.0).tolist() == [[[0.0, 0.0]]]


def test_regions_are_connected_disjoint_and_prefer_large_ones() -> None:
    difference = np.zeros((20, 20), bool)
    difference[0:10, 0:10] = True
    difference[15, 15] = difference[16, 16] = True  # 8-connected pair
    difference[19, 0] = True
    regions = choose_regions(difference, 9, np.random.default_rng(0))
    assert sorted(int(region.sum()) for region in regions) == [1, 2, 100]
    assert np.array_equal(np.sum(regions, axis=0), difference.astype(int))
    first = [int(choose_regions(difference, 1, np.random.default_rng(seed))[0].sum()) for seed in range(200)]
    assert first.count(100) > 180
    assert choose_regions(difference, 0, np.random.default_rng(0)) == []
    assert choose_regions(np.zeros((3, 3), bool), 5, np.random.default_rng(0)) == []
