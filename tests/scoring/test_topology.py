"""Known answers for drawn shapes, and agreement with scikit-image (`plain_topology`) and gudhi."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import gudhi
import numpy as np
import pytest
from skimage.measure import euler_number, label
from skimage.morphology import thin

from vesselrl.scoring.topology import prototype_topology, topology

CIRCLE = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def plain_topology(mask):
    skeleton = thin(mask)
    framed = np.pad(skeleton, 1)
    around = np.stack([np.roll(framed, (-row, -column), (0, 1)) for row, column in CIRCLE])[:, 1:-1, 1:-1]
    crossings = (np.roll(around, -1, axis=0) & ~around).sum(axis=0)
    num_components = label(mask, connectivity=2).max()
    return {
        "skeleton": skeleton.tobytes(),
        "length_px": skeleton.sum(),
        "num_components": num_components,
        "num_loops": num_components - euler_number(mask, connectivity=2),
        "num_ends": (skeleton & (around.sum(axis=0) == 1)).sum(),
        "num_junctions": label(skeleton & (crossings >= 3), connectivity=2).max(),
        "thinning": "guo_hall",
    }


def numbers(mask):
    measured = vars(topology(mask))
    return measured | {"skeleton": measured["skeleton"].tobytes()}


def lines(*polylines, width=3, size=64):
    """Through (x, y) points."""
    points = [np.array(polyline, np.int32) for polyline in polylines]
    return cv2.polylines(np.zeros((size, size), np.uint8), points, False, 1, width)


def rings(*centres):
    canvas = np.zeros((64, 64), np.uint8)
    for centre in centres:
        cv2.circle(canvas, centre, 12, 1, 3)
    return canvas


EMPTY = np.zeros((64, 64), np.uint8)
# name: (mask, components, loops, ends, junctions); None = not a stable number
KNOWN = {
    "empty": (EMPTY, 0, 0, 0, 0),
    "square": (np.pad(np.ones((2, 2)), 20), 1, 0, 0, 0),
    "all foreground": (1 - EMPTY, 1, 0, 0, 0),
    "line": (lines([(5, 32), (58, 32)]), 1, 0, 2, 0),
    "broken line": (lines([(5, 32), (25, 32)], [(35, 32), (58, 32)]), 2, 0, 4, 0),
    "cross": (lines([(10, 32), (54, 32)], [(32, 10), (32, 54)]), 1, 0, 4, 1),
    "Y": (lines([(32, 32), (32, 56)], [(12, 10), (32, 32), (52, 10)]), 1, 0, 3, 1),
    "two rings": (rings((16, 16), (46, 46)), 2, 2, 0, 0),
    "figure of eight": (rings((22, 32), (38, 32)), 1, 3, 0, 2),
    "ring with a gap": (rings((32, 32)) * (np.arange(64) < 40), 1, 0, 2, 0),
    "frame on the border": (np.pad(np.zeros((58, 58)), 3, constant_values=1), 1, 1, 0, 0),
    "four corners of a checkerboard": (np.pad(np.indices((3, 3)).sum(0) % 2 == 0, 3), 1, 0, 4, 1),
    "diagonal pair of holes": (np.pad(np.eye(2) == 0, 3, constant_values=True), 1, 2, None, None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes(name):
    mask, *expected = KNOWN[name]
    shape = topology(mask)
    found = [shape.num_components, shape.num_loops, shape.num_ends, shape.num_junctions]
    assert all(known in (number, None) for number, known in zip(found, expected, strict=True))
    assert shape.length_px == np.count_nonzero(shape.skeleton)


def vessels(seed):
    """A few random curved strokes of 2 to 9 px, with breaks and specks."""
    rng = np.random.default_rng(seed)
    canvas = np.zeros((96, 101), np.uint8)
    for _ in range(6):
        walk = rng.uniform((0, 0), (101, 96)) + np.cumsum(rng.normal(0, 7, (15, 2)), axis=0)
        cv2.polylines(canvas, [walk.astype(np.int32)], False, 1, int(rng.integers(2, 10)))
    return (canvas.astype(bool) & (rng.random(canvas.shape) < 0.99)) | (rng.random(canvas.shape) < 0.003)


def draw_masks(num):
    """Noise of any density and blobs, 1 to 23 px wide, and a few trees."""
    rng = np.random.default_rng(1)
    for i in range(num):
        noise = rng.random(2 * rng.integers(0, 12, size=2) + 1).astype(np.float32)
        yield noise < rng.random() if i % 2 else cv2.GaussianBlur(noise, (0, 0), 1.2) > 0.5
    yield from (vessels(seed) for seed in range(num // 50))


@pytest.mark.parametrize("num", [400, pytest.param(3000, marks=pytest.mark.slow)])
def test_everything_equals_the_oracle_on_any_number_of_threads(num):
    """The larger trees come as views and as uint8, too."""
    large = cv2.resize(vessels(2).astype(np.uint8), (584, 565), interpolation=cv2.INTER_NEAREST)
    masks = [*draw_masks(num), large, large[::3, 1::2]]
    measured = [numbers(mask) for mask in masks]
    assert measured == [plain_topology(mask > 0) for mask in masks]
    with ThreadPoolExecutor(5) as pool:
        assert measured == list(pool.map(numbers, masks))


def test_mask_and_skeleton_have_the_betti_numbers_of_gudhi_and_the_skeleton_is_its_own():
    """Pixels as top cells: 8-connected foreground. Gudhi drops trailing dimensions of thin masks."""
    for mask in draw_masks(600):
        cells = gudhi.CubicalComplex(top_dimensional_cells=np.where(mask, 0.0, 1.0))
        cells.compute_persistence()
        components, loops, *_ = [*cells.persistent_betti_numbers(0.0, 0.0), 0, 0]
        shape = topology(mask)
        again = topology(shape.skeleton)
        for measured in (shape, again):
            assert (measured.num_components, measured.num_loops) == (components, loops)
        np.testing.assert_array_equal(again.skeleton, shape.skeleton)


def test_prototype_counts_every_branching_pixel_and_mirrors_the_border():
    shape = prototype_topology(lines([(2, 4), (6, 4)], [(4, 2), (4, 6)], width=1, size=9))
    # the centre has four neighbours, each pixel beside it has four as well: centre, outer, two diagonals
    assert (shape.length_px, shape.num_components, shape.num_ends, shape.num_junctions) == (9, 1, 4, 5)
    assert prototype_topology(lines([(0, 4), (5, 4)], width=1, size=9)).num_ends == 1
