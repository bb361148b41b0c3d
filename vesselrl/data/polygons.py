"""Polygons and masks: the only rasteriser of vesselrl, its inverse, and the reader of the `mask` field.

Coordinates are those of COCO and LabelMe: x to the right, y down, in px, with (0, 0) at the outer corner of
the first pixel. The pixel in row r, column c covers [c, c+1) × [r, r+1); its centre is (c + 0.5, r + 0.5). A
pixel is foreground when its centre is inside the polygon, so a mask has the area of its outline.
`cv2.fillPoly` and `PIL.ImageDraw` also fill every pixel that the outline touches, which makes thin vessels
about one px wider.

Contours of `skimage.measure.find_contours` and `cv2.findContours` count from the centre of the first pixel:
add 0.5 to them, or use `mask_to_polygons`.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import ndimage
from skimage.measure import find_contours

from vesselrl.errors import DataError

Size = tuple[int, int]  # width, height
OnError = Callable[[DataError], None]


def rasterise(polygons: Iterable[np.ndarray | Sequence[float]], shape: tuple[int, int]) -> np.ndarray:
    """The union of polygons as a mask: a pixel is True when its centre is inside at least one of them.

    A polygon that crosses itself is filled by the even-odd rule. A centre on the outline belongs to the
    polygon on its right (below, at a horizontal edge), so neighbours with a common edge neither overlap
    nor leave a gap.

    Args:
        polygons: each an (N, 2) array of (x, y) or a flat [x1, y1, x2, y2, …], in px from the image corner.
            Parts outside the image are cut off. No polygons give an empty mask.
        shape: (H, W) of the mask.

    Returns:
        Bool (H, W).

    >>> rasterise([[1, 1, 4, 1, 4, 3, 1, 3]], (4, 5)).astype(int)
    array([[0, 0, 0, 0, 0],
           [0, 1, 1, 1, 0],
           [0, 1, 1, 1, 0],
           [0, 0, 0, 0, 0]])
    """
    mask = np.zeros(shape, bool)
    for polygon in polygons:
        _fill(mask, np.asarray(polygon, np.float64).reshape(-1, 2))
    return mask


def _fill(mask: np.ndarray, points: np.ndarray) -> None:
    """Adds one polygon to `mask`, from the places where its edges cross the centre line of each row."""
    height, width = mask.shape
    ends = np.roll(points, -1, axis=0)
    downwards = (points[:, 1] <= ends[:, 1])[:, None]
    top, bottom = np.where(downwards, points, ends), np.where(downwards, ends, points)

    # Rows whose centre line y satisfies top <= y < bottom: a vertex on the line counts once.
    first = np.clip(np.ceil(top[:, 1] - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(bottom[:, 1] - 0.5), 0, height).astype(np.int64)
    num_rows = last - first
    if not num_rows.any():
        return
    edge = np.repeat(np.arange(len(points)), num_rows)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows) + first[edge]

    # From each crossing to the right, inside and outside change places.
    share = (row + 0.5 - top[edge, 1]) / (bottom[edge, 1] - top[edge, 1])
    x = top[edge, 0] + share * (bottom[edge, 0] - top[edge, 0])
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    start, stop = row.min(), row.max() + 1
    cell = (row - start) * (width + 1) + column
    crossings = np.bincount(cell, minlength=(stop - start) * (width + 1)).reshape(stop - start, width + 1)
    mask[start:stop] |= np.cumsum(crossings[:, :width], axis=1) % 2 == 1


def mask_to_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """The outlines of a mask, without loss: `rasterise(mask_to_polygons(mask), mask.shape)` equals the mask.

    One polygon for each 8-connected component, drawn half-way between foreground and background pixels.
    Points on a straight line are left out. The format has no holes, and a union of outlines would fill them:
    here a hole is joined to its component by a cut of zero width. Rasterisers of the even-odd kind, this one
    and pycocotools among them, keep the hole. Programs that also draw the outline mark the cut; give those
    the mask as PNG.

    Args:
        mask: bool (H, W). An empty mask gives an empty list.

    Returns:
        (N, 2) float arrays of (x, y), all multiples of 0.5 px from the image corner.

    >>> mask_to_polygons(np.array([[False, False], [False, True]]))[0].tolist()
    [[1.5, 2.0], [1.0, 1.5], [1.5, 1.0], [2.0, 1.5]]
    """
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    polygons = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        part = np.pad(labels[rows, columns] == label, 1).astype(np.float64)
        # From the centre of the padded first pixel to the corner of the real one: −1 + 0.5.
        offset = np.array([columns.start, rows.start]) - 0.5
        rings = [
            _drop_straight(ring[:-1, ::-1] + offset)
            for ring in find_contours(part, 0.5, fully_connected="high")
        ]
        polygon = rings[0]
        for hole in rings[1:]:
            polygon = np.concatenate([polygon, rings[0][:1], hole, hole[:1]])
        polygons.append(polygon)
    return polygons


def _drop_straight(ring: np.ndarray) -> np.ndarray:
    """The closed ring without the corners at which it does not turn."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def scale_polygons(polygons: Iterable[np.ndarray], old: Size, new: Size) -> tuple[np.ndarray, ...]:
    """Polygons that were drawn on an image of the size `old`, for the same image in the size `new`.

    Args:
        polygons: (N, 2) arrays of (x, y) in px.
        old: (width, height) in px.
        new: (width, height) in px.

    >>> scale_polygons([np.array([[800.0, 400.0]])], (800, 800), (512, 512))[0].tolist()
    [[512.0, 256.0]]
    """
    factors = np.array(new, np.float64) / np.array(old, np.float64)
    return tuple(polygon * factors for polygon in polygons)


