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
from vesselrl.inference import merging
from vesselrl.inference.merging import merge
from vesselrl.inference.predictor import Prediction, Predictor
from vesselrl.models import export
from vesselrl.scoring.metrics import dice

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
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        if "00002" in file:
            part = {name: tensor.bfloat16() for name, tensor in part.items()}
        save_file(part, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "LICENSE").write_text("of the model")
    return folder


def predict(base: Path, adapter: Path | None, images: list[np.ndarray]) -> list[Prediction]:
    return Predictor.from_pretrained(base, adapter, "cpu").predict_batch(images)


@pytest.fixture
def balanced(lively_checkpoint: Path, adapter: Path, images: list[np.ndarray]) -> float:
    """A threshold through the adapted model's logits, so that masks are neither empty nor full."""
    logits = np.concatenate([p.logits.ravel() for p in predict(lively_checkpoint, adapter, images)])
    return float(np.median(logits))


def test_the_copy_predicts_like_base_and_adapter(
    lively_checkpoint: Path, adapter: Path, images: list[np.ndarray], balanced: float, tmp_path: Path
) -> None:
    done = merge(lively_checkpoint, adapter, tmp_path / "merged")
    assert done["output"] == str(tmp_path / "merged")
    assert done["verified_dice"] >= 0.999
    assert done["max_probability_gap"] < 1e-4
    expected = predict(lively_checkpoint, adapter, images)
    untouched = predict(lively_checkpoint, None, images)
    for one, other, plain in zip(
        predict(tmp_path / "merged", None, images), expected, untouched, strict=True
    ):
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
        assert dice(one.logits > balanced, other.logits > balanced) >= 0.999
        assert dice(one.logits > balanced, plain.logits > balanced) < 0.98  # the adapter does matter
    assert digests(tmp_path / "merged").keys() == digests(lively_checkpoint).keys()


def test_the_base_is_only_read(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = digests(base), digests(adapter)
    merge(base, adapter, tmp_path / "merged", "float32")
    assert (digests(base), digests(adapter)) == before


def test_shards_index_and_unused_tensors_are_kept(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "merged")
    merged, original = all_tensors(tmp_path / "merged"), all_tensors(base)
    assert digests(tmp_path / "merged").keys() == digests(base).keys()
    for name in ("model.safetensors.index.json", "vocab.json", "LICENSE", "sam2_config.json"):
        assert digests(tmp_path / "merged")[name] == digests(base)[name]
    for file in base.glob("*.safetensors"):
        assert load_file(tmp_path / "merged" / file.name).keys() == load_file(file).keys()
    assert {name: t.dtype for name, t in merged.items()} == {name: t.dtype for name, t in original.items()}
    assert torch.equal(merged[MEMORY], original[MEMORY])
    changed = {name for name in merged if not torch.equal(merged[name], original[name])}
    assert changed == adapted_names(adapter)


def adapted_names(adapter: Path) -> set[str]:
    """Official weights that the adapter's modules are stored in."""
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    return {official for target in targets for official in export.official_names(f"{target}.weight")}


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_one_dtype_for_all(
    lively_checkpoint: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(merging, "MIN_DICE", 0.9)  # rounding a random model to bfloat16 moves a few pixels
    merge(lively_checkpoint, adapter, tmp_path / "merged", dtype)
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "merged").values()} == {expected}


# ---- What goes wrong leaves nothing


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """An empty folder for the copy."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_a_target_that_exists_is_refused(lively_checkpoint: Path, adapter: Path, workplace: Path) -> None:
    (workplace / "merged").mkdir()
    (workplace / "merged" / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match="merged exists already; choose another --output_model"):
        merge(lively_checkpoint, adapter, workplace / "merged")
    assert [path.name for path in workplace.rglob("*")] == ["merged", "mine.txt"]


def test_a_copy_that_fails_half_way_is_removed(
    base: Path, adapter: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second shard."""
    seen = []

    def save(tensors: dict, path: Path, metadata: dict) -> None:
        seen.append(sorted(p.name for p in workplace.iterdir()))
        if len(seen) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(export, "save_file", save)
    before = digests(base)
    with pytest.raises(OSError, match="No space left"):
        merge(base, adapter, workplace / "merged")
    assert seen == [["merged.partial"], ["merged.partial"]]  # never under the final name
    assert list(workplace.iterdir()) == []
    assert digests(base) == before


def test_a_copy_that_predicts_otherwise_is_removed(
    lively_checkpoint: Path, adapter: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "merge_adapter", lambda adapted: zero_decoder(adapted.unload()))
    with pytest.raises(CheckpointError, match=r"predicts other masks .* was removed"):
        merge(lively_checkpoint, adapter, workplace / "merged")
    assert list(workplace.iterdir()) == []


def zero_decoder(model: torch.nn.Module) -> torch.nn.Module:
    for mlp in model.sam.mask_decoder.output_hypernetworks_mlps:
        mlp.proj_out.weight.data.neg_()
        mlp.proj_out.bias.data.neg_()
    return model


def test_a_copy_that_cannot_be_read_back_is_removed(
    lively_checkpoint: Path, adapter: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = export.save_tensors

    def save_less(tensors: dict, path: Path) -> None:
        save({name: tensor for name, tensor in tensors.items() if name != "mlp1.0.weight"}, path)

    monkeypatch.setattr(export, "save_tensors", save_less)
    with pytest.raises(CheckpointError, match="1 missing"):
        merge(lively_checkpoint, adapter, workplace / "merged")
    assert list(workplace.iterdir()) == []


def test_too_little_room_is_said_before_copying(
    lively_checkpoint: Path, adapter: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(workplace)._replace(free=1000)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CheckpointError, match=r"0\.0 GB free; .* GB are needed"):
        merge(lively_checkpoint, adapter, workplace / "merged")
    assert list(workplace.iterdir()) == []


def test_an_unknown_dtype_is_refused(lively_checkpoint: Path, adapter: Path, workplace: Path) -> None:
    with pytest.raises(CheckpointError, match="choose one of keep, float32, bfloat16"):
        merge(lively_checkpoint, adapter, workplace / "merged", "int8")


def test_the_verb(
    lively_checkpoint: Path, adapter: Path, workplace: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["merge", "--base_model", lively_checkpoint, "--lora_weights", adapter.parent]
    words += ["--output_model", workplace / "merged"]
    assert main(list(map(str, words))) == 0
    assert "Dice 1.0000" in capsys.readouterr().out
    assert main(list(map(str, words))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {workplace / 'merged'} exists already")
