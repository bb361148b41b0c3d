"""The shape of a Sa2VA checkpoint: `config.json` plus a side-car for SAM2.

The official `config.json` is silent about SAM2, whose heads and windows leave no trace in tensor shapes.
They are read from `sam2_config.json` beside it; without that file SAM2-Hiera-Large is assumed.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from transformers import InternVLVisionConfig, PretrainedConfig, Sam2Config

from vesselrl.errors import CheckpointError
from vesselrl.experiment.run_folder import read_json
from vesselrl.models.families import FAMILIES, QWEN2, TEMPLATES, Family, family_name

SAM2_SIDECAR = "sam2_config.json"
_TRANSFORMER = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_LARGEST, _MOST_LAYERS = 2**24, 1000  # of a whole number: a wrong one must not build layers for hours
# The other fields that shape the model, by kind; what is not listed (kernels, generation) is ignored.
_KINDS = {"whole numbers": int, "numbers": float, "texts": str, "true or false": bool}
_KINDS |= {"objects": dict, "lists": list}
_LLM_NEEDED = (*_TRANSFORMER, "num_key_value_heads", "vocab_size")
_LLM_OPTIONAL = {
    "whole numbers": "max_position_embeddings max_window_layers sliding_window head_dim",
    "numbers": "rms_norm_eps rope_theta attention_dropout initializer_range",
    "texts": "hidden_act",
    "true or false": "use_sliding_window tie_word_embeddings attention_bias bias",
    "objects": "rope_scaling rope_parameters",
    "lists": "layer_types",
}
_PATCHES = "spatial_merge_size temporal_patch_size"
# Sections of config.json with what they need and what they may have; the second pair is that of a Qwen-VL.
_VISION = {
    False: (
        (*_TRANSFORMER, "image_size", "patch_size"),
        {
            "whole numbers": "num_channels",
            "numbers": "layer_norm_eps attention_dropout dropout initializer_factor",
            "texts": "norm_type hidden_act",
            "true or false": "qkv_bias qk_normalization",
        },
    ),
    True: (
        tuple(f"depth hidden_size num_heads intermediate_size patch_size out_hidden_size {_PATCHES}".split()),
        {
            "whole numbers": "in_channels tokens_per_second window_size num_position_embeddings",
            "texts": "hidden_act",
            "lists": "fullatt_block_indexes deepstack_visual_indexes",
        },
    ),
}
# Values of config.json that the native model is written for; absent ones mean the same.
_SUPPORTED = {"select_layer": -1, "ps_version": "v2"}


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
    """The shape of one Sa2VA of any family."""

    vision: dict  # `vision_config` of config.json: an InternViT, or the tower of a Qwen-VL
    llm: dict  # `llm_config`, or `text_config` of a Qwen-VL
    sam2: Sam2Dimensions
    tile_px: int = 448  # side of a tile of the language model's image input
    downsample_ratio: float = 0.5  # of the pixel shuffle's sides; 0.5: four patches make one image token
    is_tied: bool = False  # without an lm_head in the files, that is the embedding; no mask needs it
    # Not in the text that hashes of older runs were made of, unless they are unusual.
    kind: str = field(default=QWEN2, repr=False)  # a key of FAMILIES
    template: str = field(default="qwen_chat", repr=False)  # a key of TEMPLATES

    def __str__(self) -> str:
        unusual = (self.kind, self.template) != (QWEN2, "qwen_chat")
        return f"{self!r} {self.kind} {self.template}" if unusual else repr(self)

    @property
    def family(self) -> Family:
        """What is special to this family."""
        return FAMILIES[self.kind]

    @property
    def heads(self) -> tuple[int, int]:
        """Attention heads of the language model, of queries and of keys and values."""
        return self.llm["num_attention_heads"], self.llm["num_key_value_heads"]

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

    def native_llm(self) -> PretrainedConfig:
        """The transformers configuration of the language model, of a Qwen-VL with its vision tower."""
        untied = {"tie_word_embeddings": False}
        values = _known(self.llm, _LLM_NEEDED, _LLM_OPTIONAL) | untied
        if self.family.is_whole:
            vision = _known(self.vision, *_VISION[True])
            return self.family.config(text_config=values, vision_config=vision, **untied)
        if "bias" in self.llm or self.kind.startswith("InternLM2"):
            values["attention_bias"] = values.pop("bias", True)  # InternLM2's word and default
        return self.family.config(**values)

    def to_dict(self) -> dict:
        """The config.json object that `read_config` reads back, together with SAM2's side-car."""
        is_whole = self.family.is_whole
        values = {
            "architectures": ["Sa2VAChatModelQwen" if is_whole else "Sa2VAChatModel"],
            "model_type": "sa2va_chat",
            "vision_config": self.vision,
            "text_config" if is_whole else "llm_config": self.llm,
            "template": self.template,
            "tie_word_embeddings": False,
        }
        tiles = {"force_image_size": self.tile_px, "downsample_ratio": self.downsample_ratio, **_SUPPORTED}
        return values if is_whole else values | tiles


