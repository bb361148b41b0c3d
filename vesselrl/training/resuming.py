"""An interrupted training goes on as if nothing had happened.

All that its next steps depend on lies in one file of the run folder, so that it is there whole or not at all:
tensors as safetensors, numbers as JSON in the header. It is written at every validation and deleted when the
run has finished. Data, model and settings are not in it; that they are the same is checked by fingerprints.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vesselrl.errors import RunError
from vesselrl.models.export import save_tensors
from vesselrl.training.feature_store import tensor_hash
from vesselrl.training.run_data import RunData

STATE_FILE = "resume.safetensors"
_TENSOR = "tensor:"  # in the JSON, in the place of a tensor, before its name


def write_state(folder: Path, state: Mapping[str, Any]) -> Path:
    """Writes FOLDER/resume.safetensors; an older one stays until the new one is complete.

    Args:
        folder: of the run.
        state: dicts, lists, plain values and tensors, in each other as wanted; keys are strings.

    Raises:
        RunError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, "", tensors, {})
    path = folder / STATE_FILE
    try:
        save_tensors(tensors, path, {"state": json.dumps(plain)})
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{path} cannot be written ({error}). Make room, then go on with --resume_from {folder}."
        ) from None
    return path


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote, its tensors on the CPU.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        if (folder / "training_info.json").is_file():
            raise RunError(f"{folder} has finished: there is nothing to resume. See its report.html.")
        raise RunError(
            f"{folder} cannot be resumed: it has no {STATE_FILE}, which runs write at their first "
            "validation. Give the folder of an interrupted run, or start anew."
        )
    try:
        with safe_open(path, framework="pt") as file:
            plain = json.loads(file.metadata()["state"])
            return _with_tensors(plain, cache(file.get_tensor))  # shared ones stay shared
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}). Start the training anew.") from None


def random_state() -> dict[str, Tensor]:
    """The global random generators of torch, which LoRA dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda{k}": one for k, one in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Puts back what `random_state` gave; GPUs that are not here are left out."""
    torch.set_rng_state(state["cpu"])
    for k in range(torch.cuda.device_count()):
        if f"cuda{k}" in state:
            torch.cuda.set_rng_state(state[f"cuda{k}"], k)


def optimizer_moments(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """What the optimizer remembers of each parameter, by the parameter's name."""
    return {name: dict(optimizer.state[p]) for name, p in trainable.items() if p in optimizer.state}


def restore_moments(
    optimizer: torch.optim.Optimizer,
    trainable: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Puts back what `optimizer_moments` gave."""
    optimizer.state.clear()
    for name, remembered in moments.items():
        p = trainable[name]
        # Step counts stay on the CPU, as AdamW has them.
        optimizer.state[p] = {k: v.to(p.device) if v.ndim else v.clone() for k, v in remembered.items()}


def origins(data: RunData, start: Mapping[str, Tensor]) -> dict[str, str]:
    """What must be the same before and after the interruption, each as a hash."""
    lines = {side: [sample.key for sample in getattr(data, side)] for side in ("train", "val", "test")}
    lines["start"] = [f"{name} {tensor_hash(value)}" for name, value in start.items()]
    return {name: hashlib.sha256("\n".join(each).encode()).hexdigest()[:16] for name, each in lines.items()}


def check_origins(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuses to go on with other images, or from another model, than the run began with.

    Raises:
        RunError: something differs; the message says what.
    """
    words = {"train": "training images", "val": "validation images", "test": "test images"}
    words["start"] = "values of the adapters before the first step (another model, seed or version)"
    changed = [words[name] for name in words if before.get(name) != now[name]]
    if changed:
        raise RunError(
            f"The run cannot be resumed, because these have changed since: {', '.join(changed)}. Put them "
            "back, or start anew."
        )


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """The value with each tensor moved to `tensors`; one that occurs twice is kept once."""
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = name
            tensors[name] = value.detach().cpu().contiguous()
        return _TENSOR + names[id(value)]
    if isinstance(value, Mapping):
        return {k: _without_tensors(v, f"{name}/{k}", tensors, names) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(v, f"{name}/{k}", tensors, names) for k, v in enumerate(value)]
    return value


def _with_tensors(value: Any, get: Callable[[str], Tensor]) -> Any:
    """The inverse of `_without_tensors`."""
    if isinstance(value, str) and value.startswith(_TENSOR):
        return get(value.removeprefix(_TENSOR))
    if isinstance(value, dict):
        return {k: _with_tensors(v, get) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_tensors(v, get) for v in value]
    return value
