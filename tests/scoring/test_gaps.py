"""Closing gaps: a drawn vessel by hand, random fields against SciPy's components, the order of the steps."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra, minimum_spanning_tree

from vesselrl.scoring import gaps
from vesselrl.scoring.gaps import FainterMask
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.topology import topology

EIGHT = np.ones((3, 3), bool)


def pieces(mask: np.ndarray) -> int:
    return ndimage.label(mask, EIGHT)[1]


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
    assert pieces(mask) == 2
    closed = FainterMask(faint, 0.2).close(mask)
    assert np.array_equal(closed, faint > 0.2)  # above 0.2 there is the bar alone, with its gap
    wider = FainterMask(faint, 0.1).close(mask)
    assert pieces(wider) == 1
    assert wider[11:18, 23:25].all()  # as wide as the fainter mask
    added = wider & ~mask
    assert not added[:, :18].any()  # the half width of the rim, 4 px, beyond the gap
    assert not added[:, 30:].any()  # neither the rest of the rim nor the twig


def test_a_gap_below_the_level_stays_open(faint: np.ndarray) -> None:
    mask = faint > 0.5
    assert np.array_equal(FainterMask(faint, 0.4).close(mask), mask)
    assert np.array_equal(PostProcessing(close_gaps=0.4).mask(faint), mask)
    assert np.array_equal(PostProcessing().mask(faint), mask)


@pytest.mark.parametrize("shape", [(32, 128), (64, 64)])
def test_a_fainter_mask_without_an_edge_closes_nothing(shape: tuple[int, int]) -> None:
    """It has a centreline, but no width: a way across would be as wide as the image."""
    values = np.full(shape, 0.3)
    values[10:20, 5:20] = values[10:20, 30:60] = 0.9
    mask = values > 0.5
    assert np.array_equal(FainterMask(values, 0.2).close(mask), mask)
    assert FainterMask(values, 0.2).links(mask)[1] == 0


def test_an_end_is_not_prolonged(faint: np.ndarray) -> None:
    """One component and a twig: there is a link, but no gap."""
    faint[13:16, 22:26] = 0.9
    mask = faint > 0.5
    fainter = FainterMask(faint, 0.1)
    labels, count = fainter.links(mask)
    assert count == 1
    assert (labels == 1)[20:26, 35:38].all()
    assert np.array_equal(fainter.close(mask), mask)
    nothing = np.zeros_like(mask)
    assert not FainterMask(np.zeros(mask.shape), 0.1).close(nothing).any()


def test_of_two_ways_the_shorter_is_taken_and_twigs_are_not() -> None:
    """Two bars, a faint way of 5 px between them, one of 15 px, and a twig on each."""
    values = np.zeros((30, 40), np.float32)
    values[5:25, 5] = values[5:25, 30] = 0.9
    values[10, 6:30] = values[20, 6:30] = 0.1
    values[10, 11:25] = 0.9  # leaves two gaps of 5 px in the upper way
    values[14:20, 12] = 0.1
    mask = values > 0.5
    assert pieces(mask) == 3
    closed = FainterMask(values, 0.05).close(mask)
    expected = mask.copy()
    expected[10, 6:30] = True
    assert np.array_equal(closed, expected)


def test_three_pieces_need_two_ways() -> None:
    """A star of three arms of 3, 4 and 6 px: the third way would not be needed between the first two."""
    values = np.zeros((30, 30), np.float32)
    for row, column in ((15, 11), (15, 20), (22, 15)):
        values[row - 1 : row + 2, column - 1 : column + 2] = 0.9
    values[15, 10:21] = np.maximum(values[15, 10:21], 0.1)
    values[15:23, 15] = np.maximum(values[15:23, 15], 0.1)
    mask = values > 0.5
    assert pieces(mask) == 3
    closed = FainterMask(values, 0.05).close(mask)
    assert pieces(closed) == 1
    ring = values.copy()
    ring[3, 5:26] = ring[3:16, 5] = ring[3:16, 25] = ring[15, 5:11] = ring[15, 20:26] = 0.1
    ring = np.maximum(ring, values)
    assert np.array_equal(FainterMask(ring, 0.05).close(mask), closed)  # not round the outside


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth random probabilities and a mask of them."""
    values = ndimage.gaussian_filter(np.random.default_rng(seed).random((80, 90)), 2)
    values = ((values - values.min()) / np.ptp(values)).astype(np.float32)
    return values, values > 0.6


