"""Memory that a model takes in training, from its shapes alone."""

import os

import torch

from vesselrl.models.config import Sam2Dimensions

# Of SAM2's image encoder, measured: floats kept for the gradient, per float that goes through a block.
KEPT, KEPT_RECOMPUTING = 29, 1.1


def activation_bytes(sam2: Sam2Dimensions, recomputing: bool = False) -> float:
    """Bytes that the gradient of SAM2's image encoder needs for one image, in float32."""
    sides = [sam2.image_size // 4 // 2**stage for stage in range(len(sam2.embed_dim_per_stage))]
    block = [4 * width * side**2 for width, side in zip(sam2.embed_dim_per_stage, sides, strict=True)]
    total = sum(size * count for size, count in zip(block, sam2.blocks_per_stage, strict=True))
    return KEPT_RECOMPUTING * total + KEPT * max(block) if recomputing else KEPT * total


def total_memory(device: str) -> int:
    """Bytes of memory that a device has in all."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
