"""From probabilities to the mask that is used: a threshold, then small components go and gaps are closed.

A faint stretch of vessel leaves a gap of a few pixels at the usual threshold. The mask at a lower threshold
often goes on there, but is too wide everywhere else. So only its bridges are taken: the parts of its
centreline outside the mask, as wide as it is there. And of these, where gaps are closed, only the shortest
paths across: the low-threshold mask has twigs and loops that no vessel has.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np

from vesselrl.scoring.overlap import as_mask
from vesselrl.scoring.topology import topology


@dataclass(frozen=True)
class PostProcessing:
    """The way from probabilities to the mask that is used."""

    threshold: float = 0.5  # probability above which a pixel is vessel
    min_component_px: int = 0  # smallest 8-connected component that is kept, in px; 0 keeps all
    close_gaps: float = 0.0  # probability above which a gap between kept components is closed; 0 closes none

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"The threshold is {self.threshold}; give a probability between 0 and 1.")
        if self.min_component_px < 0:
            raise ValueError(f"min_component_px is {self.min_component_px}; give 0 or more.")
        if not 0 <= self.close_gaps < 1:
            raise ValueError(f"close_gaps is {self.close_gaps}; give 0, or a probability below 1.")

    @property
    def changes_masks(self) -> bool:
        """Whether anything is done after the threshold."""
        return self.min_component_px > 1 or self.close_gaps > 0

    def mask(self, probabilities: np.ndarray) -> np.ndarray:
        """The mask, bool (H, W), of probabilities of that size."""
        return next(self.masks(probabilities, [self.threshold]))

    def masks(self, probabilities: np.ndarray, thresholds: Iterable[float]) -> Iterator[np.ndarray]:
        """The masks of one image at other thresholds than its own."""
        postprocess = self.postprocess_for(probabilities)
        for threshold in thresholds:
            yield postprocess(probabilities > np.float32(threshold))

    def postprocess_for(self, probabilities: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Return the function that turns any thresholded mask of one image into the used one."""
        if self.close_gaps == 0:
            return partial(drop_small_components, min_px=self.min_component_px)
        low = LowThresholdMask(probabilities, self.close_gaps)
        return lambda mask: low.close(drop_small_components(mask, self.min_component_px))


THRESHOLD_ONLY = PostProcessing()


def post_processing(
    settings: Mapping[str, Any],
    threshold: float = 0.5,
    min_component_px: int | None = None,
    close_gaps: float | None = None,
) -> PostProcessing:
    """Make masks as asked, or (None) as the run with these settings was trained and validated."""
    if min_component_px is None:
        min_component_px = settings.get("min_component_px", 0)
    if close_gaps is None:
        close_gaps = settings.get("close_gaps", 0.0)
    return PostProcessing(threshold, min_component_px, close_gaps)


def drop_small_components(mask: Any, min_px: int) -> np.ndarray:
    """The mask, bool or 0/1 (H, W), without its 8-connected components of fewer than `min_px` pixels."""
    mask = as_mask(mask)
    if min_px < 0:
        raise ValueError(f"min_px is {min_px}. Give a number of pixels, 0 or more.")
    if min_px <= 1:
        return mask
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    kept = stats[:, cv2.CC_STAT_AREA] >= min_px
    kept[0] = False  # the background
    return kept[labels]


class LowThresholdMask:
    """The mask of one image at a lower threshold, and where it reaches across the gaps of other masks.

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

    def bridges(self, mask: np.ndarray) -> tuple[np.ndarray, int]:
        """Label the bridges beyond a mask, bool (H, W), from 1 to n: int32 (H, W) with 0 elsewhere, and n.

        Each connected part of the centreline outside `mask` is a bridge, with the pixels that are nearest to
        it and no further from it than the edge of the low-threshold mask.
        """
        centrelines = self._skeleton & ~mask
        count, parts = cv2.connectedComponents(centrelines.astype(np.uint8), connectivity=8)
        pixels, nearest = self._around(centrelines, mask)
        labels = np.zeros(mask.shape, np.int32)
        labels.flat[pixels] = parts.flat[nearest]
        return labels, count - 1

    def close(self, mask: np.ndarray) -> np.ndarray:
        """A mask whose 8-connected components are joined where its centreline touches both, bool (H, W).

        Along the shortest paths on it, as wide as the low-threshold mask is there, and no more of them than
        it takes: two paths between the same two components would make a loop.
        """
        closed = mask.copy()
        closed.flat[self._around(self._paths(mask), mask)[0]] = True
        return closed

    def _paths(self, mask: np.ndarray) -> np.ndarray:
        """The pixels of the centreline that join components of a mask, bool (H, W)."""
        from vesselrl.scoring.kernels import NEIGHBOURS, spanning_paths, voronoi_labels

        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        framed, width = np.pad(labels, 1), mask.shape[1] + 2
        candidates = np.flatnonzero(np.pad(self._skeleton & ~mask, 1)).astype(np.int32)
        steps = np.array([row * width + column for row, column in NEIGHBOURS], np.int32)
        meetings = voronoi_labels(candidates, framed.ravel(), steps)
        on_path = np.zeros(framed.shape, bool)
        on_path.flat[candidates[spanning_paths(*meetings, count - 1)]] = True
        return on_path[1:-1, 1:-1]

    def _around(self, centre: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flat indices of the pixels beyond a mask that belong to a centreline, and of their owners on it."""
        if not centre.any():
            return np.zeros(0, np.intp), np.zeros(0, np.intp)
        distance, nearest = cv2.distanceTransformWithLabels(
            (~centre).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        place = np.zeros(nearest.max() + 1, np.intp)
        place[nearest[centre]] = np.flatnonzero(centre)
        beyond = np.flatnonzero(self._mask & ~mask)
        owner = place[nearest.flat[beyond]]
        inside = distance.flat[beyond] <= self._half_width.flat[owner]
        return beyond[inside], owner[inside]
