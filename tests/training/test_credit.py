"""Credit assignment against brute force: flip one pixel or one region, score again."""

import numpy as np
import pytest

from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import MultiObjectiveReward, SimpleDiceReward, get_reward_function
from vesselrl.scoring.topology import topology
from vesselrl.training.credit import assign_credit, overlap_counts, overlap_credit


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


def probability(greedy: np.ndarray) -> np.ndarray:
    """So sure that no lower threshold shows anything else."""
    return np.where(greedy, 0.95, 0.02).astype(np.float32)


PLAIN = PostProcessing()


def credit_of(sample: np.ndarray, on: np.ndarray, truth: np.ndarray, reward, count: int, post=PLAIN):
    rng = np.random.default_rng(0)
    return assign_credit(sample[None], on, truth, topology(truth), reward, post, count, rng)


@pytest.mark.parametrize("reward_type", ["multi_objective", "simple_dice"])
def test_the_credit_of_a_region_adds_up_to_what_flipping_it_changes(
    truth: np.ndarray, reward_type: str
) -> None:
    """A bar that closes a gap, and the smaller of the two pieces that it joins: R(with) - R(without)."""
    reward = get_reward_function(reward_type, custom=lambda pred, gt: float(pred.sum()) / 100)
    greedy = truth & ~gap(truth)
    result = credit_of(truth, probability(greedy), truth, reward, 9)
    credit = result.overlap + result.structure
    without = reward(greedy, truth)[0]
    assert result.num_regions == 2
    assert credit[gap(truth)].sum() == pytest.approx(reward(truth, truth)[0] - without, abs=1e-4)
    piece = np.zeros_like(truth)
    piece[10:13, 2:6] = True
    assert credit[piece].sum() == pytest.approx(without - reward(greedy & ~piece, truth)[0], abs=1e-4)
    # The user's term pays for every pixel; topology and length, where the reward has them, for much more.
    share = result.structure[gap(truth)]
    assert (share > 0).all()
    assert (share > 0.011).all() == (reward_type == "multi_objective")


def test_region_credit_of_a_lost_piece_is_on_minus_off(truth: np.ndarray) -> None:
    """The sample drops a piece that the greedy mask has; the credit still says what being ON is worth."""
    result = credit_of(truth & ~gap(truth), probability(truth), truth, MultiObjectiveReward(), 4)
    assert result.num_regions == 1  # the tree itself is never flipped
    assert np.array_equal(result.structure > 0, gap(truth))


def test_a_speck_of_the_greedy_mask_is_tried_without_it(truth: np.ndarray) -> None:
    """No sample differs, yet the speck is found: R(on) - R(off) < 0."""
    greedy = truth.copy()
    greedy[20:22, 3:5] = True
    result = credit_of(greedy, probability(greedy), truth, MultiObjectiveReward(), 4)
    assert result.num_regions == 1
    assert np.array_equal(result.structure < 0, greedy & ~truth)


def test_a_link_earns_what_it_saves_from_removal(truth: np.ndarray) -> None:
    """Pieces below 20 px are removed: the gap's 9 px bring back the 12 px behind it, and earn them too."""
    reward = MultiObjectiveReward()
    post = PostProcessing(min_component_px=20)
    greedy = truth & ~gap(truth)
    tree = post.mask(probability(greedy))
    assert np.count_nonzero(greedy & ~tree) == 12
    greedy[20:22, 3:5] = True  # a speck, which is removed before and after
    on = probability(greedy)
    on[gap(truth)] = 0.3
    result = credit_of(greedy, on, truth, reward, 9, post)  # no sample closes the gap: a link does
    # The link, once per level; the piece that is removed anyway is not flipped.
    assert result.num_regions == 2
    credit = result.overlap + result.structure
    wanted = reward(truth, truth)[0] - reward(tree, truth)[0]
    assert credit[gap(truth)].sum() == pytest.approx(wanted, abs=1e-4)
    assert result.greedy_reward == pytest.approx(reward(tree, truth)[0], abs=1e-5)
    assert result.greedy_counts == overlap_counts(tree, truth)
    # Pixels of the removed piece keep their own credit, and it pays to put them back.
    assert (result.overlap[greedy & ~tree & truth] > 0).all()
    assert not result.structure[greedy & ~tree].any()


