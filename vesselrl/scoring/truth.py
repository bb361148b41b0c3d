"""What is known of a truth before any prediction is scored: computed once per content, then kept."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from vesselrl.scoring.calibre import CALIBRES, calibre_map, recall_by_calibre
from vesselrl.scoring.masks import as_mask, as_mask_pair
from vesselrl.scoring.metrics import score_mask
from vesselrl.scoring.spec import METRIC_SPEC
from vesselrl.scoring.surface import Surface, surface, surface_scores
from vesselrl.scoring.topology import Topology, topology

# Truths that are kept; a truth of 512 x 512 with everything below takes 2 MB.
NUM_KEPT = 32

# The scores that `evaluation_scores` adds to those of `score_mask`.
EVALUATION_ONLY = ("hd95", "nsd", *(f"recall_{name}" for name in CALIBRES))


class Truth:
    """A true mask, bool (H, W), and its parts, each computed when it is first asked for."""

    def __init__(self, mask: Any) -> None:
        self.mask = as_mask(mask, "truth")

    @functools.cached_property
    def topology(self) -> Topology:
        """Centreline and shape counts."""
        return topology(self.mask)

    @functools.cached_property
    def surface(self) -> Surface:
        """Border and distance map."""
        return surface(self.mask)

    @functools.cached_property
    def calibres(self) -> np.ndarray:
        """Width class of every pixel, uint8 (H, W); see `calibre_map`."""
        return calibre_map(self.mask, self.topology.skeleton)


def known_truth(mask: Any) -> Truth:
    """The `Truth` of a mask, bool or 0/1 (H, W); equal masks share one, so its parts are computed once.

    It is found by content, never by the identity of an array, and holds its own copy of the mask.

    Raises:
        ValueError: not a mask.

    >>> known_truth(np.eye(3)) is known_truth(np.eye(3, dtype=bool))
    True
    """
    mask = as_mask(mask, "truth")
    return _truth_of(mask.shape, np.packbits(mask).tobytes(), METRIC_SPEC["version"])


def forget_truths() -> None:
    """Drop every kept truth; for measurements that must include the truth's part."""
    _truth_of.cache_clear()


@functools.lru_cache(maxsize=NUM_KEPT)
def _truth_of(shape: tuple[int, int], bits: bytes, spec_version: int) -> Truth:
    pixels = np.unpackbits(np.frombuffer(bits, np.uint8), count=shape[0] * shape[1])
    return Truth(pixels.reshape(shape).astype(bool))


def evaluation_scores(pred: Any, truth: Any, known: Truth | None = None) -> dict[str, float]:
    """Everything an evaluation reports of one prediction: `score_mask`, distances and recall by calibre.

    Args:
        pred: bool or 0/1 (H, W).
        truth: bool or 0/1 (H, W).
        known: `known_truth(truth)` if the caller keeps it.

    Returns:
        The scores of `score_mask`, and hd95 (px, lower is better), nsd (in [0, 1]), recall_thin,
        recall_medium, recall_thick (in [0, 1], nan where the truth has nothing of that width). Two empty
        masks: hd95 0, nsd 1; exactly one empty mask: hd95 the diagonal of the image, nsd 0.

    Raises:
        ValueError: not masks, of different size, or a `known` that is not of this truth.

    >>> bar = np.zeros((12, 40), bool)
    >>> bar[4:7, 5:35] = True
    >>> scores = evaluation_scores(bar, bar)
    >>> [scores[name] for name in ("dice", "hd95", "nsd", "recall_thin", "recall_thick")]
    [1.0, 0.0, 1.0, 1.0, nan]
    """
    pred, truth = as_mask_pair(pred, truth)
    if known is None:
        known = known_truth(truth)
    elif not np.array_equal(known.mask, truth):
        raise ValueError("the known truth is of another mask than the given truth. Pass known_truth(truth).")
    return {
        **score_mask(pred, truth, known.topology),
        **surface_scores(pred, known.surface),
        **recall_by_calibre(pred, known.calibres),
    }
