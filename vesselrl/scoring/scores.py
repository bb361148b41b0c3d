"""All scores of a prediction, one dict per mask, and the parts of a truth that are computed once."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np

from vesselrl.scoring.overlap import (
    METRIC_SPEC,
    as_mask,
    as_mask_pair,
    counts,
    overlap_scores,
    recall_from_counts,
)
from vesselrl.scoring.surface import Surface, surface, surface_scores
from vesselrl.scoring.topology import Topology, check_topology, topology

VESSEL_WIDTHS = ("thin", "medium", "thick")


def score_mask(pred: Any, truth: Any, truth_topology: Topology | None = None) -> dict[str, float]:
    """Score one predicted mask, bool or 0/1 (H, W): overlap, centreline and topology.

    Returns:
        dice, iou, recall, precision, specificity, cldice, tprec, tsens: in [0, 1];
        beta0_error, beta1_error: absolute difference in the number of connected components and of loops;
        length_ratio: centreline length of the prediction over that of the truth;
        foreground: share of the image that the prediction covers.
        nan stands for "has no meaning": recall of an empty truth, length_ratio of a non-empty prediction to
        an empty truth, specificity without background. Leave nan out of means and say how many; JSON: null.
    """
    pred, truth = as_mask_pair(pred, truth)
    truth_shape = topology(truth) if truth_topology is None else truth_topology
    check_topology(truth_shape, truth)
    pred_shape = topology(pred)
    return {
        **overlap_scores(counts(pred, truth)),
        **cldice_scores(pred, truth, pred_shape, truth_shape),
        "beta0_error": float(abs(pred_shape.num_components - truth_shape.num_components)),
        "beta1_error": float(abs(pred_shape.num_loops - truth_shape.num_loops)),
        "length_ratio": length_ratio(pred_shape, truth_shape),
        "foreground": float(np.count_nonzero(pred) / pred.size),
    }


def cldice(pred: Any, truth: Any) -> float:
    """Centreline Dice in [0, 1], the harmonic mean of tprec and tsens (Shit et al., CVPR 2021).

    tprec is the share of the predicted centreline inside the truth, tsens the share of the true centreline
    inside the prediction. Never use it alone: an all-foreground mask can score 1.
    """
    pred, truth = as_mask_pair(pred, truth)
    return cldice_scores(pred, truth, topology(pred), topology(truth))["cldice"]


def cldice_scores(
    pred: np.ndarray, truth: np.ndarray, pred_shape: Topology, truth_shape: Topology
) -> dict[str, float]:
    """cldice, tprec and tsens of two bool masks whose topologies are known; both empty 1, one empty 0."""
    if pred_shape.length_px == 0 or truth_shape.length_px == 0:
        agree = float(pred_shape.length_px == truth_shape.length_px)
        return {"cldice": agree, "tprec": agree, "tsens": agree}
    tprec = float(np.count_nonzero(pred_shape.skeleton & truth) / pred_shape.length_px)
    tsens = float(np.count_nonzero(truth_shape.skeleton & pred) / truth_shape.length_px)
    total = tprec + tsens
    return {"cldice": 2 * tprec * tsens / total if total > 0 else 0.0, "tprec": tprec, "tsens": tsens}


def length_ratio(pred: Topology, truth: Topology) -> float:
    """Centreline length of the prediction over that of the truth; both empty 1, only the truth empty nan."""
    if truth.length_px == 0:
        return 1.0 if pred.length_px == 0 else float("nan")
    return pred.length_px / truth.length_px


# ---- Recall by vessel width: thin branches hold few pixels and vanish in any other score ----


def width_map(truth: Any, skeleton: np.ndarray | None = None) -> np.ndarray:
    """Width class of every pixel of a truth: 0 background, 1 thin, 2 medium, 3 thick; uint8 (H, W).

    A centreline pixel is as wide as the largest disc that fits into the truth and covers it: thick from a
    diameter of 9 px, medium from 5 px. Every other pixel of the truth takes the class of the centreline pixel
    nearest to it, so the rough edge of a thick vessel is not called thin. Outside the image is background.
    """
    from scipy.ndimage import distance_transform_edt

    truth = as_mask(truth, "truth")
    classes = np.zeros(truth.shape, np.uint8)
    if not truth.any():
        return classes
    if skeleton is None:
        skeleton = topology(truth).skeleton
    widths = np.ones(truth.shape, np.uint8)
    widths[covered_by_discs(truth, METRIC_SPEC["calibre_medium_from_px"])] = 2
    widths[covered_by_discs(truth, METRIC_SPEC["calibre_thick_from_px"])] = 3
    nearest = distance_transform_edt(~skeleton, return_distances=False, return_indices=True)
    classes[truth] = widths[tuple(nearest)][truth]
    return classes


def covered_by_discs(mask: np.ndarray, diameter_px: int) -> np.ndarray:
    """Pixels of a bool mask (H, W) that some disc of an odd diameter inside the mask covers; bool (H, W).

    An odd disc sits on a pixel: one of 5 px does not fit into a bar of 4 px.
    """

    def distance(pixels: np.ndarray) -> np.ndarray:
        return cv2.distanceTransform(pixels.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)

    centres = distance(np.pad(mask, 1))[1:-1, 1:-1] > diameter_px / 2
    return distance(~centres) < diameter_px / 2 if centres.any() else centres


def recall_by_width(pred: Any, classes: np.ndarray) -> dict[str, float]:
    """Share of the thin, medium and thick truth (`width_map`) that was found; nan where there is none."""
    pred = as_mask(pred, "pred")
    if pred.shape != classes.shape:
        raise ValueError(
            f"prediction {pred.shape} and width map {classes.shape} differ in size (H, W). "
            "Pass width_map(truth) of the same image."
        )
    present = np.bincount(classes.ravel(), minlength=4)
    found = np.bincount(classes[pred], minlength=4)
    shares = recall_from_counts(found, present - found)
    return {f"recall_{name}": float(share) for name, share in zip(VESSEL_WIDTHS, shares[1:], strict=True)}


# ---- The truth's part, computed once per content ----


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
    def widths(self) -> np.ndarray:
        """Width class of every pixel, uint8 (H, W)."""
        return width_map(self.mask, self.topology.skeleton)


def cached_truth(mask: Any) -> Truth:
    """The `Truth` of a mask, bool or 0/1 (H, W); equal masks share one, so its parts are computed once.

    It is found by content, and holds its own copy of the mask.
    """
    mask = as_mask(mask, "truth")
    return _truth_of(mask.shape, np.packbits(mask).tobytes())


def clear_truth_cache() -> None:
    """Drop every kept truth; for measurements that must include the truth's part."""
    _truth_of.cache_clear()


