"""Gaps of a mask, and where the mask at a lower threshold reaches across them.

A faint stretch of vessel leaves a gap of a few pixels at the usual threshold; what lies behind it is cut off.
The fainter mask, at a lower threshold, often goes on there, but is too wide everywhere else. So only its
links are taken: the parts of its centreline outside the mask, as wide as it is there. And of the links, where
gaps are closed, only the shortest ways across: the fainter mask has twigs and loops that no vessel has.
"""

import cv2
import numpy as np

from vesselrl.scoring import paths
from vesselrl.scoring.backend import compiled_kernels
from vesselrl.scoring.neighbourhood import NEIGHBOURS
from vesselrl.scoring.topology import topology


class FainterMask:
    """The mask of one image at a lower threshold.

    Args:
        probabilities: (H, W) in [0, 1].
        level: probability above which a pixel belongs to it, in (0, 1).
    """

    def __init__(self, probabilities: np.ndarray, level: float) -> None:
        self._mask = probabilities > np.float32(level)
        if self._mask.all():  # a mask without an edge has no width, and says nothing
            self._mask = np.zeros_like(self._mask)
        self._skeleton = topology(self._mask).skeleton
        self._half_width = cv2.distanceTransform(self._mask.astype(np.uint8), cv2.DIST_L2, 5)

    def links(self, mask: np.ndarray) -> tuple[np.ndarray, int]:
        """Where it goes on beyond a mask.

        Each connected part of its centreline outside `mask` is a link, with the pixels that are nearest to it
        and no further from it than the edge of the fainter mask.

        Args:
            mask: bool (H, W).

        Returns:
            (H, W) int32 with labels 1 to n, 0 elsewhere and in `mask`, and n.
        """
        ways = self._skeleton & ~mask
        count, parts = cv2.connectedComponents(ways.astype(np.uint8), connectivity=8)
        pixels, nearest = self._around(ways, mask)
        labels = np.zeros(mask.shape, np.int32)
        labels.flat[pixels] = parts.flat[nearest]
        return labels, count - 1

    def close(self, mask: np.ndarray) -> np.ndarray:
        """A mask whose 8-connected components are joined where its centreline touches both, bool (H, W).

        Along the shortest ways on it, as wide as the fainter mask is there, and no more of them
        than it takes: two ways between the same two components would make a loop.
        """
        closed = mask.copy()
        closed.flat[self._around(self._paths(mask), mask)[0]] = True
        return closed

    def _paths(self, mask: np.ndarray) -> np.ndarray:
        """The pixels of the centreline that join components of a mask, bool (H, W)."""
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        framed, width = np.pad(labels, 1), mask.shape[1] + 2
        ways = np.flatnonzero(np.pad(self._skeleton & ~mask, 1)).astype(np.int32)
        steps = np.array([row * width + column for row, column in NEIGHBOURS], np.int32)
        search = compiled_kernels() or paths
        claims = search.claim_ways(ways, framed.ravel(), steps)
        on_path = np.zeros(framed.shape, bool)
        on_path.flat[ways[search.spanning_paths(*claims, count - 1)]] = True
        return on_path[1:-1, 1:-1]

    def _around(self, centre: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flat indices of the pixels beyond a mask that parts of the centreline stand for, and of which one.

        A pixel belongs to the centreline pixel that is nearest to it, if it is no further from it than the
        edge of the fainter mask is.
        """
        if not centre.any():
            return np.zeros(0, np.intp), np.zeros(0, np.intp)
        distance, nearest = cv2.distanceTransformWithLabels(
            (~centre).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        place = np.zeros(nearest.max() + 1, np.intp)
        place[nearest[centre]] = np.flatnonzero(centre)
        beyond = np.flatnonzero(self._mask & ~mask)
        stands_for = place[nearest.flat[beyond]]
        inside = distance.flat[beyond] <= self._half_width.flat[stands_for]
        return beyond[inside], stands_for[inside]
