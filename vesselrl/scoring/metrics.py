"""Agreement of a predicted mask with the truth: the only place where Dice and its relatives are computed.

Empty masks, one rule for all overlap scores and clDice: two empty masks agree (1), exactly one empty mask is
a complete failure (0). Only what has no meaning is nan: recall and length ratio where there is nothing to
find, specificity where there is no background.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from vesselrl.scoring.masks import as_mask_pair
from vesselrl.scoring.spec import METRIC_SPEC
from vesselrl.scoring.topology import Topology, topology


class Counts(NamedTuple):
    """Pixels by agreement; the four add up to height x width."""

    # foreground in both
    tp: int
    # foreground in the prediction only
    fp: int
    # foreground in the truth only
    fn: int
    # foreground in neither
    tn: int


def counts(pred: Any, truth: Any) -> Counts:
    """Count true/false positive and negative pixels of two 0/1 or bool masks (H, W).

    Raises:
        ValueError: not masks, or of different size.

    >>> counts(np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 0, 0]], bool))
    Counts(tp=1, fp=1, fn=0, tn=2)
    """
    pred, truth = as_mask_pair(pred, truth)
    tp = int(np.count_nonzero(pred & truth))
    fp = int(np.count_nonzero(pred)) - tp
    fn = int(np.count_nonzero(truth)) - tp
    return Counts(tp, fp, fn, pred.size - tp - fp - fn)


def dice(pred: Any, truth: Any) -> float:
    """Overlap of two masks, 2·|P∩T| / (|P|+|T|), in [0, 1].

    Masks are bool or 0/1 (H, W). Two empty masks score 1, exactly one empty mask 0.

    >>> dice(np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 0, 0]], bool))
    0.6666666666666666
    """
    tp, fp, fn, _ = counts(pred, truth)
    return float(dice_from_counts(tp, fp, fn))


def iou(pred: Any, truth: Any) -> float:
    """Intersection over union, |P∩T| / |P∪T|, in [0, 1].

    Masks are bool or 0/1 (H, W). Two empty masks score 1, exactly one empty mask 0.

    >>> iou(np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 0, 0]], bool))
    0.5
    """
    return _overlap_scores(counts(pred, truth))["iou"]


def recall(pred: Any, truth: Any) -> float:
    """Share of the truth that was found, |P∩T| / |T|, in [0, 1]; nan where the truth is empty.

    Masks are bool or 0/1 (H, W). An empty prediction of a non-empty truth scores 0.

    >>> recall(np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 1, 0]], bool))
    0.5
    """
    tp, _, fn, _ = counts(pred, truth)
    return float(recall_from_counts(tp, fn))


def precision(pred: Any, truth: Any) -> float:
    """Share of the prediction that is right, |P∩T| / |P|, in [0, 1].

    Masks are bool or 0/1 (H, W). Two empty masks score 1, exactly one empty mask 0.

    >>> precision(np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 1, 0]], bool))
    0.5
    """
    tp, fp, fn, _ = counts(pred, truth)
    return float(precision_from_counts(tp, fp, fn))


def specificity(pred: Any, truth: Any) -> float:
    """Share of the background left alone, TN / (TN + FP), in [0, 1]; nan where the truth is all foreground.

    Masks are bool or 0/1 (H, W). An empty prediction scores 1.

    >>> specificity(np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 0, 0]], bool))
    0.6666666666666666
    """
    return _overlap_scores(counts(pred, truth))["specificity"]


def cldice(pred: Any, truth: Any) -> float:
    """Overlap along the centrelines, in [0, 1]: the harmonic mean of tprec and tsens.

    tprec = |skeleton(P)∩T| / |skeleton(P)| and tsens = |skeleton(T)∩P| / |skeleton(T)|. Masks are bool or 0/1
    (H, W). Two empty masks score 1, exactly one empty mask 0, masks that miss each other 0.

    Never use it alone: an all-foreground mask can score 1 when its one-pixel skeleton falls on a vessel.

    >>> bar = np.zeros((5, 8), bool)
    >>> bar[1:4] = True
    >>> cldice(bar, bar)
    1.0
    """
    pred, truth = as_mask_pair(pred, truth)
    return cldice_scores(pred, truth, topology(pred), topology(truth))["cldice"]


def score_mask(
    pred: Any, truth: Any, truth_topology: Topology | None = None, backend: str = "auto"
) -> dict[str, float]:
    """All scores of one prediction, from one count and one topology of each mask.

    Args:
        pred: bool or 0/1 (H, W).
        truth: bool or 0/1 (H, W).
        truth_topology: `topology(truth)` if the caller has it already.
        backend: of `topology`.

    Returns:
        dice, iou, recall, precision, specificity, cldice, tprec, tsens: in [0, 1];
        beta0_error, beta1_error: absolute difference in the number of pieces and of loops;
        length_ratio: centreline length of the prediction over that of the truth, 1 for two empty masks;
        foreground: share of the image that the prediction covers.
        nan stands for "has no meaning": recall of an empty truth, length_ratio of a non-empty prediction to
        an empty truth, specificity without background. Leave nan out of means and say how many; JSON: null.

    Raises:
        ValueError: not masks, of different size, or a topology that is not of this truth.

    >>> empty = np.zeros((4, 4), bool)
    >>> score_mask(empty, empty)["dice"], score_mask(empty, empty)["recall"]
    (1.0, nan)
    """
    pred, truth = as_mask_pair(pred, truth)
    truth_shape = topology(truth, backend) if truth_topology is None else truth_topology
    check_topology(truth_shape, truth)
    pred_shape = topology(pred, backend)
    return {
        **_overlap_scores(counts(pred, truth)),
        **cldice_scores(pred, truth, pred_shape, truth_shape),
        "beta0_error": float(abs(pred_shape.num_components - truth_shape.num_components)),
        "beta1_error": float(abs(pred_shape.num_loops - truth_shape.num_loops)),
        "length_ratio": length_ratio(pred_shape, truth_shape),
        "foreground": float(np.count_nonzero(pred) / pred.size),
    }


def length_ratio(pred: Topology, truth: Topology) -> float:
    """Centreline length of the prediction over that of the truth; both empty 1, only the truth empty nan."""
    if truth.length_px == 0:
        return 1.0 if pred.length_px == 0 else float("nan")
    return pred.length_px / truth.length_px


def check_topology(shape: Topology, mask: np.ndarray) -> None:
    """Refuse a topology that cannot be of this mask, or that follows other definitions than `METRIC_SPEC`.

    Raises:
        ValueError: size or thinning differ.
    """
    if shape.skeleton.shape != mask.shape:
        raise ValueError(
            f"the given topology has size {shape.skeleton.shape}, the mask has {mask.shape} (H, W). "
            "Pass topology(truth) of the same image."
        )
    if shape.thinning != METRIC_SPEC["skeleton"]:
        raise ValueError(
            f"the given topology comes from {shape.thinning!r} thinning, not {METRIC_SPEC['skeleton']!r}. "
            "Pass topology(truth)."
        )


# ---- From counts: numbers or arrays, float64 out ----


def dice_from_counts(tp: Any, fp: Any, fn: Any, empty: float = 1.0) -> np.ndarray:
    """Dice, 2·tp / (2·tp+fp+fn), elementwise over counts; `empty` where both masks are empty.

    >>> dice_from_counts(np.array([1, 0]), np.array([1, 0]), 0)
    array([0.66666667, 1.        ])
    """
    tp, fp, fn = _as_float(tp, fp, fn)
    return _ratio(2 * tp, 2 * tp + fp + fn, empty)


def recall_from_counts(tp: Any, fn: Any, empty: float = np.nan) -> np.ndarray:
    """Recall, tp / (tp+fn), elementwise over counts; `empty` where the truth is empty.

    >>> recall_from_counts(np.array([1, 0]), np.array([1, 0]), empty=1.0)
    array([0.5, 1. ])
    """
    tp, fn = _as_float(tp, fn)
    return _ratio(tp, tp + fn, empty)


def precision_from_counts(tp: Any, fp: Any, fn: Any, empty: float = 1.0) -> np.ndarray:
    """Precision, tp / (tp+fp), elementwise over counts; `empty` where both masks are empty, 0 where one is.

    >>> precision_from_counts(np.array([1, 0, 0]), np.array([1, 0, 0]), np.array([0, 0, 5]))
    array([0.5, 1. , 0. ])
    """
    tp, fp, fn = _as_float(tp, fp, fn)
    return _ratio(tp, tp + fp, np.where(fn == 0, empty, 0.0))


def _overlap_scores(pixel_counts: Counts) -> dict[str, float]:
    tp, fp, fn, tn = pixel_counts
    scores = {
        "dice": dice_from_counts(tp, fp, fn),
        "iou": _ratio(*_as_float(tp, tp + fp + fn), empty=1.0),
        "recall": recall_from_counts(tp, fn),
        "precision": precision_from_counts(tp, fp, fn),
        "specificity": _ratio(*_as_float(tn, tn + fp), empty=np.nan),
    }
    return {name: float(score) for name, score in scores.items()}


def cldice_scores(
    pred: np.ndarray, truth: np.ndarray, pred_shape: Topology, truth_shape: Topology
) -> dict[str, float]:
    """cldice, tprec and tsens of two bool masks whose topologies are known; see `cldice`."""
    if pred_shape.length_px == 0 or truth_shape.length_px == 0:
        agree = float(pred_shape.length_px == truth_shape.length_px)
        return {"cldice": agree, "tprec": agree, "tsens": agree}
    tprec = float(np.count_nonzero(pred_shape.skeleton & truth) / pred_shape.length_px)
    tsens = float(np.count_nonzero(truth_shape.skeleton & pred) / truth_shape.length_px)
    total = tprec + tsens
    return {"cldice": 2 * tprec * tsens / total if total > 0 else 0.0, "tprec": tprec, "tsens": tsens}


def _as_float(*values: Any) -> tuple[np.ndarray, ...]:
    if all(isinstance(value, int | float) for value in values):
        return values  # single counts need no arrays: ten times faster
    return np.broadcast_arrays(*(np.asarray(value, np.float64) for value in values))


def _ratio(numerator: Any, denominator: Any, empty: Any) -> Any:
    """Divide numerator by denominator, and `empty` where the denominator is 0."""
    if isinstance(denominator, int | float):
        return np.float64(numerator / denominator if denominator > 0 else empty)
    out = np.array(np.broadcast_to(empty, denominator.shape), np.float64)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)