@functools.lru_cache(maxsize=32)  # a truth of 512 x 512 with all its parts takes 2 MB
def _truth_of(shape: tuple[int, int], bits: bytes) -> Truth:
    pixels = np.unpackbits(np.frombuffer(bits, np.uint8), count=shape[0] * shape[1])
    return Truth(pixels.reshape(shape).astype(bool))


def evaluation_scores(pred: Any, truth: Any) -> dict[str, float]:
    """The scores of `score_mask`, `surface_scores` and `recall_by_width` of two bool or 0/1 masks (H, W)."""
    pred, truth = as_mask_pair(pred, truth)
    cached = cached_truth(truth)
    return {
        **score_mask(pred, truth, cached.topology),
        **surface_scores(pred, cached.surface),
        **recall_by_width(pred, cached.widths),
    }


# ---- Many masks over threads: the compiled kernels, NumPy and OpenCV release the GIL while they work ----


def score_masks(
    preds: Sequence[Any], truths: Sequence[Any], *, evaluation: bool = False, num_threads: int | None = None
) -> list[dict[str, float]]:
    """Score N predictions, bool or 0/1 (H, W), against their truths, in their order.

    Each gets its `score_mask`, or with `evaluation` its `evaluation_scores`, which are several times slower.
    """
    if len(preds) != len(truths):
        raise ValueError(
            f"got {len(preds)} predictions for {len(truths)} truths. Pass one truth per prediction."
        )
    preds = [as_mask(mask, f"pred {i}") for i, mask in enumerate(preds)]
    truths = [as_mask(mask, f"truth {i}") for i, mask in enumerate(truths)]
    for i, (pred, truth) in enumerate(zip(preds, truths, strict=True)):
        if pred.shape != truth.shape:
            raise ValueError(
                f"pred {i} is {pred.shape}, truth {i} is {truth.shape} (H, W). Resize the prediction."
            )

    def score(pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return score_mask(pred, truth, cached_truth(truth).topology)

    return in_threads(evaluation_scores if evaluation else score, preds, truths, num_threads=num_threads)


def in_threads(function: Callable, *arguments: Sequence[Any], num_threads: int | None = None) -> list:
    """`[function(a, b, ...) for a, b, ... in zip(*arguments)]` over threads, by default one per core."""
    if num_threads is None:
        num_threads = min(8, os.cpu_count() or 1)
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}.")
    if num_threads == 1:
        return [function(*values) for values in zip(*arguments, strict=True)]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(function, *arguments))
