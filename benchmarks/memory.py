"""CPU seconds and peak memory of a training's parts at the real shapes, with random weights, on a CPU."""

import gc
import json as json_module
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks import run
from vesselrl.data.dataset import TrainBatch
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import write_json
from vesselrl.models.config import SAM2_SIDECAR, Sa2VAConfig, Sam2Dimensions
from vesselrl.models.miniature import write_tokenizer
from vesselrl.models.sa2va import LANGUAGE, Sa2VA
from vesselrl.scoring.rewards import make_reward
from vesselrl.scoring.topology import topology
from vesselrl.training.policy import NEGATIVE, PROBE, load_policy
from vesselrl.training.setup import make_updates

_TOWER = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_VISION = _TOWER | {"image_size": 448, "patch_size": 14, "qkv_bias": True}
_COMMON = {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6}
# hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, vocab_size
_SIZES = {"1b": (896, 24, 14, 2, 4864, 151674), "internvl3-8b": (3584, 28, 28, 4, 18944, 151679)}
_FIELDS = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
SHARD_BYTES = 2e9


def memory(
    shape: Literal["1b", "internvl3-8b"] = "1b",
    lora_scope: tuple[str, ...] = ("projector", "mask_decoder"),
    stage: Literal["sft", "rl"] = "rl",
    detail_head: Literal["none", "pretrained"] = "none",
    use_bf16: bool = False,
    folder: str = "output/random_models",
    json: bool = False,
) -> int:
    """Loads a random model of a real shape, computes one [SEG] state, takes two steps and predicts once.

    Args:
        shape: of the model, which is written to the folder once (4.6 GB, or 16.4 GB in bfloat16).
        lora_scope: what is trained.
        stage: kind of the steps, on one image of 512 x 512.
        detail_head: that the masks go through.
        use_bf16: vision tower and language model in bfloat16, in the files too.
        folder: of the random models.
        json: print the numbers as JSON.
    """
    model_path = random_model(shape, folder, use_bf16)
    settings = {"model_path": str(model_path), "lora_scope": lora_scope, "use_bf16": use_bf16}
    settings |= {"detail_head": detail_head}
    config = TrainConfig.from_dict(settings | {"stage": stage, "cache_gb": 0.0, "num_workers": 1})
    rng, rows = np.random.default_rng(0), {}
    image, truth = rng.integers(0, 255, (512, 512, 3), dtype=np.uint8), np.zeros((512, 512), bool)
    truth[250:256, 10:500] = True
    batch = TrainBatch(["a"], [image], [truth], [topology(truth)], size=1)
    with measured(rows, "load"):
        policy = load_policy(config, "cpu")
    with measured(rows, "[SEG] states"):
        if policy.language_is_frozen:
            policy.keep_states({"a": image, PROBE: image, NEGATIVE: 255 - image}.items())
            policy.drop_language()
            gc.collect()
    _, updates = make_updates(config, policy, make_reward(config.to_dict()))
    for name in ("first step", "next step"):
        with measured(rows, name):
            updates[stage].step(batch)
    with measured(rows, "prediction"):
        policy.predict(image)
    parts = policy.model.named_parameters()
    language = sum(parameter.numel() for name, parameter in parts if name.startswith(LANGUAGE))
    lines = [f"{shape}, {' '.join(lora_scope)}, {stage}: {language:,} parameters of the language model left"]
    lines += [f"{name:<14}{row['cpu_s']:8.1f} CPU-s{row['peak_gb']:8.2f} GB" for name, row in rows.items()]
    print(json_module.dumps({"language": language} | rows) if json else "\n".join(lines))
    return 0


@contextmanager
def measured(rows: dict[str, dict], name: str) -> Iterator[None]:
    """Notes CPU seconds and the largest anonymous memory of this process in a `with` block."""
    done, peaks, started = threading.Event(), [anonymous_bytes()], time.process_time()

    def watch() -> None:
        while not done.wait(0.02):
            peaks.append(anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        rows[name] = {"cpu_s": time.process_time() - started, "peak_gb": max(peaks) / 1e9}


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def random_model(shape: str, folder: str, use_bf16: bool) -> Path:
    """The folder of a checkpoint with random weights, which is written where it is not there yet."""
    model_path = Path(folder) / f"{shape}{'_bf16' * use_bf16}"
    if not (model_path / "config.json").exists():
        dtype = torch.bfloat16 if use_bf16 else torch.float32
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # its memory is not that of the training
            pool.submit(write_random, model_path, shape, dtype).result()
    return model_path


def write_random(folder: Path, shape: str, dtype: torch.dtype) -> None:
    """Writes a checkpoint with random weights in the official layout, shard by shard."""
    llm = _COMMON | dict(zip(_FIELDS.split(), _SIZES[shape], strict=True))
    config = Sa2VAConfig(_VISION, llm, Sam2Dimensions())
    with torch.device("meta"):
        model = Sa2VA(config)
    state, keys = model.state_dict(), model.keys
    names = [*dict.fromkeys(name for native in state for name in keys.officials(native))]
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for number, name in enumerate(names):
        size = keys.join(name, state).shape
        noise = torch.empty(size, dtype=dtype).normal_(0, 0.02, generator=generator)
        tensors[name] = torch.ones(size, dtype=dtype) if "norm" in name and name.endswith("weight") else noise
        if sum(tensor.nbytes for tensor in tensors.values()) > SHARD_BYTES or name == names[-1]:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / f"model-{number:05}.safetensors", metadata={"format": "pt"})
            tensors = {}
    write_tokenizer(folder)
    write_json(folder / SAM2_SIDECAR, vars(config.sam2))
    write_json(folder / "config.json", config.to_dict())


if __name__ == "__main__":
    run(memory)
