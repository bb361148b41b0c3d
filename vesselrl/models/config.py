"""The shape of a Sa2VA checkpoint: `config.json` plus a side-car for SAM2.

The official `config.json` is silent about SAM2, whose heads and windows leave no trace in tensor shapes.
They are read from `sam2_config.json` beside it; without that file SAM2-Hiera-Large is assumed.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from transformers import InternVLVisionConfig, Qwen2Config, Sam2Config

from vesselrl.errors import CheckpointError
from vesselrl.experiment.run_folder import read_json

SAM2_SIDECAR = "sam2_config.json"
_TRANSFORMER = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_NEEDED = {
    "vision_config": (*_TRANSFORMER, "image_size", "patch_size"),
    "llm_config": (*_TRANSFORMER, "num_key_value_heads", "vocab_size"),
}
_LARGEST, _MOST_LAYERS = 2**24, 1000  # of a whole number: a wrong one must not build layers for hours
# The other fields that shape the model, by kind; what is not listed (kernels, generation) is ignored.
_KINDS = {"whole numbers": int, "numbers": float, "texts": str, "true or false": bool}
_KINDS |= {"objects": dict, "lists": list}
_OPTIONAL = {
    "vision_config": {
        "whole numbers": "num_channels",
        "numbers": "layer_norm_eps attention_dropout dropout initializer_factor",
        "texts": "norm_type hidden_act",
        "true or false": "qkv_bias qk_normalization",
    },
    "llm_config": {
        "whole numbers": "max_position_embeddings max_window_layers sliding_window head_dim",
        "numbers": "rms_norm_eps rope_theta attention_dropout initializer_range",
        "texts": "hidden_act",
        "true or false": "use_sliding_window tie_word_embeddings",
        "objects": "rope_scaling rope_parameters",
        "lists": "layer_types",
    },
}
# Values of config.json that the native model is written for; absent ones mean the same.
_QWEN2 = "Qwen2ForCausalLM"
_SUPPORTED = {"select_layer": -1, "ps_version": "v2", "template": "qwen_chat"}


@dataclass(frozen=True)
class Sam2Dimensions:
    """Shape of the SAM2 part; the defaults are Hiera-Large at 1024 px, as in every published Sa2VA."""

    image_size: int = 1024
    embed_dim_per_stage: tuple[int, ...] = (144, 288, 576, 1152)
    blocks_per_stage: tuple[int, ...] = (2, 6, 36, 4)
    num_attention_heads_per_stage: tuple[int, ...] = (2, 4, 8, 16)
    window_size_per_stage: tuple[int, ...] = (8, 4, 16, 8)
    global_attention_blocks: tuple[int, ...] = (23, 33, 43)
    background_size: tuple[int, int] = (7, 7)
    hidden_size: int = 256
    decoder_mlp_dim: int = 2048
    iou_head_hidden_dim: int = 256

    @classmethod
    def from_dict(cls, values: dict) -> "Sam2Dimensions":
        """Reads the side-car's JSON object; unknown or missing fields are errors."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            fault = f"missing {sorted(names - set(values))}, unknown {sorted(set(values) - names)}"
            raise CheckpointError(f"{SAM2_SIDECAR} must have exactly the fields {sorted(names)}; {fault}.")
        for name, value in values.items():
            is_list, wants_list = isinstance(value, list), isinstance(getattr(cls, name), tuple)
            if is_list != wants_list or not all(_is(int, n) for n in (value if is_list else [value])):
                kind = "a list of whole numbers" if wants_list else "a whole number"
                raise CheckpointError(f"{SAM2_SIDECAR} has {name} = {_shown(value)}; {kind} is needed.")
        if sum(values["blocks_per_stage"]) > _MOST_LAYERS or values["image_size"] > 4096:
            raise CheckpointError(f"{SAM2_SIDECAR} describes a SAM2 far larger than any. Copy it again.")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def native(self) -> Sam2Config:
        """The transformers configuration of the same shape."""
        lists = {name: list(value) for name, value in asdict(self).items() if isinstance(value, tuple)}
        size, hidden = self.image_size, {"hidden_size": self.hidden_size}
        backbone = {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": self.embed_dim_per_stage[0],
            "num_attention_heads": self.num_attention_heads_per_stage[0],
            "image_size": [size, size],
            "window_positional_embedding_background_size": lists.pop("background_size"),
        }
        vision = {
            "model_type": "sam2_vision_model",
            "backbone_config": backbone | lists,
            "backbone_channel_list": lists["embed_dim_per_stage"][::-1],
            "backbone_feature_sizes": [[size // s, size // s] for s in (4, 8, 16)],
            "fpn_hidden_size": self.hidden_size,
        }
        heads = {"mlp_dim": self.decoder_mlp_dim, "iou_head_hidden_dim": self.iou_head_hidden_dim}
        prompts, decoder = hidden | {"image_size": size}, hidden | heads
        return Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)


@dataclass(frozen=True)
class Sa2VAConfig:
    """The shape of one Sa2VA of the InternVL + Qwen2 family."""

    vision: dict  # `vision_config` of config.json, an InternViT
    llm: dict  # `llm_config`, a Qwen2
    sam2: Sam2Dimensions
    tile_px: int = 448  # side of a tile of the language model's image input
    downsample_ratio: float = 0.5  # of the pixel shuffle's sides; 0.5: four patches make one image token
    is_tied: bool = False  # without an lm_head in the files, that is the embedding; no mask needs it

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that one tile becomes, (tile / patch)² · ratio²."""
        return int((self.tile_px // self.vision["patch_size"]) ** 2 * self.downsample_ratio**2)

    def native_vision(self) -> InternVLVisionConfig:
        """The transformers configuration of the vision tower."""
        v = self.vision
        same = "norm_type layer_norm_eps hidden_act attention_dropout num_channels".split()
        return InternVLVisionConfig(
            **{name: v[name] for name in (*_TRANSFORMER, *same) if name in v},
            attention_bias=v.get("qkv_bias", True),
            use_qk_norm=v.get("qk_normalization", False),
            layer_scale_init_value=v.get("initializer_factor", 1.0),
            hidden_dropout_prob=v.get("dropout", 0.0),
            image_size=[v["image_size"]] * 2,
            patch_size=[v["patch_size"]] * 2,
            use_mean_pooling=True,  # then the tower has no final norm, as InternViT
        )

    def native_llm(self) -> Qwen2Config:
        """The transformers configuration of the language model."""
        names = {*_NEEDED["llm_config"], *" ".join(_OPTIONAL["llm_config"].values()).split()}
        values = {k: v for k, v in self.llm.items() if k in names and v is not None}
        return Qwen2Config(**values | {"tie_word_embeddings": False})

    def to_dict(self) -> dict:
        """The config.json object that `read_config` reads back, together with SAM2's side-car."""
        return {
            "architectures": ["Sa2VAChatModel"],
            "model_type": "sa2va_chat",
            "vision_config": self.vision,
            "llm_config": self.llm,
            "force_image_size": self.tile_px,
            "downsample_ratio": self.downsample_ratio,
            **_SUPPORTED,
            "tie_word_embeddings": False,
        }


def unreadable(file: Path, error: Exception) -> CheckpointError:
    """The error for a file that cannot be read, which names a Git LFS pointer as what it is."""
    with file.open("rb") as opened:
        is_pointer = opened.read(40).startswith(b"version https://git-lfs.github.com/")
    if is_pointer:
        fault = f"{file} is only a Git LFS pointer to the file"
        return CheckpointError(f"{fault}. Run `git lfs pull` in the clone that it came from.")
    kind = "is not valid JSON" if file.suffix == ".json" else "cannot be read"
    return CheckpointError(f"{file} {kind} ({error}). Is it truncated? Copy it again from the source.")


def read_json_object(path: Path) -> dict:
    """Reads one JSON object of a checkpoint, with or without a byte order mark."""
    try:
        values = read_json(path)
    except ValueError as error:  # also text that is no UTF-8, and numbers of 5,000 digits
        raise unreadable(path, error) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, an object was expected.")
    return values


def _is(kind: type, value: object) -> bool:
    """Whether a value of a JSON file is of a kind, and within what any model has."""
    if kind is int:
        return type(value) is int and 0 <= value <= _LARGEST
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 1e12
    return isinstance(value, kind)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."


def _check_section(source: Path, section: str, part: Mapping) -> None:
    """Refuses a section of config.json that lacks a field, or has a value of another kind."""
    limits = {name: _MOST_LAYERS if name == "num_hidden_layers" else 2**20 for name in _NEEDED[section]}
    fits = {name: _is(int, part.get(name)) and 0 < part[name] <= most for name, most in limits.items()}
    if wrong := ", ".join(name for name, fit in fits.items() if not fit):
        needs = f"{source}: `{section}` needs whole numbers for {wrong}"
        raise CheckpointError(f"{needs}. Is this a Sa2VA of the InternVL family?")
    for kind, names in _OPTIONAL[section].items():
        for name in names.split():
            value = part.get(name)
            is_odd = name.endswith("_eps") and value is not None and _is(float, value) and value > 0.1
            if value is not None and (is_odd or not _is(_KINDS[kind], value)):
                fault = f"{source}: `{section}` has {name} = {_shown(value)}"
                raise CheckpointError(f"{fault}; {kind} of a usual size are needed. Copy it from the source.")


def read_config(folder: Path, sam2: Sam2Dimensions | None = None) -> Sa2VAConfig:
    """Reads the configuration of a checkpoint folder; `sam2` overrides its side-car."""
    source = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"Model folder {folder} does not exist; give --model_path a Sa2VA's folder.")
    if not source.exists():
        todo = f"run `vesselrl doctor --model_path {folder}`, which lists what can be inferred"
        raise CheckpointError(f"{folder} has no config.json; {todo}.")
    if sam2 is None:
        sidecar = folder / SAM2_SIDECAR
        sam2 = Sam2Dimensions.from_dict(read_json_object(sidecar)) if sidecar.exists() else Sam2Dimensions()
    values = read_json_object(source)
    for section in _NEEDED:
        _check_section(source, section, values[section] if isinstance(values.get(section), dict) else {})
    vision, llm = values["vision_config"], values["llm_config"]
    names, kind = llm.get("architectures"), llm.get("model_type")
    # Re-saved files may lack the class, but not the model's kind.
    first = names[0] if isinstance(names, list) and names else names or (kind == "qwen2" and _QWEN2) or "?"
    if first != _QWEN2:
        supported = f"{_QWEN2} (Sa2VA-InternVL3 2B, 8B, 14B; Sa2VA 1B, 4B)"
        raise CheckpointError(f"{source} names the language model {_shown(first)}; choose a {supported}.")
    for name, expected in _SUPPORTED.items():
        got = values.get(name, expected)
        got = got.replace("-", "_") if isinstance(got, str) else got
        if got != expected:
            raise CheckpointError(f"{source} has {name} = {_shown(got)}; only {expected!r} is supported.")
    ratio = values.get("downsample_ratio", 0.5)
    tile_px, patch_px = values.get("force_image_size") or vision["image_size"], vision["patch_size"]
    if not (_is(float, ratio) and 0 < ratio <= 1 and abs(1 / ratio - round(1 / ratio)) < 1e-6):
        raise CheckpointError(f"{source} has downsample_ratio = {_shown(ratio)}; 0.5 is usual.")
    if tile_px != vision["image_size"] or tile_px % (patch_px * round(1 / ratio)):
        fault = f"{source} has force_image_size = {_shown(tile_px)}, image_size = {vision['image_size']}"
        raise CheckpointError(f"{fault}, patch_size = {patch_px}; equal sizes of whole tokens are supported.")
    is_tied = True in (values.get("tie_word_embeddings"), llm.get("tie_word_embeddings"))
    return Sa2VAConfig(vision, llm, sam2, tile_px, float(ratio), is_tied)
