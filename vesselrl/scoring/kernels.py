"""The compiled loops, which release the GIL; importing them imports numba, so it is done where they are used.

`frame` is the flat mask with one pixel of background around it, `pixels` the foreground positions in reading
order; `steps[k]` leads to neighbour k, which owns bit k of `codes[position]`.
"""

import logging
from collections.abc import Callable

import numba
import numpy as np

logger = logging.getLogger(__name__)

# The eight neighbours of a pixel, counter-clockwise from the east, as (row, column) steps.
NEIGHBOURS = np.array([(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)])

# ---- Tables by neighbourhood code, 0 to 255: bits[code, k] is neighbour k ----

BITS = (np.arange(256)[:, None] >> np.arange(8)) & 1
ENDS = BITS.sum(axis=1) == 1
# Crossing number (steps from background to foreground once around the pixel) of 3 or more: branches meet.
JUNCTIONS = (np.roll(BITS, -1, axis=1) > BITS).sum(axis=1) >= 3


def thinning_table() -> np.ndarray:
    """Which pixels each of the two passes of Guo and Hall (CACM 1989) removes: bool (2, 256)."""
    e, ne, n, nw, w, sw, s, se = BITS.T.astype(bool)
    num_runs = sum([~e & (ne | n), ~n & (nw | w), ~w & (sw | s), ~s & (se | e)])
    num_pairs = np.minimum(sum([ne | e, nw | n, sw | w, se | s]), sum([n | ne, w | nw, s | sw, e | se]))
    removable = (num_runs == 1) & (num_pairs >= 2) & (num_pairs <= 3)  # neither an end nor deep inside
    return np.stack([removable & ~((ne | n | ~se) & e), removable & ~((sw | s | ~nw) & w)])


def touch_table() -> np.ndarray:
    """Where a new pixel touches those before it in reading order: two directions or -1, int8 (2, 256)."""
    _, north_east, north, north_west, west, *_ = BITS.T.astype(bool)
    first = np.select([north, west, north_west], [2, 4, 3], -1)  # north adjoins the three others
    return np.stack([first, np.where(north_east & ~north, 1, -1)]).astype(np.int8)


THINNING = thinning_table()
TOUCHES = touch_table()


def _compiled(function: Callable) -> Callable:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError as error:  # no writable place for the compiled code
        logger.info("numba cannot keep its compiled code (%s): it is compiled again in every process.", error)
        return numba.njit(nogil=True)(function)


def framed(mask: np.ndarray) -> np.ndarray:
    """The mask inside one pixel of background: flat bool, of a length that is a multiple of 8."""
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
def components_and_loops(pixels, codes, steps):
    """Number of 8-connected components and of loops, adding the pixels in reading order (union-find)."""
    index = np.empty(codes.size, np.int32)
    parent = np.arange(pixels.size)
    num_components, num_loops = pixels.size, 0
    for i in range(pixels.size):
        pixel = pixels[i]
        index[pixel] = i
        for touch in range(2):
            direction = TOUCHES[touch, codes[pixel]]
            if direction < 0:
                continue
            root, other = i, index[pixel + steps[direction]]
            while parent[root] != root:
                root = parent[root]
            while parent[other] != other:
                parent[other] = parent[parent[other]]
                other = parent[other]
            if root == other:  # both belonged to one component before
                num_loops += 1
            else:
                num_components -= 1
                parent[max(root, other)] = min(root, other)
    return num_components, num_loops


@_compiled
def thin(pixels, codes, steps):
    """Guo-Hall thinning: the skeleton pixels in reading order; `codes` become their neighbourhood codes."""
    kept, removed = pixels.copy(), np.empty_like(pixels)
    num_kept, changed = pixels.size, True
    while changed:
        changed = False
        for step in range(2):
            num_alive, num_kept, num_removed = num_kept, 0, 0
            for i in range(num_alive):  # decide for all pixels first, then remove them together
                pixel = kept[i]
                goes = THINNING[step, codes[pixel]]
                removed[num_removed] = kept[num_kept] = pixel
                num_removed += goes
                num_kept += not goes
            for i in range(num_removed):
                for k in range(8):
                    codes[removed[i] + steps[k]] &= 255 - (1 << ((k + 4) % 8))
            changed = changed or num_removed > 0
    return kept[:num_kept]


