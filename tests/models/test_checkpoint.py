"""Official and native tensor names: the published 8B checkpoint on the meta device, and both directions."""

import json
from pathlib import Path

import pytest
import torch

from vesselrl.errors import CheckpointError
from vesselrl.models.checkpoint import is_unused, native_names, native_state, official_names, read_tensors
from vesselrl.models.miniature import random_sa2va
from vesselrl.models.sa2va import Sa2VA

LOST = "text_hidden_fcs.2.bias"
QKV = "vision_model.encoder.layers.0.attn.qkv.weight"
POINT = "grounding_encoder.sam2_model.sam_prompt_encoder.point_embeddings.2.weight"


def test_all_names_and_shapes_of_the_8b_checkpoint(shared_folder: Path, model_8b: Sa2VA) -> None:
    table = json.loads((shared_folder / "design" / "keymap_internvl3_8b.json").read_text())
    official = {name: torch.empty(row["shape"], device="meta") for name, row in table.items()}
    state = native_state(model_8b, official.items(), torch.bfloat16)  # raises on any mismatch
    shapes = {name: tensor.shape for name, tensor in model_8b.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == shapes
    assert len(official) == 1589
    assert sum(map(is_unused, official)) == sum(row["native"] is None for row in table.values()) == 157
    for name, row in table.items():
        if row["native"] is None:
            assert is_unused(name), name
        elif row["native"]:  # the table left one name out
            assert sorted(native_names(name)) == sorted(row["native"]), name
        else:
            assert name.endswith("sam_prompt_encoder.not_a_point_embed.weight")


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


MISMATCHES = [
    (LOST, None, f"1 missing: {LOST}"),
    (POINT, None, r"1 wrong shape: .*point_embeddings\.0\.weight \(3, 32\)"),
    ("extra.weight", torch.zeros(1), r"1 unknown: extra\.weight"),
    (LOST, torch.zeros(3), r"1 wrong shape: text_hidden_fcs\.2\.bias \(3,\)"),
    (QKV, torch.zeros(9, 32), rf"3 wrong shape: {QKV} \(3, 32\)"),
    (QKV, torch.zeros(2, 32), rf"2 wrong shape: {QKV} \(1, 32\).*; .* \| 1 missing: vision"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), MISMATCHES)
def test_mismatches_are_listed(tiny_checkpoint: Path, name: str, tensor: object, message: str) -> None:
    tensors = dict(read_tensors(tiny_checkpoint)) | {name: tensor}
    given = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    with pytest.raises(CheckpointError, match=message):
        native_state(random_sa2va(), given, torch.float32)
