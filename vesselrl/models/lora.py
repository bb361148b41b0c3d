"""LoRA adapters on exactly the modules that were meant, by full path, saved in PEFT's own layout.

A suffix such as `q_proj` also names SAM2's attention; every target is therefore listed by its full path.
"""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional

from vesselrl.errors import CheckpointError, LearningError
from vesselrl.experiment import run_folder
from vesselrl.experiment.run_folder import SHARED_FILE, find_run, run_settings
from vesselrl.models import checkpoint
from vesselrl.models.checkpoint import DETAIL_HEAD, LARGEST_WEIGHT
from vesselrl.models.config import read_json_object
from vesselrl.models.sa2va import Sa2VA

logger = logging.getLogger(__name__)

ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", DETAIL_HEAD, SHARED_FILE]

# The parts of the model that a scope may name: prefix of their modules, and which of these are adapted.
# `projector` is the one from [SEG] to SAM2; the vision tower and its own projector stay as they are. The IoU
# and object heads never receive a gradient (the choice of a mask is an argmax), nor does mask token 0.
_PARTS = {
    "language_model": ("lm.", r"model\.(language_model\.)?layers\.\d+\.(self_attn|mlp)\.(PROJECTIONS)"),
    "projector": ("text_hidden_fcs.", "[02]"),
    "mask_decoder": ("sam.mask_decoder.", r"transformer\..+|conv_s[01]|output_hypernetworks_mlps\.[123]\..+"),
    "image_encoder": ("sam.vision_encoder.", r"backbone\.(patch_embed\.projection|blocks\..+)|neck\.convs.+"),
}
SCOPES = tuple(_PARTS)

# Settings of PEFT's LoraConfig that make another function of the same tensors.
_UNSUPPORTED = (
    "use_dora use_qalora use_bdlora lora_bias bias fan_in_fan_out modules_to_save exclude_modules "
    "layers_to_transform layers_pattern layer_replication target_parameters trainable_token_indices "
    "alora_invocation_tokens megatron_config loftq_config arrow_config kasa_config velora_config "
    "monteclora_config"
).split()
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights; others change the base
# Numbers of a setting, or of one target in a pattern: whether they are whole, the lowest and the highest.
_NUMBERS = {
    "r": (True, 1, 2**16),
    "rank_pattern": (True, 1, 2**16),
    "lora_alpha": (False, 1e-4, LARGEST_WEIGHT),
    "alpha_pattern": (False, 1e-4, LARGEST_WEIGHT),
    "lora_dropout": (False, 0, 0.99),
}


class LoraPreset(NamedTuple):
    """A LoRA size for the language model; the projections are those of every layer."""

    rank: int
    alpha: int
    dropout: float  # in supervised training only; without it PPO and its control train the same function
    projections: tuple[str, ...]


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA_PRESETS = {
    "small": LoraPreset(16, 32, 0.0, ("q_proj", "v_proj")),
    "medium": LoraPreset(32, 64, 0.0, _ATTENTION),
    "large": LoraPreset(64, 128, 0.1, (*_ATTENTION, "gate_proj", "up_proj", "down_proj")),
}


def check_scope(scope: Collection[str]) -> None:
    """Refuses an empty scope and unknown names with a ValueError."""
    if not scope or set(scope) - set(SCOPES):
        choices = ", ".join(SCOPES)
        raise ValueError(f"LoRA scope {list(scope)} is not usable; choose one or more of {choices}.")


def target_modules(model: nn.Module, scope: Collection[str], projections: Iterable[str]) -> list[str]:
    """Full paths of the modules that LoRA is put on; the projections matter to the language model only."""
    check_scope(scope)
    patterns = (f"{re.escape(prefix)}({pattern})" for prefix, pattern in (_PARTS[name] for name in scope))
    wanted = re.compile("|".join(patterns).replace("PROJECTIONS", "|".join(projections)))
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return [name for name in layers if wanted.fullmatch(name)]


def attach_lora(model: Sa2VA, scope: Collection[str], size: LoraPreset) -> PeftModel:
    """Freezes the model and puts LoRA of this size on the modules of the scope, in place."""
    targets = target_modules(model, scope, size.projections)
    model.requires_grad_(False)
    numbers = {"r": size.rank, "lora_alpha": size.alpha, "lora_dropout": size.dropout}
    config = LoraConfig(target_modules=targets, bias="none", **numbers)
    return _checked(get_peft_model(model, config), targets)


