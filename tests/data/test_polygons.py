"""The rasteriser against hand tables and other libraries, its inverse, and the outlines of users' files."""

import numpy as np
import pytest
from pycocotools import mask as pycocotools_mask
from scipy import ndimage
from skimage.draw import polygon2mask

from tests.data.broken_roots import encode_mask
from vesselrl.data import polygons
from vesselrl.data.polygons import mask_to_polygons, rasterise, read_polygon, read_run_lengths
from vesselrl.errors import DataError


def curved_vessel(width, size=128):
    """A smooth outline of the given width that winds across the image, as (N, 2) points."""
    t = np.linspace(0, 1, 200)
    line = np.stack([10 + (size - 20) * t, size / 2 + size / 4 * np.sin(6 * t)], axis=1)
    along = np.gradient(line, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
    return np.concatenate([line + across * width / 2, (line - across * width / 2)[::-1]])


def test_triangle_drawn_by_hand():
    # Centres (c + 0.5, r + 0.5) below the diagonal from (0, 0) to (4, 4): column < row.
    # On the diagonal the centres lie on the outline; they belong to the polygon on the right of the edge.
    below = rasterise([[0, 0, 4, 4, 0, 4]], (4, 4))
    above = rasterise([[0, 0, 4, 0, 4, 4]], (4, 4))
    assert below.astype(int).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert (above == ~below).all()


def test_area_is_the_area_of_the_outline():
    for width in (4, 6, 12):
        outline = curved_vessel(width)
        mask = rasterise([outline], (128, 128))
        x, y = outline.T
        area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2  # shoelace formula
        assert mask.sum() == pytest.approx(area, rel=0.02)
        # The pixels of skimage are centred on whole numbers.
        assert (mask == polygon2mask((128, 128), outline[:, ::-1] - 0.5)).all()


def test_all_or_nothing():
    full, wide = [0, 0, 4, 0, 4, 4, 0, 4], [-9, -9, 99, -9, 99, 99, -9, 99]
    union = [[0, 0, 3, 0, 3, 4, 0, 4], [2, 0, 4, 0, 4, 4, 2, 4]]  # not an exclusive or
    for outlines in (union, [full], [full, full], [wide]):
        assert rasterise(outlines, (4, 4)).all()
    for polygon in (full * 2, [20, 20, 30, 20, 30, 30], [1, 1, 2, 2]):  # twice around: the even-odd rule
        assert not rasterise([polygon], (4, 4)).any()


def test_round_trip_keeps_holes_borders_and_single_pixels_without_needless_points():
    rng = np.random.default_rng(1)
    masks = [rng.random(rng.integers(1, 30, 2)) < rng.random() for _ in range(50)]
    masks += [rasterise([curved_vessel(width)], (128, 128)) for width in (1.5, 4, 8)]
    for mask in masks:
        polygons = mask_to_polygons(mask)
        assert len(polygons) == ndimage.label(mask, np.ones((3, 3)))[1]
        assert (rasterise(polygons, mask.shape) == mask).all()
    assert mask_to_polygons(np.zeros((5, 5), bool)) == []
    assert len(mask_to_polygons(np.pad(np.ones((10, 14), bool), 3))[0]) == 8  # four sides, four cut corners
    (polygon,) = mask_to_polygons(np.eye(3, dtype=bool))  # pixels that touch at a corner need no cut
    assert len(np.unique(polygon, axis=0)) == len(polygon)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "polygon 1 is a number, not a list"),
        ([0, 0, 4, 0, 4], "polygon 1 has 5 coordinates, an odd number"),
        ([0, 0, 10**400, 0, 4, 4], "polygon 1 holds 100000000000, not a finite number"),
        ([0, 0, "Li Ming", 0, 4, 4], "polygon 1 holds a text, not a number"),
        ([0, 0, True, 0, 4, 4], "polygon 1 holds true or false, not a number"),
        ([0, 0, 4, 0, 4, 4.5], "polygon 1 has y = 4.5, outside its image of 4×3 px"),
        ([0, 0, 4, -1.5, 9, 4], "polygon 1 has x = 9, outside"),  # x first
    ],
)
def test_errors_name_polygon_and_value(value, message):
    with pytest.raises(DataError, match=message):
        read_polygon(value, (4, 3), "polygon 1")
    empty = ([], [1, 1], [0, 0, 1, 1], [1, 0, 1, 4, 1, 2], [0, 0, 1, 1, 3, 3, 2, 2], [0, 0, 2, 1, 3, 3, 2, 1])
    assert [read_polygon(flat, (4, 4), "") for flat in empty] == [None] * len(empty)
    assert read_polygon([0, 0, 4, 0, 0, 4, 4, 4], (4, 4), "") is not None  # a bow: its lobes cancel out
    assert read_polygon([-1, -1, 5, -1, 5, 5], (4, 4), "").tolist() == [[-1, -1], [5, -1], [5, 5]]


HOLE = np.pad(~np.pad(np.ones((7, 7), bool), 1), 5)


@pytest.mark.parametrize(
    ("polygon", "expected"),
    [
        (curved_vessel(2), (False, False)),
        (curved_vessel(0.4), (True, False)),  # falls apart
        ([[3, 3.6], [60, 3.6], [60, 4.4]], (True, False)),  # between the centres of two rows: no pixel
        (np.tile([[5, 5], [40, 5], [40, 30], [5, 30]], (2, 1)), (False, True)),
        (np.concatenate([curved_vessel(5), curved_vessel(4.8)]), (False, True)),  # not quite the same
        (mask_to_polygons(HOLE)[0], (False, False)),
        ([[-1, -1], [-0.5, -1], [-0.5, 0]], (True, False)),  # outside
    ],
)
def test_outlines_that_are_thinner_than_a_pixel_or_traced_twice(polygon, expected):
    assert polygons.is_doubtful(np.array(polygon, np.float64), (128, 128)) == expected


def test_run_lengths_agree_with_pycocotools():
    rng = np.random.default_rng(0)
    for shape in [*rng.integers(1, 40, (200, 2)), (300, 700)]:
        mask = rng.random(shape) < rng.random()
        height, width = mask.shape
        plain = {"size": [height, width], "counts": polygons.RunLengths.encode(mask).runs.tolist()}
        packed = pycocotools_mask.frPyObjects(plain, height, width)
        assert packed | {"counts": packed["counts"].decode()} == encode_mask(mask)
        for value in (plain, encode_mask(mask)):
            runs = read_run_lengths(value, (width, height), "")
            assert (runs.decode() == mask).all()
            assert (rasterise([runs], mask.shape) == mask).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": "0P"}, "damaged or cut short"),
        ({"counts": "1"}, "do not fill the mask of 64×64 px"),
        ({"counts": [4096.0]}, "other things than whole numbers"),
        ({"counts": None}, "'counts' is null"),
        ({"size": [64, 63]}, "the run-length mask has 63×64 px, its image 64×64 px"),
        ({"size": "LI_MING"}, "the run-length mask has another size"),
    ],
)
def test_broken_run_lengths(change, message):
    with pytest.raises(DataError, match=message) as raised:
        read_run_lengths({"size": [64, 64], "counts": [4096]} | change, (64, 64), "annotation 2")
    assert raised.value.code == "bad_rle"
    assert str(raised.value).startswith("annotation 2: ")
    with pytest.raises(DataError, match=r"more than 33,554,432"):  # 4 GiB from 40 bytes
        read_run_lengths({"size": [65535, 65535], "counts": [65535**2]}, (65535, 65535), "annotation 2")
