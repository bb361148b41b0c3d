"""What keeping the outputs of frozen parts saves in training: the same steps with and without it.

Two scopes: with the image encoder frozen its features are kept; with the language model frozen, which is the
default, the [SEG] states are.
"""

import time
from typing import Any

import numpy as np
import torch

from vesselrl.data.annotations import Sample
from vesselrl.data.dataset import VesselDataset
from vesselrl.experiment.config import TrainConfig
from vesselrl.training.batches import BatchSource
from vesselrl.training.feature_store import FeatureStore
from vesselrl.training.policy import MaskPolicy
from vesselrl.training.setup import load_policy
from vesselrl.training.supervised import SupervisedUpdate

SCOPES = {
    "image encoder frozen": ("projector", "mask_decoder"),
    "language model frozen": ("projector", "mask_decoder", "image_encoder"),
}


def benchmark_caching(
    samples: list[Sample], model_path: str | None = None, num_rounds: int = 3
) -> dict[str, dict[str, Any]]:
    """Trains one epoch on the samples, supervised, with everything kept and with nothing kept.

    Kept values are filled by an epoch before the one that is timed; both sides train from the same start.

    Args:
        samples: images to train on.
        model_path: checkpoint; None: the embedded miniature.
        num_rounds: turns of both sides; medians are over these.

    Returns:
        By scope: `kept_s` and `computed_s` (seconds per epoch, median), `ratio` (computed over kept) and
        `same_losses` (whether all losses are equal to the last bit).
    """
    result = {}
    for name, scope in SCOPES.items():
        config = TrainConfig(model_path=model_path, lora_scope=scope, batch_size=2, num_passes=1)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        losses = {}
        policies = {kept: _policy(config, kept) for kept in (True, False)}
        _epoch(policies[True], config, samples)  # fills the memory
        for _ in range(num_rounds):
            for kept, policy in policies.items():
                started = time.perf_counter()
                losses[kept] = _epoch(policy, config, samples)
                seconds[kept].append(time.perf_counter() - started)
        kept_s, computed_s = (float(np.median(seconds[kept])) for kept in (True, False))
        result[name] = {
            "kept_s": kept_s,
            "computed_s": computed_s,
            "ratio": computed_s / kept_s,
            "same_losses": losses[True] == losses[False],
        }
    return result


def format_caching(result: dict[str, dict[str, Any]]) -> str:
    """The result of `benchmark_caching` as a table for a terminal."""
    lines = [f"{'':<24}{'kept':>9}{'computed':>10}{'ratio':>8}  losses"]
    for name, row in result.items():
        same = "identical" if row["same_losses"] else "DIFFERENT"
        times = f"{row['kept_s']:>8.2f}s{row['computed_s']:>9.2f}s"
        lines.append(f"{name:<24}{times}{row['ratio']:>7.2f}x  {same}")
    return "\n".join(lines)


def _policy(config: TrainConfig, kept: bool) -> MaskPolicy:
    policy = load_policy(config, "cpu")
    policy.store, policy.keys_repeat = (FeatureStore(), True) if kept else (None, False)
    return policy


def _epoch(policy: MaskPolicy, config: TrainConfig, samples: list[Sample]) -> list[float]:
    """The losses of one epoch from the policy's start; its adapters are put back there first."""
    with policy.at_start():
        optimizer = torch.optim.AdamW(policy.trainable.values(), lr=config.peak_learning_rate)
        update = SupervisedUpdate(policy, optimizer, config)
        batches = BatchSource(VesselDataset(samples), config.batch_size, config.seed)
        return [update.step(batch)["train/loss"] for batch in batches.epoch(1)]
