"""2,000 random masks of odd sizes: compiled = plain = any number of threads = scikit-image = gudhi."""

import cv2
import gudhi
import numpy as np
import pytest
from skimage.measure import euler_number, label
from skimage.morphology import thin

from vesselrl.scoring.batch import topologies
from vesselrl.scoring.neighbourhood import thinning_table
from vesselrl.scoring.plain import removable
from vesselrl.scoring.topology import topology

NUM_MASKS = 2000


@pytest.fixture(scope="module")
def masks():
    """Half of them noise of any density, half of them blobs; 1 to 23 px wide, never an even number."""
    rng = np.random.default_rng(1)
    drawn = []
    for i in range(NUM_MASKS):
        height, width = 2 * rng.integers(0, 12, size=2) + 1
        noise = rng.random((height, width)).astype(np.float32)
        drawn.append(noise < rng.random() if i % 2 else cv2.GaussianBlur(noise, (0, 0), 1.2) > 0.5)
    return drawn


@pytest.fixture(scope="module")
def shapes(masks):
    return topologies(masks, num_threads=1)


def numbers(shape):
    counted = {name: value for name, value in vars(shape).items() if name != "skeleton"}
    return {**counted, "skeleton": shape.skeleton.tobytes()}


def test_the_plain_backend_gives_the_same_topology(masks, shapes):
    for mask, shape in zip(masks, shapes, strict=True):
        assert numbers(topology(mask, "plain")) == numbers(shape)


@pytest.mark.parametrize("num_threads", [2, 5, None])
def test_the_number_of_threads_changes_nothing(masks, shapes, num_threads):
    threaded = topologies(masks, num_threads=num_threads)
    assert [numbers(shape) for shape in threaded] == [numbers(shape) for shape in shapes]


def test_skeletons_are_those_of_scikit_image(masks, shapes):
    for mask, shape in zip(masks, shapes, strict=True):
        np.testing.assert_array_equal(shape.skeleton, thin(mask))


def test_pieces_and_euler_number_are_those_of_scikit_image(masks, shapes):
    for mask, shape in zip(masks, shapes, strict=True):
        assert shape.num_components == label(mask, connectivity=2).max()
        assert shape.num_components - shape.num_loops == euler_number(mask, connectivity=2)


def test_pieces_and_loops_are_the_betti_numbers_of_gudhi(masks, shapes):
    """Pixels as top cells: 8-connected foreground. Gudhi drops trailing dimensions of thin masks."""
    for mask, shape in zip(masks, shapes, strict=True):
        cells = gudhi.CubicalComplex(top_dimensional_cells=np.where(mask, 0.0, 1.0))
        cells.compute_persistence()
        pieces, loops, *_ = [*cells.persistent_betti_numbers(0.0, 0.0), 0, 0]
        assert (shape.num_components, shape.num_loops) == (pieces, loops)


def test_bitwise_conditions_are_the_thinning_table():
    """All 256 neighbourhoods, one per entry; the second pass is the first one turned by half a turn."""
    codes = np.arange(256)
    neighbours = [np.where(codes >> k & 1, 255, 0).astype(np.uint8) for k in range(8)]
    for row, around in zip(thinning_table(), (neighbours, neighbours[4:] + neighbours[:4]), strict=True):
        np.testing.assert_array_equal(removable(*around), np.where(row, 255, 0))
