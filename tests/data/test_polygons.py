import numpy as np
import pytest
from scipy import ndimage
from skimage.draw import polygon2mask

from vesselrl.data.polygons import mask_to_polygons, parse_polygons, rasterise
from vesselrl.errors import DataError


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def winding_number(polygon, x, y):
    """Turns of the outline around a point, by the sum of angles: another method than counting crossings."""
    rays = polygon - [x, y]
    angles = np.arctan2(rays[:, 1], rays[:, 0])
    steps = np.diff(np.append(angles, angles[0]))
    return round(((steps + np.pi) % (2 * np.pi) - np.pi).sum() / (2 * np.pi))


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


def test_agrees_with_the_angle_test_on_random_polygons():
    rng = np.random.default_rng(0)
    for _ in range(20):
        polygon = rng.uniform(-3, 15, (3, 2))
        mask = rasterise([polygon], (12, 11))
        for row, column in np.ndindex(mask.shape):
            assert mask[row, column] == (winding_number(polygon, column + 0.5, row + 0.5) != 0)


def test_agrees_with_skimage_whose_pixels_are_centred_on_whole_numbers():
    outline = curved_vessel(4)
    assert (rasterise([outline], (128, 128)) == polygon2mask((128, 128), outline[:, ::-1] - 0.5)).all()


@pytest.mark.parametrize("width", [4, 6, 12])
def test_area_is_the_area_of_the_outline(width):
    outline = curved_vessel(width)
    x, y = outline.T
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2  # shoelace formula
    assert rasterise([outline], (128, 128)).sum() == pytest.approx(area, rel=0.02)


def test_union_not_exclusive_or():
    left, right = [0, 0, 3, 0, 3, 2, 0, 2], [2, 0, 5, 0, 5, 2, 2, 2]
    assert rasterise([left, right], (2, 5)).all()


def test_crossing_outline_is_filled_by_the_even_odd_rule():
    twice_around = [0, 0, 4, 0, 4, 4, 0, 4] * 2
    assert not rasterise([twice_around], (4, 4)).any()


def test_outside_is_cut_off_and_nothing_is_empty():
    assert rasterise([[-9, -9, 99, -9, 99, 99, -9, 99]], (3, 4)).all()
    assert not rasterise([[20, 20, 30, 20, 30, 30]], (3, 4)).any()
    assert not rasterise([], (3, 4)).any()
    assert not rasterise([[1, 1, 2, 2]], (3, 4)).any()


@pytest.mark.parametrize("width", [1.5, 4, 8])
def test_round_trip_of_a_thin_vessel_is_exact(width):
    mask = rasterise([curved_vessel(width)], (128, 128))
    again = rasterise(mask_to_polygons(mask), mask.shape)
    assert dice(again, mask) == 1


def test_round_trip_keeps_holes_borders_and_single_pixels():
    rng = np.random.default_rng(1)
    for _ in range(50):
        mask = rng.random(rng.integers(1, 30, 2)) < rng.random()
        assert (rasterise(mask_to_polygons(mask), mask.shape) == mask).all()
    ring = np.ones((9, 9), bool)
    ring[3:6, 3:6] = False
    ring[4, 4] = True
    polygons = mask_to_polygons(ring)
    assert len(polygons) == 2  # the ring with its cut, and the dot inside
    assert (rasterise(polygons, ring.shape) == ring).all()


def test_one_polygon_for_each_component_and_none_for_an_empty_mask():
    mask = np.random.default_rng(2).random((40, 40)) < 0.3
    assert len(mask_to_polygons(mask)) == ndimage.label(mask, np.ones((3, 3)))[1]
    assert mask_to_polygons(np.zeros((5, 5), bool)) == []


def test_pixels_that_touch_at_a_corner_need_no_cut():
    (polygon,) = mask_to_polygons(np.eye(3, dtype=bool))
    assert len(np.unique(polygon, axis=0)) == len(polygon)


def test_outline_has_no_needless_points():
    mask = np.zeros((20, 20), bool)
    mask[5:15, 3:17] = True
    assert len(mask_to_polygons(mask)[0]) == 8  # four sides and four cut corners


SQUARE = [0, 0, 4, 0, 4, 4, 0, 4]


@pytest.mark.parametrize(
    "value", [[SQUARE], [[SQUARE]], [SQUARE, SQUARE], [[SQUARE], [SQUARE]], [SQUARE, [SQUARE]]]
)
def test_both_nestings(value):
    polygons, num_skipped = parse_polygons(value, (4, 4), "record 0")
    assert num_skipped == 0
    assert rasterise(polygons, (4, 4)).all()


def test_polygons_that_enclose_nothing_are_counted():
    polygons, num_skipped = parse_polygons([[1, 1], SQUARE, [0, 0, 1, 1], []], (4, 4), "record 0")
    assert (len(polygons), num_skipped) == (1, 3)
    assert parse_polygons([], (4, 4), "record 0") == ((), 0)


def test_one_pixel_outside_is_tolerated():
    polygons, _ = parse_polygons([[-1, -1, 5, -1, 5, 5]], (4, 4), "record 0")
    assert len(polygons) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[0, 0, 4, 0, 4]], "record 5: polygon 0 has 5 coordinates, an odd number"),
        ([SQUARE, [0, 0, 4, 0, 4, float("nan")]], "record 5: polygon 1 holds nan, not a finite number"),
        ([[0, 0, float("inf"), 0, 4, 4]], "record 5: polygon 0 holds inf, not a finite number"),
        ([[0, 0, 10**400, 0, 4, 4]], "record 5: polygon 0 holds 100000000000, not a finite number"),
        ([[0, 0, None, 0, 4, 4]], "record 5: polygon 0 holds null, not a number"),
        ([[0, 0, "Li Ming", 0, 4, 4]], "record 5: polygon 0 holds a text, not a number"),
        ([[0, 0, True, 0, 4, 4]], "record 5: polygon 0 holds true or false, not a number"),
        ([[0, 0, 5.5, 0, 4, 4]], "record 5: polygon 0 has x = 5.5, outside its image of 4×3 px"),
        ([[0, 0, 4, 0, 4, 4.5]], "record 5: polygon 0 has y = 4.5, outside its image of 4×3 px"),
        ([[0, 0, 4, 0, 4, -1.5]], "record 5: polygon 0 has y = -1.5, outside"),
        ([[[0, 0], [4, 0], [4, 4]]], "record 5: 'mask' holds points as [x, y] pairs"),
        ([0, 0, 4, 0, 4, 3], "record 5: 'mask' holds a number where a polygon was expected"),
        ([[0, 0, [4, 0], 4, 3]], "record 5: 'mask' mixes numbers and lists"),
        ([[[[0, 0, 4, 0, 4, 3]]]], "record 5: polygon 0 holds a list, not a number"),
        ({"counts": "", "size": [3, 4]}, "record 5: 'mask' is an object, not a list of polygons"),
        ("Li Ming.png", "record 5: 'mask' is a text, not a list of polygons"),
        (None, "record 5: 'mask' is null, not a list of polygons"),
    ],
)
def test_errors_name_record_polygon_and_value(value, message):
    with pytest.raises(DataError) as raised:
        parse_polygons(value, (4, 3), "record 5")
    assert message in str(raised.value)
    assert "Li Ming" not in str(raised.value)
    assert "\n" not in str(raised.value)
