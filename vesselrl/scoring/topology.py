"""The shape of a mask in five numbers: centreline length, pieces, loops, ends and junctions.

Two implementations give the same answers, bit for bit:

- `numba` visits only the foreground pixels (compiled on first use, releases the GIL, so threads scale);
- `plain` composes scikit-image, OpenCV and NumPy, for machines where numba cannot be imported.

The definitions are fixed in `METRIC_SPEC`, which is stored with every result. Nothing heavy is imported until
the first mask is measured. Callers that run many threads should limit OpenCV's own: `cv2.setNumThreads(1)`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vesselrl.scoring.masks import as_mask

logger = logging.getLogger(__name__)

# What every number in this package means. Raise `version` whenever a definition changes.
METRIC_SPEC: dict[str, Any] = {
    "version": 1,
    "skeleton": "guo_hall",
    "foreground_connectivity": 8,
    "background_connectivity": 4,
    "padding": "background",
    "length": "skeleton pixels",
    "end": "skeleton pixel with exactly one 8-neighbour",
    "junction": "8-connected cluster of skeleton pixels with crossing number >= 3",
}

BACKENDS = ("auto", "numba", "plain")

# The eight neighbours of a pixel, counter-clockwise from the east, as (row, column) steps. Neighbour k owns
# bit k of a "neighbourhood code" (0..255); the opposite neighbour owns bit (k + 4) % 8.
NEIGHBOURS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


@dataclass(frozen=True, eq=False)
class Topology:
    """Centreline and shape counts of one mask.

    All counts of an empty mask are 0.
    """

    # bool (H, W), one pixel wide; a subset of the mask with the same pieces and loops
    skeleton: np.ndarray
    # number of skeleton pixels, in pixels
    length_px: int
    # 8-connected pieces (Betti number 0)
    num_components: int
    # holes of background, 4-connected, that the foreground encloses (Betti number 1)
    num_loops: int
    # skeleton pixels with exactly one 8-neighbour
    num_ends: int
    # clusters of skeleton pixels where three or more branches meet
    num_junctions: int
    # thinning algorithm: "guo_hall", or "zhang" from `prototype_topology`
    thinning: str = "guo_hall"


def topology(mask: Any, backend: str = "auto") -> Topology:
    """Measure centreline, pieces, loops, ends and junctions of a mask.

    Args:
        mask: bool or 0/1 (H, W).
        backend: "auto" takes numba where it can be imported, else the plain implementation (logged once);
            "numba" and "plain" insist.

    Raises:
        ValueError: not a mask, or an unknown backend.
        ImportError: backend "numba" was asked for and numba is missing.

    An empty mask has an empty skeleton and all counts 0.

    >>> ring = np.ones((5, 5), bool)
    >>> ring[1:4, 1:4] = False
    >>> shape = topology(ring, backend="plain")
    >>> shape.num_components, shape.num_loops, shape.num_ends
    (1, 1, 0)
    """
    mask = as_mask(mask)
    if backend not in BACKENDS:
        raise ValueError(f"unknown topology backend {backend!r}. Choose one of: {', '.join(BACKENDS)}.")
    kernels = None if backend == "plain" else _compiled_kernels()
    if kernels is not None:
        return _measure_sparse(mask, kernels)
    if backend == "numba":
        raise ImportError('topology backend "numba": numba cannot be imported. Install it, or use "auto".')
    return _measure_plain(mask)


def prototype_topology(mask: Any) -> Topology:
    """Measure a mask the way the prototype's reward did; for reward spec "seed" only.

    Zhang-Suen skeleton of scikit-image, pieces of the skeleton, and as junction every single skeleton pixel
    with three or more neighbours, so one crossing counts several times. The border mirrors the image.

    An empty mask has an empty skeleton and all counts 0.

    >>> line = np.zeros((5, 9), bool)
    >>> line[2, 2:7] = True
    >>> prototype_topology(line).num_ends
    2
    """
    import cv2
    from skimage.morphology import skeletonize

    skeleton = skeletonize(as_mask(mask))
    pixels = skeleton.astype(np.uint8)
    num_neighbours = cv2.filter2D(pixels, -1, np.ones((3, 3), np.uint8)) - pixels
    num_components = cv2.connectedComponents(pixels, connectivity=8)[0] - 1
    return Topology(
        skeleton=skeleton,
        length_px=int(pixels.sum()),
        num_components=num_components,
        num_loops=num_components - _euler_characteristic(skeleton),
        num_ends=int(np.count_nonzero(skeleton & (num_neighbours == 1))),
        num_junctions=int(np.count_nonzero(skeleton & (num_neighbours >= 3))),
        thinning="zhang",
    )


# ---- Tables over the 256 neighbourhood codes ----


@functools.cache
def thinning_table() -> np.ndarray:
    """Which pixels each of the two Guo-Hall passes removes: bool (2, 256), by neighbourhood code.

    From the conditions in Guo and Hall, "Parallel thinning with two-subiteration algorithms", CACM 1989: the
    pixel adjoins one run of foreground only (1), is neither an end nor deep inside (2), and lies on the side
    that this pass works on (3).
    """
    table = np.zeros((2, 256), bool)
    for code in range(256):
        e, ne, n, nw, w, sw, s, se = (bool(code >> k & 1) for k in range(8))
        gaps = ((e, ne or n), (n, nw or w), (w, sw or s), (s, se or e))
        num_runs = sum(not side and onward for side, onward in gaps)
        pairs_from_corner = (ne or e) + (nw or n) + (sw or w) + (se or s)
        pairs_from_side = (n or ne) + (w or nw) + (s or sw) + (e or se)
        removable = num_runs == 1 and 2 <= min(pairs_from_corner, pairs_from_side) <= 3
        table[0, code] = removable and not ((ne or n or not se) and e)
        table[1, code] = removable and not ((sw or s or not nw) and w)
    return table


@functools.cache
def _touch_table() -> np.ndarray:
    """Where a new pixel touches the pixels before it in reading order: two directions or -1, int8 (2, 256).

    The north pixel adjoins the three others (west, north-west, north-east), so it stands for all of them.
    Without it there may be one touch on the west side and a separate one at the north-east corner.
    """
    east_north, north, west_north, west = 1, 2, 3, 4
    table = np.full((2, 256), -1, np.int8)
    for code in range(256):
        present = [direction for direction in (north, west, west_north) if code >> direction & 1]
        if present:
            table[0, code] = present[0]
        if north not in present and code >> east_north & 1:
            table[1, code] = east_north
    return table


@functools.cache
def _node_tables() -> tuple[np.ndarray, np.ndarray]:
    """(number of neighbours, crossing number) for each neighbourhood code.

    The crossing number counts the steps from background to foreground once around the pixel: 1 at an end,
    2 along a line, 3 or more where branches meet.
    """
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    return bits.sum(axis=1), (bits < np.roll(bits, -1, axis=1)).sum(axis=1)


# ---- numba: work on the list of foreground pixels ----
# The three functions below are plain Python that numba compiles on first use. They see the mask as a flat
# frame with one pixel of background around it: `pixels` are the foreground positions in reading order,
# `steps[k]` leads to neighbour k, and `codes[p]` is the neighbourhood code of position p.


def _neighbourhood_codes(pixels, steps, num_positions):
    """Neighbourhood code of every position: each foreground pixel reports itself to its eight neighbours."""
    codes = np.zeros(num_positions, np.uint8)
    for pixel in pixels:
        for k in range(8):
            codes[pixel + steps[k]] |= 1 << ((k + 4) % 8)
    return codes


def _components_and_loops(pixels, codes, steps, touches):
    """8-connected pieces and loops, by adding the pixels one by one in reading order (union-find).

    Each touch of a new pixel with what is already there joins two pieces, or, where both sides were one piece
    before, closes a loop.
    """
    index = np.empty(codes.size, np.int32)
    parent = np.arange(pixels.size)
    num_components, num_loops = pixels.size, 0
    for i in range(pixels.size):
        pixel = pixels[i]
        index[pixel] = i
        for touch in range(2):
            direction = touches[touch, codes[pixel]]
            if direction < 0:
                continue
            root, other = i, index[pixel + steps[direction]]
            while parent[root] != root:
                root = parent[root]
            while parent[other] != other:
                parent[other] = parent[parent[other]]
                other = parent[other]
            if root == other:
                num_loops += 1
            else:
                num_components -= 1
                parent[max(root, other)] = min(root, other)
    return num_components, num_loops


def _thin(pixels, codes, steps, table):
    """Guo-Hall thinning: the skeleton pixels in reading order; `codes` become their neighbourhood codes."""
    kept = pixels.copy()
    removed = np.empty_like(pixels)
    num_kept, changed = pixels.size, True
    while changed:
        changed = False
        for step in range(2):
            num_alive, num_kept, num_removed = num_kept, 0, 0
            for i in range(num_alive):  # decide for all pixels first, then remove them together
                pixel = kept[i]
                if table[step, codes[pixel]]:
                    removed[num_removed] = pixel
                    num_removed += 1
                else:
                    kept[num_kept] = pixel
                    num_kept += 1
            for i in range(num_removed):
                for k in range(8):
                    codes[removed[i] + steps[k]] &= 255 - (1 << ((k + 4) % 8))
            changed = changed or num_removed > 0
    return kept[:num_kept]


_KERNELS = (_neighbourhood_codes, _components_and_loops, _thin)


@functools.cache
def _compiled_kernels() -> tuple[Callable, ...] | None:
    """The three kernels compiled by numba, or None where numba cannot be imported."""
    try:
        import numba
    except ImportError as error:
        logger.warning("numba cannot be imported (%s): topology uses the slower plain backend.", error)
        return None
    try:
        return tuple(numba.njit(nogil=True, cache=True)(kernel) for kernel in _KERNELS)
    except RuntimeError as error:  # no writable place for the compiled code
        logger.info("numba cannot keep its compiled code (%s): it is compiled again in every process.", error)
        return tuple(numba.njit(nogil=True)(kernel) for kernel in _KERNELS)


def _measure_sparse(mask: np.ndarray, kernels: tuple[Callable, ...]) -> Topology:
    neighbourhood_codes, components_and_loops, thin = kernels
    frame = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), bool)
    frame[1:-1, 1:-1] = mask
    steps = np.array([row * frame.shape[1] + column for row, column in NEIGHBOURS])

    pixels = np.flatnonzero(frame)
    codes = neighbourhood_codes(pixels, steps, frame.size)
    num_components, num_loops = components_and_loops(pixels, codes, steps, _touch_table())
    centreline = thin(pixels, codes, steps, thinning_table())

    num_neighbours, num_crossings = _node_tables()
    centreline_codes = codes[centreline]
    junction_pixels = centreline[num_crossings[centreline_codes] >= 3]
    junction_codes = neighbourhood_codes(junction_pixels, steps, frame.size)
    num_junctions, _ = components_and_loops(junction_pixels, junction_codes, steps, _touch_table())

    frame[:] = False
    frame.ravel()[centreline] = True
    return Topology(
        skeleton=np.ascontiguousarray(frame[1:-1, 1:-1]),
        length_px=centreline.size,
        num_components=num_components,
        num_loops=num_loops,
        num_ends=int(np.count_nonzero(num_neighbours[centreline_codes] == 1)),
        num_junctions=num_junctions,
    )


# ---- plain: the same numbers from libraries ----


def _measure_plain(mask: np.ndarray) -> Topology:
    import cv2
    from skimage.morphology import thin

    skeleton = thin(mask)
    num_neighbours, num_crossings = _node_tables()
    codes = _dense_codes(skeleton)
    junction_pixels = skeleton & (num_crossings[codes] >= 3)
    num_components = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)[0] - 1
    return Topology(
        skeleton=skeleton,
        length_px=int(np.count_nonzero(skeleton)),
        num_components=num_components,
        num_loops=num_components - _euler_characteristic(mask),
        num_ends=int(np.count_nonzero(skeleton & (num_neighbours[codes] == 1))),
        num_junctions=cv2.connectedComponents(junction_pixels.view(np.uint8), connectivity=8)[0] - 1,
    )


def _dense_codes(mask: np.ndarray) -> np.ndarray:
    """Neighbourhood code of every pixel, uint8 (H, W)."""
    height, width = mask.shape
    padded = np.pad(mask, 1)
    codes = np.zeros(mask.shape, np.uint8)
    for k, (row, column) in enumerate(NEIGHBOURS):
        codes |= padded[1 + row : 1 + row + height, 1 + column : 1 + column + width].astype(np.uint8) << k
    return codes


def _euler_characteristic(mask: np.ndarray) -> int:
    """Pieces minus loops of an 8-connected mask: faces - edges + corners of its pixels as closed squares."""
    padded = np.pad(mask, 1)
    num_faces = np.count_nonzero(mask)
    vertical = padded[:, 1:] | padded[:, :-1]
    num_edges = np.count_nonzero(vertical) + np.count_nonzero(padded[1:] | padded[:-1])
    num_corners = np.count_nonzero(vertical[1:] | vertical[:-1])
    return int(num_faces - num_edges + num_corners)
