"""Known answers for drawn shapes, and agreement with scikit-image (plain_topology) and gudhi."""

import subprocess
import sys
from itertools import product

import cv2
import gudhi
import numpy as np
import pytest

from tests.scoring.plain_topology import plain_topology
from vesselrl.scoring.scores import in_threads
from vesselrl.scoring.topology import prototype_topology, topology


def blank(height=64, width=64):
    return np.zeros((height, width), np.uint8)


def line(*points, width=3, canvas=None):
    """A polyline through (x, y) points."""
    canvas = blank() if canvas is None else canvas
    return cv2.polylines(canvas, [np.array(points, np.int32)], False, 1, width)


def ring(x, y, canvas=None):
    return cv2.circle(blank() if canvas is None else canvas, (x, y), 12, 1, 3)


def square(size):
    return np.pad(np.ones((size, size), np.uint8), 20)


def pixels(*positions):
    canvas = blank(8, 8)
    canvas[tuple(np.transpose(positions))] = 1
    return canvas


def numbers(mask):
    measured = vars(topology(mask))
    return measured | {"skeleton": measured["skeleton"].tobytes()}


CROSS = line((10, 32), (54, 32), canvas=line((32, 10), (32, 54)))
TEE = line((10, 20), (54, 20), canvas=line((32, 20), (32, 54)))
WYE = line((32, 32), (32, 56), canvas=line((12, 10), (32, 32), (52, 10)))