def _known(values: Mapping, needed: tuple[str, ...], optional: Mapping[str, str]) -> dict:
    """The fields of a section that shape the model."""
    names = {*needed, *" ".join(optional.values()).split()}
    return {name: value for name, value in values.items() if name in names and value is not None}


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


def _check_section(
    source: Path, section: str, values: Mapping, needed: tuple[str, ...], optional: Mapping[str, str]
) -> dict:
    """A section of config.json; refused where it lacks a field, or has a value of another kind."""
    part = values[section] if isinstance(values.get(section), dict) else {}
    limits = {name: _MOST_LAYERS if name in ("num_hidden_layers", "depth") else 2**20 for name in needed}
    fits = {name: _is(int, part.get(name)) and 0 < part[name] <= most for name, most in limits.items()}
    if wrong := ", ".join(name for name, fit in fits.items() if not fit):
        raise CheckpointError(f"{source}: `{section}` needs whole numbers for {wrong}. Is this a Sa2VA?")
    for kind, names in optional.items():
        for name in names.split():
            value = part.get(name)
            is_odd = name.endswith("_eps") and value is not None and _is(float, value) and value > 0.1
            if value is not None and (is_odd or not _is(_KINDS[kind], value)):
                fault = f"{source}: `{section}` has {name} = {_shown(value)}"
                raise CheckpointError(f"{fault}; {kind} of a usual size are needed. Copy it from the source.")
    return part


def read_config(folder: Path, sam2: Sam2Dimensions | None = None) -> Sa2VAConfig:
    """Reads the configuration of a checkpoint folder; `sam2` overrides its side-car."""
    source = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"Model folder {folder} does not exist; give --model_path a Sa2VA's folder.")
    if not source.exists():
        todo = f"run `vesselrl doctor --model_path {folder} --write_config`, which infers it from the tensors"
        raise CheckpointError(f"{folder} has no config.json; {todo}.")
    if sam2 is None:
        sidecar = folder / SAM2_SIDECAR
        sam2 = Sam2Dimensions.from_dict(read_json_object(sidecar)) if sidecar.exists() else Sam2Dimensions()
    values = read_json_object(source)
    kind = family_name(values, source)
    is_whole = FAMILIES[kind].is_whole
    vision = _check_section(source, "vision_config", values, *_VISION[is_whole])
    section = "text_config" if is_whole else "llm_config"
    llm = _check_section(source, section, values, _LLM_NEEDED, _LLM_OPTIONAL)
    is_tied = True in (values.get("tie_word_embeddings"), llm.get("tie_word_embeddings"))
    if is_whole:  # its `template` is that of the processor, whose system prompt no training had
        return Sa2VAConfig(vision, llm, sam2, is_tied=is_tied, kind=kind)
    for name, expected in _SUPPORTED.items():
        if (got := values.get(name, expected)) != expected:
            raise CheckpointError(f"{source} has {name} = {_shown(got)}; only {expected!r} is supported.")
    template = values.get("template") or "qwen_chat"
    if not isinstance(template, str) or template.replace("-", "_") not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise CheckpointError(f"{source} has template = {_shown(template)}; supported are {known}.")
    ratio = values.get("downsample_ratio", 0.5)
    tile_px, patch_px = values.get("force_image_size") or vision["image_size"], vision["patch_size"]
    if not (_is(float, ratio) and 0 < ratio <= 1 and abs(1 / ratio - round(1 / ratio)) < 1e-6):
        raise CheckpointError(f"{source} has downsample_ratio = {_shown(ratio)}; 0.5 is usual.")
    if tile_px != vision["image_size"] or tile_px % (patch_px * round(1 / ratio)):
        fault = f"{source} has force_image_size = {_shown(tile_px)}, image_size = {vision['image_size']}"
        raise CheckpointError(f"{fault}, patch_size = {patch_px}; equal sizes of whole tokens are supported.")
    return Sa2VAConfig(vision, llm, sam2, tile_px, float(ratio), is_tied, kind, template.replace("-", "_"))


