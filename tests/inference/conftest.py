"""A small model whose answer depends on picture and prompt, and an adapter that changes it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vesselrl.inference.predictor import Predictor
from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.lora import SCOPES, LoraPreset, attach_lora, save_adapter
from vesselrl.models.miniature import random_sa2va, write_miniature


@pytest.fixture(scope="session")
def lively_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_checkpoint`, with larger weights: logits of size 1 instead of 0.001; read only."""
    folder = tmp_path_factory.mktemp("lively") / "model"
    model = random_sa2va()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            transposed = isinstance(module, nn.ConvTranspose2d)
            num_inputs = len(module.weight) if transposed else module.weight[0].numel()
            module.weight.data.normal_(0, num_inputs**-0.5, generator=generator)
    write_miniature(folder, model)
    return folder


@pytest.fixture(scope="session")
def predictor(lively_checkpoint: Path) -> Predictor:
    return Predictor.from_pretrained(lively_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def adapter(lively_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on all four components, as large as after a long training; read only."""
    folder = tmp_path_factory.mktemp("run") / "best_lora"
    model = load_sa2va(lively_checkpoint)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        peft_model = attach_lora(model, SCOPES, LoraPreset(2, 4, 0.0, ("q_proj", "down_proj")))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    save_adapter(peft_model, folder)
    return folder


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    """Of different sizes: the first needs a single tile, the others several."""
    sizes = enumerate([(64, 64, 3), (40, 90, 3), (100, 64, 3)])
    return [np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8) for seed, size in sizes]
