"""Where the time of a training step goes: device, CPU and copies, and what the presets would take.

Random weights of the real shapes make no masks. So the embedded miniature's logits of an image are added to
theirs, and scoring has real masks to work on.
"""

import json as json_module
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import run
from benchmarks.memory import random_model
from vesselrl.data.dataset import BatchSource, VesselDataset
from vesselrl.data.samples import find_samples
from vesselrl.evaluation import evaluate as evaluation
from vesselrl.experiment.config import PRESETS, TrainConfig
from vesselrl.inference.predictor import Predictor
from vesselrl.models.processing import Sa2VAInputs, Sa2VAProcessor
from vesselrl.models.sa2va import DecodedMasks
from vesselrl.scoring.rewards import make_reward
from vesselrl.synthetic.dataset import BuiltinSize, builtin_data
from vesselrl.training.policy import MaskPolicy, keep_states, load_policy
from vesselrl.training.ppo import PPOUpdate
from vesselrl.training.setup import make_updates, select_device

# What is done while the device waits; all else counts as the device's. Without a GPU "sample" is noise and
# scoring in turn, which a training does in threads beside the reference's pass.
PARTS = {
    "inputs": (Sa2VAProcessor, "__call__"),
    "copies": (Sa2VAInputs, "to"),
    "sample": (PPOUpdate, "sample"),
    "credit": (PPOUpdate, "collect"),
    "scores": (evaluation, "evaluation_scores"),
    "reward": (evaluation, "score_or_skip"),
}
TEST_IMAGES = 130  # of the built-in data, scored before and after
SIDES = {"miniature": 256, "1b": 512, "internvl3-8b": 512}  # of the images, in px; none is cut into tiles
Row = dict[str, float]  # seconds of one image in all, of the device and of each part, and the device's TFLOP


def step(
    shape: Literal["miniature", "1b", "internvl3-8b"] = "miniature",
    lora_scope: tuple[str, ...] = TrainConfig().model.lora_scope,
    rounds: int = 3,
    detail_head: Literal["none", "pretrained"] = "none",
    use_bf16: bool = False,
    tflops: float | None = None,
    folder: str = "output/random_models",
    json: bool = False,
) -> int:
    """Times PPO and supervised steps on one image, and its validation; on a GPU where there is one.

    Args:
        shape: of the model; all but the miniature have random weights, written to the folder once.
        lora_scope: what is trained.
        rounds: images, of which the fastest counts, after one to warm up.
        detail_head: that the masks go through.
        use_bf16: vision tower and language model in bfloat16.
        tflops: 1e12 operations a second of another device, in place of the measured time of this one.
        folder: of the random models.
        json: print the numbers as JSON.
    """
    model_path = None if shape == "miniature" else str(random_model(shape, folder, use_bf16))
    settings = {"model_path": model_path, "lora_scope": lora_scope, "use_bf16": use_bf16}
    settings |= {"detail_head": detail_head}
    device, size = select_device(0), BuiltinSize(rounds + 1, 1, 1, SIDES[shape])
    with TemporaryDirectory() as output:
        config = TrainConfig.from_dict(settings | {"output_dir": output})
        rows = measure(config, device, size, tflops)
    seconds = {name: row["all"] for name, row in rows.items()}
    ratios = {
        "nothing kept : kept": seconds["rl, nothing kept"] / seconds["rl"],
        "8 masks : 1": seconds["rl, 8 masks"] / seconds["rl, 1 mask"],
        "PPO : supervised, a pass": seconds["rl"] / config.ppo.num_passes / seconds["sft"],
        "CPU and copies : PPO step": 1 - rows["rl"]["device"] / seconds["rl"],
        "validation, images a second, before": 1 / seconds["validation, nothing kept"],
        "validation, images a second": 1 / seconds["validation"],
    }
    ratios |= {f"{n}, minutes": projected(PRESETS[n], config, seconds) for n in ("quick", "full")}
    about = {"shape": shape, "scope": " ".join(lora_scope), "device": device, "tflops": tflops}
    if json:
        print(json_module.dumps(about | {"rows": rows, "ratios": ratios}, indent=1))
        return 0
    columns = ("all", "device", *PARTS, "tflop")
    print(*about.values(), f"\n{'seconds an image':<26}", *(f"{name:>9}" for name in columns))
    for name, row in rows.items():
        print(f"{name:<26}", *(f"{row.get(column, 0):9.4f}" for column in columns))
    print(*(f"{name:<40}{value:8.3f}" for name, value in ratios.items()), sep="\n")
    return 0


