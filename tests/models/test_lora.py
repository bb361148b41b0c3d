"""Adapters: exactly the intended modules, the function that PEFT computes, saved and read back unchanged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from vesselrl.errors import CheckpointError
from vesselrl.models import lora
from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.lora import LORA_PRESETS, SCOPES, LoraPreset, adapter_parameters, attach_lora
from vesselrl.models.sa2va import Sa2VA

QKVO = LORA_PRESETS["medium"].projections
SMALLEST = LoraPreset(2, 4, 0.0, QKVO)


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
        counts = lora.trainable_counts(attach_lora(model_8b, ["language_model"], LORA_PRESETS["medium"]))
    assert counts == {"language_model": 20_185_088}
    assert 28 * 32 * 4 * (3584 + (3584 + 512) // 2) == 20_185_088


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_touches_its_component_only(model: Sa2VA, scope: str) -> None:
    adapted = attach_lora(model, [scope], SMALLEST)
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
        attach_lora(model, ["language_model"], SMALLEST)
    for scope in (["decoder"], []):
        with pytest.raises(ValueError, match="choose one or more of language_model, projector"):
            lora.target_modules(model, scope, QKVO)


@torch.no_grad()
def test_an_adapter_that_is_saved_loaded_and_saved_again_stays_what_it_is(
    tiny_checkpoint: Path, model: Sa2VA, tmp_path: Path
) -> None:
    """The masks are identical, and the modules named in full both times, which PEFT shortens on loading."""
    other, processor = load_sa2va(tiny_checkpoint)
    peft_model = attach_lora(other, SCOPES, LoraPreset(3, 6, 0.0, QKVO))
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


# ---- Adapters as PEFT can write them: equal to the weights merged by hand, or refused by name


TARGETS = ["text_hidden_fcs.0", "text_hidden_fcs.2"]
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": TARGETS}
PLAIN["base_model_name_or_path"] = "/gone"
RANKS = {"r": 2, "rank_pattern": {"0": 4, TARGETS[1]: 4}}


def write_adapter(folder: Path, settings: dict | None = None, rename=str, change=lambda n, t: t):
    """Writes an adapter on the two layers from [SEG] to SAM2; returns its matrices by target."""
    folder.mkdir()
    generator, pairs, content = torch.Generator().manual_seed(0), {}, {}
    for target, (rows, columns) in zip(TARGETS, ((48, 48), (32, 48)), strict=True):
        pairs[target] = [torch.randn(shape, generator=generator) for shape in ((4, columns), (rows, 4))]
        for part, tensor in zip("AB", pairs[target], strict=True):
            name = f"base_model.model.{target}.lora_{part}.weight"
            content[rename(name)] = change(name, tensor)
    save_file({name: t for name, t in content.items() if t is not None}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | (settings or {})))
    return pairs


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (2, 2)),
        ({"use_rslora": True}, (4, 4)),
        ({"alpha_pattern": {TARGETS[0]: 32}}, (8, 2)),
        ({"alpha_pattern": {"2": 1.5, TARGETS[1]: 32}}, (2, 0.375)),  # the first key that fits counts
        (RANKS | {"alpha_pattern": {"2": 4}, "use_rslora": True}, (4, 2)),
        ({"init_lora_weights": "gaussian", "corda_config": None, "peft_version": "9"}, (2, 2)),
        ({"qalora_group_size": 16}, (2, 2)),
        ({"a_later_field": True, "bias": "none", "layers_to_transform": None, "loftq_config": {}}, (2, 2)),
    ],
)
def test_settings_of_peft_equal_weights_merged_by_hand(
    model: Sa2VA, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict, scales: tuple
) -> None:
    pairs = write_adapter(tmp_path / "adapter", settings)
    layers = [model.get_submodule(target) for target in TARGETS]
    triples = zip(layers, scales, pairs.values(), strict=True)
    expected = [layer.weight + scale * b @ a for layer, scale, (a, b) in triples]
    merged = lora.load_adapter(model, tmp_path / "adapter").merge_and_unload()
    for target, weight in zip(TARGETS, expected, strict=True):
        torch.testing.assert_close(merged.get_submodule(target).weight, weight, rtol=1e-5, atol=1e-5)
    assert ("are ignored: a_later_field" in caplog.text) == ("a_later_field" in settings)


@pytest.mark.parametrize(
    "rename",
    [lambda n: n.replace(".weight", ".default.weight"), lambda n: f"base_model.model.{n}", lambda n: n[17:]],
)
def test_names_as_other_ways_of_saving_leave_them(tiny_checkpoint: Path, tmp_path: Path, rename) -> None:
    found = []
    for name, given in (("plain", lambda name: name), ("other", rename)):
        write_adapter(tmp_path / name, rename=given)
        adapted = lora.load_adapter(load_sa2va(tiny_checkpoint)[0], tmp_path / name, is_trainable=True)
        found.append(adapter_parameters(adapted))
    assert len(found[0]) == 4
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


REFUSED_SETTINGS = [
    *({"lora_alpha": value} for value in (0, -8, 1e9, float("nan"), float("inf"), "8", True, None)),
    *({"r": value} for value in (0, -1, 10**9, 4.5, "4", float("nan"))),
    *({"lora_dropout": value} for value in (1, -0.1, float("nan"))),
    *({"alpha_pattern": value} for value in ({TARGETS[0]: 0}, {TARGETS[1]: 1e9}, {"text.*": 9}, [9])),
    *({"rank_pattern": value} for value in ({TARGETS[0]: 10**9}, {"(a+)+$": 4}, {r"text_hidden_fcs\.0": 4})),
    *({"init_lora_weights": value} for value in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", ["x"])),
    {"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm"]}, {"layers_to_transform": 0},
    {"fan_in_fan_out": True}, {"exclude_modules": "x"}, {"lora_bias": True}, {"use_rslora": "yes"},
]  # fmt: skip


@pytest.mark.parametrize("settings", REFUSED_SETTINGS, ids=str)
def test_settings_that_are_not_supported_are_refused_by_name(model, tmp_path, settings) -> None:
    write_adapter(tmp_path / "adapter", settings)
    (name,) = settings
    with pytest.raises(CheckpointError, match=rf"adapter_config.json has {name} = "):
        lora.load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("targets", ["(a+)+$", "all-linear", ["(a+)+$"], [3], [["x"]], [], None, {}])
def test_target_modules_are_plain_names(model: Sa2VA, tmp_path: Path, targets: object) -> None:
    write_adapter(tmp_path / "adapter", {"target_modules": targets})
    with pytest.raises(CheckpointError, match="describes no LoRA of vesselrl"):
        lora.load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("message", "settings", "change"),
    [
        ("lora_A.weight holds nan", {}, lambda name, t: t * float("nan")),
        ("lora_A.weight holds values as large as 1e", {}, lambda name, t: torch.full_like(t, 1e38)),
        ("2 tensors missing", {}, lambda name, t: t if ".0." in name else None),
        ("has rank 4, its adapter_config.json says 8", {"r": 8}, lambda name, t: t),
        ("size mismatch for .*lora_B", {}, lambda name, t: t[:7].clone()),
        ("has rank", {}, lambda name, t: torch.tensor(1.0)),
    ],
)
def test_tensors_that_do_not_fit_are_named(model, tmp_path: Path, message, settings, change) -> None:
    write_adapter(tmp_path / "adapter", settings, change=change)
    with pytest.raises(CheckpointError, match=message):
        lora.load_adapter(model, tmp_path / "adapter")


def test_an_adapter_that_changes_nothing_is_said(model: Sa2VA, tmp_path: Path, caplog) -> None:
    write_adapter(tmp_path / "one", change=lambda name, t: t * (".0." in name))
    lora.load_adapter(model, tmp_path / "one")
    assert "changes nothing" not in caplog.text
    write_adapter(tmp_path / "zero", change=lambda name, t: t * ("lora_A" in name))
    lora.load_adapter(model, tmp_path / "zero")
    assert "zero changes nothing: all of its lora_B are 0" in caplog.text


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