@_compiled
def measure(frame, num_pixels, shape):
    """Skeleton, its pixels, components, loops, ends, junctions of one mask."""
    row = shape[1] + 2
    steps = NEIGHBOURS[:, 0] * row + NEIGHBOURS[:, 1]
    pixels = foreground_positions(frame, num_pixels)
    codes = neighbourhood_codes(pixels, steps, frame.size)
    num_components, num_loops = components_and_loops(pixels, codes, steps)
    centreline = thin(pixels, codes, steps)
    skeleton = np.zeros(shape, np.bool_)
    for pixel in centreline:
        skeleton[pixel // row - 1, pixel % row - 1] = True
    codes = codes[centreline]
    branching = centreline[JUNCTIONS[codes]]
    branching_codes = neighbourhood_codes(branching, steps, frame.size)
    num_junctions, _ = components_and_loops(branching, branching_codes, steps)
    return skeleton, centreline.size, num_components, num_loops, ENDS[codes].sum(), num_junctions


@_compiled
def distances_in_columns(border):
    """Distance of every pixel to the nearest True of `border`, bool (H, W), within its column: int32."""
    height, width = border.shape
    distances = np.where(border, np.int32(0), np.int32(height + width))
    for row in range(1, height):
        for column in range(width):
            distances[row, column] = min(distances[row, column], distances[row - 1, column] + 1)
    for row in range(height - 2, -1, -1):
        for column in range(width):
            distances[row, column] = min(distances[row, column], distances[row + 1, column] + 1)
    return distances


@_compiled
def distances_to_border(in_columns, positions):
    """Euclidean distance of each flat position to a border that is not empty, from `distances_in_columns`."""
    width = in_columns.shape[1]
    distances = np.empty(positions.size)
    for i, position in enumerate(positions):
        row, column = position // width, position % width
        best, away = in_columns[row, column] ** 2, 1
        while away**2 < best:  # look left and right as far as the best distance reaches
            for beside in (column - away, column + away):
                if 0 <= beside < width:
                    best = min(best, in_columns[row, beside] ** 2 + away**2)
            away += 1
        distances[i] = np.sqrt(best)
    return distances


@_compiled
def voronoi_labels(candidates, labels, steps):
    """Label each candidate with the component that is the fewest steps away; find where labels meet.

    Such meetings suffice for the shortest paths between all components (Mehlhorn 1988). `candidates` are flat
    positions, int32 (N,), in reading order; `labels` is flat int32 with a border of 0, components from 1 on.

    Returns:
        The label of each candidate (0: none reaches it), the candidate through which it was reached (-1: from
        the component itself), and of each meeting two candidates (the second -c where component c itself is
        met) and the pixels of the path through them.
    """
    total, num_queued, done, met = len(candidates), 0, 0, 0
    number, before = np.zeros(len(labels), np.int32), np.full(total, -1, np.int32)
    number[candidates] = np.arange(1, total + 1)
    owner, distance = np.zeros(total, np.int32), np.zeros(total, np.int32)
    queue, one = np.empty(total, np.int32), np.empty(16 * total, np.int32)
    other, length = np.empty_like(one), np.empty_like(one)
    for i in range(total):
        for step in steps:
            component = labels[candidates[i] + step]
            if component != 0 and owner[i] == 0:
                owner[i], distance[i] = component, 1
                queue[num_queued] = i
                num_queued += 1
            elif component != 0 and owner[i] != component:
                one[met], other[met], length[met] = i, -component, 1
                met += 1
    while done < num_queued:
        i = queue[done]
        done += 1
        for step in steps:
            j = number[candidates[i] + step] - 1
            if j >= 0 and owner[j] == 0:
                owner[j], distance[j], before[j] = owner[i], distance[i] + 1, i
                queue[num_queued] = j
                num_queued += 1
            elif j >= 0 and owner[j] != owner[i]:
                one[met], other[met], length[met] = i, j, distance[i] + distance[j]
                met += 1
    return owner, before, one[:met], other[:met], length[:met]


@_compiled
def spanning_paths(owner, before, one, other, length, num_components):
    """Which candidates lie on the shortest paths that join all that can be joined (Kruskal 1956)."""
    group = np.arange(num_components + 1)
    taken = np.zeros(len(owner), np.bool_)
    for meeting in np.argsort(length, kind="mergesort"):
        i, j = one[meeting], other[meeting]
        first, second = group[owner[i]], group[owner[j] if j >= 0 else -j]
        if first == second:
            continue
        group[group == second] = first
        for end in (i, j):
            while end >= 0:
                taken[end] = True
                end = before[end]
    return taken