def measure(config: TrainConfig, device: str, size: BuiltinSize, tflops: float | None) -> dict[str, Row]:
    """Times steps and validation on built-in images, with what can be kept of an image and without."""
    samples, rows = find_samples(builtin_data("output", size)), {}
    policy, reward = load_policy(config, device), make_reward(config.to_dict())
    batches = [*BatchSource(VesselDataset(samples), 1, seed=0).epoch(1)]
    if config.model.model_path:
        imitate_miniature(policy, [batch.images[0] for batch in batches])

    def train(name: str, stage: str, num_samples: int = config.ppo.num_samples) -> None:
        _, updates = make_updates(config, policy, reward)
        updates["rl"].settings = replace(config.ppo, num_samples=num_samples)  # a training has 2 or more
        updates["rl"].checked = True  # self-checks belong to the first step alone
        if device == "cpu":  # whose seconds cannot be told apart where masks are scored during a pass
            updates["rl"].pool = InTurn()
        policy.freeze_reference()
        rows[name] = fastest([partial(updates[stage].step, batch) for batch in batches], tflops)

    def validate(name: str) -> None:
        images = [partial(evaluation.evaluate, policy.predict, [sample], reward) for sample in samples]
        rows[name] = fastest(images, tflops)

    store, policy.store, policy.keys_repeat = policy.store, None, False
    train("rl, nothing kept", "rl")
    validate("validation, nothing kept")
    policy.store, policy.keys_repeat = store, True
    keep_states(policy, samples, [])
    for _ in range(2):  # the first fills files and memory
        validate("validation")
    for _ in range(2):
        train("sft", "sft")
    train("rl", "rl")
    train("rl, 8 masks", "rl", 8)
    train("rl, 1 mask", "rl", 1)
    return rows


class InTurn(Executor):
    """Runs each job when it is submitted."""

    def submit(self, function: Callable, *args: object) -> Future:
        """Runs it, and keeps the result."""
        job = Future()
        job.set_result(function(*args))
        return job


def imitate_miniature(policy: MaskPolicy, images: list[np.ndarray]) -> None:
    """Adds the embedded miniature's logits of each of these images to the policy's."""
    miniature, own_logits, added = Predictor.from_pretrained(device="cpu"), policy.logits, {}
    for image in images:
        logits = torch.from_numpy(miniature.predict(image).logits).to(policy.model.device)
        added[float(policy.prepare([image]).sam_pixels.mean())] = logits

    def logits(decoded: DecodedMasks, choice: Tensor, inputs: Sa2VAInputs) -> list[Tensor]:
        return [own_logits(decoded, choice, inputs)[0] + added[float(inputs.sam_pixels.mean())]]

    policy.logits = logits


def projected(preset: TrainConfig, measured: TrainConfig, seconds: dict[str, float]) -> float:
    """Minutes of a training on its largest number of images, with its validations and the test."""
    optim, images, ends = preset.optim, preset.data.max_train_samples, [0]
    more_passes, total = preset.ppo.num_passes - measured.ppo.num_passes, 0.0
    for epoch in range(1, optim.num_epochs + 1):
        passes = preset.passes_of_epoch(epoch, optim.num_epochs)
        is_rl = preset.stage_of_epoch(epoch, optim.num_epochs) == "rl"
        total += images * (seconds["rl"] + more_passes * seconds["sft"] if is_rl else passes * seconds["sft"])
        ends.append(ends[-1] + passes * math.ceil(images / optim.batch_size))
    validations = len({*ends, *range(0, ends[-1], preset.run.val_freq)})
    scored = validations * preset.data.max_val_samples + 2 * TEST_IMAGES
    return (total + scored * seconds["validation"]) / 60


def fastest(calls: Sequence[Callable[[], object]], tflops: float | None) -> Row:
    """Seconds of the fastest call and of its parts; the first call warms up, and its work is counted."""
    with FlopCounterMode(display=False) as counter:
        calls[0]()
    rows = []
    for call in calls[1:]:
        row = defaultdict(float)
        with ExitStack() as stack, timed(row, "all"):
            for name, (owner, attribute) in PARTS.items():
                original = getattr(owner, attribute)
                stack.enter_context(mock.patch.object(owner, attribute, timed(row, name)(original)))
            call()
        rows.append(row)
    row = dict(min(rows, key=lambda row: row["all"]))
    row["tflop"] = counter.get_total_flops() / 1e12
    parts = sum(row.get(name, 0.0) for name in PARTS)
    row["device"] = row["tflop"] / tflops if tflops else row["all"] - parts
    return row | {"all": row["device"] + parts}


@contextmanager
def timed(row: Row, name: str) -> Iterator[None]:
    """Adds the seconds of a `with` block, or of a function's calls; without a GPU CPU seconds."""
    started = now()
    try:
        yield
    finally:
        row[name] += now() - started


def now() -> float:
    """Seconds on the clock, when the GPU has done all it was given; without one CPU seconds."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    run(step)
