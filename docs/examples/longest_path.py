"""A reward of one's own that no gradient reaches: the longest path of the vessel tree, kept in one piece."""

from collections import deque
from functools import lru_cache

import numpy as np

from vesselrl.scoring.topology import topology


def unbroken(pred: np.ndarray, gt: np.ndarray) -> float:
    """The chance that two points of the longest true path are joined by predicted vessel, minus 1.

    A path of n pixels that the prediction covers in runs of r1, r2, ... pixels earns
    (r1² + r2² + ...) / n² - 1: 0 where it is covered without a break, -1/2 with one break in the middle,
    -1 where none of it is found. One more pixel found never costs. Both masks are bool arrays (H, W).
    """
    rows, columns = longest_path(gt.shape, np.packbits(gt).tobytes())
    if not len(rows):
        return 0.0
    covered = np.concatenate([[0], pred[rows, columns], [0]])
    changes = np.flatnonzero(np.diff(covered))  # start, end, start, end, ...
    runs = (changes[1::2] - changes[::2]) / len(rows)
    return float((runs**2).sum()) - 1


@lru_cache(maxsize=1024)
def longest_path(shape: tuple[int, int], bits: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the longest path along the centreline of a mask; computed once per mask.

    Exact where the centreline has no loops: the pixel farthest from any pixel is an end of a longest path.
    """
    mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=shape[0] * shape[1]).reshape(shape)
    left = {(int(row), int(column)) for row, column in np.argwhere(topology(mask).skeleton)}
    longest: list[tuple[int, int]] = []
    while left:
        piece = walk(next(iter(left)), left)
        longest = max(longest, way_back(walk(list(piece)[-1], left)), key=len)
        left -= piece.keys()
    pixels = np.array(longest, int).reshape(-1, 2)
    return pixels[:, 0], pixels[:, 1]


def walk(start: tuple[int, int], pixels: set[tuple[int, int]]) -> dict:
    """Every pixel that can be reached from `start`, the farthest last, and the one it was reached from."""
    reached, queue = {start: None}, deque([start])
    steps = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    while queue:
        row, column = here = queue.popleft()
        for down, right in steps:
            there = (row + down, column + right)
            if there in pixels and there not in reached:
                reached[there] = here
                queue.append(there)
    return reached


def way_back(reached: dict) -> list[tuple[int, int]]:
    """The path from the last pixel of a walk to its start."""
    path = [list(reached)[-1]]
    while reached[path[-1]] is not None:
        path.append(reached[path[-1]])
    return path
