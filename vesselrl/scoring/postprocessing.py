"""From probabilities to the mask that is used: a threshold, then small components go and gaps are closed.

A faint stretch leaves a gap where a lower threshold goes on, though too wide and with twigs. So a gap is
closed along the shortest paths on the centreline of that mask alone, as wide as it is there.
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
    """Threshold, smallest component and closing of gaps, in this order."""

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
        """Whether more is done than the threshold."""
        return self.min_component_px > 1 or self.close_gaps > 0

    def mask(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the mask, bool (H, W), of probabilities of that size."""
        return next(self.masks(probabilities, [self.threshold]))

    def masks(self, probabilities: np.ndarray, thresholds: Iterable[float]) -> Iterator[np.ndarray]:
        """Return the masks of one image at other thresholds than its own."""
        postprocess = self.postprocess_for(probabilities)
        return (postprocess(probabilities > np.float32(threshold)) for threshold in thresholds)

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
    size = settings.get("min_component_px", 0) if min_component_px is None else min_component_px
    level = settings.get("close_gaps", 0.0) if close_gaps is None else close_gaps
    return PostProcessing(threshold, size, level)


def drop_small_components(mask: Any, min_px: int) -> np.ndarray:
    """Drop the 8-connected components of fewer than `min_px` pixels of a mask, bool or 0/1 (H, W)."""
    mask = as_mask(mask)
    if min_px <= 1:
        return mask
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    kept = stats[:, cv2.CC_STAT_AREA] >= min_px
    kept[0] = False  # the background
    return kept[labels]


class LowThresholdMask:
    """The mask of probabilities (H, W) above a low `level`, which reaches across the gaps of other masks."""

    def __init__(self, probabilities: np.ndarray, level: float) -> None:
        self._mask = probabilities > np.float32(level)
        if self._mask.all():  # a mask without an edge has no width, and says nothing
            self._mask = np.zeros_like(self._mask)
        self._skeleton = topology(self._mask).skeleton
        self._half_width = cv2.distanceTransform(self._mask.astype(np.uint8), cv2.DIST_L2, 5)

    def bridges(self, mask: np.ndarray) -> tuple[np.ndarray, int]:
        """Label the n parts of the centreline outside a mask, as wide as this is: int32 (H, W), 0 to n; n."""
        centrelines = self._skeleton & ~mask
        count, parts = cv2.connectedComponents(centrelines.astype(np.uint8), connectivity=8)
        pixels, nearest = self._around(centrelines, mask)
        labels = np.zeros(mask.shape, np.int32)
        labels.flat[pixels] = parts.flat[nearest]
        return labels, count - 1

    def close(self, mask: np.ndarray) -> np.ndarray:
        """Join the 8-connected components of a mask, bool (H, W), by no more bridges than it takes."""
        closed = mask.copy()
        closed.flat[self._around(self._paths(mask), mask)[0]] = True
        return closed

    def _paths(self, mask: np.ndarray) -> np.ndarray:
        """Pixels of the centreline on the shortest paths between components of a mask, bool (H, W)."""
        from vesselrl.scoring.kernels import NEIGHBOURS, spanning_paths, voronoi_labels

        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        framed, width = np.pad(labels, 1), mask.shape[1] + 2
        candidates = np.flatnonzero(np.pad(self._skeleton & ~mask, 1)).astype(np.int32)
        steps = (NEIGHBOURS @ (width, 1)).astype(np.int32)
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
