"""Official Sa2VA tensor names and the native ones, in both directions.

Each rule is a pair of templates; `{i}` and `{j}` stand for a number and `{rest}` for the remaining name. The
first rule that matches wins. Only three tensors change shape on the way, none is transposed: the vision
tower's fused qkv is cut in three, SAM2's four point embeddings become one table, and its random positional
matrix is stored twice.
"""

import re
from functools import cache

# Official prefixes.
_VISION = "vision_model."
_VISION_LAYER = _VISION + "encoder.layers.{i}."
_SAM = "grounding_encoder.sam2_model."
_TRUNK, _DECODER = _SAM + "image_encoder.trunk.", _SAM + "sam_mask_decoder."
_PROMPT = _SAM + "sam_prompt_encoder."
_DECODER_LAYER = _DECODER + "transformer.layers.{i}."
# Native prefixes.
_LAYER = "vision.encoder.layer.{i}."
_BACKBONE = "sam.vision_encoder.backbone."
_MASKS = "sam.mask_decoder."
_MASKS_LAYER = _MASKS + "transformer.layers.{i}."

QKV = _VISION_LAYER + "attn.qkv.{rest}"
POINTS = _PROMPT + "point_embeddings.{i}.weight"
POINT_TABLE = "sam.prompt_encoder.point_embed.weight"
POSITIONS = _PROMPT + "pe_layer.positional_encoding_gaussian_matrix"

_RULES: tuple[tuple[str, str], ...] = (
    (_VISION + "embeddings.class_embedding", "vision.embeddings.cls_token"),
    (_VISION + "embeddings.position_embedding", "vision.embeddings.position_embeddings"),
    (_VISION + "embeddings.patch_embedding.{rest}", "vision.embeddings.patch_embeddings.projection.{rest}"),
    (_VISION_LAYER + "attn.proj.{rest}", _LAYER + "attention.projection_layer.{rest}"),
    (_VISION_LAYER + "attn.{rest}", _LAYER + "attention.{rest}"),
    (_VISION_LAYER + "norm1.{rest}", _LAYER + "layernorm_before.{rest}"),
    (_VISION_LAYER + "norm2.{rest}", _LAYER + "layernorm_after.{rest}"),
    (_VISION_LAYER + "ls{j}", _LAYER + "lambda_{j}"),
    (_VISION_LAYER + "mlp.{rest}", _LAYER + "mlp.{rest}"),
    ("mlp1.{rest}", "projector.{rest}"),
    ("language_model.{rest}", "lm.{rest}"),
    ("text_hidden_fcs.{rest}", "text_hidden_fcs.{rest}"),
    (_TRUNK + "patch_embed.proj.{rest}", _BACKBONE + "patch_embed.projection.{rest}"),
    (_TRUNK + "blocks.{i}.norm{j}.{rest}", _BACKBONE + "blocks.{i}.layer_norm{j}.{rest}"),
    (_TRUNK + "blocks.{i}.mlp.layers.0.{rest}", _BACKBONE + "blocks.{i}.mlp.proj_in.{rest}"),
    (_TRUNK + "blocks.{i}.mlp.layers.1.{rest}", _BACKBONE + "blocks.{i}.mlp.proj_out.{rest}"),
    (_TRUNK + "{rest}", _BACKBONE + "{rest}"),
    (_SAM + "image_encoder.neck.convs.{i}.conv.{rest}", "sam.vision_encoder.neck.convs.{i}.{rest}"),
    (_SAM + "no_mem_embed", "sam.no_memory_embedding"),
    (_PROMPT + "not_a_point_embed.{rest}", "sam.prompt_encoder.not_a_point_embed.{rest}"),
    (_PROMPT + "no_mask_embed.{rest}", "sam.prompt_encoder.no_mask_embed.{rest}"),
    (_PROMPT + "mask_downscaling.0.{rest}", "sam.prompt_encoder.mask_embed.conv1.{rest}"),
    (_PROMPT + "mask_downscaling.1.{rest}", "sam.prompt_encoder.mask_embed.layer_norm1.{rest}"),
    (_PROMPT + "mask_downscaling.3.{rest}", "sam.prompt_encoder.mask_embed.conv2.{rest}"),
    (_PROMPT + "mask_downscaling.4.{rest}", "sam.prompt_encoder.mask_embed.layer_norm2.{rest}"),
    (_PROMPT + "mask_downscaling.6.{rest}", "sam.prompt_encoder.mask_embed.conv3.{rest}"),
    (_DECODER + "output_upscaling.0.{rest}", _MASKS + "upscale_conv1.{rest}"),
    (_DECODER + "output_upscaling.1.{rest}", _MASKS + "upscale_layer_norm.{rest}"),
    (_DECODER + "output_upscaling.3.{rest}", _MASKS + "upscale_conv2.{rest}"),
    (_DECODER_LAYER + "norm{j}.{rest}", _MASKS_LAYER + "layer_norm{j}.{rest}"),
    (_DECODER_LAYER + "mlp.layers.0.{rest}", _MASKS_LAYER + "mlp.proj_in.{rest}"),
    (_DECODER_LAYER + "mlp.layers.1.{rest}", _MASKS_LAYER + "mlp.proj_out.{rest}"),
    *(
        (f"{_DECODER}transformer.{place}.out_proj.{{rest}}", f"{_MASKS}transformer.{place}.o_proj.{{rest}}")
        for place in (
            "layers.{i}.self_attn",
            "layers.{i}.cross_attn_token_to_image",
            "layers.{i}.cross_attn_image_to_token",
            "final_attn_token_to_image",
        )
    ),
    (_DECODER + "transformer.norm_final_attn.{rest}", _MASKS + "transformer.layer_norm_final_attn.{rest}"),
    *(
        (f"{_DECODER}{head}.layers.{k}.{{rest}}", f"{_MASKS}{head}.{native}.{{rest}}")
        for head in ("output_hypernetworks_mlps.{i}", "iou_prediction_head", "pred_obj_score_head")
        for k, native in enumerate(("proj_in", "layers.0", "proj_out"))
    ),
    (_DECODER + "{rest}", _MASKS + "{rest}"),
)  # fmt: skip

