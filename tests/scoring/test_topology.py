"""Known answers for drawn shapes, and agreement with scikit-image, gudhi and the plain backend."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from skimage.measure import euler_number, label
from skimage.morphology import thin

import vesselrl.scoring
from vesselrl.scoring import backend
from vesselrl.scoring.spec import METRIC_SPEC
from vesselrl.scoring.topology import prototype_topology, topology

BACKENDS = ("numba", "plain")


def blank(height=64, width=64):
    return np.zeros((height, width), np.uint8)


def line(*points, width=3, canvas=None):
    """A polyline through (x, y) points."""
    canvas = blank() if canvas is None else canvas
    cv2.polylines(canvas, [np.array(points, np.int32)], False, 1, width)
    return canvas


def ring(x, y, radius=12, width=3, canvas=None):
    canvas = blank() if canvas is None else canvas
    cv2.circle(canvas, (x, y), radius, 1, width)
    return canvas


def square(size):
    canvas = blank()
    canvas[20 : 20 + size, 20 : 20 + size] = 1
    return canvas


def gapped_ring():
    canvas = ring(32, 32)
    canvas[32, 36:] = 0
    return canvas


def frame():
    canvas = np.ones((64, 64), np.uint8)
    canvas[3:-3, 3:-3] = 0
    return canvas


def pixels(*positions):
    canvas = blank(8, 8)
    canvas[tuple(np.transpose(positions))] = 1
    return canvas


def punched(*positions):
    return 1 - pixels(*positions)


CROSS = line((10, 32), (54, 32), canvas=line((32, 10), (32, 54)))
TEE = line((10, 20), (54, 20), canvas=line((32, 20), (32, 54)))
WYE = line((32, 32), (32, 56), canvas=line((12, 10), (32, 32), (52, 10)))

# name: (mask, pieces, loops, ends, junctions); None = not a stable number
KNOWN = {
    "empty": (blank(), 0, 0, 0, 0),
    "one pixel": (square(1), 1, 0, 0, 0),
    "2x2": (square(2), 1, 0, 0, 0),
    "3x3": (square(3), 1, 0, 0, 0),
    "all foreground": (1 - blank(), 1, 0, 0, 0),
    "one-pixel line": (line((5, 32), (58, 32), width=1), 1, 0, 2, 0),
    "line": (line((5, 32), (58, 32)), 1, 0, 2, 0),
    "broken line": (line((5, 32), (25, 32), canvas=line((35, 32), (58, 32))), 2, 0, 4, 0),
    "cross": (CROSS, 1, 0, 4, 1),
    "T": (TEE, 1, 0, 3, 1),
    "Y": (WYE, 1, 0, 3, 1),
    "ring": (ring(32, 32), 1, 1, 0, 0),
    "two rings": (ring(16, 16, canvas=ring(46, 46)), 2, 2, 0, 0),
    "figure of eight": (ring(22, 32, canvas=ring(38, 32)), 1, 3, 0, 2),
    "ring with a gap": (gapped_ring(), 1, 0, 2, 0),
    "frame on the border": (frame(), 1, 1, 0, 0),
    "four corners of a checkerboard": (pixels((3, 3), (3, 5), (5, 3), (5, 5), (4, 4)), 1, 0, 4, 1),
    "diagonal pair": (pixels((3, 3), (4, 4)), 1, 0, 2, 0),
    "diagonal pair of holes": (punched((3, 3), (4, 4)), 1, 2, None, None),
}


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes(name, implementation):
    mask, pieces, loops, ends, junctions = KNOWN[name]
    shape = topology(mask, implementation)
    assert (shape.num_components, shape.num_loops) == (pieces, loops)
    if ends is not None:
        assert (shape.num_ends, shape.num_junctions) == (ends, junctions)
    assert shape.length_px == np.count_nonzero(shape.skeleton)


@pytest.mark.parametrize(("size", "length"), [(1, 1), (2, 1), (3, 1)])
def test_small_squares_shrink_to_one_pixel(size, length):
    assert topology(square(size)).length_px == length


def test_a_one_pixel_line_is_its_own_skeleton():
    mask = line((5, 8), (40, 50), width=1)
    np.testing.assert_array_equal(topology(mask).skeleton, mask.astype(bool))


def vessels(seed, height=96, width=101):
    """A few random curved strokes of 2 to 9 px, with breaks and specks."""
    rng = np.random.default_rng(seed)
    canvas = blank(height, width)
    for _ in range(6):
        walk = rng.uniform((0, 0), (width, height)) + np.cumsum(rng.normal(0, 7, (15, 2)), axis=0)
        line(*walk.astype(int), width=int(rng.integers(2, 10)), canvas=canvas)
    return (canvas.astype(bool) & (rng.random(canvas.shape) < 0.99)) | (rng.random(canvas.shape) < 0.003)


def random_masks():
    rng = np.random.default_rng(0)
    for _ in range(120):
        shape = rng.integers(1, 45, size=2)
        noise = rng.random(shape).astype(np.float32)
        yield noise < rng.random()
        yield cv2.GaussianBlur(noise, (0, 0), 1.5) > 0.5
    for seed in range(12):
        yield vessels(seed)


def counts_of(shape):
    return (
        shape.length_px,
        shape.path_length_px,
        shape.num_components,
        shape.num_loops,
        shape.num_ends,
        shape.num_junctions,
    )


def test_skeleton_pieces_and_loops_equal_scikit_image():
    for mask in random_masks():
        shape = topology(mask, "numba")
        np.testing.assert_array_equal(shape.skeleton, thin(mask))
        assert shape.num_components == label(mask, connectivity=2).max()
        assert shape.num_components - shape.num_loops == euler_number(mask, connectivity=2)


def test_numba_and_plain_backend_agree_in_everything():
    for mask in random_masks():
        fast, plain = topology(mask, "numba"), topology(mask, "plain")
        np.testing.assert_array_equal(fast.skeleton, plain.skeleton)
        assert counts_of(fast) == counts_of(plain)
        assert fast.thinning == plain.thinning == METRIC_SPEC["skeleton"]


def test_pieces_and_loops_are_the_betti_numbers_of_gudhi():
    gudhi = pytest.importorskip("gudhi")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mask = rng.random((21, 18)) < rng.uniform(0.2, 0.8)
        cells = gudhi.CubicalComplex(top_dimensional_cells=np.where(mask, 0.0, 1.0))
        cells.compute_persistence()
        betti = cells.persistent_betti_numbers(0.0, 0.0)
        assert (topology(mask).num_components, topology(mask).num_loops) == (betti[0], betti[1])


def test_the_skeleton_lies_inside_keeps_the_topology_and_cannot_be_thinned_again():
    for mask in random_masks():
        shape = topology(mask)
        again = topology(shape.skeleton)
        assert not (shape.skeleton & ~mask).any()
        assert (again.num_components, again.num_loops) == (shape.num_components, shape.num_loops)
        np.testing.assert_array_equal(again.skeleton, shape.skeleton)


@pytest.mark.parametrize("width", [2, 3, 4, 6, 10, 14])
def test_straight_bars_keep_their_length_at_every_angle(width):
    """Zhang-Suen thinning fails here: it eats exact diagonals."""
    half = 60
    every_degree = [(degrees, 0.0) for degrees in range(180)]
    diagonals = [(degrees, offset) for degrees in (45, 135) for offset in np.linspace(0.05, 0.95, 10)]
    for degrees, offset in every_degree + diagonals:
        direction = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
        ys, xs = np.mgrid[:140, :140] - 70 - offset
        along, across = xs * direction[0] + ys * direction[1], ys * direction[0] - xs * direction[1]
        bar = (np.abs(along) <= half) & (np.abs(across) <= width / 2)
        shape = topology(bar)
        # a diagonal step of one pixel covers sqrt(2) of length
        ideal = 2 * half * np.abs(direction).max()
        assert shape.length_px >= 0.85 * ideal, (width, degrees, offset, shape.length_px, ideal)
        assert (shape.num_components, shape.num_loops) == (1, 0)


def test_quarter_turns_keep_pieces_and_loops_and_nearly_the_length():
    for seed in range(10):
        mask = vessels(seed)
        shape, turned = topology(mask), topology(np.rot90(mask))
        assert (shape.num_components, shape.num_loops) == (turned.num_components, turned.num_loops)
        assert turned.length_px == pytest.approx(shape.length_px, rel=0.03)


def test_a_margin_of_background_changes_nothing():
    mask = vessels(1)
    padded = topology(np.pad(mask, ((3, 0), (1, 6))))
    assert counts_of(padded) == counts_of(topology(mask))
    np.testing.assert_array_equal(padded.skeleton[3:, 1:-6], topology(mask).skeleton)


def test_every_isolated_speck_is_one_piece():
    mask = blank()
    mask[2:60:4, 2:60:4] = 1
    assert topology(mask).num_components == 15 * 15


def test_odd_sizes_and_strided_views():
    large = cv2.resize(vessels(2).astype(np.uint8), (584, 565), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(topology(large).skeleton, thin(large))
    assert counts_of(topology(large[::3, 1::2])) == counts_of(topology(large[::3, 1::2].copy()))


def test_threads_give_the_answers_of_one_thread():
    masks = [vessels(seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(topology, masks))
    assert [counts_of(shape) for shape in threaded] == [counts_of(topology(mask)) for mask in masks]


def test_the_mask_is_left_as_it_was():
    mask = vessels(4)
    before = mask.copy()
    for implementation in BACKENDS:
        topology(mask, implementation)
    np.testing.assert_array_equal(mask, before)


def test_prototype_counts_every_branching_pixel_and_mirrors_the_border():
    plus = line((2, 4), (6, 4), width=1, canvas=line((4, 2), (4, 6), width=1, canvas=blank(9, 9)))
    shape = prototype_topology(plus)
    # the centre has four neighbours, each pixel beside it has four as well: centre, outer, two diagonals
    assert (shape.length_px, shape.num_components, shape.num_ends, shape.num_junctions) == (9, 1, 4, 5)
    tee = line((2, 4), (6, 4), width=1, canvas=line((4, 4), (4, 7), width=1, canvas=blank(9, 9)))
    # three neighbours each at the centre and both sides, four below
    assert prototype_topology(tee).num_junctions == 4
    reaching_the_border = line((0, 4), (5, 4), width=1, canvas=blank(9, 9))
    assert prototype_topology(reaching_the_border).num_ends == 1
    assert topology(reaching_the_border).num_ends == 2


@pytest.fixture
def without_numba(monkeypatch):
    backend.compiled_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "vesselrl.scoring.kernels", raising=False)
    monkeypatch.delattr(vesselrl.scoring, "kernels", raising=False)
    yield
    backend.compiled_kernels.cache_clear()


@pytest.mark.usefixtures("without_numba")
def test_without_numba_the_plain_backend_serves_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert counts_of(topology(CROSS)) == counts_of(topology(CROSS, "plain"))
    assert [record.message for record in caplog.records if "slower plain backend" in record.message] == [
        caplog.records[0].message
    ]
    with pytest.raises(ImportError, match="numba cannot be imported"):
        topology(CROSS, "numba")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"unknown topology backend 'gpu'.*auto, numba, plain"):
        topology(CROSS, "gpu")


def test_nothing_heavy_is_imported_before_the_first_mask():
    code = (
        "import sys, vesselrl.scoring.rewards; "
        "print([name for name in ('numba', 'cv2', 'skimage', 'torch', 'scipy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# name: (mask, pixels, side steps, diagonal steps)
LENGTHS = {
    "empty": (blank(), 0, 0, 0),
    "one pixel": (square(1), 1, 0, 0),
    "row": (line((5, 8), (14, 8), width=1), 10, 9, 0),
    "diagonal": (line((5, 8), (14, 17), width=1), 10, 0, 9),
    "corner": (pixels((1, 1), (1, 2), (1, 3), (2, 3), (3, 3)), 4, 2, 1),
    "knight's move": (pixels((1, 1), (1, 2), (2, 3), (2, 4)), 4, 2, 1),
    "plus": (line((1, 8), (15, 8), width=1, canvas=line((8, 1), (8, 15), width=1)), 29, 28, 0),
}


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", LENGTHS)
def test_path_length_by_hand(name, implementation):
    """Thinning takes a corner that only fills a diagonal step; around a crossing the sides count alone."""
    mask, num_pixels, num_sides, num_diagonals = LENGTHS[name]
    shape = topology(mask, implementation)
    assert shape.length_px == num_pixels
    assert shape.path_length_px == pytest.approx(num_sides + num_diagonals * 2**0.5)


def test_path_length_is_nearly_the_true_length_where_pixels_are_not():
    """At 45 degrees the pixel count is short by a factor of 1.41."""
    for degrees in range(0, 91, 15):
        mask = cv2.line(blank(200, 200), (20, 20), (20 + round(150 * np.cos(np.radians(degrees))),
                        20 + round(150 * np.sin(np.radians(degrees)))), 1, 1)  # fmt: skip
        assert topology(mask).path_length_px == pytest.approx(150, rel=0.09)