def test_a_gap_that_is_closed_anyway_keeps_its_overlap_credit(truth: np.ndarray) -> None:
    """At 0.3 the gap is closed above 0.2 and left open above 0.4; only then a link earns the connection."""
    reward = MultiObjectiveReward()
    on = probability(truth & ~gap(truth))
    on[gap(truth)] = 0.3
    closed = credit_of(on > 0.5, on, truth, reward, 9, PostProcessing(close_gaps=0.2))
    assert closed.greedy_reward == pytest.approx(6.15, abs=1e-6)
    assert not closed.structure[gap(truth)].any()
    assert (closed.overlap[gap(truth)] > 0).all()
    left = credit_of(on > 0.5, on, truth, reward, 9, PostProcessing(close_gaps=0.4))
    assert left.greedy_reward < 6.1
    assert (left.structure[gap(truth)] > 0).all()


def test_a_speck_that_will_be_removed_is_not_tried(truth: np.ndarray) -> None:
    """Off in the greedy mask, on in a sample, 4 px: in or out, the mask that is used stays the same."""
    sample = truth.copy()
    sample[20:22, 3:5] = True
    reward = MultiObjectiveReward()
    removed = credit_of(sample, probability(truth), truth, reward, 9, PostProcessing(min_component_px=20))
    assert removed.num_regions == 0
    assert not removed.structure.any()
    assert credit_of(sample, probability(truth), truth, reward, 9).num_regions == 1


def test_drawn_masks_are_scored_as_they_are_used(truth: np.ndarray) -> None:
    sample = truth.copy()
    sample[20:22, 3:5] = True
    reward = MultiObjectiveReward()
    post = PostProcessing(min_component_px=20)
    assert credit_of(sample, probability(truth), truth, reward, 0, post).rewards == pytest.approx([6.15])
    assert credit_of(sample, probability(truth), truth, reward, 0).rewards[0] < 6.1


def test_rewards_and_terms_add_up(truth: np.ndarray) -> None:
    reward = MultiObjectiveReward()
    samples = np.stack([noisy(truth, seed) for seed in range(3)])
    result = assign_credit(
        samples, probability(truth), truth, topology(truth), reward, PLAIN, 2, np.random.default_rng(0)
    )
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
    result = credit_of(sample, probability(truth), truth, reward, 4)
    credit = result.overlap + result.structure
    gained = reward(sample, truth)[0] - reward(truth, truth)[0]
    assert 1 < gained < 2  # 2 for the corner, less what its 16 wrong pixels cost in Dice
    assert credit[:4, :4].sum() == pytest.approx(gained, abs=1e-4)
    assert np.count_nonzero(result.structure) == 16
    assert result.terms["custom"].tolist() == [2.0]


def test_structure_is_scored_once_per_mask_and_once_per_region(truth: np.ndarray) -> None:
    """As docs/rewards.md promises to whoever brings a slow function: drawn masks, greedy mask, regions."""
    calls = []

    def counted(pred: np.ndarray, gt: np.ndarray) -> float:
        calls.append(1)
        return 0.0

    reward = SimpleDiceReward(custom=counted)
    masks = np.stack([noisy(truth, seed) for seed in range(3)])
    on, rng = probability(truth), np.random.default_rng(0)
    result = assign_credit(masks, on, truth, topology(truth), reward, PLAIN, 5, rng)
    assert result.num_regions == 5
    assert len(calls) == 3 + 1 + 5


def test_a_link_earns_what_it_saves_from_removal_with_dice_alone(truth: np.ndarray) -> None:
    """No structure term, but masks are not used as they are: 9 px of a gap bring back the 12 px behind it."""
    post, greedy = PostProcessing(min_component_px=20), truth & ~gap(truth)
    on = probability(greedy)
    on[gap(truth)] = 0.3
    result = credit_of(greedy, on, truth, SimpleDiceReward(), 9, post)
    whole, lost = truth.sum(), np.count_nonzero(truth & ~post.mask(probability(greedy)))
    wanted = 10 - 10 * 2 * (whole - lost) / (2 * whole - lost)  # Dice of all, and of all but the lost piece
    assert (result.overlap + result.structure)[gap(truth)].sum() == pytest.approx(wanted, abs=1e-4)


def test_without_structure_terms_no_region_is_scored(truth: np.ndarray) -> None:
    result = credit_of(noisy(truth, 1), probability(truth), truth, SimpleDiceReward(), 5)
    assert result.num_regions == 0
    assert not result.structure.any()
