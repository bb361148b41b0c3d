"""Looks at machine, packages, model folder and data before a long run, and changes nothing.

Heavy packages are imported inside the checks, so that a broken installation is reported and ends nothing.
"""

import math
import os
import platform
import re
import shutil
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from vesselrl.errors import CheckpointError
from vesselrl.experiment.config import ModelSettings

ROOT = Path(__file__).resolve().parents[1]
SPECIAL_TOKENS = (("[SEG]",), ("<IMG_CONTEXT>", "<|image_pad|>"))  # one of each
GB = 1e9
SAMPLE = 2**16  # values of a tensor that are looked at
SCRIPT = "install_dependencies.sh"  # of a clone; a wheel has none
INSTALL = f"Run: {f'bash {SCRIPT}' if (ROOT / SCRIPT).is_file() else 'pip install vesselrl'}"
COPY = "Copy the missing or broken files from the source again."
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, what was found and what to do about it, if anything."""

    name: str
    status: Literal["ok", "warning", "problem"]  # a warning works, with a limit
    detail: str
    todo: str = ""
    numbers: dict = field(default_factory=dict)  # for `--json`


def diagnose(
    base_model: str | Path | None = None,
    data_root: str | Path | None = None,
    output_dir: str | Path = "output",
    write_config: bool = False,
    lora_scope: tuple[str, ...] = ModelSettings.lora_scope,
    **places: str | None,
) -> list[Check]:
    """Runs every check that applies; no model or no data leaves its checks out.

    `write_config`: a model without config.json gets one. `lora_scope`: of the training whose memory is
    estimated. `places`: image_dir, mask_dir, mask_suffix of data.
    """
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    checks = [check_packages(), *check_processor(), check_disk(Path(output_dir))]
    if base_model is not None:
        checks += check_model(base_model, write_config)
        if all(check.status == "ok" for check in checks if check.name in ("weights", "config")):
            checks.append(check_memory(base_model, lora_scope))
    checks += [] if data_root is None else [check_data(Path(data_root), **places)]
    return [Check("python", "ok", python), *checks]


def format_report(checks: list[Check]) -> str:
    """One line per check, status first.

    >>> print(format_report([Check("disk", "problem", "0.2 GB free in output", "Free some space.")]))
    problem  disk       0.2 GB free in output -> Free some space.
    """
    lines = (f"{c.status:8} {c.name:10} {c.detail}" + f" -> {c.todo}" * bool(c.todo) for c in checks)
    return "\n".join(lines)


def check_packages(pins: dict[str, str] | None = None) -> Check:
    """Compares the installed packages with their pins, by default those of the clone's constraints.txt."""
    pins = read_pins(ROOT / "constraints.txt") if pins is None else pins
    missing, other, required = [], [], required_packages()
    for name in required:
        try:
            # A local label such as +cpu names the build, not another version.
            installed = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if installed != pins.get(name, installed):
            other.append(f"{name} {installed} (pinned {pins[name]})")
    if missing:
        return Check("packages", "problem", f"missing: {', '.join(missing)}", INSTALL)
    if other:
        return Check("packages", "warning", f"not the tested versions: {', '.join(other)}", INSTALL)
    return Check("packages", "ok", f"{len(required)} packages" + (", all as pinned" if pins else ""))


def required_packages() -> list[str]:
    """Names of the packages that this version of vesselrl depends on, without extras."""
    lines = metadata.requires("vesselrl") or ()
    return sorted(re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line)


