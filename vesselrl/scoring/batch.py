"""Many masks at once, over threads: the compiled kernel, NumPy and OpenCV release the GIL while they work.

Results keep the order of the masks and do not depend on the number of threads. An error in one mask stops the
batch and is raised here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vesselrl.scoring.masks import as_mask
from vesselrl.scoring.metrics import score_mask
from vesselrl.scoring.topology import Topology, topology
from vesselrl.scoring.truth import evaluation_scores, known_truth

MAX_THREADS = 8


def score_masks(
    preds: Sequence[Any],
    truths: Sequence[Any],
    *,
    evaluation: bool = False,
    num_threads: int | None = None,
) -> list[dict[str, float]]:
    """Score predictions against their truths, one dict of `score_mask` each.

    What is needed of a truth is computed once, however often it occurs (see `known_truth`).

    Args:
        preds: N masks, bool or 0/1 (H, W); sizes may differ from pair to pair.
        truths: N masks of the same sizes.
        evaluation: add what `evaluation_scores` adds; several times slower.
        num_threads: at least 1; None takes one per core, at most 8.

    Raises:
        ValueError: not as many predictions as truths, or, with the number of the pair, not masks or of
            different size.

    >>> import numpy as np
    >>> bar = np.array([[0, 1, 1, 0]], bool)
    >>> [scores["dice"] for scores in score_masks([bar, ~bar], [bar, bar])]
    [1.0, 0.0]
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

    def score(pred: Any, truth: Any) -> dict[str, float]:
        if evaluation:
            return evaluation_scores(pred, truth)
        return score_mask(pred, truth, known_truth(truth).topology)

    return in_threads(score, preds, truths, num_threads=num_threads)


def topologies(
    masks: Sequence[Any], *, num_threads: int | None = None, backend: str = "auto"
) -> list[Topology]:
    """`topology` of every mask, bool or 0/1 (H, W), in their order.

    Raises:
        ValueError: not masks, or no threads.
    """
    return in_threads(lambda mask: topology(mask, backend), masks, num_threads=num_threads)


def in_threads(function: Callable, *arguments: Sequence[Any], num_threads: int | None = None) -> list:
    """`[function(a, b, ...) for a, b, ... in zip(*arguments)]`, over threads.

    Raises:
        ValueError: num_threads below 1, or what `function` raises.

    >>> in_threads(max, [1, 5], [4, 2], num_threads=2)
    [4, 5]
    """
    if num_threads is None:
        num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}.")
    num_threads = min(num_threads, len(arguments[0]))
    if num_threads <= 1:
        return [function(*values) for values in zip(*arguments, strict=True)]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(function, *arguments))
