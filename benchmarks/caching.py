"""Time that keeping the outputs of frozen parts saves in training: the same steps with and without it."""

import json as json_module
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import run
from vesselrl.data.dataset import BatchSource, VesselDataset
from vesselrl.data.samples import Sample, find_samples
from vesselrl.data.splits import take
from vesselrl.experiment.config import TrainConfig
from vesselrl.synthetic.dataset import builtin_data
from vesselrl.training.checkpoint import with_values
from vesselrl.training.policy import FeatureStore, MaskPolicy
from vesselrl.training.setup import load_policy
from vesselrl.training.supervised import SupervisedUpdate

# With the image encoder frozen its features are kept, with the language model (the default) the [SEG] states.
SCOPES = {
    "image encoder frozen": ("projector", "mask_decoder"),
    "language model frozen": ("projector", "mask_decoder", "image_encoder"),
}


def caching(
    data_root: str | None = None, num_images: int = 12, num_rounds: int = 3, json: bool = False
) -> int:
    """Times a training epoch with and without keeping the outputs of frozen parts of the model.

    Args:
        data_root: data set; none: the built-in synthetic angiograms.
        num_images: images in an epoch.
        num_rounds: rounds that the median is taken over.
        json: print the numbers as JSON.
    """
    samples = take(find_samples(data_root or builtin_data("output")), num_images)
    result = measure(samples, num_rounds=num_rounds)
    lines = [f"{'':<24}{'kept':>9}{'computed':>10}{'ratio':>8}  losses"]
    for name, row in result.items():
        same = "identical" if row["same_losses"] else "DIFFERENT"
        lines.append(
            f"{name:<24}{row['kept_s']:>8.2f}s{row['computed_s']:>9.2f}s{row['ratio']:>7.2f}x  {same}"
        )
    print(json_module.dumps(result, indent=1) if json else "\n".join(lines))
    return int(not all(row["same_losses"] for row in result.values()))


def measure(
    samples: Sequence[Sample], model_path: str | None = None, num_rounds: int = 3
) -> dict[str, dict[str, Any]]:
    """Seconds per epoch with everything kept and nothing kept, by scope, and whether all losses are equal."""
    result = {}
    for name, scope in SCOPES.items():
        settings = {"model_path": model_path, "lora_scope": scope, "batch_size": 2, "num_passes": 1}
        config = TrainConfig.from_dict(settings)
        seconds, losses, policies = {True: [], False: []}, {}, {}
        for kept in seconds:
            policies[kept] = policy = load_policy(config, "cpu")
            policy.store, policy.keys_repeat = (FeatureStore(), True) if kept else (None, False)
        epoch_losses(policies[True], config, samples)  # fills the memory
        for _ in range(num_rounds):
            for kept, policy in policies.items():
                started = time.perf_counter()
                losses[kept] = epoch_losses(policy, config, samples)
                seconds[kept].append(time.perf_counter() - started)
        kept_s, computed_s = (float(np.median(seconds[kept])) for kept in (True, False))
        times = {"kept_s": kept_s, "computed_s": computed_s, "ratio": computed_s / kept_s}
        result[name] = times | {"same_losses": losses[True] == losses[False]}
    return result


def epoch_losses(policy: MaskPolicy, config: TrainConfig, samples: Sequence[Sample]) -> list[float]:
    """The losses of one epoch from the policy's start; its adapters are put back there first."""
    with with_values(policy, policy.start):
        optimizer = torch.optim.AdamW(policy.trainable.values(), lr=config.peak_learning_rate)
        update = SupervisedUpdate(policy, optimizer, config)
        batches = BatchSource(VesselDataset(samples), 2, seed=42)
        return [update.step(batch)["train/loss"] for batch in batches.epoch(1)]


if __name__ == "__main__":
    run(caching)
