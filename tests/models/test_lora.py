"""Adapters: exactly the intended modules, the function that PEFT computes, saved and read back unchanged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from vesselrl.models import lora
from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.lora import LORA_PRESETS, SCOPES, adapter_parameters, attach_lora
from vesselrl.models.sa2va import Sa2VA

QKVO = LORA_PRESETS["medium"].projections


@pytest.fixture
def model(tiny_checkpoint: Path) -> Sa2VA:
    return load_sa2va(tiny_checkpoint)[0]


def num_folded(model: nn.Module) -> int:
    return sum(isinstance(module, lora._Folded) for module in model.modules())


def test_language_model_presets_on_the_8b_shapes(model_8b: Sa2VA) -> None:
    """Rank 32 on q, k, v, o of 28 layers: by hand 32 * (in + out) summed, 20,185,088 values; none of SAM2."""
    for preset, parts in (("small", 2), ("medium", 4), ("large", 7)):
        names = lora.target_modules(model_8b, ["language_model"], LORA_PRESETS[preset].projections)
        assert len(names) == 28 * parts
    names = lora.target_modules(model_8b, ["language_model"], QKVO)
    assert names == [f"lm.model.layers.{layer}.self_attn.{part}" for layer in range(28) for part in QKVO]
    with torch.device("meta"):
        counts = lora.trainable_counts(attach_lora(model_8b, ["language_model"], QKVO, rank=32, alpha=64))
    assert counts == {"language_model": 20_185_088}
    assert 28 * 32 * 4 * (3584 + (3584 + 512) // 2) == 20_185_088


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_touches_its_component_only(model: Sa2VA, scope: str) -> None:
    adapted = attach_lora(model, [scope], QKVO, 2, 4)
    assert list(lora.trainable_counts(adapted)) == [scope]
    assert all(".lora_" in name for name in adapter_parameters(adapted))
    assert (num_folded(adapted) > 0) == (scope != "language_model")


def test_heads_without_a_gradient_are_left_out(model: Sa2VA) -> None:
    names = lora.target_modules(model, ["mask_decoder"], QKVO)
    assert {"sam.mask_decoder.conv_s0", "sam.mask_decoder.output_hypernetworks_mlps.1.proj_in"} <= set(names)
    assert not [name for name in names if "iou" in name or "obj_score" in name or "mlps.0" in name]


def test_a_suffix_match_is_refused(model: Sa2VA, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake of the prototype: `q_proj` also names the attention of SAM2."""
    suffixes = {"target_modules": list(QKVO)}
    monkeypatch.setattr(lora, "LoraConfig", lambda **given: LoraConfig(**(given | suffixes)))
    with pytest.raises(ValueError, match="LoRA matched other modules than intended"):
        attach_lora(model, ["language_model"], QKVO, 2, 4)
    for scope in (["decoder"], []):
        with pytest.raises(ValueError, match="choose one or more of language_model, projector"):
            lora.target_modules(model, scope, QKVO)


@torch.no_grad()
def test_an_adapter_that_is_saved_loaded_and_saved_again_stays_what_it_is(
    tiny_checkpoint: Path, model: Sa2VA, tmp_path: Path
) -> None:
    """The masks are identical, and the modules named in full both times, which PEFT shortens on loading."""
    other, processor = load_sa2va(tiny_checkpoint)
    peft_model = attach_lora(other, SCOPES, QKVO, 3, 6)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(peft_model).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    inputs = processor([np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)])
    expected = peft_model.get_base_model()(inputs)[0]
    first, second = tmp_path / "first", tmp_path / "second"
    lora.save_adapter(peft_model, first)
    names = ["SHA256SUMS", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in first.iterdir()) == names
    base = model(inputs)[0]
    again = lora.load_adapter(model, first, is_trainable=True)
    assert torch.equal(expected, again.get_base_model()(inputs)[0])
    assert not torch.equal(expected > 0, base > 0)
    lora.save_adapter(again, second)
    weights = lora.load_adapter(load_sa2va(tiny_checkpoint)[0], second).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in adapter_parameters(again).items())
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second)]
    targets = configs[0]["target_modules"]
    assert sorted(targets) == sorted(configs[1]["target_modules"])
    names = {f"base_model.model.{name}.lora_{part}.weight" for name in targets for part in "AB"}
    assert set(load_file(first / "adapter_model.safetensors")) == names  # as PEFT itself saves them
    assert torch.allclose(peft_model.merge_and_unload()(inputs)[0], expected, atol=1e-4)


def adapted(dropout: float = 0.0) -> nn.Module:
    """LoRA on a strided, padded convolution, a 1x1 convolution and a linear layer."""
    torch.manual_seed(0)
    conv, point = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 5, 1, bias=False)
    layers = nn.Sequential(conv, nn.ReLU(), point, nn.Flatten(2), nn.Linear(16, 4))
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["0", "2", "4"])
    model = get_peft_model(layers, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return model


def test_the_same_values_and_gradients_as_peft() -> None:
    x, model, results = torch.randn(2, 3, 8, 8), adapted(), []
    with torch.no_grad(), model.disable_adapter():
        off = model(x)
    for _ in range(2):
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in adapter_parameters(model).values())])
        lora.fold_adapters(model)
    expected, found = results
    assert (num_folded(model), len(found)) == (3, 7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        with model.disable_adapter():
            torch.testing.assert_close(model(x), off)
        torch.testing.assert_close(model.merge_and_unload()(x), expected[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], off)


def test_dropout_and_half_precision_keep_pefts_way() -> None:
    """A bfloat16 weight would swallow a small adapter: W + 1e-4 is W."""
    x = torch.ones(1, 3, 8, 8)
    model = adapted(dropout=0.5)
    lora.fold_adapters(model)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    half = get_peft_model(nn.Sequential(nn.Linear(4, 4).bfloat16()), LoraConfig(r=2, target_modules=["0"]))
    lora.fold_adapters(half)
    assert half.base_model.model[0].lora_A["default"].weight.dtype == torch.float32
    assert not half.base_model.model[0].can_fold()