def spanning_length(ways: np.ndarray, mask: np.ndarray) -> int:
    """Pixels that the shortest ways between all components have, as a minimum spanning tree; by SciPy."""
    components, count = ndimage.label(mask, EIGHT)
    numbers = np.full(mask.shape, -1)
    numbers[ways] = np.arange(ways.sum())
    edges = set()
    for row, column in np.argwhere(ways):
        here = numbers[row, column]
        for r, c in np.ndindex(3, 3):
            y, x = row + r - 1, column + c - 1
            if not (0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]):
                continue
            if components[y, x]:
                edges.add((int(here), int(ways.sum() + components[y, x] - 1)))
            elif numbers[y, x] > here:
                edges.add((int(here), int(numbers[y, x])))
    size = int(ways.sum()) + count
    rows, columns = np.array(sorted(edges)).T
    graph = coo_array((np.full(len(rows), 1.0), (rows, columns)), shape=(size, size)).tocsr()
    terminals = np.arange(size - count, size)
    # Not through a component: its edges are left out for all but the component where a way begins.
    between = np.zeros((count, count))
    for k, terminal in enumerate(terminals):
        others = np.setdiff1d(terminals, terminal)
        own = graph.copy().tolil()
        own[:, others] = 0
        distance = dijkstra(own.tocsr(), directed=False, indices=terminal)
        for other in others:
            touching = rows[columns == other]
            # A way over n pixels has n steps from its first component to its last pixel.
            between[k, other - terminals[0]] = min(distance[touching], default=np.inf)
    between[np.isinf(between)] = 0
    return int(minimum_spanning_tree(between).sum())


@pytest.mark.parametrize("seed", range(8))
def test_all_that_can_be_joined_is_joined_by_the_fewest_pixels(seed: int) -> None:
    values, mask = random_case(seed)
    fainter = FainterMask(values, 0.45)
    closed = fainter.close(mask)
    assert (closed >= mask).all()
    assert (values[closed] > 0.45).all()
    ways = topology(values > np.float32(0.45)).skeleton & ~mask
    # Of the parts of the ways, islands touch no component and join nothing.
    parts, count = ndimage.label(ways, EIGHT)
    touches = [mask[ndimage.binary_dilation(parts == k, EIGHT)].any() for k in range(1, count + 1)]
    paths = fainter._paths(mask)
    assert (paths <= ways).all()
    assert pieces(mask) > pieces(mask | paths) == pieces(mask | ways) - touches.count(False)
    assert 0 < paths.sum() <= spanning_length(ways, mask)


def test_without_numba_the_same_gaps_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    values, mask = random_case(0)
    compiled = FainterMask(values, 0.45).close(mask)
    monkeypatch.setattr(gaps, "compiled_kernels", lambda: None)
    assert np.array_equal(FainterMask(values, 0.45).close(mask), compiled)


def test_small_components_go_before_gaps_are_closed(faint: np.ndarray) -> None:
    """The piece right of the gap has 63 px, the bar left of it 57 px."""
    kept = PostProcessing(min_component_px=60, close_gaps=0.2).mask(faint)
    assert np.array_equal(kept, (faint > 0.5) & (np.arange(50) > 25))
    both = PostProcessing(min_component_px=57, close_gaps=0.2).mask(faint)
    assert np.array_equal(both, faint > 0.2)


def test_all_thresholds_of_one_image_are_those_alone(faint: np.ndarray) -> None:
    post = PostProcessing(0.5, 10, 0.05)
    thresholds = (0.1, 0.2, 0.5, 0.95)
    for threshold, mask in zip(thresholds, post.masks(faint, thresholds), strict=True):
        assert np.array_equal(mask, PostProcessing(threshold, 10, 0.05).mask(faint))
    assert np.array_equal(post.finisher(faint)(faint > 0.5), post.mask(faint))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "The threshold is 0.0; give a probability between 0 and 1"),
        ({"threshold": 85}, "The threshold is 85"),
        ({"min_component_px": -3}, "min_component_px is -3; give 0 or more"),
        ({"close_gaps": -0.1}, "close_gaps is -0.1; give 0, or a probability below 1"),
        ({"close_gaps": 1.0}, "close_gaps is 1.0"),
        ({"close_gaps": float("nan")}, "close_gaps is nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PostProcessing(**settings)