def read_pins(path: Path) -> dict[str, str]:
    """Versions by package name from a file of `name==version` lines; empty when there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pairs = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {name.lower(): version for name, equals, version in pairs if equals}


def check_processor() -> list[Check]:
    """CPU threads, and name and memory of every CUDA device."""
    try:
        import torch
    except ImportError as error:
        return [Check("processor", "problem", f"torch cannot be imported: {error}", INSTALL)]
    threads = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    processor = Check("processor", "ok", threads)
    if not torch.cuda.is_available():
        todo = "The miniature runs on the CPU; an 8B model needs a GPU and a CUDA build (CONTRIBUTING.md)."
        return [processor, Check("gpu", "warning", f"none that torch {torch.__version__} can use", todo)]
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    found = ", ".join(f"{device.name} with {device.total_memory / GB:.0f} GB" for device in devices)
    bf16 = "works" if torch.cuda.is_bf16_supported() else "is not supported"
    return [processor, Check("gpu", "ok", f"{found}; bf16 {bf16}")]


def check_disk(output_dir: Path) -> Check:
    """Whether the output folder can be written and has room."""
    folder = output_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check("disk", "problem", f"{folder} cannot be written", "Choose another --output_dir.")
    free = shutil.disk_usage(folder).free / GB
    detail = f"{free:.1f} GB free for {output_dir}"
    if free < 1:
        return Check("disk", "problem", detail, "Free some space or choose another --output_dir.")
    if free < 20:
        return Check("disk", "warning", detail, "Enough for adapters; a merged 8B in bf16 takes 16.4 GB.")
    return Check("disk", "ok", detail)


def check_model(base_model: str | Path, write_config: bool = False) -> list[Check]:
    """Whether a checkpoint is complete: weights, config.json, every tensor by name and shape, tokenizer."""
    try:
        from vesselrl.models.checkpoint import checkpoint_folder
    except ImportError as error:
        return [Check("model", "problem", f"cannot be checked: {error}", INSTALL)]
    try:
        folder = checkpoint_folder(base_model)
    except CheckpointError as error:
        return [Check("model", "problem", str(error))]
    if not folder.is_dir():
        advice = "Give --model_path a Sa2VA checkpoint folder."
        return [Check("model", "problem", f"{folder} does not exist", advice)]
    weights, shapes = check_weights(folder)
    # Of half a model no config.json can be told.
    checks = [weights, check_config(folder, shapes, write_config and weights.status == "ok")]
    if all(check.status == "ok" for check in checks):
        checks.append(check_tensors(folder, shapes))
    return [*checks, check_tokenizer(folder)]


def check_weights(folder: Path) -> tuple[Check, Shapes]:
    """Compares safetensors headers with the index, looks at samples of all tensors; returns shapes too."""
    from vesselrl.models.checkpoint import read_index, read_shapes

    try:
        listed = read_index(folder)
    except (CheckpointError, OSError) as error:
        return Check("weights", "problem", f"the index cannot be read: {error}", COPY), {}
    if not (files := sorted(set(listed.values()) or {f.name for f in folder.glob("model*.safetensors")})):
        todo = "Point --model_path to the folder that holds them; pickled .bin or .pth weights are not read."
        return Check("weights", "problem", f"{folder} holds no model*.safetensors", todo), {}
    shapes, faults = {}, []
    for name in files:
        try:
            if not (folder / name).is_file():
                raise ValueError(f"{name} is missing")
            found = read_shapes(folder / name)
            _check_values(folder / name)
        except (ValueError, OSError) as error:
            faults.append(str(error))
            continue
        if lost := [tensor for tensor, file in listed.items() if file == name and tensor not in found]:
            faults.append(f"{name} lacks {len(lost)} tensors of the index, first {lost[0]}")
        shapes |= found
    if faults:
        found = f"{len(faults)} of {len(files)} files: {'; '.join(faults)}"
        return Check("weights", "problem", found, COPY), shapes
    size = sum((folder / name).stat().st_size for name in files) / GB
    found = f"{len(files)} files, {len(shapes)} tensors, {size:.2f} GB; sampled values are in range"
    return Check("weights", "ok", found), shapes


def check_config(folder: Path, shapes: Shapes, write_config: bool = False) -> Check:
    """Whether config.json describes a model that vesselrl can build; if there is none, whether it can be."""
    from vesselrl.experiment.run_folder import write_json
    from vesselrl.models.config import config_from_shapes, infer_config, read_config

    file, todo, written = folder / "config.json", "", ""
    try:
        if not file.is_file():
            fields = ", ".join(f"{name} {value}" for name, value in infer_config(shapes).items())
            known = f" The tensor shapes say: {fields}." if fields else ""
            option = known and ", or --write_config"
            todo = f"Take config.json from the model this one was trained from{option}."
            if not write_config:
                return Check("config", "problem", f"no config.json in {folder}.{known}", todo)
            write_json(file, config_from_shapes(shapes).to_dict())
            written = ", written from the tensor shapes"
        config = read_config(folder)
    except CheckpointError as error:
        return Check("config", "problem", str(error), todo)
    parts, names = ("vision", "llm"), ("num_hidden_layers", "hidden_size", "vocab_size")
    stated = {f"{part}_config.{name}": getattr(config, part).get(name) for part in parts for name in names}
    values = {name: value for name, value in stated.items() if value is not None}
    if found := {name: seen for name, seen in infer_config(shapes).items() if values.get(name, seen) != seen}:
        wrong = "; ".join(f"{name} is {values[name]}, the tensors say {seen}" for name, seen in found.items())
        return Check("config", "problem", wrong, "This config.json belongs to another model; replace it.")
    detail = ", ".join(f"{name} {value}" for name, value in values.items())
    return Check("config", "ok", f"{config.kind}, {detail}{written}")


def check_tensors(folder: Path, shapes: Shapes) -> Check:
    """Whether every tensor has a place of its shape in the model, and every place a tensor."""
    import torch

    from vesselrl.models.checkpoint import empty_model, native_state
    from vesselrl.models.config import read_config

    try:
        model = empty_model(read_config(folder), shapes, str(folder))
        tensors = ((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())
        native_state(model, tensors, torch.float32, str(folder))
    except CheckpointError as error:
        return Check("tensors", "problem", str(error))
    unused = sum(map(model.keys.is_unused, shapes))
    found = f"{len(shapes)} names: 0 missing, 0 unknown, 0 of a wrong shape"
    return Check("tensors", "ok", f"{found}; {unused} are for videos only")


def check_memory(model: str | Path, lora_scope: tuple[str, ...]) -> Check:
    """How much memory a training in this scope takes, by kind of weights, and whether 24 GB suffice."""
    from vesselrl.models.checkpoint import checkpoint_folder
    from vesselrl.models.config import read_config
    from vesselrl.models.memory import memory_budget

    budget = memory_budget(read_config(checkpoint_folder(model)), lora_scope)
    total = sum(part["parameters"] for part in budget["components"].values()) / 1e6
    rows, fits = budget["options"].items(), any(row["fits_24_gb"] for row in budget["options"].values())
    listed = [f"{kind} {row['least']:.1f} GB" + " (24 GB suffice)" * row["fits_24_gb"] for kind, row in rows]
    detail = f"{total:,.1f} million parameters; training {', '.join(lora_scope)}: {', '.join(listed)}"
    todo = "" if fits else "Take a larger card or a smaller --lora_scope."
    return Check("memory", "ok" if fits else "warning", detail, todo, budget)


def check_tokenizer(folder: Path) -> Check:
    """Whether the tokenizer can be built and knows Sa2VA's own tokens."""
    from vesselrl.models.processing import load_tokenizer

    try:
        known = load_tokenizer(folder).get_vocab().keys()
    except CheckpointError as error:
        return Check("tokenizer", "problem", str(error))
    if absent := [" or ".join(tokens) for tokens in SPECIAL_TOKENS if known.isdisjoint(tokens)]:
        todo = "This is no Sa2VA's. Copy the tokenizer files from the source of the model."
        return Check("tokenizer", "problem", f"does not know {', '.join(absent)}", todo)
    return Check("tokenizer", "ok", f"{len(known)} tokens, Sa2VA's own among them")


