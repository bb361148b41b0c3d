"""The shape of a Sa2VA checkpoint: `config.json` plus a side-car for SAM2.

The official `config.json` is silent about SAM2, whose heads and windows leave no trace in tensor shapes.
They are read from `sam2_config.json` beside it; without that file SAM2-Hiera-Large is assumed.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from transformers import InternVLVisionConfig, Qwen2Config, Sam2Config

from vesselrl.errors import CheckpointError

SAM2_SIDECAR = "sam2_config.json"
_TRANSFORMER = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_NEEDED = {
    "vision_config": (*_TRANSFORMER, "image_size", "patch_size"),
    "llm_config": (*_TRANSFORMER, "num_key_value_heads", "vocab_size"),
}
# Values of config.json that the native model is written for; absent ones mean the same.
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
            if is_list != wants_list or any(type(n) is not int for n in (value if is_list else [value])):
                kind = "a list of whole numbers" if wants_list else "a whole number"
                raise CheckpointError(f"{SAM2_SIDECAR} has {name} = {value!r}; {kind} is needed.")
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
        ignored = ("architectures", "model_type", "auto_map", "transformers_version", "tie_word_embeddings")
        values = {k: v for k, v in self.llm.items() if k not in ignored}
        return Qwen2Config(**values, tie_word_embeddings=False)

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


def read_json_object(path: Path) -> dict:
    """Reads one JSON object of a checkpoint."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Copy it again from the source.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, an object was expected.")
    return values


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
    for section, names in _NEEDED.items():
        part = values[section] if isinstance(values.get(section), dict) else {}
        if wrong := ", ".join(name for name in names if type(part.get(name)) is not int):
            needs = f"{source}: `{section}` needs whole numbers for {wrong}"
            raise CheckpointError(f"{needs}. Is this a Sa2VA of the InternVL family?")
    vision, llm = values["vision_config"], values["llm_config"]
    if (architecture := (llm.get("architectures") or ["?"])[0]) != "Qwen2ForCausalLM":
        supported = "Qwen2ForCausalLM (Sa2VA-InternVL3 2B, 8B, 14B; Sa2VA 1B, 4B)"
        raise CheckpointError(f"{source} names the language model {architecture!r}; choose a {supported}.")
    for name, expected in _SUPPORTED.items():
        got = values.get(name, expected)
        got = got.replace("-", "_") if isinstance(got, str) else got
        if got != expected:
            raise CheckpointError(f"{source} has {name} = {got!r}; only {expected!r} is supported.")
    tile_px = int(values.get("force_image_size") or vision["image_size"])
    return Sa2VAConfig(vision, llm, sam2, tile_px, float(values.get("downsample_ratio", 0.5)))
