"""Folded LoRA layers against PEFT's own: the same function, the same gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from vesselrl.models.folded_lora import FoldedConv2d, FoldedLinear, fold_adapters
from vesselrl.models.loading import load_sa2va
from vesselrl.models.lora import SCOPES, attach_lora


class Layers(nn.Module):
    """A strided, padded convolution, a 1x1 convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 5, 1, bias=False)
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.point(torch.relu(self.conv(x))).movedim(1, -1))


def adapted(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["conv", "point", "linear"])
    model = get_peft_model(Layers(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return model


def value_and_gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return out.detach(), grads


def test_the_same_values_and_gradients_as_peft() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = adapted()
    expected, expected_grads = value_and_gradients(model, x)
    assert fold_adapters(model) == 3
    found, grads = value_and_gradients(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(grads) == 6
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-4)


def test_turned_off_and_merged_as_in_peft() -> None:
    x = torch.randn(1, 3, 8, 8)
    model = adapted()
    with torch.no_grad():
        on = model(x)
        with model.disable_adapter():
            off = model(x)
        fold_adapters(model)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), off)
        torch.testing.assert_close(model.merge_and_unload()(x), on, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(on, off)


def test_dropout_keeps_pefts_way_in_training() -> None:
    x = torch.ones(1, 3, 8, 8)
    model = adapted(dropout=0.5)
    fold_adapters(model)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_half_precision_weights_are_not_folded() -> None:
    """A bfloat16 weight would swallow a small adapter: W + 1e-4 is W."""
    model = nn.Sequential(nn.Linear(4, 4).to(torch.bfloat16))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    fold_adapters(model)
    layer = model.base_model.model[0]
    assert isinstance(layer, FoldedLinear)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert not layer.can_fold()


@pytest.mark.parametrize("scope", SCOPES)
def test_the_language_model_keeps_pefts_layers(tiny_checkpoint: Path, scope: str) -> None:
    model, _ = load_sa2va(tiny_checkpoint)
    adapted_model = attach_lora(model, [scope], ("q_proj",), 2, 4)
    kinds = {type(m) for m in adapted_model.modules() if isinstance(m, FoldedLinear | FoldedConv2d)}
    assert bool(kinds) == (scope != "language_model")


def test_a_folded_adapter_is_saved_under_pefts_names(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    from vesselrl.models.lora import save_adapter

    model, _ = load_sa2va(tiny_checkpoint)
    adapted_model = attach_lora(model, ["projector"], (), 2, 4)
    save_adapter(adapted_model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tensors) == [
        f"base_model.model.text_hidden_fcs.{k}.lora_{part}.weight" for k in (0, 2) for part in "AB"
    ]
    assert all(np.isfinite(value).all() for value in tensors.values())