def resize_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask in another size: its outlines are scaled and drawn by `rasterise`; an empty mask stays empty.

    Args:
        mask: bool (H, W).
        shape: (H, W) of the result.
    """
    if mask.shape == tuple(shape):
        return mask
    return rasterise(scale_polygons(mask_to_polygons(mask), mask.shape[::-1], shape[::-1]), shape)


def parse_polygons(
    value: object, size: Size, record: str, on_error: OnError | None = None
) -> tuple[tuple[np.ndarray, ...], int]:
    """Reads the `mask` field of a record: flat polygons, or objects that hold flat polygons.

    Polygons with fewer than three points enclose nothing: they are left out and counted.

    Args:
        value: `[[x1, y1, x2, y2, …], …]`, or one level deeper.
        size: (width, height) of the image in px; a coordinate may lie up to 1 px outside.
        record: how messages name the record.
        on_error: gets the error of each broken polygon, which is then left out; None: the first is raised.

    Returns:
        The polygons as (N, 2) arrays, and how many had too few points.

    Raises:
        DataError: the field is something else, or a polygon has an odd number of coordinates, a value that
            is not a finite number, or one outside the image; the message names record, polygon and value.
    """
    polygons, num_skipped = [], 0
    for number, flat in enumerate(_flatten(value, record)):
        try:
            points = read_outline(flat, size, f"{record}: polygon {number}")
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        if points is None:
            num_skipped += 1
        else:
            polygons.append(points)
    return tuple(polygons), num_skipped


def read_outline(flat: object, size: Size, where: str) -> np.ndarray | None:
    """One flat polygon as an (N, 2) array; None where it has fewer than three points.

    Args:
        flat: `[x1, y1, x2, y2, …]`.
        size: (width, height) of the image in px; a coordinate may lie up to 1 px outside.
        where: how the message names the polygon.

    Raises:
        DataError: as `parse_polygons`.
    """
    points = _parse_flat(flat, where)
    if len(points) < 3:
        return None
    for axis, (name, limit) in enumerate(zip("xy", size, strict=True)):
        outside = points[(points[:, axis] < -1) | (points[:, axis] > limit + 1), axis]
        if len(outside):
            raise DataError(
                f"{where} has {name} = {outside[0]:g}, outside its image of {size[0]}×{size[1]} px. Write "
                "the size it was drawn on into the record (imageWidth, imageHeight), or remove the record.",
                "outside_image",
            )
    return points


def _flatten(value: object, record: str) -> list[list]:
    """The flat polygons of a `mask` field of either nesting."""
    if not isinstance(value, list):
        raise DataError(
            f"{record}: 'mask' is {describe(value)}, not a list of polygons. "
            "Write [[x1, y1, x2, y2, ...], ...], or put the mask as a PNG file into masks/.",
            "bad_record",
        )
    polygons = []
    for item in value:
        if not isinstance(item, list):
            raise DataError(
                f"{record}: 'mask' holds {describe(item)} where a polygon was expected. "
                "Write [[x1, y1, x2, y2, ...], ...], with one more pair of brackets than a single polygon.",
                "bad_polygon",
            )
        if not any(isinstance(part, list) for part in item):
            polygons.append(item)
            continue
        if not all(isinstance(part, list) for part in item):
            raise DataError(
                f"{record}: 'mask' mixes numbers and lists in one polygon. Write [x1, y1, x2, y2, ...].",
                "bad_polygon",
            )
        if len(item) > 2 and all(len(part) == 2 for part in item):
            raise DataError(
                f"{record}: 'mask' holds points as [x, y] pairs. "
                "Write each polygon flat: [x1, y1, x2, y2, ...].",
                "bad_polygon",
            )
        polygons.extend(item)
    return polygons


def _parse_flat(flat: object, where: str) -> np.ndarray:
    """One flat polygon as an (N, 2) array."""
    if not isinstance(flat, list):
        raise DataError(f"{where} is {describe(flat)}, not a list. Correct it, or remove it.", "bad_polygon")
    for value in flat:
        if type(value) not in (int, float):
            raise DataError(
                f"{where} holds {describe(value)}, not a number. Correct it, or remove the polygon.",
                "bad_polygon",
            )
        if not abs(value) < 1e300:  # also true of NaN and infinity; larger integers do not fit into a float
            raise DataError(
                f"{where} holds {str(value)[:12]}, not a finite number. Correct it, or remove the polygon.",
                "bad_polygon",
            )
    if len(flat) % 2:
        raise DataError(
            f"{where} has {len(flat)} coordinates, an odd number. "
            "Write pairs of x and y, or remove the polygon.",
            "odd_length",
        )
    return np.array(flat, np.float64).reshape(-1, 2)


def describe(value: object) -> str:
    """What a JSON value is, in words, without its content (a text may carry a name)."""
    names = {dict: "an object", str: "a text", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
