"""What makes a mask of probabilities: a threshold, then small components go and gaps are closed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from vesselrl.scoring.gaps import FainterMask
from vesselrl.scoring.masks import drop_small_components


@dataclass(frozen=True)
class PostProcessing:
    """The way from probabilities to the mask that is used.

    Raises:
        ValueError: a value out of range.
    """

    # Probability above which a pixel is vessel.
    threshold: float = 0.5
    # Smallest 8-connected component that is kept, in px; 0 keeps all.
    min_component_px: int = 0
    # Probability above which a gap between two of the kept components is closed; 0 closes none.
    close_gaps: float = 0.0

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
        finish = self.finisher(probabilities)
        for threshold in thresholds:
            yield finish(probabilities > np.float32(threshold))

    def finisher(self, probabilities: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """What is done to any mask of one image after the threshold: (H, W) bool in, (H, W) bool out."""
        if self.close_gaps == 0:
            return partial(drop_small_components, min_px=self.min_component_px)
        fainter = FainterMask(probabilities, self.close_gaps)
        return lambda mask: fainter.close(drop_small_components(mask, self.min_component_px))


THRESHOLD_ONLY = PostProcessing()
