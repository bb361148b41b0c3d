"""The shape of a mask, measured in one compiled call that visits the foreground pixels only.

Importing this module imports numba; `topology` does so when the first mask is measured. The functions see the
mask as a flat frame with one pixel of background around it: `pixels` are the foreground positions in reading
order, `steps[k]` leads to neighbour k, and `codes[p]` is the neighbourhood code of position p. All of them
release the GIL, so threads scale.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numba
import numpy as np

from vesselrl.scoring import paths
from vesselrl.scoring.neighbourhood import NEIGHBOURS

logger = logging.getLogger(__name__)


def _compiled(function: Callable) -> Callable:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError as error:  # no writable place for the compiled code
        logger.info("numba cannot keep its compiled code (%s): it is compiled again in every process.", error)
        return numba.njit(nogil=True)(function)


def framed(mask: np.ndarray) -> np.ndarray:
    """The mask inside one pixel of background: flat bool, (H+2) x (W+2), its length a multiple of 8."""
    height, width = mask.shape[0] + 2, mask.shape[1] + 2
    frame = np.zeros(-(-height * width // 8) * 8, bool)
    frame[: height * width].reshape(height, width)[1:-1, 1:-1] = mask
    return frame


@_compiled
def foreground_positions(frame, num_pixels):
    """Positions of the foreground in reading order, int32; eight pixels at a time are skipped if empty."""
    pixels = np.empty(num_pixels + 1, np.int32)
    found = 0
    for i, word in enumerate(frame.view(np.uint64)):
        if word != 0:
            for position in range(8 * i, 8 * i + 8):  # write always, move on if it counts: no branch to miss
                pixels[found] = position
                found += frame[position]
    return pixels[:num_pixels]


@_compiled
def neighbourhood_codes(pixels, steps, num_positions):
    """Neighbourhood code of every position: each foreground pixel reports itself to its eight neighbours."""
    codes = np.zeros(num_positions, np.uint8)
    for pixel in pixels:
        for k in range(8):
            codes[pixel + steps[k]] |= 1 << ((k + 4) % 8)
    return codes


@_compiled
def components_and_loops(pixels, codes, steps, touches):
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


@_compiled
def thin(pixels, codes, steps, table):
    """Guo-Hall thinning: the skeleton pixels in reading order; `codes` become their neighbourhood codes."""
    kept = pixels.copy()
    removed = np.empty_like(pixels)
    num_kept, changed = pixels.size, True
    while changed:
        changed = False
        for step in range(2):
            removable = table[step]
            num_alive, num_kept, num_removed = num_kept, 0, 0
            for i in range(num_alive):  # decide for all pixels first, then remove them together
                pixel = kept[i]
                goes = removable[codes[pixel]]
                removed[num_removed] = kept[num_kept] = pixel
                num_removed += goes
                num_kept += not goes
            for i in range(num_removed):
                for k in range(8):
                    codes[removed[i] + steps[k]] &= 255 - (1 << ((k + 4) % 8))
            changed = changed or num_removed > 0
    return kept[:num_kept]


@_compiled
def measure(frame, num_pixels, shape, thinning, touches, nodes):
    """All numbers of one mask.

    Args:
        frame: `framed(mask)`.
        num_pixels: foreground pixels of the mask.
        shape: (H, W) of the mask.
        thinning: `thinning_table()`.
        touches: `touch_table()`.
        nodes: `node_tables()`.

    Returns:
        (skeleton bool (H, W), (skeleton pixels, side steps, diagonal steps), pieces, loops, ends, junctions);
        each step between two skeleton pixels counts once.
    """
    row = shape[1] + 2
    steps = np.empty(8, np.int64)
    for k in range(8):
        steps[k] = NEIGHBOURS[k][0] * row + NEIGHBOURS[k][1]
    pixels = foreground_positions(frame, num_pixels)
    codes = neighbourhood_codes(pixels, steps, frame.size)
    num_components, num_loops = components_and_loops(pixels, codes, steps, touches)
    centreline = thin(pixels, codes, steps, thinning)

    skeleton = np.zeros(shape, np.bool_)
    branching = np.empty_like(centreline)
    num_ends, num_branching, num_sides, num_diagonals = 0, 0, 0, 0
    for pixel in centreline:
        skeleton[pixel // row - 1, pixel % row - 1] = True
        code = codes[pixel]
        num_ends += nodes.ends[code]
        num_sides += nodes.side_steps[code]
        num_diagonals += nodes.diagonal_steps[code]
        if nodes.junctions[code]:
            branching[num_branching] = pixel
            num_branching += 1
    branching = branching[:num_branching]
    branching_codes = neighbourhood_codes(branching, steps, frame.size)
    num_junctions, _ = components_and_loops(branching, branching_codes, steps, touches)
    lengths = centreline.size, num_sides // 2, num_diagonals // 2
    return skeleton, lengths, num_components, num_loops, num_ends, num_junctions


@_compiled
def distances_to_border(border, positions):
    """Euclidean distance from each flat position to the nearest True of `border`, bool (H, W) not empty.

    Two sweeps give the distance within each column; then a position looks left and right, column by column,
    as far as its best distance so far reaches.
    """
    height, width = border.shape
    gaps = np.where(border, np.int32(0), np.int32(height + width))
    for row in range(1, height):
        for column in range(width):
            gaps[row, column] = min(gaps[row, column], gaps[row - 1, column] + 1)
    for row in range(height - 2, -1, -1):
        for column in range(width):
            gaps[row, column] = min(gaps[row, column], gaps[row + 1, column] + 1)

    distances = np.empty(positions.size, np.float32)
    for i, position in enumerate(positions):
        row, column = position // width, position % width
        best, away = gaps[row, column] ** 2, 1
        while away**2 < best:
            for beside in (column - away, column + away):
                if 0 <= beside < width:
                    best = min(best, gaps[row, beside] ** 2 + away**2)
            away += 1
        distances[i] = np.sqrt(best)
    return distances


claim_ways = _compiled(paths.claim_ways)
spanning_paths = _compiled(paths.spanning_paths)