# Fields of config.json, and the tensor and axis, or the numbered layers, that tell their value.
_PATCH_WEIGHT, _LLM = "vision_model.embeddings.patch_embedding.weight", "language_model.model."
_SHAPED = {
    "vision_config.hidden_size": (_PATCH_WEIGHT, 0),
    "vision_config.patch_size": (_PATCH_WEIGHT, 2),
    "vision_config.intermediate_size": ("vision_model.encoder.layers.0.mlp.fc1.weight", 0),
    "llm_config.vocab_size": (_LLM + "embed_tokens.weight", 0),
    "llm_config.hidden_size": (_LLM + "embed_tokens.weight", 1),
    "llm_config.intermediate_size": (_LLM + "layers.0.mlp.gate_proj.weight", 0),
}
_LAYERED = {"vision_config.num_hidden_layers": "vision_model.encoder.layers."}
_LAYERED |= {"llm_config.num_hidden_layers": _LLM + "layers."}
# Heads leave no trace in shapes: known for the published models of Qwen2, by width and layers. The 4B is not
# among them, because some copies of it were trained with Phi3's prompt template, which leaves none either.
_HEADS = {(896, 24): (14, 2), (1536, 28): (12, 2), (3584, 28): (28, 4), (5120, 48): (40, 8)}


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The fields of config.json that tensor shapes determine, from the shapes by official tensor name.

    >>> infer_config({"language_model.model.embed_tokens.weight": (151679, 3584)})
    {'llm_config.vocab_size': 151679, 'llm_config.hidden_size': 3584}
    """
    found = {key: shapes[name][axis] for key, (name, axis) in _SHAPED.items() if name in shapes}
    for key, prefix in _LAYERED.items():
        if layers := {name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)}:
            found[key] = len(layers)
    return found


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Sa2VAConfig:
    """Rebuilds the configuration of a published Sa2VA-1B, InternVL3-2B, 8B or 14B from its tensors."""
    found = infer_config(shapes)
    parts = [{k.partition(".")[2]: v for k, v in found.items() if k.startswith(p)} for p in ("vision", "llm")]
    vision, llm = parts
    heads = _HEADS.get((llm.get("hidden_size"), llm.get("num_hidden_layers")))
    if heads is None or (vision.get("hidden_size"), vision.get("num_hidden_layers")) != (1024, 24):
        fault = f"config.json can be rebuilt for Sa2VA-1B and InternVL3-2B, 8B and 14B only, not for {found}"
        raise CheckpointError(f"{fault}. Take it from the model that this one was trained from.")
    vision |= {"num_attention_heads": 16, "image_size": 448, "qkv_bias": True, "norm_type": "layer_norm"}
    vision |= {"qk_normalization": False, "architectures": ["InternVisionModel"]}
    llm |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "rope_theta": 1e6}
    llm |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "architectures": [QWEN2]}
    return Sa2VAConfig(vision, llm, Sam2Dimensions())
