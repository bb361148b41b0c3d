"""Resuming: an interrupted training goes on as if nothing had happened.

All that its next steps depend on lies in one file of the run folder, from the first validation to the end:
tensors as safetensors, numbers as JSON in the header. Data, model and settings are checked by fingerprints.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vesselrl.errors import RunError
from vesselrl.experiment.run_folder import atomic_write
from vesselrl.inference.predictor import Prediction

STATE_FILE = "resume.safetensors"
STATE_VERSION = "2"
_TENSOR = "tensor:"  # in the JSON, in the place of a tensor, before its name


class Model(Protocol):
    """A model in training: a Sa2VA with adapters, or a baseline in its place."""

    kind: str  # names its folders, `best_<kind>` and `final_<kind>`
    trainable: dict[str, nn.Parameter]
    counts: dict[str, int]  # trainable values per component
    start: Any  # values before the first step
    predict: Callable[[np.ndarray], Prediction]  # of an image, uint8 RGB (H, W, 3)
    values: Callable[[], Any]  # a copy of all that training changes
    restore: Callable[[Any], None]  # sets such values
    distance: Callable[[], float]  # from the start; 0 if nothing has moved
    save: Callable[[Path], None]  # writes the values to a folder


@contextmanager
def with_values(model: Model, values: Any) -> Iterator[None]:
    """The model with other values for the length of a `with` block."""
    now = model.values()
    model.restore(values)
    try:
        yield
    finally:
        model.restore(now)


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes nested dicts, lists, plain values and tensors to resume.safetensors, or raises WriteError."""
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_without_tensors(state, "", tensors, {}))
    with atomic_write(folder / STATE_FILE) as partial:
        save_file(tensors, partial, {"format": "pt", "version": STATE_VERSION, "state": plain})


def read_state(folder: Path) -> dict[str, Any]:
    """Reads the state that `write_state` wrote, tensors on the CPU, or raises RunError."""
    path = folder / STATE_FILE
    if not path.is_file():
        if (folder / "training_info.json").is_file():
            raise RunError(f"{folder} has finished: there is nothing to resume. See its report.html.")
        reason = f"it has no {STATE_FILE}, which runs write at their first validation"
        advice = "Give the folder of an interrupted run, or start anew."
        raise RunError(f"{folder} cannot be resumed: {reason}. {advice}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            if header["version"] != STATE_VERSION:
                raise ValueError(f"its version is {header['version']}, not {STATE_VERSION}")
            return _with_tensors(json.loads(header["state"]), cache(file.get_tensor))  # shared stay shared
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}). Start the training anew.") from None


def random_state() -> dict[str, Tensor]:
    """States of torch's global random generators, which LoRA dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda{k}": one for k, one in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Restores torch's global random generators; GPUs that are not here are left out."""
    torch.set_rng_state(state["cpu"])
    for k in range(torch.cuda.device_count()):
        if f"cuda{k}" in state:
            torch.cuda.set_rng_state(state[f"cuda{k}"], k)


def moments(optimizer: Optimizer, model: Model) -> dict[str, dict[str, Tensor]]:
    """State of the optimizer for each parameter, by the parameter's name."""
    return {name: dict(optimizer.state[p]) for name, p in model.trainable.items() if p in optimizer.state}


def restore_moments(optimizer: Optimizer, model: Model, kept: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Restores the state of the optimizer."""
    optimizer.state.clear()
    for name, state in kept.items():
        p = model.trainable[name]
        # Step counts stay on the CPU, as AdamW has them.
        optimizer.state[p] = {k: v.to(p.device) if v.ndim else v.clone() for k, v in state.items()}


def tensor_hash(values: Tensor) -> str:
    """First 32 hex digits of the sha256 of a tensor's shape, type and bytes."""
    values = values.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    digest.update(values.view(-1).numpy().tobytes())
    return digest.hexdigest()[:32]


def fingerprint(keys: Mapping[str, list[str]], model: Model) -> dict[str, str]:
    """Hashes of what must be the same before and after an interruption: keys of images, starting weights."""
    lines = dict(keys)
    if model.trainable:
        lines["start"] = [f"{name} {tensor_hash(value)}" for name, value in model.start.items()]
    return {name: hashlib.sha256("\n".join(each).encode()).hexdigest()[:16] for name, each in lines.items()}


def check_fingerprint(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises RunError, with a list, where images or model are not those that the run began with."""
    labels = {"train": "training images", "val": "validation images", "test": "test images"}
    labels["start"] = "values of the adapters before the first step (another model, seed or version)"
    changed = [label for name, label in labels.items() if before.get(name) != now[name]]
    if changed:
        fault = f"The run cannot be resumed, because these have changed since: {', '.join(changed)}"
        raise RunError(f"{fault}. Put them back, or start anew.")


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
    if isinstance(value, str) and value.startswith(_TENSOR):
        return get(value.removeprefix(_TENSOR))
    if isinstance(value, dict):
        return {k: _with_tensors(v, get) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_tensors(v, get) for v in value]
    return value
