"""Outlines and masks: the only rasteriser of vesselrl, its inverse, and the reading of users' outlines.

Coordinates are (x, y) in px as in COCO and LabelMe: pixel (r, c) has its centre at (c + 0.5, r + 0.5).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from scipy import ndimage
from skimage.measure import find_contours

from vesselrl.data.images import check_pixels
from vesselrl.errors import DataError

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class RunLengths:
    """A run-length mask of COCO: down the columns, background and vessel in turn, background first."""

    runs: np.ndarray  # uint32
    shape: tuple[int, int]  # (H, W)

    @classmethod
    def encode(cls, mask: np.ndarray) -> "RunLengths":
        """The run lengths of a bool mask (H, W)."""
        changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
        return cls(np.diff(changes, prepend=0, append=mask.size).astype(np.uint32), mask.shape)

    def decode(self) -> np.ndarray:
        """The mask as bool (H, W)."""
        is_vessel = np.arange(len(self.runs)) % 2 == 1
        return np.repeat(is_vessel, self.runs).reshape(self.shape, order="F")


Outline = np.ndarray | RunLengths  # a polygon: (N, 2) of (x, y)


def rasterise(outlines: Iterable[Outline | Sequence[float]], shape: tuple[int, int]) -> np.ndarray:
    """The union of outlines as a mask (H, W): a pixel is True when its centre is inside at least one of them.

    So a mask has the area of its outline, where `cv2.fillPoly` and `PIL.ImageDraw` make thin vessels about
    one px wider. A polygon that crosses itself is filled by the even-odd rule; a centre on the outline
    belongs to the polygon on its right (below, at a horizontal edge). Polygons are arrays (N, 2) or flat
    [x1, y1, …] in px of this shape, and cut off outside of it. Run lengths are scaled to it.

    >>> rasterise([[1, 1, 4, 1, 4, 3, 1, 3]], (3, 5)).astype(int)
    array([[0, 0, 0, 0, 0],
           [0, 1, 1, 1, 0],
           [0, 1, 1, 1, 0]])
    """
    mask = np.zeros(shape, bool)
    for outline in outlines:
        if isinstance(outline, RunLengths):
            mask |= resize_mask(outline.decode(), shape)
        else:
            rows, turns = _turns(np.asarray(outline, np.float64).reshape(-1, 2), shape)
            mask[rows] |= (turns & 1).astype(bool)
    return mask


def is_doubtful(polygon: np.ndarray, shape: tuple[int, int]) -> tuple[bool, bool]:
    """Whether a polygon in an image of this shape is thinner than a pixel, and whether it lies on itself.

    Too thin: no pixel, or several components with less than 90 % in the largest. On itself: the even-odd rule
    leaves less than half of what has a winding number other than 0, as where a ring is traced twice.
    """
    low = np.clip(np.floor(polygon.min(axis=0)), 0, shape[::-1]).astype(int)
    high = np.clip(np.ceil(polygon.max(axis=0)), low, shape[::-1]).astype(int)
    width, height = high - low
    points = polygon - low
    inside = (_turns(points, (height, width))[1] & 1).astype(np.uint8)
    (x, y), num_pixels = points.T, np.count_nonzero(inside)
    is_thin = _falls_apart(inside)
    # The signed area counts every turn; the winding numbers themselves take longer.
    if not is_thin and abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) < 3 * num_pixels:
        return False, False
    wound = (_turns(points, (height, width), signed=True)[1] != 0).astype(np.uint8)
    is_twice = 2 * num_pixels < np.count_nonzero(wound)
    return _falls_apart(wound) if is_twice else is_thin, is_twice


def _falls_apart(mask: np.ndarray) -> bool:
    """Whether a uint8 mask is empty, or less than 90 % of it are in its largest component."""
    if (num_labels := cv2.connectedComponents(mask)[0] if mask.size else 1) < 3:  # the background is one
        return num_labels == 1
    sizes = cv2.connectedComponentsWithStats(mask)[2][1:, cv2.CC_STAT_AREA]
    return bool(sizes.max() < 0.9 * sizes.sum())


def _turns(points: np.ndarray, shape: tuple[int, int], signed: bool = False) -> tuple[slice, np.ndarray]:
    """The rows in which a polygon lies, and how often its edges are crossed from the left up to each pixel.

    It follows from where the edges cross the centre line of each row. If `signed` it is the winding number:
    an edge that leads upwards takes away what one that leads downwards adds.
    """
    height, width = shape
    ends = np.roll(points, -1, axis=0)
    downwards = (points[:, 1] <= ends[:, 1])[:, None]
    top, bottom = np.where(downwards, points, ends), np.where(downwards, ends, points)
    # Rows whose centre line y satisfies top <= y < bottom: a vertex on the line counts once.
    first = np.clip(np.ceil(top[:, 1] - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(bottom[:, 1] - 0.5), 0, height).astype(np.int64)
    num_rows = last - first
    if not num_rows.any():
        return slice(0), np.zeros((0, width), np.int64)
    edge = np.repeat(np.arange(len(points)), num_rows)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows) + first[edge]
    # From each crossing to the right, inside and outside change places.
    share = (row + 0.5 - top[edge, 1]) / (bottom[edge, 1] - top[edge, 1])
    x = top[edge, 0] + share * (bottom[edge, 0] - top[edge, 0])
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    start, stop = row.min(), row.max() + 1
    cell = (row - start) * (width + 1) + column
    signs = np.where(downwards, 1, -1)[edge, 0] if signed else None
    crossings = np.bincount(cell, signs, (stop - start) * (width + 1)).reshape(stop - start, width + 1)
    return slice(start, stop), np.cumsum(crossings[:, :width], axis=1)


def mask_to_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """The outlines of a bool mask, without loss: `rasterise(mask_to_polygons(mask), mask.shape)` equals it.

    One polygon for each 8-connected component, drawn half-way between foreground and background pixels. A
    hole is joined to its component by a cut of zero width, since a union of outlines would fill it;
    rasterisers of the even-odd kind, this one and pycocotools among them, keep the hole.
    """
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    polygons = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        part = np.pad(labels[rows, columns] == label, 1).astype(np.float64)
        # `find_contours` counts from the centre of the padded first pixel: −1 + 0.5.
        offset = np.array([columns.start, rows.start]) - 0.5
        rings = []
        for contour in find_contours(part, 0.5, fully_connected="high"):
            ring = contour[:-1, ::-1] + offset
            before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
            rings.append(ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]])  # corners that turn
        polygon = rings[0]
        for hole in rings[1:]:
            polygon = np.concatenate([polygon, rings[0][:1], hole, hole[:1]])
        polygons.append(polygon)
    return polygons


def scale_polygons(outlines: Iterable[Outline], old: Size, new: Size) -> tuple[Outline, ...]:
    """Polygons of an image of `old` (width, height) px, for the same image in the size `new`."""
    factors = np.array(new, np.float64) / np.array(old, np.float64)
    return tuple(o if isinstance(o, RunLengths) else o * factors for o in outlines)


def resize_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A bool mask in another (H, W): its outlines are scaled and drawn; an empty mask stays empty."""
    if mask.shape == tuple(shape):
        return mask
    return rasterise(scale_polygons(mask_to_polygons(mask), mask.shape[::-1], shape[::-1]), shape)