def load_adapter(model: Sa2VA, folder: Path, is_trainable: bool = False) -> PeftModel:
    """Puts a saved adapter on a model; a CheckpointError says why the two do not fit."""
    check_adapter(folder)
    if damaged := run_folder.damaged_files(folder):
        advice = f"Copy the folder again; if the change is meant, remove its {run_folder.SUMS_FILE}"
        raise CheckpointError(f"{folder}: {', '.join(damaged)} is not as it was saved. {advice}.")
    file = folder / "adapter_model.safetensors"
    config = read_adapter_config(folder / "adapter_config.json")
    targets = sorted(config.target_modules)
    if absent := sorted(set(targets) - {name for name, _ in model.named_modules()}):
        fault = f"{folder} adapts {len(absent)} modules that this model does not have, such as {absent[0]}"
        raise CheckpointError(f"{fault}; it was trained on another base model.")
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.read_shard(file):
        checkpoint.check_weight(name, tensor, folder)
        if tensors.setdefault(_plain_name(name), tensor) is not tensor:
            raise CheckpointError(f"{file} holds {_plain_name(name)} twice. Copy the folder again.")
    # PEFT fills missing tensors at random and ignores unknown ones; here both are errors.
    expected = {f"{target}.lora_{part}.weight" for target in targets for part in "AB"}
    if tensors.keys() != expected:
        missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        count = f"{len(missing)} tensors missing, {len(unknown)} unknown, such as {(missing + unknown)[0]}"
        raise CheckpointError(f"{file} does not fit its adapter_config.json: {count}. Copy the folder again.")
    for target in targets:  # before PEFT makes matrices of a rank that may be absurd
        stated = config.rank_pattern.get(target, config.r)
        found = next(iter(tensors[f"{target}.lora_A.weight"].shape), 0)
        if found != stated:
            fault = f"{folder}: {target} has rank {found}, its adapter_config.json says {stated}"
            raise CheckpointError(f"{fault}. Copy the folder again.")
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name):
        logger.warning("%s changes nothing: all of its lora_B are 0. Was it saved before training?", folder)
    model.requires_grad_(False)
    config.inference_mode = not is_trainable
    try:
        peft_model = get_peft_model(model, config)
        for target in targets:
            layer = model.get_submodule(target)
            for part in ("lora_A", "lora_B"):
                weight = getattr(layer, part)["default"].weight
                if weight.shape != (shape := tensors[f"{target}.{part}.weight"].shape):
                    sizes = f"size mismatch for {target}.{part}: {tuple(shape)}, not {tuple(weight.shape)}"
                    raise ValueError(sizes)
                weight.data.copy_(tensors[f"{target}.{part}.weight"])
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{folder} does not fit this model: {reason}") from None
    if not is_trainable:
        peft_model.eval()
    _checked(peft_model, targets)
    if (folder / DETAIL_HEAD).is_file():
        model.detail = checkpoint.load_detail_head(folder / DETAIL_HEAD).to(model.device)
    return peft_model


def _plain_name(name: str) -> str:
    """The tensor's name without the prefixes and the adapter's name that some ways of saving leave in it."""
    name = re.sub(r"^(base_model\.model\.)+", "", name)
    return re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", name)


def read_adapter_config(file: Path) -> LoraConfig:
    """Reads adapter_config.json; a setting that changes the function and is not supported is an error."""
    values = read_json_object(file)
    kind, targets = values.get("peft_type"), values.get("target_modules")
    if kind != "LORA" or not isinstance(targets, list) or not targets or not all(map(_is_name, targets)):
        found = f"peft_type {kind!r:.40}, target_modules {targets!r:.40}"
        fault = f"{file} describes no LoRA of vesselrl ({found})"
        raise CheckpointError(f"{fault}; give an adapter that vesselrl has trained.")
    other = [name for name in _UNSUPPORTED if not _is_neutral(values.get(name))]
    other += [] if values.get("init_lora_weights") in _STARTS else ["init_lora_weights"]
    if other:
        shown = ", ".join(f"{name} = {values[name]!r:.40}" for name in other)
        advice = "Merge it with PEFT, or train anew"
        raise CheckpointError(f"{file} has {shown}, which is not supported. {advice}.")
    later = values.keys() - {field.name for field in fields(LoraConfig)}
    if unknown := sorted(name for name in later if not _is_neutral(values[name])):
        logger.warning("%s has fields that are not known and are ignored: %s", file, ", ".join(unknown))
    values = {"lora_dropout": 0.0, "use_rslora": False} | values
    used = {name: _number(file, name, values.get(name)) for name in ("r", "lora_alpha", "lora_dropout")}
    for name in ("rank_pattern", "alpha_pattern"):
        used[name] = _by_target(file, name, values.get(name), targets)
    if not isinstance(use_rslora := values["use_rslora"], bool):
        raise CheckpointError(f"{file} has use_rslora = {use_rslora!r:.40}; true or false is needed.")
    return LoraConfig(target_modules=targets, bias="none", use_rslora=use_rslora, **used)


