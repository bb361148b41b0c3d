"""Official and native tensor names: the published 8B checkpoint on the meta device, and both directions."""

import json
from pathlib import Path

import pytest
import torch

from vesselrl.errors import CheckpointError
from vesselrl.models.checkpoint import is_unused, native_names, native_state, official_names, read_tensors
from vesselrl.models.config import Sa2VAConfig
from vesselrl.models.miniature import random_sa2va
from vesselrl.models.sa2va import Sa2VA

LOST = "text_hidden_fcs.2.bias"
QKV = "vision_model.encoder.layers.0.attn.qkv.weight"
POINT = "grounding_encoder.sam2_model.sam_prompt_encoder.point_embeddings.2.weight"


@pytest.fixture(scope="module")
def table_8b(shared_folder: Path) -> dict:
    return json.loads((shared_folder / "design" / "keymap_internvl3_8b.json").read_text())


@pytest.fixture(scope="module")
def model_8b(config_8b: Sa2VAConfig) -> Sa2VA:
    with torch.device("meta"):
        return Sa2VA(config_8b)


def test_all_names_and_shapes_of_the_8b_checkpoint_load(table_8b: dict, model_8b: Sa2VA) -> None:
    official = {name: torch.empty(row["shape"], device="meta") for name, row in table_8b.items()}
    state = native_state(model_8b, official.items(), torch.bfloat16)  # raises on any mismatch
    assert {name: t.shape for name, t in state.items()} == {
        n: t.shape for n, t in model_8b.state_dict().items()
    }
    assert len(official) == 1589
    assert sum(map(is_unused, official)) == sum(row["native"] is None for row in table_8b.values()) == 157


def test_names_agree_with_the_proven_table(table_8b: dict) -> None:
    for official, row in table_8b.items():
        if row["native"] is None:
            assert is_unused(official), official
        elif row["native"]:  # the table left one name out
            assert sorted(native_names(official)) == sorted(row["native"]), official
        else:
            assert official.endswith("sam_prompt_encoder.not_a_point_embed.weight")


def test_parameter_counts_of_the_8b_model(model_8b: Sa2VA) -> None:
    """Counts of the official model per part; of SAM2 those that single images use."""
    parts = ("vision", "projector", "lm", "text_hidden_fcs", "sam")
    counts = {name: sum(p.numel() for p in getattr(model_8b, name).parameters()) for name in parts}
    expected = (304_012_288, 27_540_480, 7_612_856_832, 13_766_400, 224_430_130 - 7_505_265)
    assert counts == dict(zip(parts, expected, strict=True))


def test_official_names_invert_native_names() -> None:
    for native in random_sa2va().state_dict():
        for official in official_names(native):
            assert native in native_names(official), (native, official)
    assert native_names("optimizer.state") is None
    with pytest.raises(KeyError, match="no official name"):
        official_names("nonsense.weight")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (LOST, None, f"1 missing: {LOST}"),
        (POINT, None, r"1 wrong shape: .*point_embeddings\.0\.weight \(3, 32\)"),
        ("extra.weight", torch.zeros(1), r"1 unknown: extra\.weight"),
        (LOST, torch.zeros(3), r"1 wrong shape: text_hidden_fcs\.2\.bias \(3,\)"),
        (QKV, torch.zeros(9, 32), rf"3 wrong shape: {QKV} \(3, 32\)"),
        (QKV, torch.zeros(2, 32), rf"2 wrong shape: {QKV} \(1, 32\).*; .* \| 1 missing: vision"),
    ],
)
def test_mismatches_are_listed(
    tiny_checkpoint: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    tensors = dict(read_tensors(tiny_checkpoint)) | {name: tensor}
    if tensor is None:
        del tensors[name]
    with pytest.raises(CheckpointError, match=message):
        native_state(random_sa2va(), tensors.items(), torch.float32)