# SAM2's video memory: part of every official checkpoint, never used for a single image.
UNUSED_PREFIXES = tuple(
    _SAM + name
    for name in (
        "memory_attention.", "memory_encoder.", "maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr",
        "obj_ptr_proj.", "mask_downsample.",
    )
)  # fmt: skip


@cache
def _pattern(template: str) -> re.Pattern:
    escaped = re.escape(template)
    for name, body in (("i", r"\d+"), ("j", r"\d+"), ("rest", r".+")):
        escaped = escaped.replace(re.escape("{" + name + "}"), f"(?P<{name}>{body})")
    return re.compile(escaped)


def _translate(name: str, source: int) -> str | None:
    for rule in _RULES:
        match = _pattern(rule[source]).fullmatch(name)
        if match:
            return rule[1 - source].format(**match.groupdict())
    return None


def is_unused(official: str) -> bool:
    """Whether an official tensor is known and has no part in single-image segmentation."""
    return official.startswith(UNUSED_PREFIXES)


def native_names(official: str) -> tuple[str, ...] | None:
    """Native tensors that hold an official one, or None when the name is unknown.

    Three names for a fused qkv (q, k, v along dim 0), two for the positional matrix (equal copies), else one.
    The point embeddings 0 to 3 all name the same table, row by row.

    >>> native_names("mlp1.0.weight")
    ('projector.0.weight',)
    """
    qkv = _pattern(QKV).fullmatch(official)
    if qkv:
        base = f"vision.encoder.layer.{qkv['i']}.attention."
        return tuple(f"{base}{part}_proj.{qkv['rest']}" for part in "qkv")
    if official == POSITIONS:
        return (
            "sam.prompt_encoder.shared_embedding.positional_embedding",
            "sam.shared_image_embedding.positional_embedding",
        )
    if _pattern(POINTS).fullmatch(official):
        return (POINT_TABLE,)
    native = _translate(official, source=0)
    return None if native is None else (native,)


def official_names(native: str) -> tuple[str, ...]:
    """Official tensors that a native one is stored in; the inverse of `native_names`.

    >>> official_names("vision.encoder.layer.3.attention.k_proj.weight")
    ('vision_model.encoder.layers.3.attn.qkv.weight',)

    Raises:
        KeyError: no rule produces this native name.
    """
    part = re.fullmatch(r"vision\.encoder\.layer\.(\d+)\.attention\.[qkv]_proj\.(.+)", native)
    if part:
        return (QKV.format(i=part[1], rest=part[2]),)
    if native == POINT_TABLE:
        return tuple(POINTS.format(i=k) for k in range(4))
    if native.endswith(
        (".shared_embedding.positional_embedding", ".shared_image_embedding.positional_embedding")
    ):
        return (POSITIONS,)
    official = _translate(native, source=1)
    if official is None:
        raise KeyError(f"no official name for the native tensor {native!r}")
    return (official,)


def point_row(official: str) -> int | None:
    """The row of the point-embedding table that an official tensor fills, or None for any other tensor."""
    match = _pattern(POINTS).fullmatch(official)
    return int(match["i"]) if match else None
