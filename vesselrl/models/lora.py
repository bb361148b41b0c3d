"""LoRA adapters on exactly the modules that were meant, by full path.

A suffix such as `q_proj` also names SAM2's attention; every target is therefore listed by its full module
path, and a match that was not asked for is an error. Adapters are saved in PEFT's own layout.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn

from vesselrl.errors import CheckpointError
from vesselrl.models.config import read_json
from vesselrl.models.folded_lora import fold_adapters
from vesselrl.models.sa2va import Sa2VA

SCOPES = ("language_model", "projector", "mask_decoder", "image_encoder")

# `projector` is the one from [SEG] to SAM2; the vision tower and its own projector stay as they are.
# The iou and object heads never receive a gradient (the choice of a mask is an argmax),
# nor does mask token 0.
_MODULES = {
    "projector": r"text_hidden_fcs\.[02]",
    "mask_decoder": r"sam\.mask_decoder\.(transformer\..+|conv_s[01]|output_hypernetworks_mlps\.[123]\..+)",
    "image_encoder": (
        r"sam\.vision_encoder\.(backbone\.(patch_embed\.projection|blocks\..+)|neck\.convs\.\d+)"
    ),
}


@dataclass(frozen=True)
class LoraPreset:
    """A LoRA size for the language model: rank, alpha, dropout and the adapted projections of every layer.

    Dropout acts in supervised training only; it is 0 where the adapters are small, so that PPO and its
    supervised control train the same function, and because it makes a supervised step on the embedded
    miniature much slower.
    """

    rank: int
    alpha: int
    dropout: float
    projections: tuple[str, ...]


LORA_PRESETS = {
    "small": LoraPreset(16, 32, 0.0, ("q_proj", "v_proj")),
    "medium": LoraPreset(32, 64, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "large": LoraPreset(
        64, 128, 0.1, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ),
}


def check_scope(scope: Iterable[str]) -> None:
    """Whether a scope can be used.

    Raises:
        ValueError: it is empty, or a name is unknown.
    """
    scope = tuple(scope)
    if not scope or set(scope) - set(SCOPES):
        raise ValueError(
            f"LoRA scope {list(scope)} is not usable; choose one or more of {', '.join(SCOPES)}."
        )


def target_modules(model: nn.Module, scope: Iterable[str], projections: Iterable[str]) -> list[str]:
    """Full paths of the modules that LoRA is put on.

    Args:
        model: the native Sa2VA, adapters not yet attached.
        scope: some of `SCOPES`.
        projections: layer parts of the language model, of use only when it is in the scope.

    Raises:
        ValueError: an unknown or empty scope.
    """
    scope = tuple(scope)
    check_scope(scope)
    language = rf"lm\.model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(projections)})"
    patterns = [language if name == "language_model" else _MODULES[name] for name in scope]
    wanted = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and wanted.fullmatch(name)
    ]


def attach_lora(
    model: Sa2VA,
    scope: Iterable[str],
    projections: Iterable[str],
    rank: int,
    alpha: int,
    dropout: float = 0.0,
) -> PeftModel:
    """Freezes the model and puts LoRA on the modules of the scope, in place.

    Raises:
        ValueError: unknown scope, or PEFT adapted another set of modules than intended.
    """
    targets = target_modules(model, scope, projections)
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    peft_model = get_peft_model(model, config)
    # PEFT shortens long lists to suffixes; the saved adapter must name what it adapts in full.
    peft_model.peft_config["default"].target_modules = set(targets)
    _refuse_unintended(peft_model, targets)
    fold_adapters(peft_model)
    return peft_model


def load_adapter(model: Sa2VA, folder: Path, is_trainable: bool = False) -> PeftModel:
    """Puts a saved adapter on a model.

    Raises:
        CheckpointError: the folder is not an adapter or does not fit the model.
    """
    check_adapter(folder)
    config = read_json(folder / "adapter_config.json")
    targets = config.get("target_modules")
    if config.get("peft_type") != "LORA" or not isinstance(targets, list) or not targets:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'} describes no LoRA of vesselrl (peft_type "
            f"{config.get('peft_type')!r}); give an adapter that vesselrl has trained."
        )
    modules = dict(model.named_modules())
    absent = sorted(name for name in targets if name not in modules)
    if absent:
        raise CheckpointError(
            f"{folder} adapts {len(absent)} modules that this model does not have, such as {absent[0]}; "
            "it was trained on another base model."
        )
    _check_adapter_tensors(folder / "adapter_model.safetensors", targets)
    model.requires_grad_(False)
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} does not fit this model: {str(error).splitlines()[-1].strip()}"
        ) from None
    # As in attach_lora: what is saved again must name what it adapts in full.
    peft_model.peft_config["default"].target_modules = set(targets)
    _refuse_unintended(peft_model, targets)
    fold_adapters(peft_model)
    return peft_model


def check_adapter(folder: Path) -> None:
    """Whether a folder holds the files of an adapter.

    Raises:
        CheckpointError: one is missing.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).exists():
            raise CheckpointError(
                f"{folder} has no {name}; give a run's best_lora, final_lora or checkpoint_epoch_N folder."
            )


