"""Memory that a model takes in training, from its shapes alone, and its language model in four bits."""

import os
from collections import Counter
from collections.abc import Collection

import torch
from torch import nn

from vesselrl.errors import RefusedError
from vesselrl.models.config import Sa2VAConfig, Sam2Dimensions
from vesselrl.models.lora import LORA_PRESETS, attach_lora, trainable_counts
from vesselrl.models.sa2va import Sa2VA

GB = 1e9
CARD_GB = 24
# Of SAM2's image encoder, measured: floats kept for the gradient, per float that goes through a block.
KEPT, KEPT_RECOMPUTING = 29, 1.1
ADAPTER_BYTES = 20  # of a trained value: itself, gradient, two moments, and a copy in case memory runs out
WORKING_BYTES = 1e9  # features, mask decoder and scratch memory of a step with one image
TOKENS = 300  # of an image with one tile, and of the prompt
BYTES = {"float32": 4, "bfloat16": 2, "nf4": 0.53}  # of a weight of the language model
COMPONENTS = {
    "vision tower": ("vision.", "lm.model.visual."),  # of a Qwen-VL with its projector
    "image projector": "projector.",
    "lm_head": "lm.lm_head.",
    "language model": "lm.",
    "prompt projection": "text_hidden_fcs.",
    "image encoder": "sam.vision_encoder.",
    "mask decoder": "sam.",
}
_IN_FLOAT32 = ("prompt projection", "image encoder", "mask decoder")


def activation_bytes(sam2: Sam2Dimensions, recomputing: bool = False) -> float:
    """Bytes that the gradient of SAM2's image encoder needs for one image, in float32."""
    sides = [sam2.image_size // 4 // 2**stage for stage in range(len(sam2.embed_dim_per_stage))]
    block = [4 * width * side**2 for width, side in zip(sam2.embed_dim_per_stage, sides, strict=True)]
    total = sum(size * count for size, count in zip(block, sam2.blocks_per_stage, strict=True))
    return KEPT_RECOMPUTING * total + KEPT * max(block) if recomputing else KEPT * total


def memory_budget(config: Sa2VAConfig, scope: Collection[str]) -> dict:
    """Parameters and GB of each component, and GB of a training by kind of weights; nothing is loaded.

    For adapters of the preset `medium` in this scope and one image a step. `states`: the pass over all images
    before the training; `training`: a step; `recomputing`: with blocks computed twice; `least`: unavoidable.
    """
    with torch.device("meta"):
        model = Sa2VA(config)
        counts = Counter()
        for name, parameter in model.named_parameters():
            component = next(c for c, prefix in COMPONENTS.items() if name.startswith(prefix))
            counts[component] += parameter.numel()
        trained = trainable_counts(attach_lora(model, scope, LORA_PRESETS["medium"]))
    language = ("vision tower", "image projector", "language model")
    fixed = 4 * sum(counts[name] for name in _IN_FLOAT32) + WORKING_BYTES
    fixed += ADAPTER_BYTES * sum(trained.values())
    llm, options = config.llm, {}
    for kind, size in BYTES.items():
        if kind == "nf4" and "language_model" not in scope:
            continue  # it is not in memory
        tower = sum(counts[name] for name in language[:2]) * max(2, size)
        weights, width = tower + counts["language model"] * size, max(2, size) * llm["num_hidden_layers"]
        kept = {False: 10 * llm["hidden_size"] + 4 * llm["intermediate_size"], True: llm["hidden_size"]}
        rows = {} if "language_model" in scope else {"states": fixed + weights}
        for name, recomputing in (("training", False), ("recomputing", True)):
            rows[name] = fixed
            if "language_model" in scope:
                rows[name] += weights + TOKENS * width * kept[recomputing]
            if "image_encoder" in scope:
                rows[name] += activation_bytes(config.sam2, recomputing)
        rows["least"] = max(rows.get("states", 0), rows["recomputing"])
        options[kind] = {name: round(value / GB, 2) for name, value in rows.items()}
        options[kind]["fits_24_gb"] = rows["least"] < CARD_GB * GB
    return {
        "components": {
            name: {"parameters": counts[name], "float32_gb": counts[name] * 4 / GB,
                   "bfloat16_gb": counts[name] * (4 if name in _IN_FLOAT32 else 2) / GB}
            for name in COMPONENTS
        },
        "trained_values": trained,
        "options": options,
    }  # fmt: skip


def to_nf4(model: Sa2VA) -> None:
    """Puts the linear layers of the language model into four bits, which its way to the GPU then packs."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        fault = "--use_nf4 needs the package bitsandbytes, which is not installed"
        raise RefusedError(f"{fault}. Run: pip install 'vesselrl[nf4]'") from None
    for name, layer in [*model.language_layers().named_modules()]:
        if isinstance(layer, nn.Linear):
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            packed = Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
            packed.weight, packed.bias = Params4bit(layer.weight.data, False, quant_type="nf4"), layer.bias
            model.language_layers().set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # PEFT looks for this


def shard_layers(model: Sa2VA, device: str) -> None:
    """Moves a model to the device, but of the language model's frozen layers only this process's share.

    All processes gather a layer's weights together while it runs (FSDP2). Adapters are whole in each.
    """
    from torch.distributed.fsdp import fully_shard

    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in model.language_layers():
        fully_shard(layer, reshard_after_forward=True, ignored_params=whole)
    # The whole has no share of its own: it lets the next layer come while one computes.
    fully_shard(model.lm.model, ignored_params={*model.lm.model.parameters()})
    model.to(device)


def total_memory(device: str) -> int:
    """Bytes of memory that a device has in all."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
