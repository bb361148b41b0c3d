"""The shape of a mask without numba: the numbers of `kernels.measure` from NumPy and OpenCV.

Thinning treats eight pixels in one byte: the image is cut into eight strips of rows, strip k owns bit k, and
the conditions of Guo and Hall become bitwise operations on whole arrays.
"""

from __future__ import annotations

import numpy as np

from vesselrl.scoring.neighbourhood import NEIGHBOURS, node_tables


def measure(mask: np.ndarray) -> tuple:
    """All numbers of one mask, bool (H, W) contiguous; returns what `kernels.measure` returns."""
    import cv2

    skeleton = thin(mask)
    frame = np.pad(skeleton, 1)
    pixels = np.flatnonzero(frame)
    codes = np.zeros(pixels.size, np.uint8)
    for k, (row, column) in enumerate(NEIGHBOURS):
        codes |= frame.ravel()[pixels + (row * frame.shape[1] + column)].view(np.uint8) << k
    nodes = node_tables()
    frame.ravel()[pixels] = nodes.junctions[codes]
    num_junctions = cv2.connectedComponents(frame.view(np.uint8), connectivity=8)[0] - 1

    num_components = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)[0] - 1
    num_loops = num_components - euler_characteristic(mask)
    lengths = (
        pixels.size,
        int(nodes.side_steps[codes].sum()) // 2,
        int(nodes.diagonal_steps[codes].sum()) // 2,
    )
    return skeleton, lengths, num_components, num_loops, int(nodes.ends[codes].sum()), num_junctions


def euler_characteristic(mask: np.ndarray) -> int:
    """Pieces minus loops of an 8-connected mask: faces - edges + corners of its pixels as closed squares.

    >>> euler_characteristic(np.ones((3, 3), bool))
    1
    """
    padded = np.pad(mask, 1)
    num_faces = np.count_nonzero(mask)
    vertical = padded[:, 1:] | padded[:, :-1]
    num_edges = np.count_nonzero(vertical) + np.count_nonzero(padded[1:] | padded[:-1])
    num_corners = np.count_nonzero(vertical[1:] | vertical[:-1])
    return int(num_faces - num_edges + num_corners)


def thin(mask: np.ndarray) -> np.ndarray:
    """Guo-Hall skeleton of a bool mask (H, W): the pixels that `thinning_table` removes, until none is left.

    >>> thin(np.ones((3, 7), bool)).astype(int)
    array([[0, 0, 0, 0, 0, 0, 0],
           [0, 1, 1, 1, 1, 1, 0],
           [0, 0, 0, 0, 0, 0, 0]])
    """
    height, width = mask.shape
    num_rows, row = -(-height // 8), width + 1  # one column of background stands between two rows
    strips = np.zeros((8, num_rows, width), bool)
    strips.reshape(-1, width)[:height] = mask

    # One row above and below each strip: there the bytes hold the last and the first row of its neighbours.
    flat = np.zeros((num_rows + 2) * row + 2, np.uint8)
    rows = flat[1:-1].reshape(num_rows + 2, row)
    rows[1:-1, :-1] = np.packbits(strips, axis=0)[0]
    start, size = 1 + row, num_rows * row
    pixels = flat[start : start + size]
    neighbours = [flat[start + dy * row + dx :][:size] for dy, dx in NEIGHBOURS]
    opposite = neighbours[4:] + neighbours[:4]

    changed = True
    while changed:
        changed = False
        for around in (neighbours, opposite):  # the second pass is the first one turned by half a turn
            np.right_shift(rows[-2], 1, out=rows[0])
            np.left_shift(rows[1], 1, out=rows[-1])
            removed = pixels & removable(*around)
            if removed.any():
                pixels ^= removed
                changed = True
    strips = np.unpackbits(rows[None, 1:-1, :-1], axis=0).view(bool)
    return strips.reshape(-1, width)[:height].copy()


def removable(e, ne, n, nw, w, sw, s, se) -> np.ndarray:
    """Row 0 of `thinning_table` as bitwise operations on eight neighbours, for arrays of bytes."""
    from_side = ne | n, nw | w, sw | s, se | e
    from_corner = ne | e, nw | n, sw | w, se | s
    one_run = _exactly_one(from_side[0] & ~e, from_side[1] & ~n, from_side[2] & ~w, from_side[3] & ~s)
    no_end = _at_least_two(*from_side) & _at_least_two(*from_corner)
    inside = _all(*from_side) & _all(*from_corner)
    return one_run & no_end & ~inside & ~(e & (from_side[0] | ~se))


def _exactly_one(a, b, c, d) -> np.ndarray:
    return (a ^ b ^ c ^ d) & ~(a & b | c & d)


def _at_least_two(a, b, c, d) -> np.ndarray:
    return a & b | c & d | (a | b) & (c | d)


def _all(a, b, c, d) -> np.ndarray:
    return a & b & c & d
