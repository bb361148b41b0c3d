"""Native models to folders in the official Sa2VA layout."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vesselrl.errors import CheckpointError
from vesselrl.experiment.run_folder import write_json
from vesselrl.models.config import SAM2_SIDECAR, Sa2VAConfig
from vesselrl.models.keymap import is_unused, native_names, official_names, point_row
from vesselrl.models.loading import shard_files
from vesselrl.models.sa2va import Sa2VA


def official_tensors(model: Sa2VA) -> Iterator[tuple[str, torch.Tensor]]:
    """Official names and tensors of a native model, each once."""
    state = model.state_dict()
    done: set[str] = set()
    for native in state:
        for official in official_names(native):
            if official not in done:
                done.add(official)
                yield official, official_tensor(official, state)


def official_tensor(official: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """One official tensor put together from the native state dict."""
    natives = native_names(official)
    if natives is None:
        raise KeyError(f"unknown official tensor {official!r}")
    row = point_row(official)
    if row is not None:
        return state[natives[0]][row : row + 1].contiguous()
    if len(natives) == 3:
        return torch.cat([state[name] for name in natives])
    return state[natives[0]].contiguous()


def config_json(config: Sa2VAConfig) -> dict:
    """The config.json object of a native model."""
    return {
        "architectures": ["Sa2VAChatModel"],
        "model_type": "sa2va_chat",
        "vision_config": config.vision,
        "llm_config": config.llm,
        "force_image_size": config.tile_px,
        "downsample_ratio": config.downsample_ratio,
        "select_layer": -1,
        "ps_version": "v2",
        "template": config.template,
        "tie_word_embeddings": False,
    }


def save_sa2va(model: Sa2VA, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes config.json, the SAM2 side-car and model.safetensors; the tokenizer is the caller's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_json(model.config))
    write_json(folder / SAM2_SIDECAR, model.config.sam2.to_dict())
    tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in official_tensors(model)}
    save_tensors(tensors, folder / "model.safetensors")


def copy_with_weights(source: Path, target: Path, model: Sa2VA, dtype: torch.dtype | None = None) -> None:
    """Copies a checkpoint folder with the model's weights in place of its own, shard by shard.

    Files that are not weights and tensors that single images do not use are copied unchanged. The folder
    appears under its final name only when complete; the source is never written to.

    Args:
        source: the checkpoint that the model was loaded from.
        target: new folder; must not exist.
        model: native model whose weights are written.
        dtype: of the written weights; None keeps each tensor's own.

    Raises:
        CheckpointError: the target exists or the disk has too little room.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another --output_model or remove it.")
    shards = shard_files(source)
    needed = sum(file.stat().st_size for file in shards)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed * 1.05:
        raise CheckpointError(
            f"{target.parent} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed."
        )
    state = model.state_dict()
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    skip = {file.name for file in shards}
    try:
        shutil.copytree(source, partial, ignore=lambda _, names: [name for name in names if name in skip])
        for file in shards:
            tensors = {}
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is no dict)
                    original = shard.get_tensor(name)
                    new = original if is_unused(name) else official_tensor(name, state)
                    tensors[name] = new.detach().to("cpu", dtype or original.dtype).contiguous()
            save_tensors(tensors, partial / file.name)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file that appears only when complete, with words of one's own in its header."""
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"} | (metadata or {}))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
