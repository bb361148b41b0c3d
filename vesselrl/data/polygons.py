"""Outlines and masks: the only rasteriser of vesselrl, its inverse, and the reading of users' outlines.

Coordinates are those of COCO and LabelMe: x to the right, y down, in px, with (0, 0) at the outer corner of
the first pixel. The pixel in row r, column c covers [c, c+1) × [r, r+1); its centre is (c + 0.5, r + 0.5). A
pixel is foreground when its centre is inside the polygon, so a mask has the area of its outline.
`cv2.fillPoly` and `PIL.ImageDraw` also fill every pixel that the outline touches, which makes thin vessels
about one px wider.

Contours of `skimage.measure.find_contours` and `cv2.findContours` count from the centre of the first pixel:
add 0.5 to them, or use `mask_to_polygons`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.measure import find_contours

from vesselrl.errors import DataError

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class RunLengths:
    """A run-length mask of COCO: down the columns, background and vessel in turn, background first."""

    runs: np.ndarray  # uint32
    shape: tuple[int, int]  # (H, W)

    def decode(self) -> np.ndarray:
        """The mask as bool (H, W)."""
        is_vessel = np.arange(len(self.runs)) % 2 == 1
        return np.repeat(is_vessel, self.runs).reshape(self.shape, order="F")


@dataclass(frozen=True)
class Outlines:
    """A label as a layout gives it, in px of the image it was drawn on; all parts are one target."""

    polygons: tuple[np.ndarray, ...] = ()  # (N, 2) arrays of (x, y)
    rle: tuple[RunLengths, ...] = ()
    num_skipped: int = 0  # polygons with fewer than three points, which are left out

    def draw(self, shape: tuple[int, int]) -> np.ndarray:
        """The union of all parts as bool (H, W); polygons are in px of this shape."""
        mask = rasterise(self.polygons, shape)
        for rle in self.rle:
            mask |= resize_mask(rle.decode(), shape)
        return mask


# ---- Between polygons and masks


def rasterise(polygons: Iterable[np.ndarray | Sequence[float]], shape: tuple[int, int]) -> np.ndarray:
    """The union of polygons as a mask: a pixel is True when its centre is inside at least one of them.

    A polygon that crosses itself is filled by the even-odd rule. A centre on the outline belongs to the
    polygon on its right (below, at a horizontal edge), so neighbours neither overlap nor leave a gap.

    Args:
        polygons: each an (N, 2) array of (x, y) or a flat [x1, y1, x2, y2, …], in px from the image corner;
            parts outside the image are cut off. None of them: an empty mask.
        shape: (H, W) of the mask.

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
    Points on a straight line are left out. A hole is joined to its component by a cut of zero width, since a
    union of outlines would fill it. Rasterisers of the even-odd kind, this one and pycocotools among them,
    keep the hole. Programs that also draw the outline mark the cut; give those the mask as PNG.

    Args:
        mask: bool (H, W). An empty mask gives an empty list.

    >>> mask_to_polygons(np.array([[False, False], [False, True]]))[0].tolist()
    [[1.5, 2.0], [1.0, 1.5], [1.5, 1.0], [2.0, 1.5]]
    """
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    polygons = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        part = np.pad(labels[rows, columns] == label, 1).astype(np.float64)
        # From the centre of the padded first pixel to the corner of the real one: −1 + 0.5.
        offset = np.array([columns.start, rows.start]) - 0.5
        contours = find_contours(part, 0.5, fully_connected="high")
        rings = [_drop_straight(ring[:-1, ::-1] + offset) for ring in contours]
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
    """Polygons of an image of `old` (width, height) px, for the same image in the size `new`.

    >>> scale_polygons([np.array([[800.0, 400.0]])], (800, 800), (512, 512))[0].tolist()
    [[512.0, 256.0]]
    """
    factors = np.array(new, np.float64) / np.array(old, np.float64)
    return tuple(polygon * factors for polygon in polygons)


def resize_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A bool mask in another (H, W): its outlines are scaled and drawn; an empty mask stays empty."""
    if mask.shape == tuple(shape):
        return mask
    return rasterise(scale_polygons(mask_to_polygons(mask), mask.shape[::-1], shape[::-1]), shape)


# ---- Outlines in users' files


def read_polygon(flat: object, size: Size, where: str) -> np.ndarray | None:
    """A polygon `[x1, y1, x2, y2, …]` as an (N, 2) array; None where it has fewer than three points.

    Raises:
        DataError: no list, no pairs of finite numbers, or one more than 1 px outside the image of this size.
    """
    if not isinstance(flat, list):
        raise DataError(f"{where} is {describe(flat)}, not a list. Correct it, or remove it.", "bad_polygon")
    for value in flat:
        is_number = type(value) in (int, float)
        # True of NaN and infinity as well; larger integers do not fit into a float.
        if not is_number or not abs(value) < 1e300:
            found = f"{str(value)[:12]}, not a finite" if is_number else f"{describe(value)}, not a"
            message = f"{where} holds {found} number. Correct it, or remove the polygon."
            raise DataError(message, "bad_polygon")
    if len(flat) % 2:
        message = f"{where} has {len(flat)} coordinates, an odd number. Write pairs of x and y, or remove it."
        raise DataError(message, "odd_length")
    points = np.array(flat, np.float64).reshape(-1, 2)
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


def read_run_lengths(value: dict, size: Size, where: str) -> RunLengths:
    """A run-length mask `{"size": [H, W], "counts": …}`, compressed (a text) or plain (a list of numbers).

    Raises:
        DataError: a field is missing or wrong, the size differs, or the runs do not fill the mask.
    """
    shape, counts, (width, height) = value.get("size"), value.get("counts"), size

    def refuse(fault: str) -> DataError:
        return DataError(f"{where}: {fault}. Write it again, or remove it.", "bad_rle")

    if shape != [height, width]:
        is_size = isinstance(shape, list) and all(type(n) is int for n in shape[:2])
        shown = "×".join(str(n) for n in shape[1::-1]) + " px" if is_size else "another size"
        raise refuse(f"the run-length mask has {shown}, its image {width}×{height} px")
    if isinstance(counts, str):
        runs = _decompress(counts, refuse)
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        runs = counts
    else:
        kind = "a list with other things than whole numbers" if isinstance(counts, list) else describe(counts)
        raise refuse(f"'counts' is {kind}, not a text or a list of run lengths")
    if any(run < 0 for run in runs) or sum(runs) != width * height:
        raise refuse(f"the runs do not fill the mask of {width}×{height} px")
    return RunLengths(np.array(runs, np.uint32), (height, width))


def _decompress(text: str, refuse: Callable[[str], DataError]) -> list[int]:
    """The run lengths in a text of 6-bit characters: five bits of a number each, the sixth means "goes on".

    From the fourth on, a number is the difference to the one before the last.
    """
    runs: list[int] = []
    number = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 40:
            raise refuse("'counts' is damaged")
        number |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:  # negative
                number -= 1 << shift
            runs.append(number + runs[-2] if len(runs) > 2 else number)
            number = shift = 0
    if shift:
        raise refuse("'counts' is cut short")
    return runs


def describe(value: object) -> str:
    """The kind of a JSON value in words, without its content (a text may carry a name)."""
    names = {dict: "an object", str: "a text", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