def read_polygon(flat: object, size: Size, where: str) -> np.ndarray | None:
    """A polygon `[x1, y1, …]`, at most 1 px outside its image, as (N, 2); None if it encloses nothing."""
    if not isinstance(flat, list):
        raise DataError(f"{where} is {describe(flat)}, not a list. Correct it, or remove it.", "bad_polygon")
    for value in flat:
        is_number = type(value) in (int, float)
        # True of NaN and infinity as well; larger integers do not fit into a float.
        if not is_number or not abs(value) < 1e300:
            found = f"{str(value)[:12]}, not a finite" if is_number else f"{describe(value)}, not a"
            fault = f"{where} holds {found} number. Correct it, or remove the polygon."
            raise DataError(fault, "bad_polygon")
    if len(flat) % 2:
        fault = f"{where} has {len(flat)} coordinates, an odd number. Write pairs of x and y, or remove it."
        raise DataError(fault, "odd_length")
    points = np.array(flat, np.float64).reshape(-1, 2)
    if len(points) < 3:
        return None
    outside = (points < -1) | (points > np.array(size) + 1)
    for axis, row in np.argwhere(outside.T)[:1]:
        value = f"{where} has {'xy'[axis]} = {points[row, axis]:g}"
        advice = "Write the size it was drawn on (imageWidth, imageHeight) into the record, or remove that."
        fault = f"{value}, outside its image of {size[0]}×{size[1]} px. {advice}"
        raise DataError(fault, "outside_image")
    return points if _has_area(points) else None


