"""Resuming: an interrupted training goes on as if nothing had happened.

All that its next steps depend on lies in one file of the run folder, from beginning to end: tensors as
safetensors, numbers as JSON in the header. Settings, reward, model and data are checked by fingerprints.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vesselrl.data.dicom import locate
from vesselrl.data.polygons import RunLengths
from vesselrl.data.samples import Sample
from vesselrl.errors import PeerOutOfMemoryError, RefusedError
from vesselrl.experiment import run_folder
from vesselrl.experiment.options import hide_paths
from vesselrl.experiment.run_folder import CONFIG_FILE, PRIVATE_FILE, RunFolder, file_hash, json_hash
from vesselrl.inference.predictor import Prediction
from vesselrl.training import processes

logger = logging.getLogger(__name__)

STATE_FILE = "resume.safetensors"
PREVIOUS_FILE = "resume.previous.safetensors"
STATE_VERSION = "4"
# Settings that change where and how fast a training runs, but no result.
FREE_SETTINGS = {"output_dir", "lang", "log_freq", "num_workers", "gpu", "report_to", "use_wandb", "cache_gb"}
# What comes of reading a safetensors file that is damaged, or holds other values than were written.
DAMAGED = (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError)
_TENSOR = "tensor:"  # in the JSON, in the place of a tensor, before its name


class Model(Protocol):
    """A model in training: a Sa2VA with adapters, or a baseline in its place."""

    kind: str  # names its folders, `best_<kind>` and `final_<kind>`
    trainable: dict[str, nn.Parameter]
    counts: dict[str, int]  # trainable values per component
    head: Any  # its `DetailHead`; None: there is none
    store: Any  # of features by image, to be read ahead; None: there is none
    savings: dict[str, Callable[[], None]]  # ways to need less memory, in words; no result changes by them
    start: Any  # values before the first step
    base: Any  # those of what it is compared with: the same, but for a detail head that was added
    images_per_pass: int  # that `predict_batch` is best given
    predict_batch: Callable[[list[np.ndarray]], Sequence[Prediction]]  # of images, uint8 RGB (H, W, 3)
    values: Callable[[], Any]  # a copy of all that training changes
    restore: Callable[[Any], None]  # sets such values
    distance: Callable[[], float]  # from the start; 0 if nothing has moved
    identity: Callable[[], str]  # changes with everything that its masks depend on at the start
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
    """Writes nested dicts, lists, plain values and tensors to resume.safetensors; keeps the state before."""
    if not processes.is_main():
        return
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_without_tensors(state, "", tensors, {}))
    header = {"version": STATE_VERSION, "state": plain, "sha256": tensors_hash(tensors, plain)}
    with run_folder.atomic_write(folder / STATE_FILE, previous=folder / PREVIOUS_FILE) as partial:
        save_file(tensors, partial, {"format": "pt"} | header)


def interrupted_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run's folder, which may have been changed: the state knows what they were."""
    if not (folder / CONFIG_FILE).is_file():
        fault = f"{folder} cannot be resumed: it has no {CONFIG_FILE}, the settings of a run"
        raise RefusedError(f"{fault}. Give the folder of an interrupted run, or start anew.")
    return run_folder.run_settings(folder, may_be_changed=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Reads the newest whole state, tensors on the CPU, or raises RefusedError; see `forget_damaged`."""
    faults = {}
    for name in (STATE_FILE, PREVIOUS_FILE):
        try:
            state = _read_state(folder / name)
        except FileNotFoundError:
            faults[name] = "it is missing"
        except DAMAGED as error:
            faults[name] = f"it cannot be read: {' '.join(str(error).split())}"
        else:
            if faults:
                fault = f"{folder / STATE_FILE}: {faults[STATE_FILE]}"
                logger.warning("%s. Going on from the state before it, after step %d.", fault, state["step"])
            return state
    if set(faults.values()) != {"it is missing"}:
        found = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise RefusedError(f"{folder} cannot be resumed ({found}). Start the training anew.")
    if (folder / "training_info.json").is_file():
        raise RefusedError(f"{folder} has finished: there is nothing to resume. See its report.html.")
    advice = "Give the folder of an interrupted run, or start anew."
    raise RefusedError(f"{folder} cannot be resumed: it has no {STATE_FILE}. {advice}")


def _read_state(path: Path) -> dict[str, Any]:
    """Reads one file, or raises what is wrong with it."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        if header["version"] != STATE_VERSION:
            raise ValueError(f"its version is {header['version']}, not {STATE_VERSION}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    if header["sha256"] != tensors_hash(tensors, header["state"]):
        raise ValueError("its checksum is wrong")
    return _with_tensors(json.loads(header["state"]), tensors.__getitem__)  # shared stay shared


def forget_damaged(folder: Path) -> None:
    """Removes the newest state where it is damaged, so that it never takes the place of the one before."""
    try:
        _read_state(folder / STATE_FILE)
    except DAMAGED:
        (folder / STATE_FILE).unlink(missing_ok=True)


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
        # Step counts stay on the CPU, as AdamW has them, unless it is fused.
        place = p.device if optimizer.defaults.get("fused") else "cpu"
        optimizer.state[p] = {k: v.to(p.device if v.ndim else place, copy=True) for k, v in state.items()}


def attempts(model: Model, optimizer: Optimizer, update: Any) -> Iterator[AbstractContextManager]:
    """Contexts to take a step in: a second, third ... where a GPU's memory did not suffice, each with less.

    Each begins where the first began, in all processes: the step ends as if memory had sufficed at once.
    """
    while model.savings and processes.blank_pass is None:  # layers in shares would wait for each other
        state, values, failures = update.state_dict(), model.values(), []
        kept, random = deepcopy(moments(optimizer, model)), random_state()
        yield _out_of_memory(failures)
        if not failures:
            return
        way = next(iter(model.savings))
        logger.warning("out of memory (%s); the step is taken again: %s", failures[0].split(".")[0], way)
        model.savings.pop(way)()
        optimizer.zero_grad(set_to_none=True)
        model.restore(values)
        restore_moments(optimizer, model, kept)
        update.load_state_dict(state)
        restore_random_state(random)
        torch.cuda.empty_cache()
    yield nullcontext()


@contextmanager
def _out_of_memory(failures: list[str]) -> Iterator[None]:
    try:
        yield
        processes.gather([])  # whether all have come this far
    except torch.OutOfMemoryError as error:
        failures.append(str(error))
        processes.tell_out_of_memory()
    except PeerOutOfMemoryError as error:
        failures.append(str(error))


def tensor_hash(values: Tensor) -> str:
    """First 32 hex digits of the sha256 of a tensor's shape, type and bytes."""
    values = values.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    digest.update(values.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def tensors_hash(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """The sha256 over names, shapes, types and bytes of tensors, and a text."""
    with ThreadPoolExecutor() as pool:  # for a whole model; a small tensor is faster than a thread
        apply = pool.map if sum(value.nbytes for value in tensors.values()) > 2**28 else map
        hashes = dict(zip(tensors, apply(tensor_hash, tensors.values()), strict=True))
    return hashlib.sha256(f"{sorted(hashes.items())} {text}".encode()).hexdigest()


def data_fingerprint(*subsets: Sequence[Sample]) -> dict[str, Any]:
    """The keys of train, val and test, and the hash of every image file and of every mask, by key."""
    samples = {sample.key: sample for subset in subsets for sample in subset}
    keys = [[sample.key for sample in subset] for subset in subsets]
    with ThreadPoolExecutor() as pool:
        hashes = {
            "images": pool.map(lambda sample: file_hash(locate(sample.image_path)[0])[:16], samples.values()),
            "masks": pool.map(_mask_hash, samples.values()),
        }
        found = {name: dict(zip(samples, each, strict=True)) for name, each in hashes.items()}
    return {"split": dict(zip(("train", "val", "test"), keys, strict=True))} | found


def _mask_hash(sample: Sample) -> str:
    if sample.fov_path is not None:
        return _mask_hash(replace(sample, fov_path=None)) + file_hash(locate(sample.fov_path)[0])[:16]
    if sample.mask_path is not None:
        return file_hash(locate(sample.mask_path)[0])[:16]
    digest = hashlib.sha256()
    for outline in sample.outlines:
        values = outline.runs if isinstance(outline, RunLengths) else outline
        digest.update(f"{values.shape} {values.dtype} {getattr(outline, 'shape', '')}".encode())
        digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()[:16]


def check_fingerprint(
    state: Mapping[str, Any] | None, now: Mapping[str, Any], allowed: Sequence[str]
) -> list[str]:
    """The parts of a run that have changed since it began, or a RefusedError that lists all not allowed."""
    before = now if state is None else state["fingerprint"]
    changed = {name: said for name in now if (said := _difference(name, before[name], now[name]))}
    listed = ", ".join(f"{name}{said}" for name, said in changed.items())
    if changed.keys() <= set(allowed):
        if changed:
            logger.warning("changed since the run began, and taken as it is now: %s", listed)
        return [*changed]
    fault = f"The run cannot be resumed, because these have changed since: {listed}"
    advice = f"Put them back, start anew, or take them as they are with --allow_change {' '.join(changed)}."
    raise RefusedError(f"{fault}. {advice}")


def _difference(name: str, before: Any, now: Any) -> str:
    """What has changed in one part of a fingerprint, in words; "" if nothing."""
    if name == "settings":
        names = [n for n in before.keys() | now if n not in FREE_SETTINGS and before.get(n) != now.get(n)]
        # Texts can be paths, and paths carry names of people.
        values = (
            n if isinstance(now.get(n), str) or isinstance(before.get(n), str)
            else f"{n} {before.get(n)}, now {now.get(n)}" for n in sorted(names)
        )  # fmt: skip
        return f" ({'; '.join(values)})" if names else ""
    if before == now:
        return ""
    if name == "split":
        subsets = (name for name, keys in before.items() if keys != now[name])
        return f" ({'; '.join(f'{n} {len(before[n])} images, now {len(now[n])}' for n in subsets)})"
    if name in ("images", "masks"):
        keys = [key for key in now if key in before and before[key] != now[key]]
        return f" ({len(keys)} of {len(now)}, such as {keys[0]})" if keys else ""
    return " (weights, tokenizer, configuration or seed)" if name == "model" else " (source or version)"


def write_first_files(
    run: RunFolder, place: RunFolder, state: Mapping[str, Any] | None, start: Mapping[str, Any], config: dict
) -> None:
    """Writes config.json, and a first state; what an older run lacks is put back from `place`."""
    if state is None:
        write_state(run.path, start)
        logger.info("if interrupted it goes on with: vesselrl train --resume_from %s", run.path)
    else:
        forget_damaged(run.path)
        for file in place.path.glob("*.json"):
            run_folder.write_text(run.path / file.name, file.read_text(encoding="utf-8"))
    args, origin = hide_paths(config["args"]), (state or start)["provenance"]
    if hidden := {name: value for name, value in config["args"].items() if args[name] != value}:
        run_folder.write_text(run.path / PRIVATE_FILE, json.dumps(hidden, indent=2) + "\n", mode=0o600)
    run.write_json(CONFIG_FILE, config | {"args": args, "provenance": origin, "args_sha256": json_hash(args)})


def check_fits(state: Mapping[str, Any], model: Model) -> None:
    """Raises RefusedError where the values of a state are not of this model's shape."""
    kept = state.get("values", model.values())
    if not model.trainable or not isinstance(kept, dict):
        return
    shapes = [{name: tuple(value.shape) for name, value in one.items()} for one in (kept, model.values())]
    if shapes[0] != shapes[1]:
        raise RefusedError("The run cannot be resumed: its adapters have other shapes now. Start anew.")


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
