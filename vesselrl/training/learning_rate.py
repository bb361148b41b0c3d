"""How the learning rate changes over a training."""

import math
from collections.abc import Sequence


def warm_cosine(step: int, num_steps: int, warmup_share: float) -> float:
    """Factor on the peak rate: linear warm-up, then a half cosine from 1 down to 0.

    Args:
        step: counted from 0.
        num_steps: of the whole training.
        warmup_share: share of the steps that warm up, in [0, 1); at least one step does.

    >>> [round(warm_cosine(step, 10, 0.2), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = max(1, round(num_steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


def staged_warm_cosine(step: int, stages: Sequence[tuple[int, float]], warmup_share: float) -> float:
    """Factor on the peak rate of a training in stages, each with its own warm-up and its own way down to 0.

    Args:
        step: counted from 0 over all stages.
        stages: number of steps and peak factor of each, at least one stage.
        warmup_share: of each stage's steps, in [0, 1).

    >>> [round(staged_warm_cosine(step, [(10, 1.0), (10, 0.1)], 0.2), 2) for step in (1, 6, 10, 11, 16)]
    [1.0, 0.5, 0.05, 0.1, 0.05]
    """
    for num_steps, factor in stages[:-1]:
        if step < num_steps:
            return factor * warm_cosine(step, num_steps, warmup_share)
        step -= num_steps
    num_steps, factor = stages[-1]
    return factor * warm_cosine(step, num_steps, warmup_share)
