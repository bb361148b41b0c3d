"""Official and native tensor names: the user's 8B checkpoint on the meta device, and both directions."""

import json
from pathlib import Path

import pytest
import torch

from vesselrl.errors import CheckpointError
from vesselrl.models.config import Sa2VAConfig
from vesselrl.models.keymap import is_unused, native_names, official_names
from vesselrl.models.loading import native_state
from vesselrl.models.miniature import DEBUG_SAM2, miniature_config, random_sa2va
from vesselrl.models.sa2va import Sa2VA


@pytest.fixture(scope="module")
def table_8b(shared_folder: Path) -> dict:
    return json.loads((shared_folder / "design" / "keymap_internvl3_8b.json").read_text())


@pytest.fixture(scope="module")
def model_8b(config_8b: Sa2VAConfig) -> Sa2VA:
    with torch.device("meta"):
        return Sa2VA(config_8b)


def test_all_names_and_shapes_of_the_8b_checkpoint_load(table_8b: dict, model_8b: Sa2VA, capsys) -> None:
    official = {name: torch.empty(row["shape"], device="meta") for name, row in table_8b.items()}
    state = native_state(model_8b, official.items(), torch.bfloat16)  # raises on any mismatch
    expected = model_8b.state_dict()
    assert set(state) == set(expected)
    assert all(state[name].shape == expected[name].shape for name in expected)
    unused = [name for name in official if is_unused(name)]
    with capsys.disabled():
        print(
            f"\n{len(official)} official tensors, {len(unused)} unused: "
            "0 missing, 0 unexpected, 0 wrong shapes"
        )
    assert len(official) == 1589
    assert len(unused) == sum(row["native"] is None for row in table_8b.values())


def test_names_agree_with_the_proven_table(table_8b: dict) -> None:
    for official, row in table_8b.items():
        if row["native"] is None:
            assert is_unused(official), official
            continue
        if not row["native"]:  # the table left this one name out
            assert official.endswith("sam_prompt_encoder.not_a_point_embed.weight")
            continue
        assert sorted(native_names(official)) == sorted(row["native"]), official


def test_parameter_counts_of_the_8b_model(model_8b: Sa2VA) -> None:
    """Counts of the official model per part; of SAM2 those that single images use."""
    counts = {
        name: sum(p.numel() for p in getattr(model_8b, name).parameters())
        for name in ("vision", "projector", "lm", "text_hidden_fcs", "sam")
    }
    assert counts["vision"] == 304_012_288
    assert counts["projector"] == 27_540_480
    assert counts["lm"] == 7_612_856_832
    assert counts["text_hidden_fcs"] == 13_766_400
    assert counts["sam"] == 224_430_130 - 7_505_265


def test_official_names_invert_native_names() -> None:
    for native in random_sa2va(miniature_config(DEBUG_SAM2)).state_dict():
        for official in official_names(native):
            assert native in native_names(official), (native, official)


def test_unknown_names() -> None:
    assert native_names("optimizer.state") is None
    with pytest.raises(KeyError, match="no official name"):
        official_names("nonsense.weight")


def test_mismatches_are_listed(tiny_checkpoint: Path) -> None:
    from vesselrl.models.loading import read_tensors

    model = random_sa2va(miniature_config(DEBUG_SAM2))
    tensors = dict(read_tensors(tiny_checkpoint))
    lost = "text_hidden_fcs.2.bias"
    with pytest.raises(CheckpointError, match=f"1 missing: {lost}"):
        native_state(model, {k: v for k, v in tensors.items() if k != lost}.items(), torch.float32)
    with pytest.raises(CheckpointError, match=r"1 unknown: extra\.weight"):
        native_state(model, (tensors | {"extra.weight": torch.zeros(1)}).items(), torch.float32)
    with pytest.raises(CheckpointError, match=r"1 wrong shape: text_hidden_fcs\.2\.bias \(3,\)"):
        native_state(model, (tensors | {lost: torch.zeros(3)}).items(), torch.float32)