def adapts_language(adapter: Path) -> bool:
    """Whether a saved adapter changes the language model."""
    check_adapter(adapter)
    targets = read_adapter_config(adapter / "adapter_config.json").target_modules
    return any(name.startswith(_PARTS["language_model"][0]) for name in targets)


def _is_neutral(value: object) -> bool:
    """Whether a setting is left as PEFT has it without one; the number 0 is none: it may name a layer."""
    return value is None or value is False or value in ([], {}, "none")


def _is_name(value: object) -> bool:
    """Whether a value is the name of a module or the end of one, and no regular expression."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.]+", value) is not None


def _by_target(file: Path, name: str, pattern: object, targets: list[str]) -> dict[str, float]:
    """A pattern's values by full name; as in PEFT the first key counts that is a target or the end of one."""
    if not isinstance(pattern, dict | None) or not all(map(_is_name, pattern or ())):
        fault = f"{file} has {name} = {pattern!r:.60}"
        raise CheckpointError(f"{fault}; only plain names of modules are supported, no regular expressions.")
    keys = {t: next((k for k in pattern or () if f".{t}".endswith(f".{k}")), None) for t in targets}
    return {target: _number(file, name, pattern[key]) for target, key in keys.items() if key is not None}


def _number(file: Path, name: str, value: object) -> float:
    """A rank, alpha or dropout within its range."""
    is_whole, lowest, highest = _NUMBERS[name]
    if type(value) not in ((int,) if is_whole else (int, float)) or not lowest <= value <= highest:
        kind = f"a {'whole ' * is_whole}number from {lowest:g} to {highest:g}"
        raise CheckpointError(f"{file} has {name} = {value!r:.40}; {kind} is needed.")
    return value


def adapter_folder(path: str | Path) -> Path:
    """The folder of an adapter: itself, `best_lora` of a run folder, or ORG/NAME, which is downloaded."""
    path = checkpoint.local_folder(path, ADAPTER_FILES, "--lora_weights")
    inside = path / "best_lora"
    return inside if not (path / "adapter_config.json").exists() and inside.is_dir() else path


def adapter_settings(lora_weights: str | Path | None) -> dict:
    """The settings of an adapter's run, or those that `push` put beside it; none for a base model."""
    if lora_weights is None:
        return {}
    run = find_run(lora_weights)
    return run_settings(run) if run else run_settings(adapter_folder(lora_weights), name=SHARED_FILE)


