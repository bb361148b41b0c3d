"""Merging: the copy predicts what base and adapter predict, the base stays, and no half copy remains."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vesselrl.cli import main
from vesselrl.errors import CheckpointError
from vesselrl.inference import merge as merging
from vesselrl.inference.merge import merge
from vesselrl.inference.predictor import Predictor
from vesselrl.models import checkpoint
from vesselrl.scoring.overlap import dice

MEMORY = "grounding_encoder.sam2_model.maskmem_tpos_enc"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.fixture
def base(lively_checkpoint: Path, tmp_path: Path) -> Path:
    """The official layout in full: two shards, an index, SAM2's unused memory; one shard in bfloat16."""
    folder = Path(shutil.copytree(lively_checkpoint, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors") | {MEMORY: torch.arange(7.0).view(7, 1)}
    (folder / "model.safetensors").unlink()
    weight_map = {
        name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        dtype = torch.bfloat16 if file.startswith("model-00002") else torch.float32
        save_file({n: t.to(dtype) for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "LICENSE").write_text("of the model")
    return folder


def test_the_copy_predicts_like_base_and_adapter(
    lively_checkpoint: Path, adapter: Path, images: list[np.ndarray], tmp_path: Path
) -> None:
    done = merge(lively_checkpoint, adapter, tmp_path / "merged")
    assert done["output"] == str(tmp_path / "merged")
    assert done["verified_dice"] >= 0.999
    assert done["max_probability_gap"] < 1e-4
    folders = ((tmp_path / "merged", None), (lively_checkpoint, adapter), (lively_checkpoint, None))
    merged, expected, base = (
        np.concatenate([p.logits.ravel() for p in Predictor.from_pretrained(*f, "cpu").predict_batch(images)])
        for f in folders
    )
    np.testing.assert_allclose(merged, expected, atol=1e-4)
    cut = np.median(expected)  # masks neither empty nor full
    assert dice(base[None] > cut, expected[None] > cut) < 0.98  # the adapter does matter


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_shards_index_and_unused_tensors_are_kept(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(merging, "MIN_DICE", 0.9)  # rounding a random model moves a few pixels
    target, before = tmp_path / "merged", (digests(base), digests(adapter))
    merge(base, adapter, target, dtype)
    assert (digests(base), digests(adapter)) == before  # only read
    merged, original = all_tensors(target), all_tensors(base)
    same = digests(target).items() & before[0].items()
    assert {name for name, _ in same} == {n for n in before[0] if not n.endswith("safetensors")}
    for file in base.glob("*.safetensors"):
        assert load_file(target / file.name).keys() == load_file(file).keys()
    dtypes = {name: t.dtype if dtype == "keep" else torch.bfloat16 for name, t in original.items()}
    assert {name: t.dtype for name, t in merged.items()} == dtypes
    assert torch.equal(merged[MEMORY].float(), original[MEMORY].float())
    changed = {name for name in merged if not torch.equal(merged[name], original[name].to(dtypes[name]))}
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert changed == {name for target in targets for name in checkpoint.official_names(f"{target}.weight")}


# ---- A failure leaves nothing


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """An empty folder for the copy."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def full_disk(tensors: dict, path: Path) -> None:
    save_file(tensors, path)
    if "00002" in path.name:
        raise OSError(28, "No space left on device")


def lost_tensor(tensors: dict, path: Path) -> None:
    save_file({name: tensor for name, tensor in tensors.items() if name != "mlp1.0.weight"}, path)


def inverted_decoder(tensors: dict, path: Path) -> None:
    save_file(
        {name: -t if "hypernetworks" in name and ".2." in name else t for name, t in tensors.items()}, path
    )


@pytest.mark.parametrize(
    ("save", "error", "message"),
    [
        (full_disk, OSError, "No space left"),
        (lost_tensor, CheckpointError, "1 missing"),
        (inverted_decoder, CheckpointError, r"predicts other masks .* was removed"),
    ],
)
def test_a_copy_that_is_not_right_never_appears(
    base: Path, adapter: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, save, error, message: str
) -> None:
    def check_and_save(tensors: dict, path: Path, metadata: dict) -> None:
        assert not (workplace / "merged").exists()
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", check_and_save)
    before = digests(base)
    with pytest.raises(error, match=message):
        merge(base, adapter, workplace / "merged")
    assert list(workplace.iterdir()) == []
    assert digests(base) == before


def test_too_little_room_and_unknown_dtypes_are_refused(
    lively_checkpoint: Path, adapter: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="choose one of keep, float32, bfloat16"):
        merge(lively_checkpoint, adapter, workplace / "merged", "int8")
    usage = shutil.disk_usage(workplace)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CheckpointError, match=r"0\.0 GB free; .* GB are needed"):
        merge(lively_checkpoint, adapter, workplace / "merged")
    assert list(workplace.iterdir()) == []


def test_the_verb_refuses_a_target_that_exists(
    lively_checkpoint: Path, adapter: Path, workplace: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["merge", "--base_model", lively_checkpoint, "--lora_weights", adapter.parent]
    words = [*map(str, words), "--output_model", str(workplace / "merged")]
    assert main(words) == 0
    assert "Dice 1.0000" in capsys.readouterr().out
    before = digests(workplace / "merged")
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {workplace / 'merged'} exists already; choose another --output_model")
    assert digests(workplace / "merged") == before
