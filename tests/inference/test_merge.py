"""Merging: the copy predicts what base and adapter predict, the base stays, and no half copy remains."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vesselrl.errors import CheckpointError, RefusedError, RunError
from vesselrl.inference import merge as merging
from vesselrl.inference.merge import merge
from vesselrl.inference.predictor import Predictor
from vesselrl.models import checkpoint
from vesselrl.scoring.overlap import dice

MEMORY = "grounding_encoder.sam2_model.maskmem_tpos_enc"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def base(lively_checkpoint: Path, tmp_path: Path) -> Path:
    """The official layout in full: two shards, an index, SAM2's unused memory; one shard in bfloat16."""
    folder = Path(shutil.copytree(lively_checkpoint, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors") | {MEMORY: torch.arange(7.0).view(7, 1)}
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    weight_map = {name: shards[k % 2] for k, name in enumerate(sorted(tensors))}
    for file, dtype in zip(shards, (torch.float32, torch.bfloat16), strict=True):
        save_file({n: t.to(dtype) for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "LICENSE").write_text("of the model")
    return folder


@pytest.mark.parametrize(("dtype", "tolerance"), [("keep", 5e-2), ("float32", 1e-4), ("bfloat16", 1e-1)])
def test_the_copy_predicts_like_base_and_adapter_and_keeps_all_else(
    base: Path, adapter: Path, images: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype, tolerance
) -> None:
    if dtype != "float32":
        monkeypatch.setattr(merging, "MIN_DICE", 0.9)  # rounding a random model moves a few pixels
    target, before = tmp_path / "merged", (digests(base), digests(adapter))
    done = merge(base, adapter, target, dtype)
    assert done["output"] == str(target)
    assert done["verified_dice"] >= merging.MIN_DICE
    assert done["max_probability_gap"] < tolerance
    assert (digests(base), digests(adapter)) == before  # only read
    models = [Predictor.from_pretrained(*f, "cpu") for f in ((target, None), (base, adapter), (base, None))]
    results = [model.predict_batch(images) for model in models]
    merged, expected, alone = (np.concatenate([one.logits.ravel() for one in each]) for each in results)
    np.testing.assert_allclose(merged, expected, atol=tolerance)
    cut = np.median(expected)  # masks neither empty nor full
    assert dice(alone[None] > cut, expected[None] > cut) < 0.98  # the adapter does matter
    same = digests(target).items() & before[0].items()
    assert {name for name, _ in same} == {n for n in before[0] if not n.endswith("safetensors")}
    tensors, original = {}, {}
    for file in base.glob("*.safetensors"):
        mine, theirs = load_file(target / file.name), load_file(file)
        assert mine.keys() == theirs.keys()
        tensors, original = tensors | mine, original | theirs
    dtypes = {name: t.dtype if dtype == "keep" else getattr(torch, dtype) for name, t in original.items()}
    assert {name: t.dtype for name, t in tensors.items()} == dtypes
    assert torch.equal(tensors[MEMORY].float(), original[MEMORY].float())
    changed = {name for name in tensors if not torch.equal(tensors[name], original[name].to(dtypes[name]))}
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    officials = models[0].model.keys.officials
    assert changed == {name for target in targets for name in officials(f"{target}.weight")}
    lora = load_file(adapter / "adapter_model.safetensors")
    for target in targets:  # base + alpha / r B A by hand, within one rounding
        a, b = (lora[f"base_model.model.{target}.lora_{part}.weight"] for part in "AB")
        (name,) = officials(f"{target}.weight")
        if a.ndim == 2:
            exact, bits = original[name].float() + 2 * b @ a, 18 if dtypes[name] == torch.float32 else 7
            torch.testing.assert_close(tensors[name].float(), exact, rtol=2.0**-bits, atol=1e-6)


FAULTS = {
    "full disk": "No space left",
    "lost tensor": "1 missing",
    "inverted decoder": r"predicts other masks .* was removed",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_copy_that_is_not_right_never_appears(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    workplace = tmp_path / "work"
    workplace.mkdir()

    def check_and_save(tensors: dict, path: Path, metadata: dict) -> None:
        assert not (workplace / "merged").exists()
        if fault == "lost tensor":
            tensors.pop("mlp1.0.weight", None)
        if fault == "inverted decoder":
            inverted = {name: -t for name, t in tensors.items() if "hypernetworks" in name and ".2." in name}
            tensors = tensors | inverted
        save_file(tensors, path)
        if fault == "full disk" and "00002" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", check_and_save)
    before = digests(base)
    with pytest.raises((OSError, CheckpointError, RunError), match=FAULTS[fault]):
        merge(base, adapter, workplace / "merged")
    assert list(workplace.iterdir()) == []
    assert digests(base) == before


def test_probabilities_prove_a_copy_as_well_as_masks(
    lively_checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_changed(tensors: dict, path: Path, metadata: dict) -> None:
        save_file({n: 1.5 * t if n == "text_hidden_fcs.2.weight" else t for n, t in tensors.items()}, path)

    monkeypatch.setattr(merging, "MIN_DICE", 0)
    monkeypatch.setattr(checkpoint, "save_file", save_changed)
    with pytest.raises(RunError, match=r"probabilities 0\.0\d+ apart, at most 0\.0003"):
        merge(lively_checkpoint, adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_empty", [0, 7, 8])
def test_pictures_in_which_vessel_is_found_are_searched(
    lively_checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_empty: int
) -> None:
    """Of 8 pictures vessel is found in all but the first ones; two are compared, or the one there is."""
    predict, masks = Predictor.predict, []

    def predict_late(self: Predictor, image: np.ndarray) -> object:
        masks.append(np.full(image.shape[:2], len(masks) >= num_empty))
        return predict(self, image)._replace(mask=masks[-1])

    monkeypatch.setattr(Predictor, "predict", predict_late)
    if num_empty == 8:  # two empty masks are no proof
        with pytest.raises(CheckpointError, match="find no vessel in 8 test pictures: nothing would prove"):
            merge(lively_checkpoint, adapter, tmp_path / "merged")
        assert list(tmp_path.iterdir()) == []
    else:
        assert merge(lively_checkpoint, adapter, tmp_path / "merged")["verified_dice"] == 1
        num_compared = min(2, 8 - num_empty)
        assert sum(mask.all() for mask in masks) == 2 * num_compared


def test_too_little_room_unknown_dtypes_and_what_exists_are_refused(
    lively_checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    for name, dtype, message in (
        ("merged", "int8", "choose one of keep, float32, bfloat16"),
        ("merged", "keep", r"has 0 MB free; .* are needed for the merged copy"),
        (".", "keep", "exists already; choose another --output_model"),
    ):
        with pytest.raises((CheckpointError, RefusedError), match=message):
            merge(lively_checkpoint, adapter, tmp_path / name, dtype)
        assert list(tmp_path.iterdir()) == []
