"""The example of a reward of one's own in docs/examples: what it pays for, on masks worked out by hand."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import shortest_path

from vesselrl.data.synthetic import TARGET, draw_sequence
from vesselrl.evaluation.run_settings import import_function
from vesselrl.scoring.rewards import SimpleDiceReward
from vesselrl.scoring.topology import topology

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import_function("longest_path:unbroken")
        yield sys.modules.pop("longest_path")


def bar(length: int = 100) -> np.ndarray:
    mask = np.zeros((20, length + 10), bool)
    mask[10, 5 : 5 + length] = True
    return mask


def packed_path(example: ModuleType, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return example.longest_path(mask.shape, np.packbits(mask).tobytes())


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ([], 0.0),
        ([(45, 55)], 2 * 0.45**2 - 1),  # a break in the middle
        ([(90, 100)], 0.9**2 - 1),  # an end: the same ten pixels cost a third
        ([(20, 30), (60, 70)], 0.2**2 + 2 * 0.3**2 - 1),
        ([(0, 100)], -1.0),
    ],
)
def test_by_hand_on_a_bar(example: ModuleType, lost: list, expected: float) -> None:
    truth = bar()
    pred = truth.copy()
    for start, end in lost:
        pred[:, 5 + start : 5 + end] = False
    assert example.unbroken(pred, truth) == pytest.approx(expected)


def test_side_branches_and_false_alarms_are_no_matter(example: ModuleType) -> None:
    truth = bar()
    truth[2:10, 50] = True
    pred = bar()
    pred[15:, :] = True
    assert example.unbroken(pred, truth) == pytest.approx(0.0)


def test_an_empty_truth_has_nothing_to_break(example: ModuleType) -> None:
    empty = np.zeros((16, 16), bool)
    assert example.unbroken(~empty, empty) == 0.0
    assert example.unbroken(empty, empty) == 0.0


def test_one_more_pixel_found_never_costs(example: ModuleType) -> None:
    truth, rng = bar(), np.random.default_rng(0)
    pred = np.zeros_like(truth)
    before = example.unbroken(pred, truth)
    for column in rng.permutation(np.arange(5, 105)):
        pred[10, column] = True
        after = example.unbroken(pred, truth)
        assert after > before
        before = after
    assert before == pytest.approx(0.0)


def test_the_path_is_as_long_as_the_longest_of_all_pairs(example: ModuleType) -> None:
    """By every pair of centreline pixels, on a tree with a second, shorter piece."""
    truth = np.zeros((48, 64), bool)
    truth[20, 4:60] = truth[5:20, 30] = truth[20:44, 50] = truth[44, 4:20] = True
    pixels = np.argwhere(topology(truth).skeleton)
    touching = np.abs(pixels[:, None] - pixels[None]).max(2) == 1
    steps = shortest_path(csr_matrix(touching), unweighted=True)
    rows, columns = packed_path(example, truth)
    assert len(rows) == steps[np.isfinite(steps)].max() + 1
    assert max(np.abs(np.diff(rows)).max(), np.abs(np.diff(columns)).max()) == 1


def test_it_is_fast_and_the_same_in_every_thread(example: ModuleType) -> None:
    ((_, truth),) = draw_sequence(TARGET, patient=1, sequence=0, num_frames=1, size=256, seed=3)
    pred = truth.copy()
    rows, columns = packed_path(example, truth)
    middle = rows[len(rows) // 2], columns[len(rows) // 2]
    pred[middle[0] - 4 : middle[0] + 5, middle[1] - 4 : middle[1] + 5] = False
    assert -0.6 < example.unbroken(pred, truth) < -0.4
    started = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(lambda _: example.unbroken(pred, truth), range(400)))
    assert (time.perf_counter() - started) / 400 < 5e-3
    assert len(set(values)) == 1


def test_it_is_a_term_of_a_reward(example: ModuleType) -> None:
    truth = bar()
    pred = truth.copy()
    pred[:, 50:60] = False
    reward = SimpleDiceReward(custom=example.unbroken, custom_weight=3)
    total, details = reward(pred, truth)
    assert details["custom_term"] == pytest.approx(3 * example.unbroken(pred, truth))
    assert total < reward(truth, truth)[0]