# name: (mask, components, loops, ends, junctions); None = not a stable number
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
    "ring with a gap": (ring(32, 32) * (np.arange(64) < 40), 1, 0, 2, 0),
    "frame on the border": (1 - np.pad(np.ones((58, 58), np.uint8), 3), 1, 1, 0, 0),
    "four corners of a checkerboard": (pixels((3, 3), (3, 5), (5, 3), (5, 5), (4, 4)), 1, 0, 4, 1),
    "diagonal pair": (pixels((3, 3), (4, 4)), 1, 0, 2, 0),
    "diagonal pair of holes": (1 - pixels((3, 3), (4, 4)), 1, 2, None, None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes(name):
    mask, *expected = KNOWN[name]
    shape = topology(mask)
    found = [shape.num_components, shape.num_loops, shape.num_ends, shape.num_junctions]
    assert all(known in (number, None) for number, known in zip(found, expected, strict=True))
    assert shape.length_px == np.count_nonzero(shape.skeleton)
    if name in ("one pixel", "2x2", "3x3"):
        assert shape.length_px == 1


def test_path_length_by_hand():
    """Thinning takes a corner that only fills a diagonal step; around a crossing the sides count alone."""
    diagonal = line((5, 8), (14, 17), width=1)
    corner = pixels((1, 1), (1, 2), (1, 3), (2, 3), (3, 3))
    knights_move = pixels((1, 1), (1, 2), (2, 3), (2, 4))
    plus = line((1, 8), (15, 8), width=1, canvas=line((8, 1), (8, 15), width=1))
    for mask, num_pixels, num_sides, num_diagonals in (
        (diagonal, 10, 0, 9), (corner, 4, 2, 1), (knights_move, 4, 2, 1), (plus, 29, 28, 0)
    ):  # fmt: skip
        shape = topology(mask)
        assert shape.length_px == num_pixels
        assert shape.path_length_px == pytest.approx(num_sides + num_diagonals * 2**0.5)


def vessels(seed, height=96, width=101):
    """A few random curved strokes of 2 to 9 px, with breaks and specks."""
    rng = np.random.default_rng(seed)
    canvas = blank(height, width)
    for _ in range(6):
        walk = rng.uniform((0, 0), (width, height)) + np.cumsum(rng.normal(0, 7, (15, 2)), axis=0)
        line(*walk.astype(int), width=int(rng.integers(2, 10)), canvas=canvas)
    return (canvas.astype(bool) & (rng.random(canvas.shape) < 0.99)) | (rng.random(canvas.shape) < 0.003)


def draw_masks(num):
    """Noise of any density and blobs, 1 to 23 px wide, never an even number, and a few trees."""
    rng = np.random.default_rng(1)
    for i in range(num):
        noise = rng.random(2 * rng.integers(0, 12, size=2) + 1).astype(np.float32)
        yield noise < rng.random() if i % 2 else cv2.GaussianBlur(noise, (0, 0), 1.2) > 0.5
    yield from (vessels(seed) for seed in range(num // 50))


@pytest.mark.parametrize("num", [400, pytest.param(3000, marks=pytest.mark.slow)])
def test_everything_equals_the_oracle_on_any_number_of_threads(num):
    masks = list(draw_masks(num))
    measured = [numbers(mask) for mask in masks]
    assert measured == [plain_topology(mask) for mask in masks]
    assert measured == in_threads(numbers, masks, num_threads=5)
    assert numbers(masks[0]) == numbers(masks[0].astype(np.uint8))


def test_components_and_loops_are_the_betti_numbers_of_gudhi():
    """Pixels as top cells: 8-connected foreground. Gudhi drops trailing dimensions of thin masks."""
    for mask in draw_masks(600):
        cells = gudhi.CubicalComplex(top_dimensional_cells=np.where(mask, 0.0, 1.0))
        cells.compute_persistence()
        components, loops, *_ = [*cells.persistent_betti_numbers(0.0, 0.0), 0, 0]
        shape = topology(mask)
        assert (shape.num_components, shape.num_loops) == (components, loops)


def test_the_skeleton_lies_inside_keeps_the_topology_and_cannot_be_thinned_again():
    for mask in draw_masks(200):
        shape = topology(mask)
        again = topology(shape.skeleton)
        assert not (shape.skeleton & ~mask).any()
        assert (again.num_components, again.num_loops) == (shape.num_components, shape.num_loops)
        np.testing.assert_array_equal(again.skeleton, shape.skeleton)


@pytest.mark.parametrize("width", [2, 3, 4, 6, 10, 14])
def test_straight_bars_keep_their_length_at_every_angle(width):
    """Zhang-Suen thinning fails here: it eats exact diagonals."""
    half = 60
    every_degree, offsets = range(180), np.linspace(0, 0.95, 12)
    for degrees, offset in [*product(every_degree, [0.0]), *product((45, 135), offsets)]:
        direction = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
        ys, xs = np.mgrid[:140, :140] - 70 - offset
        along, across = xs * direction[0] + ys * direction[1], ys * direction[0] - xs * direction[1]
        shape = topology((np.abs(along) <= half) & (np.abs(across) <= width / 2))
        # a diagonal step of one pixel covers sqrt(2) of length
        assert shape.length_px >= 0.85 * 2 * half * np.abs(direction).max(), (degrees, offset)
        assert (shape.num_components, shape.num_loops) == (1, 0)


def test_turns_margins_and_views_keep_the_shape():
    for seed in range(8):
        mask = vessels(seed)
        shape, turned = topology(mask), topology(np.rot90(mask))
        assert (shape.num_components, shape.num_loops) == (turned.num_components, turned.num_loops)
        assert turned.length_px == pytest.approx(shape.length_px, rel=0.03)
        padded = topology(np.pad(mask, ((3, 0), (1, 6))))
        np.testing.assert_array_equal(padded.skeleton[3:, 1:-6], shape.skeleton)
    large = cv2.resize(vessels(2).astype(np.uint8), (584, 565), interpolation=cv2.INTER_NEAREST)
    assert numbers(large) == plain_topology(large > 0)
    assert numbers(large[::3, 1::2]) == plain_topology(large[::3, 1::2] > 0)


def test_prototype_counts_every_branching_pixel_and_mirrors_the_border():
    plus = line((2, 4), (6, 4), width=1, canvas=line((4, 2), (4, 6), width=1, canvas=blank(9, 9)))
    shape = prototype_topology(plus)
    # the centre has four neighbours, each pixel beside it has four as well: centre, outer, two diagonals
    assert (shape.length_px, shape.num_components, shape.num_ends, shape.num_junctions) == (9, 1, 4, 5)
    assert shape.thinning == "zhang"
    reaching_the_border = line((0, 4), (5, 4), width=1, canvas=blank(9, 9))
    assert prototype_topology(reaching_the_border).num_ends == 1
    assert topology(reaching_the_border).num_ends == 2


def test_numba_and_scikit_image_are_not_imported_before_the_first_mask():
    code = (
        "import sys, vesselrl.scoring.rewards, vesselrl.scoring.overlay, vesselrl.scoring.postprocessing; "
        "print([name for name in ('numba', 'skimage', 'torch', 'scipy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
