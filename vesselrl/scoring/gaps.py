"""Gaps of a mask, and where the mask at a lower threshold reaches across them.

A faint stretch of vessel leaves a gap of a few pixels at the usual threshold; what lies behind it is cut off.
The fainter mask, at a lower threshold, often goes on there, but is too wide everywhere else. So only its
links are taken: the parts of its centreline outside the mask, as wide as it is there.
"""

import cv2
import numpy as np

from vesselrl.scoring.topology import topology


class FainterMask:
    """The mask of one image at a lower threshold.

    Args:
        probabilities: (H, W) in [0, 1].
        level: probability above which a pixel belongs to it, in (0, 1).
    """

    def __init__(self, probabilities: np.ndarray, level: float) -> None:
        self._mask = probabilities > np.float32(level)
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
        pixels, parts, count = self._links(mask)
        labels = np.zeros(mask.shape, np.int32)
        labels.flat[pixels] = parts
        return labels, count

    def close(self, mask: np.ndarray) -> np.ndarray:
        """A mask with the links that touch two or more of its 8-connected components, bool (H, W)."""
        pixels, parts, count = self._links(mask)
        lowest, highest = _components_around(mask)
        first, last = np.full(count + 1, np.inf), np.zeros(count + 1)
        np.minimum.at(first, parts, lowest.ravel()[pixels])
        np.maximum.at(last, parts, highest.ravel()[pixels])
        closed = mask.copy()
        closed.flat[pixels[(last > first)[parts]]] = True
        return closed

    def _links(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Flat indices of the pixels of all links, the link of each, counted from 1, and their number."""
        centre = self._skeleton & ~mask
        total, parts = cv2.connectedComponents(centre.astype(np.uint8), connectivity=8)
        if total == 1:
            return np.zeros(0, np.intp), np.zeros(0, np.int32), 0
        distance, nearest = cv2.distanceTransformWithLabels(
            (~centre).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        # What the nearest centreline pixel is part of, and how wide the fainter mask is there.
        part_of, reach = np.zeros(nearest.max() + 1, np.int32), np.zeros(nearest.max() + 1, np.float32)
        part_of[nearest[centre]] = parts[centre]
        reach[nearest[centre]] = self._half_width[centre]
        beyond = np.flatnonzero(self._mask & ~mask)
        nearest = nearest.ravel()[beyond]
        inside = distance.ravel()[beyond] <= reach[nearest]
        return beyond[inside], part_of[nearest[inside]], total - 1


def _components_around(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest label of the mask's components around each pixel, 3 x 3; inf and 0 without any."""
    labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[1].astype(np.float32)
    square = np.ones((3, 3), np.uint8)
    return cv2.erode(np.where(mask, labels, np.float32(np.inf)), square), cv2.dilate(labels, square)
