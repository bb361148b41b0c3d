"""Vessels of a mask in numbers: length, widths, area, branch points and tortuosity."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from vesselrl.scoring.overlap import as_mask
from vesselrl.scoring.topology import topology

UNIT_PX = 512  # shorter side of the image in whose pixels the next two are given
SHORTEST_BRANCH_PX = 16.0  # shorter ones have no shape to speak of
STEP_PX = 4.0  # a branch is measured by points so far apart, so that its pixel staircase does not count
Row = dict[str, float | None]
LENGTHS = ("length", "mean_width", "max_width")
MEASUREMENTS = (*(f"{name}_px" for name in LENGTHS), "branch_points", "tortuosity")
IN_MM = tuple(f"{name}_mm" for name in LENGTHS)


def vessel_measurements(mask: Any) -> dict[str, float]:
    """The `MEASUREMENTS` of a mask, bool or 0/1 (H, W).

    - length_px: of the centreline, without spurs. Branches run between the middles of the places where they
      meet, by chords of 4 px; a free end reaches as far as the mask does.
    - mean_width_px: area over length. max_width_px: diameter of the largest disc inside the mask; outside the
      image is background.
    - branch_points: places where three or more branches meet.
    - tortuosity: sum of arcs over sum of chords of the branches of 16 px or more; 1 is straight. Of a closed
      branch one half counts; nan without any such branch.

    The 4 and 16 px are those of an image whose shorter side has 512 px. An empty mask has 0 of all, and no
    tortuosity.
    """
    mask = as_mask(mask)
    unit, radii = min(mask.shape) / UNIT_PX, disc_radii(mask)
    skeleton = without_spurs(topology(mask).skeleton, radii)
    paths = [*branches(skeleton)]
    ends = Counter(tuple(path[place]) for path, _ in paths for place in (0, -1))
    length = sum(arc(path, max(1, round(STEP_PX * unit))) for path, _ in paths)
    length += sum(radii[round(row), round(column)] for _, free in paths for row, column in free)
    return {
        "length_px": float(length),
        "mean_width_px": float(mask.sum() / length) if length else 0.0,
        "max_width_px": float(2 * radii.max()),
        "branch_points": float(sum(count > 2 for count in ends.values())),
        "tortuosity": tortuosity([path for path, _ in paths], unit),
    }


def measurement_row(found: Row, pixel_mm: float | None = None) -> Row:
    """Measurements for a table: rounded, None for nan, and with the side of a pixel lengths in mm."""
    row = {name: value and (None if math.isnan(value) else round(value, 4)) for name, value in found.items()}
    if pixel_mm is not None:
        row |= {f"{name}_mm": round(found[f"{name}_px"] * pixel_mm, 4) for name in LENGTHS}
    return row


def check_pixel_mm(pixel_mm: float | None) -> None:
    """Refuses a size of a pixel that is none."""
    if pixel_mm is not None and not 0 < pixel_mm < math.inf:
        raise ValueError(f"--pixel_mm is {pixel_mm}; give the side of a pixel in mm, such as 0.3.")


def disc_radii(mask: np.ndarray) -> np.ndarray:
    """Radius in px of the largest disc around each pixel of a bool mask (H, W) that stays inside it.

    Measured between pixels, half a pixel short of the background, and between their quarters, of which a
    vessel of an even width has as many to each side: the larger of the two.
    """

    def distance(pixels: np.ndarray) -> np.ndarray:
        padded = np.pad(pixels, 1).view(np.uint8)
        return cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]

    quarters = distance(mask.repeat(2, 0).repeat(2, 1)).reshape(mask.shape[0], 2, mask.shape[1], 2)
    return np.maximum(distance(mask) - 0.5, quarters.max((1, 3)) / 2)


def without_spurs(skeleton: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """A centreline without the free-ended branches that thinning leaves at corners of the outline.

    They are no longer than the half diagonal of a square as wide as the vessel where they begin.
    """
    while True:
        pruned = skeleton.copy()
        for path, free in branches(skeleton):
            if len(free) == 1:
                path = path if tuple(path[0]) == free[0] else path[::-1]  # from the free end
                meeting = tuple(np.round(path[-1]).astype(int))
                if arc(path, round(STEP_PX)) <= math.sqrt(2) * radii[meeting] + 1:
                    pruned[tuple(path[:-1].astype(int).T)] = False
        if np.array_equal(pruned, skeleton):
            return skeleton
        skeleton = topology(pruned).skeleton  # what is left of a meeting place is thin again


def branches(skeleton: np.ndarray) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """The paths between ends and meeting places of a centreline, bool (H, W), and the free ends of each.

    A path is (N, 2) float, row and column from pixel to pixel, with the middles of the places where it meets
    others. One that is closed comes in two halves.
    """
    from scipy.spatial import KDTree

    pixels = skeleton.astype(np.uint8)
    num_neighbours = cv2.filter2D(pixels, -1, np.ones((3, 3)), borderType=cv2.BORDER_CONSTANT) - pixels
    meeting = skeleton & (num_neighbours > 2)
    count, labels, _, middles = cv2.connectedComponentsWithStats(meeting.view(np.uint8), connectivity=8)
    labels, alone = np.pad(labels, 1), set(range(1, count))
    places = np.argwhere(skeleton & ~meeting)
    beside: list[list[int]] = [[] for _ in places]  # of each no more than two
    for one, other in KDTree(places).query_pairs(1.5) if len(places) else ():
        beside[one].append(other)
        beside[other].append(one)
    is_left = [True] * len(places)
    # From an end, where there is one.
    for first in sorted(range(len(places)), key=lambda place: (len(beside[place]), place)):
        if not is_left[first]:
            continue
        steps = [first]
        while steps[-1] is not None:
            is_left[steps[-1]] = False
            steps.append(next((place for place in beside[steps[-1]] if is_left[place]), None))
        path, is_ring = places[steps[:-1]], len(beside[first]) == 2
        if is_ring:
            path = np.concatenate([path, path[:1]])
        middle, free, ends = path.astype(float), [], []
        for row, column in (path[0], path[-1]):
            # A single pixel may join two places; elsewhere both ends may meet at one.
            near = {*labels[row : row + 3, column : column + 3].flat} - {0, *ends * (len(path) == 1)}
            ends.append(min(near, default=0))
            alone.discard(ends[-1])
            free += [] if ends[-1] or is_ring else [(row, column)]
        start, end = (middles[[one], ::-1] if one else middle[:0] for one in ends)
        whole = np.concatenate([start, middle, end])
        if not np.array_equal(whole[0], whole[-1]) or len(whole) == 1:
            yield whole, free
        elif len(whole) > 4:
            half = len(whole) // 2
            yield from [(whole[: half + 1], []), (whole[half:], [])]
        else:  # two pixels beside each other at an end are no loop
            yield whole[:-1], [tuple(path[-1])]
    for number in alone:
        middle = middles[number, ::-1]
        yield middle[None], [tuple(middle)] * 2


def arc(path: np.ndarray, step: int) -> float:
    """Length of a path (N, 2) by the chords between every so many of its points."""
    corners = np.concatenate([path[:-1:step], path[-1:]])
    return float(np.hypot(*np.diff(corners, axis=0).T).sum())


def tortuosity(paths: list[np.ndarray], unit: float) -> float:
    """Sum of arcs over sum of chords of the paths that are long enough; nan without any."""
    long = [path for path in paths if len(path) >= math.ceil(SHORTEST_BRANCH_PX * unit)]
    chords = sum(float(np.hypot(*(path[-1] - path[0]))) for path in long)
    return sum(arc(path, max(1, round(STEP_PX * unit))) for path in long) / chords if chords else math.nan
