"""The shape of a Sa2VA checkpoint: `config.json` plus a side-car for SAM2.

The official `config.json` describes the vision tower and the language model but is silent about SAM2, whose
heads, windows and global blocks leave no trace in tensor shapes. They are read from `sam2_config.json` in the
same folder; without that file SAM2-Hiera-Large is assumed, as in every published Sa2VA.
"""

import json
from dataclasses import dataclass, fields
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
            raise CheckpointError(
                f"{SAM2_SIDECAR} must have exactly the fields {sorted(names)}; "
                f"missing {sorted(names - set(values))}, unknown {sorted(set(values) - names)}."
            )
        for name, value in values.items():
            is_list = isinstance(getattr(cls, name), tuple)
            numbers = value if isinstance(value, list) else [value]
            if isinstance(value, list) != is_list or any(type(number) is not int for number in numbers):
                kind = "a list of whole numbers" if is_list else "a whole number"
                raise CheckpointError(f"{SAM2_SIDECAR} has {name} = {value!r}; {kind} is needed.")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def native(self) -> Sam2Config:
        """The transformers configuration of the same shape."""
        size, dims = self.image_size, list(self.embed_dim_per_stage)
        backbone = {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": dims[0],
            "num_attention_heads": self.num_attention_heads_per_stage[0],
            "image_size": [size, size],
            "blocks_per_stage": list(self.blocks_per_stage),
            "embed_dim_per_stage": dims,
            "num_attention_heads_per_stage": list(self.num_attention_heads_per_stage),
            "window_size_per_stage": list(self.window_size_per_stage),
            "global_attention_blocks": list(self.global_attention_blocks),
            "window_positional_embedding_background_size": list(self.background_size),
        }
        vision = {
            "model_type": "sam2_vision_model",
            "backbone_config": backbone,
            "backbone_channel_list": dims[::-1],
            "backbone_feature_sizes": [[size // s, size // s] for s in (4, 8, 16)],
            "fpn_hidden_size": self.hidden_size,
        }
        prompt = {"hidden_size": self.hidden_size, "image_size": size}
        decoder = {
            "hidden_size": self.hidden_size,
            "mlp_dim": self.decoder_mlp_dim,
            "iou_head_hidden_dim": self.iou_head_hidden_dim,
        }
        return Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


@dataclass(frozen=True)
class Sa2VAConfig:
    """The shape of one Sa2VA of the InternVL + Qwen2 family."""

    # `vision_config` (InternViT) and `llm_config` (Qwen2) of config.json.
    vision: dict
    llm: dict
    sam2: Sam2Dimensions
    # Side of a tile of the language model's image input.
    tile_px: int = 448
    # Side ratio of the pixel shuffle; 0.5: four patches make one image token.
    downsample_ratio: float = 0.5

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that one tile becomes, (tile / patch)² · ratio²."""
        return int((self.tile_px // self.vision["patch_size"]) ** 2 * self.downsample_ratio**2)

    def native_vision(self) -> InternVLVisionConfig:
        """The transformers configuration of the vision tower."""
        v = self.vision
        return InternVLVisionConfig(
            **{name: v[name] for name in _TRANSFORMER},
            attention_bias=v.get("qkv_bias", True),
            use_qk_norm=v.get("qk_normalization", False),
            norm_type=v.get("norm_type", "layer_norm"),
            layer_norm_eps=v.get("layer_norm_eps", 1e-6),
            hidden_act=v.get("hidden_act", "gelu"),
            layer_scale_init_value=v.get("initializer_factor", 1.0),
            hidden_dropout_prob=v.get("dropout", 0.0),
            attention_dropout=v.get("attention_dropout", 0.0),
            image_size=[v["image_size"]] * 2,
            patch_size=[v["patch_size"]] * 2,
            num_channels=v.get("num_channels", 3),
            use_mean_pooling=True,  # then the tower has no final norm, as InternViT
        )

    def native_llm(self) -> Qwen2Config:
        """The transformers configuration of the language model."""
        ignored = ("architectures", "model_type", "auto_map", "transformers_version")
        values = {k: v for k, v in self.llm.items() if k not in ignored}
        return Qwen2Config(**{**values, "tie_word_embeddings": False})

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
    """Reads one JSON object of a checkpoint; a CheckpointError names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Copy it again from the source.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, an object was expected.")
    return values


def read_config(folder: Path, sam2: Sam2Dimensions | None = None) -> Sa2VAConfig:
    """Reads the configuration of a checkpoint folder; `sam2` overrides its side-car.

    Raises:
        CheckpointError: missing or damaged, or it asks for something the native model does not do.
    """
    source = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(
            f"Model folder {folder} does not exist. Give --model_path a Sa2VA checkpoint folder."
        )
    if not source.exists():
        raise CheckpointError(
            f"{folder} has no config.json. It is not among the tensors but can be rebuilt from their shapes: "
            f"run `vesselrl doctor --model_path {folder}`, which lists what can be inferred."
        )
    if sam2 is None:
        sidecar = folder / SAM2_SIDECAR
        sam2 = Sam2Dimensions.from_dict(read_json_object(sidecar)) if sidecar.exists() else Sam2Dimensions()
    values = read_json_object(source)
    for section, names in _NEEDED.items():
        if not isinstance(values.get(section), dict):
            raise CheckpointError(
                f"{source} has no `{section}` object; is this a Sa2VA of the InternVL family?"
            )
        wrong = ", ".join(name for name in names if type(values[section].get(name)) is not int)
        if wrong:
            raise CheckpointError(
                f"{source}: `{section}` needs whole numbers for {wrong}. Copy it from the source."
            )
    vision, llm = values["vision_config"], values["llm_config"]
    architecture = (llm.get("architectures") or ["?"])[0]
    if architecture != "Qwen2ForCausalLM":
        raise CheckpointError(
            f"{source} names the language model {architecture!r}; only Qwen2ForCausalLM "
            "(Sa2VA-InternVL3 2B/8B/14B and Sa2VA 1B/4B) is supported. Choose one of those checkpoints."
        )
    for name, expected in _SUPPORTED.items():
        got = values.get(name, expected)
        got = got.replace("-", "_") if isinstance(got, str) else got
        if got != expected:
            raise CheckpointError(f"{source} has {name} = {got!r}; only {expected!r} is supported.")
    tile_px = int(values.get("force_image_size") or vision["image_size"])
    return Sa2VAConfig(vision, llm, sam2, tile_px, float(values.get("downsample_ratio", 0.5)))
