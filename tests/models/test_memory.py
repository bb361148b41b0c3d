"""What a training takes, from shapes alone, against what the model keeps; the language model in four bits."""

import json
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from benchmarks.memory import anonymous_bytes
from tests.models.conftest import LLM_8B, VISION_8B
from vesselrl.cli import main
from vesselrl.errors import RefusedError
from vesselrl.experiment.config import ModelSettings, TrainConfig
from vesselrl.models.checkpoint import EMBEDDED, return_freed_memory
from vesselrl.models.config import Sa2VAConfig, Sam2Dimensions, read_config
from vesselrl.models.lora import SCOPES, LoraPreset, attach_lora
from vesselrl.models.memory import activation_bytes, memory_budget, to_nf4
from vesselrl.models.miniature import random_sa2va
from vesselrl.models.sa2va import LANGUAGE, Sa2VA

CONFIG_8B = Sa2VAConfig(VISION_8B, LLM_8B, Sam2Dimensions())


@pytest.mark.parametrize("recomputing", [False, True])
def test_activations_are_those_that_the_image_encoder_keeps(recomputing: bool) -> None:
    """Counted on the meta device; while recomputing, one block's inside comes to what is counted."""
    config = read_config(EMBEDDED)
    config = replace(config, sam2=replace(config.sam2, image_size=256))
    with torch.device("meta"):
        model = Sa2VA(config)
        model.leave_out(LANGUAGE)
        attach_lora(model, ["image_encoder"], LoraPreset(4, 8, 0.0, ()))
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, tuple[int, object]] = {}
        if recomputing:
            model.recompute_blocks()

        def count(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes(), storage
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model.encode_image(torch.empty(1, 3, 256, 256))
    found = sum(size for size, _ in kept.values())
    estimate = activation_bytes(config.sam2, recomputing)
    assert found == pytest.approx(estimate, rel=0.2) if not recomputing else found < estimate


def test_the_budget_of_the_8b_counts_what_its_files_hold() -> None:
    """As counted in its files: 304 M vision, 27.5 M mlp1, 7.61 B language, 13.8 M text_hidden_fcs."""
    budget = memory_budget(CONFIG_8B, ModelSettings.lora_scope)
    count = {name: part["parameters"] for name, part in budget["components"].items()}
    assert (count["vision tower"], count["image projector"]) == (304_012_288, 27_540_480)
    assert count["language model"] + count["lm_head"] == 7_612_856_832
    assert count["prompt projection"] == 13_766_400
    assert sum(budget["trained_values"].values()) == 15_353_440
    half = budget["options"]["bfloat16"]
    assert 14.8 < half["states"] < 18  # the language model, lm_head apart, beside SAM2
    assert (half["fits_24_gb"], budget["options"]["float32"]["fits_24_gb"]) == (True, False)
    assert half["recomputing"] < 5 < 15 < half["training"]
    assert "nf4" not in budget["options"]
    scope = memory_budget(CONFIG_8B, SCOPES)["options"]
    assert scope["nf4"]["recomputing"] < 10 < 18 < scope["bfloat16"]["recomputing"]
    assert scope["float32"]["recomputing"] > 24


def test_doctor_prints_the_budget_as_json(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    scope = ["--lora_scope", "projector", "mask_decoder"]
    main(["doctor", "--model_path", str(tiny_checkpoint), "--output_dir", str(tmp_path), "--json", *scope])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert list(checks["memory"]["numbers"]["trained_values"]) == ["projector", "mask_decoder"]
    assert "24 GB suffice" in checks["memory"]["detail"]


def test_four_bits_need_their_package_and_a_language_model_in_the_scope(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(RefusedError, match=r"pip install 'vesselrl\[nf4\]'"):
        to_nf4(random_sa2va())
    with pytest.raises(ValueError, match="--use_nf4 is for a language model in the scope"):
        TrainConfig().with_(use_nf4=True)


def growth_by_freed_blocks() -> int:
    """Bytes that are left of 50 freed blocks of 8 MB, which small ones that live on lie between."""
    for _ in range(2):
        torch.ones(7_500_000)  # 30 MB; once it is freed, glibc takes smaller blocks from its heap
    return_freed_memory()
    before = anonymous_bytes()
    blocks = [torch.ones(size) for size in 50 * (2_000_000, 20_000)]
    del blocks[::2]
    return anonymous_bytes() - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has the setting")
def test_freed_memory_goes_back_to_the_system() -> None:
    with get_context("fork").Pool(1) as pool:  # the setting stays for the whole process
        assert pool.apply(growth_by_freed_blocks) < 50e6
