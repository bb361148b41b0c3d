"""Time that keeping the outputs of frozen parts saves in training: the same steps with and without it."""

import json as json_module
import time

import numpy as np
import torch

from benchmarks import run
from vesselrl.data.dataset import BatchSource, VesselDataset
from vesselrl.data.samples import Sample, find_samples
from vesselrl.data.splits import take
from vesselrl.experiment.config import TrainConfig
from vesselrl.synthetic.dataset import builtin_data
from vesselrl.training.checkpoint import with_values
from vesselrl.training.features import FeatureStore
from vesselrl.training.policy import load_policy
from vesselrl.training.supervised import SupervisedUpdate

# With the image encoder frozen its features are kept, with the language model (the default) the [SEG] states.
FROZEN = ("projector", "mask_decoder")
SCOPES = {"image encoder frozen": FROZEN, "language model frozen": (*FROZEN, "image_encoder")}


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
    result = {name: measure(samples, scope, num_rounds) for name, scope in SCOPES.items()}
    lines = [f"{'':<24}{'kept':>9}{'computed':>10}{'ratio':>8}  losses"]
    for name, row in result.items():
        times = f"{row['kept_s']:>8.2f}s{row['computed_s']:>9.2f}s{row['ratio']:>7.2f}x"
        lines.append(f"{name:<24}{times}  {'identical' if row['same_losses'] else 'DIFFERENT'}")
    print(json_module.dumps(result, indent=1) if json else "\n".join(lines))
    return int(not all(row["same_losses"] for row in result.values()))


def measure(samples: list[Sample], scope: tuple, num_rounds: int, model_path: str | None = None) -> dict:
    """Median seconds per epoch with everything kept and nothing kept, and whether all losses are equal."""
    settings = {"model_path": model_path, "lora_scope": scope, "batch_size": 2, "num_passes": 1}
    config, seconds, losses = TrainConfig.from_dict(settings), {True: [], False: []}, {}
    policies = {kept: load_policy(config, "cpu") for kept in seconds}
    for kept, policy in policies.items():
        policy.store, policy.keys_repeat = (FeatureStore(), True) if kept else (None, False)
    for _ in range(1 + num_rounds):  # the first one fills the memory
        for kept, policy in policies.items():
            started = time.perf_counter()
            with with_values(policy, policy.start):  # puts the adapters back
                optimizer = torch.optim.AdamW(policy.trainable.values(), lr=config.peak_learning_rate)
                update = SupervisedUpdate(policy, optimizer, config)
                batches = BatchSource(VesselDataset(samples), 2, seed=42)
                losses[kept] = [update.step(batch)["train/loss"] for batch in batches.epoch(1)]
            seconds[kept].append(time.perf_counter() - started)
    kept_s, computed_s = (float(np.median(seconds[kept][1:])) for kept in (True, False))
    times = {"kept_s": kept_s, "computed_s": computed_s, "ratio": computed_s / kept_s}
    return times | {"same_losses": losses[True] == losses[False]}


if __name__ == "__main__":
    run(caching)