def check_adapter(folder: Path) -> None:
    """Refuses a folder without the files of an adapter with a CheckpointError."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).exists():
            advice = "give a run's best_lora, final_lora or checkpoint_epoch_N folder"
            raise CheckpointError(f"{folder} has no {name}; {advice}.")


def _checked(peft_model: PeftModel, targets: list[str]) -> PeftModel:
    """Refuses modules that were not meant, and folds the adapters outside the language model."""
    # PEFT shortens long lists to suffixes; the saved adapter must name what it adapts in full.
    peft_model.peft_config["default"].target_modules = set(targets)
    adapted = set(peft_model.base_model.targeted_module_names)
    extra, missing = sorted(adapted - set(targets)), sorted(set(targets) - adapted)
    trainable = [name for name in adapter_parameters(peft_model) if ".lora_" not in name]
    if extra or missing or trainable:
        raise ValueError(
            f"LoRA matched other modules than intended: {len(extra)} unexpected {extra[:3]}, "
            f"{len(missing)} missing {missing[:3]}, {len(trainable)} trainable base weights {trainable[:3]}."
        )
    fold_adapters(peft_model)
    return peft_model


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Writes adapter_config.json, adapter_model.safetensors, a detail head and checksums, nothing else."""
    with run_folder.writing(folder):
        peft_model.save_pretrained(str(folder), safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    if head := peft_model.get_base_model().detail:
        checkpoint.save_detail_head(head, folder / DETAIL_HEAD)
    run_folder.write_sums(folder)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_counts(peft_model: PeftModel) -> dict[str, int]:
    """Trainable values per scope, in the order of `SCOPES`; scopes with none are left out."""
    counts: Counter[str] = Counter()
    for name, parameter in adapter_parameters(peft_model).items():
        module = name.removeprefix("base_model.model.")
        scope = next((s for s, (prefix, _) in _PARTS.items() if module.startswith(prefix)), "detail_head")
        counts[scope] += parameter.numel()
    return {name: counts[name] for name in (*SCOPES, "detail_head") if counts[name]}


def adapter_delta_norm(peft_model: PeftModel, start: dict[str, Tensor]) -> float:
    """Euclidean distance of all trainable values from a stored start."""
    trained = adapter_parameters(peft_model).items()
    squares = [(value.detach() - start[name]).double().square().sum() for name, value in trained]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def check_gradients(peft_model: PeftModel) -> None:
    """Raises LearningError for first gradients that miss an adapter, or reach frozen weights.

    LoRA's first matrix has none while the second is zero; of the decoder's hyper-networks only that of
    the chosen candidate mask has one. A matrix that has learned may have none any more, as the log says.
    """
    trainable = adapter_parameters(peft_model)
    strays = [name for name, p in peft_model.named_parameters() if p.grad is not None and not p.requires_grad]
    if strays:
        raise LearningError(f"{len(strays)} frozen weights received a gradient, such as {strays[0]}.")
    second = {name: p.grad for name, p in trainable.items() if ".lora_B." in name}
    silent = {name for name, gradient in second.items() if gradient is None or not bool(gradient.any())}
    candidates = {name for name in second if "output_hypernetworks_mlps." in name}
    learned = {name for name in silent if bool(trainable[name].any())}
    if not candidates <= silent - learned:
        silent -= candidates
    if spent := silent & learned:
        logger.warning("%d adapter matrices get no gradient any more, such as %s", len(spent), min(spent))
        silent -= spent
    silent |= {name for name, p in trainable.items() if ".detail." in name and p.grad is None}
    if silent or not second:
        raise LearningError(
            f"{len(silent)} of {len(trainable)} adapter matrices received no gradient, such as "
            f"{min(silent, default='(there are none)')}. No trainable parameter there can learn; "
            "narrow --lora_scope."
        )


class _Folded:
    """LoRA added to the weight before the product, y = x (W + s B A)ᵀ, not beside it, x Wᵀ + s (x Aᵀ) Bᵀ.

    Value and gradients are the same, the work is not: on SAM2's large maps with few channels B A is nothing
    and a second path more than the layer. In a language model it is the other way round: PEFT's layers stay.
    """

    def can_fold(self) -> bool:
        """False where the forms differ, or a half-precision weight would swallow a small adapter."""
        return not (self.merged or self.disable_adapters) and all(
            self.base_layer.weight.dtype == self.lora_A[name].weight.dtype
            and (not self.training or isinstance(self.lora_dropout[name], nn.Identity))
            for name in self.active_adapters
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_fold():
            return super().forward(x)
        layer = self.base_layer
        weight = sum((self.get_delta_weight(name) for name in self.active_adapters), layer.weight)
        if isinstance(layer, nn.Linear):
            return functional.linear(x, weight, layer.bias)
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        return functional.conv2d(x, weight, layer.bias, *geometry)


_FOLDED = {kind: type(f"Folded{kind.__name__}", (_Folded, kind), {}) for kind in (lora.Linear, lora.Conv2d)}


def fold_adapters(peft_model: PeftModel) -> None:
    """Turns the LoRA layers outside the language model into folded ones, in place."""
    for name, layer in peft_model.named_modules():
        if type(layer) in _FOLDED and ".lm." not in f".{name}.":
            layer.__class__ = _FOLDED[type(layer)]