def _has_area(points: np.ndarray) -> bool:
    """Whether a polygon encloses anything; a line there and back does not."""
    extent = np.ptp(points, axis=0)
    if not extent.all():
        return False
    points = (points - points.min(axis=0)) / extent
    x, y = points.T
    if abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) > 1e-6:
        return True
    # Two lobes of opposite direction may cancel out, so it is drawn.
    return bool((_turns(points * 256, (256, 256))[1] & 1).any())


def circle(points: list, size: Size, where: str) -> list[list[float]]:
    """A circle, by its centre and a point on it, as a polygon of the same area, cut off at the border."""
    read_polygon([value for point in points for value in (*point, *point)], size, where)  # numbers
    (x, y), (right, bottom) = points
    step = 2 * math.pi / 180
    radius = math.hypot(right - x, bottom - y) * math.sqrt(step / math.sin(step))
    corners = ((x + radius * math.cos(k * step), y + radius * math.sin(k * step)) for k in range(180))
    return [[min(max(a, 0), size[0]), min(max(b, 0), size[1])] for a, b in corners]


def read_run_lengths(value: dict, size: Size, where: str) -> RunLengths:
    """A run-length mask `{"size": [H, W], "counts": …}`, compressed (a text) or plain (a list of numbers)."""
    shape, counts, (width, height) = value.get("size"), value.get("counts"), size
    check_pixels(size, where)
    counts = _decompress(counts) if isinstance(counts, str) else counts
    if shape != [height, width]:
        is_size = isinstance(shape, list) and all(type(n) is int for n in shape[:2])
        shown = "×".join(str(n) for n in shape[1::-1]) + " px" if is_size else "another size"
        fault = f"the run-length mask has {shown}, its image {width}×{height} px"
    elif not isinstance(counts, list):
        fault = f"'counts' is {describe(counts)}, not a text or a list of run lengths"
    elif any(type(run) is not int for run in counts):
        fault = "'counts' holds other things than whole numbers, or its text is damaged or cut short"
    elif any(run < 0 for run in counts) or sum(counts) != width * height:
        fault = f"the runs do not fill the mask of {width}×{height} px"
    else:
        return RunLengths(np.array(counts, np.uint32), (height, width))
    raise DataError(f"{where}: {fault}. Write it again, or remove it.", "bad_rle")


def _decompress(text: str) -> list[int | None]:
    """The run lengths in a text of 6-bit characters: five bits of a number each, the sixth means "goes on".

    From the fourth on, a number is the difference to the one before the last. A broken text gives [None].
    """
    runs: list[int | None] = []
    number = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 40:
            return [None]
        number |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:  # negative
                number -= 1 << shift
            runs.append(number + runs[-2] if len(runs) > 2 else number)
            number = shift = 0
    return [None] if shift else runs


def describe(value: object) -> str:
    """The kind of a JSON value in words, without its content (a text may carry a name)."""
    names = {dict: "an object", str: "a text", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
