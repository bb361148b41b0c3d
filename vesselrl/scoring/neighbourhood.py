"""Tables over the 256 ways in which the eight neighbours of a pixel can be set.

Both implementations of `topology` read them, so an end or a junction is defined here and nowhere else.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

# The eight neighbours of a pixel, counter-clockwise from the east, as (row, column) steps. Neighbour k owns
# bit k of a "neighbourhood code" (0..255); the opposite neighbour owns bit (k + 4) % 8.
NEIGHBOURS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


class NodeTables(NamedTuple):
    """What a centreline pixel is, by neighbourhood code; each table int64 (256,)."""

    # 1 where exactly one neighbour is set
    ends: np.ndarray
    # 1 where three or more branches meet: crossing number >= 3
    junctions: np.ndarray
    # neighbours across a side
    side_steps: np.ndarray
    # neighbours across a corner that cannot be reached by two side steps
    diagonal_steps: np.ndarray


@functools.cache
def node_tables() -> NodeTables:
    """The node tables.

    The crossing number counts the steps from background to foreground once around the pixel: 1 at an end,
    2 along a line, 3 or more where branches meet.

    >>> int(node_tables().ends[0b00010000])
    1
    """
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    crossing_number = (bits < np.roll(bits, -1, axis=1)).sum(axis=1)
    sides, corners = bits[:, 0::2], bits[:, 1::2]
    beside_a_side = sides | np.roll(sides, -1, axis=1)
    return NodeTables(
        ends=(bits.sum(axis=1) == 1).astype(np.int64),
        junctions=(crossing_number >= 3).astype(np.int64),
        side_steps=sides.sum(axis=1),
        diagonal_steps=(corners & ~beside_a_side).sum(axis=1),
    )


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
def touch_table() -> np.ndarray:
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
