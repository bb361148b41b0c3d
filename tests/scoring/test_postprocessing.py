"""Closing gaps by hand and against SciPy's spanning trees; small components; the order of the steps."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.sparse.csgraph import minimum_spanning_tree
from skimage.graph import MCP

from vesselrl.scoring.postprocessing import LowThresholdMask, PostProcessing, drop_small_components
from vesselrl.scoring.topology import topology

EIGHT = np.ones((3, 3), bool)


@pytest.mark.parametrize("density", [0.0, 0.15, 0.4, 1.0])
def test_small_components_are_those_of_scipy(density: float) -> None:
    mask = np.random.default_rng(7).random((61, 47)) < density
    labels, num = ndimage.label(mask, EIGHT)
    areas = ndimage.sum_labels(mask, labels, range(num + 1))
    for min_px in (0, 1, 2, 5, 12, 5000):
        np.testing.assert_array_equal(drop_small_components(mask, min_px), mask & (areas[labels] >= min_px))
    with pytest.raises(ValueError, match="min_component_px is -1"):
        PostProcessing(min_component_px=-1)


@pytest.fixture
def faint() -> np.ndarray:
    """Probabilities of a bar 3 px wide with a faint stretch of 4 px, a wide faint rim and a faint twig."""
    values = np.full((30, 50), 0.001)
    values[11:18, 3:47] = 0.15  # the rim, 7 px wide
    values[18:28, 35:38] = 0.15  # the twig, which leads nowhere
    values[13:16, 3:47] = 0.9
    values[13:16, 22:26] = 0.3
    return values


def test_a_gap_is_closed_and_nothing_else(faint: np.ndarray) -> None:
    mask = faint > 0.5
    assert np.array_equal(LowThresholdMask(faint, 0.4).close(mask), mask)  # stays open above its level
    wider = LowThresholdMask(faint, 0.1).close(mask)
    assert [ndimage.label(one, EIGHT)[1] for one in (mask, wider)] == [2, 1]
    assert wider[11:18, 23:25].all()  # as wide as the low-threshold mask
    added = np.flatnonzero((wider & ~mask).any(axis=0))
    assert 18 <= added.min() <= added.max() < 30  # neither the rest of the rim nor the twig
    everywhere = LowThresholdMask(np.full(mask.shape, 0.3), 0.2)  # without an edge it has no width
    assert np.array_equal(everywhere.close(mask), mask)
    assert everywhere.bridges(mask)[1] == 0
    faint[13:16, 22:26] = 0.9  # one component and a twig: there is a bridge, but no gap
    mask = faint > 0.5
    low = LowThresholdMask(faint, 0.1)
    labels, count = low.bridges(mask)
    assert count == 1
    assert (labels == 1)[20:26, 35:38].all()
    assert np.array_equal(low.close(mask), mask)
    assert not LowThresholdMask(np.zeros(mask.shape), 0.1).close(mask & False).any()


def test_of_two_paths_the_shorter_is_taken_and_twigs_are_not() -> None:
    """Two bars, a faint path of 5 px between them, one of 15 px, and a twig on each."""
    values = np.zeros((30, 40), np.float32)
    values[5:25, 5] = values[5:25, 30] = 0.9
    values[10, 6:30] = values[20, 6:30] = 0.1
    values[10, 11:25] = 0.9  # leaves two gaps of 5 px in the upper path
    values[14:20, 12] = 0.1
    expected = values > 0.5
    expected[10, 6:30] = True
    assert np.array_equal(LowThresholdMask(values, 0.05).close(values > 0.5), expected)


def spanning_length(paths: np.ndarray, mask: np.ndarray) -> int:
    """Pixels of a minimum spanning tree of all components, over the shortest paths between any two."""
    components, count = ndimage.label(mask, EIGHT)
    beside = [paths & ndimage.binary_dilation(components == k, EIGHT) for k in range(1, count + 1)]
    between = np.zeros((count, count))
    for one, starts in enumerate(beside):
        if starts.any():
            distances, _ = MCP(np.where(paths, 1.0, -1.0)).find_costs(np.argwhere(starts))
            between[one] = [distances[ends].min(initial=np.inf) for ends in beside]
    return int(minimum_spanning_tree(np.nan_to_num(between, posinf=0)).sum())


SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))]


@pytest.mark.parametrize("seed", SEEDS)
def test_all_that_can_be_joined_is_joined_by_the_fewest_pixels(seed: int) -> None:
    values = ndimage.gaussian_filter(np.random.default_rng(seed).random((80, 90)), 2)
    values = ((values - values.min()) / np.ptp(values)).astype(np.float32)
    mask = values > 0.6
    low = LowThresholdMask(values, 0.45)
    closed = low.close(mask)
    assert (closed >= mask).all()
    assert (values[closed] > 0.45).all()
    candidates = topology(values > np.float32(0.45)).skeleton & ~mask
    # Islands among the candidates touch no component and join nothing.
    parts, count = ndimage.label(candidates, EIGHT)
    touches = [mask[ndimage.binary_dilation(parts == k, EIGHT)].any() for k in range(1, count + 1)]
    paths = low._paths(mask)
    assert (paths <= candidates).all()
    before, after, most = (ndimage.label(one, EIGHT)[1] for one in (mask, mask | paths, mask | candidates))
    assert before > after == most - touches.count(False)
    assert 0 < paths.sum() <= spanning_length(candidates, mask)


def test_small_components_go_before_gaps_are_closed(faint: np.ndarray) -> None:
    """The component right of the gap has 63 px, the bar left of it 57 px."""
    kept = PostProcessing(min_component_px=60, close_gaps=0.2).mask(faint)
    assert np.array_equal(kept, (faint > 0.5) & (np.arange(50) > 25))
    both = PostProcessing(min_component_px=57, close_gaps=0.2).mask(faint)
    assert np.array_equal(both, faint > 0.2)
    post = PostProcessing(0.5, 10, 0.05)
    thresholds = (0.1, 0.2, 0.5, 0.95)  # of one image
    for threshold, mask in zip(thresholds, post.masks(faint, thresholds), strict=True):
        assert np.array_equal(mask, PostProcessing(threshold, 10, 0.05).mask(faint))
    assert np.array_equal(post.postprocess_for(faint)(faint > 0.5), post.mask(faint))