def _check_adapter_tensors(file: Path, targets: list[str]) -> None:
    """PEFT fills missing tensors at random and ignores unknown ones; here both are errors."""
    try:
        with safe_open(file, framework="pt") as tensors:
            found = set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}). It may be truncated: copy it again."
        ) from None
    expected = {f"base_model.model.{name}.lora_{part}.weight" for name in targets for part in "AB"}
    if found != expected:
        missing, unknown = sorted(expected - found), sorted(found - expected)
        raise CheckpointError(
            f"{file} does not fit its adapter_config.json: {len(missing)} tensors missing, {len(unknown)} "
            f"unknown, such as {(missing + unknown)[0]}. Copy the folder again."
        )


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, nothing else."""
    peft_model.save_pretrained(str(folder), safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def merge_adapter(peft_model: PeftModel) -> Sa2VA:
    """The plain model with the adapter added to its weights; the adapter is gone afterwards."""
    return peft_model.merge_and_unload()


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_counts(peft_model: PeftModel) -> dict[str, int]:
    """Trainable values per component, in the order of `SCOPES`; components with none are left out."""
    counts: Counter[str] = Counter()
    for name, parameter in adapter_parameters(peft_model).items():
        counts[component_of(name)] += parameter.numel()
    return {name: counts[name] for name in (*SCOPES, "other") if counts[name]}


def component_of(name: str) -> str:
    """The scope that a parameter or module belongs to, or `other`.

    >>> component_of("base_model.model.lm.model.layers.0.self_attn.q_proj.lora_A.default.weight")
    'language_model'
    """
    name = name.removeprefix("base_model.model.")
    prefixes = {
        "lm.": "language_model",
        "text_hidden_fcs.": "projector",
        "sam.mask_decoder.": "mask_decoder",
        "sam.vision_encoder.": "image_encoder",
    }
    return next((scope for prefix, scope in prefixes.items() if name.startswith(prefix)), "other")


def adapter_delta_norm(peft_model: PeftModel, start: dict[str, torch.Tensor]) -> float:
    """Euclidean distance of all trainable values from a stored start."""
    squares = [
        (parameter.detach() - start[name]).double().square().sum()
        for name, parameter in adapter_parameters(peft_model).items()
    ]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _refuse_unintended(peft_model: PeftModel, targets: list[str]) -> None:
    adapted = {
        name.removeprefix("base_model.model.").split(".lora_A.")[0]
        for name, _ in peft_model.named_parameters()
        if ".lora_A." in name
    }
    extra, missing = sorted(adapted - set(targets)), sorted(set(targets) - adapted)
    trainable = [name for name in adapter_parameters(peft_model) if ".lora_" not in name]
    if extra or missing or trainable:
        raise ValueError(
            f"LoRA matched other modules than intended: {len(extra)} unexpected {extra[:3]}, "
            f"{len(missing)} missing {missing[:3]}, {len(trainable)} trainable base weights {trainable[:3]}."
        )