def _check_values(path: Path) -> None:
    """Refuses nan, infinity and values beyond all weights, in small tensors and in parts of large ones."""
    from safetensors import safe_open

    from vesselrl.models.checkpoint import check_weight

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
            part = file.get_slice(name)
            shape = part.get_shape()
            if math.prod(shape) <= SAMPLE:
                check_weight(name, file.get_tensor(name), path.name)
                continue
            num_rows = max(1, SAMPLE // math.prod(shape[1:]) // 3)
            for start in (0, shape[0] // 2, shape[0] - num_rows):
                check_weight(name, part[start : start + num_rows], path.name)


def check_data(data_root: Path, **places: str | None) -> Check:
    """Whether all images and labels can be read, and how many patients and sequences there are."""
    from vesselrl.data.check import check_data as check_every_record

    report = check_every_record(data_root, **places)
    todo = "`vesselrl data check DATA_ROOT` lists every finding; docs/data.md shows the layouts."
    if errors := report.of("error"):
        more = f" (and {len(errors) - 1} more errors)" if len(errors) > 1 else ""
        return Check("data", "problem", errors[0].message + more, todo)
    counts = report.counts
    detail = "{images} images, {sequences} sequences, {patients} patients".format(**counts)
    if counts["patients"] < 3:
        todo = "Each subset needs a patient of its own; add patients, or see `vesselrl data check --help`."
        return Check("data", "problem", detail, todo)
    if warnings := report.of("warning"):
        return Check("data", "warning", f"{detail}, {len(warnings)} warnings: {warnings[0].message}", todo)
    return Check("data", "ok", detail)
