"""Adapters: exactly the intended modules, saved and read back without a change."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

from vesselrl.errors import CheckpointError
from vesselrl.models.config import Sa2VAConfig
from vesselrl.models.loading import load_sa2va
from vesselrl.models.lora import (
    LORA_PRESETS,
    SCOPES,
    adapter_parameters,
    attach_lora,
    load_adapter,
    merge_adapter,
    save_adapter,
    target_modules,
    trainable_counts,
)
from vesselrl.models.sa2va import Sa2VA

QKVO = LORA_PRESETS["medium"].projections


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def test_language_model_preset_on_the_8b_shapes(config_8b: Sa2VAConfig) -> None:
    """Rank 32 on q, k, v, o of 28 layers: by hand 32 * (in + out) summed, 20,185,088 values; none of SAM2."""
    with torch.device("meta"):
        model = Sa2VA(config_8b)
        names = target_modules(model, ["language_model"], QKVO)
        assert names == [f"lm.model.layers.{layer}.self_attn.{part}" for layer in range(28) for part in QKVO]
        counts = trainable_counts(attach_lora(model, ["language_model"], QKVO, rank=32, alpha=64))
    width, kv = 3584, 512
    by_hand = 28 * 32 * ((width + width) + 2 * (width + kv) + (width + width))
    assert counts == {"language_model": by_hand} == {"language_model": 20_185_088}


@pytest.mark.parametrize(("preset", "parts"), [("small", 2), ("medium", 4), ("large", 7)])
def test_presets_name_their_projections(tiny_checkpoint: Path, preset: str, parts: int) -> None:
    model, _ = load_sa2va(tiny_checkpoint)
    names = target_modules(model, ["language_model"], LORA_PRESETS[preset].projections)
    assert len(names) == 2 * parts
    assert all(name.startswith("lm.model.layers.") for name in names)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_touches_its_component_only(tiny_checkpoint: Path, scope: str) -> None:
    model, _ = load_sa2va(tiny_checkpoint)
    assert list(trainable_counts(attach_lora(model, [scope], QKVO, 2, 4))) == [scope]


def test_base_weights_stay_frozen(tiny_checkpoint: Path) -> None:
    model, _ = load_sa2va(tiny_checkpoint)
    peft_model = attach_lora(model, SCOPES, QKVO, 2, 4)
    assert all(".lora_" in name for name in adapter_parameters(peft_model))


def test_a_suffix_match_is_refused(tiny_checkpoint: Path, monkeypatch) -> None:
    """The mistake of the prototype: `q_proj` also names the attention of SAM2."""
    model, _ = load_sa2va(tiny_checkpoint)
    suffixes = {"target_modules": list(QKVO)}
    monkeypatch.setattr("vesselrl.models.lora.LoraConfig", lambda **given: LoraConfig(**(given | suffixes)))
    with pytest.raises(ValueError, match="LoRA matched other modules than intended"):
        attach_lora(model, ["language_model"], QKVO, 2, 4)


def test_unknown_scope(tiny_checkpoint: Path) -> None:
    model, _ = load_sa2va(tiny_checkpoint)
    with pytest.raises(ValueError, match="choose one or more of language_model, projector"):
        target_modules(model, ["decoder"], QKVO)


def randomised(tiny_checkpoint: Path):
    """Base model with an adapter whose weights are all non-zero, and its processor."""
    model, processor = load_sa2va(tiny_checkpoint)
    peft_model = attach_lora(model, SCOPES, QKVO, 3, 6)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(peft_model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return peft_model, processor


@torch.no_grad()
def test_save_and_load_give_identical_masks(tiny_checkpoint: Path, tmp_path: Path, image: np.ndarray) -> None:
    peft_model, processor = randomised(tiny_checkpoint)
    inputs = processor([image])
    expected = peft_model.get_base_model()(inputs)[0]
    save_adapter(peft_model, tmp_path / "adapter")
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    fresh, _ = load_sa2va(tiny_checkpoint)
    untouched = fresh(inputs)[0]
    again = load_adapter(fresh, tmp_path / "adapter").get_base_model()(inputs)[0]
    assert torch.equal(expected, again)
    assert not torch.equal(expected > 0, untouched > 0)


def test_an_adapter_that_was_trained_on_can_be_saved_and_loaded_again(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """What `--init_lora` goes on with names its modules in full too; PEFT shortens them on loading."""
    peft_model, _ = randomised(tiny_checkpoint)
    save_adapter(peft_model, tmp_path / "first")
    loaded = load_adapter(load_sa2va(tiny_checkpoint)[0], tmp_path / "first", is_trainable=True)
    save_adapter(loaded, tmp_path / "second")
    again = load_adapter(load_sa2va(tiny_checkpoint)[0], tmp_path / "second")
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("first", "second")
    ]
    assert sorted(configs[0]["target_modules"]) == sorted(configs[1]["target_modules"])
    weights = again.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in adapter_parameters(loaded).items())


@torch.no_grad()
def test_merging_changes_nothing_visible(tiny_checkpoint: Path, image: np.ndarray) -> None:
    peft_model, processor = randomised(tiny_checkpoint)
    inputs = processor([image])
    expected = peft_model.get_base_model()(inputs)[0]
    merged = merge_adapter(peft_model)(inputs)[0]
    assert torch.allclose(expected, merged, atol=1e-4)


def test_an_adapter_of_another_model_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    peft_model, _ = randomised(tiny_checkpoint)
    save_adapter(peft_model, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("lm.model.layers.1.", "lm.model.layers.7."))
    fresh, _ = load_sa2va(tiny_checkpoint)
    with pytest.raises(CheckpointError, match="modules that this model does not have"):
        load_adapter(fresh, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        load_adapter(fresh, tmp_path)
