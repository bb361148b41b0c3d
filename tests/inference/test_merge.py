"""Merging: the copy predicts what base and adapter predict, the base stays, and no half copy remains."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
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
    shards = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    weight_map = {name: shards[k % 2] for k, name in enumerate(sorted(tensors))}
    for file, dtype in zip(shards, (torch.float32, torch.bfloat16), strict=True):
        save_file({n: t.to(dtype) for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
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
    folders = (target, None), (base, adapter), (base, None)
    merged, expected, alone = (
        np.concatenate([p.logits.ravel() for p in Predictor.from_pretrained(*f, "cpu").predict_batch(images)])
        for f in folders
    )
    np.testing.assert_allclose(merged, expected, atol=tolerance)
    cut = np.median(expected)  # masks neither empty nor full
    assert dice(alone[None] > cut, expected[None] > cut) < 0.98  # the adapter does matter
    tensors, original = all_tensors(target), all_tensors(base)
    same = digests(target).items() & before[0].items()
    assert {name for name, _ in same} == {n for n in before[0] if not n.endswith("safetensors")}
    for file in base.glob("*.safetensors"):
        assert load_file(target / file.name).keys() == load_file(file).keys()
    dtypes = {name: t.dtype if dtype == "keep" else getattr(torch, dtype) for name, t in original.items()}
    assert {name: t.dtype for name, t in tensors.items()} == dtypes
    assert torch.equal(tensors[MEMORY].float(), original[MEMORY].float())
    changed = {name for name in tensors if not torch.equal(tensors[name], original[name].to(dtypes[name]))}
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert changed == {name for target in targets for name in checkpoint.official_names(f"{target}.weight")}


# ---- A failure leaves nothing


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """An empty folder for the copy."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def change_decoder(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return -tensor if "hypernetworks" in name and ".2." in name else tensor


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("full disk", OSError, "No space left"),
        ("lost tensor", CheckpointError, "1 missing"),
        ("inverted decoder", CheckpointError, r"predicts other masks .* was removed"),
    ],
)
def test_a_copy_that_is_not_right_never_appears(
    base: Path, adapter: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, fault, error, message: str
) -> None:
    def check_and_save(tensors: dict, path: Path, metadata: dict) -> None:
        assert not (workplace / "merged").exists()
        if fault == "lost tensor":
            tensors.pop("mlp1.0.weight", None)
        if fault == "inverted decoder":
            tensors = {name: change_decoder(name, tensor) for name, tensor in tensors.items()}
        save_file(tensors, path)
        if fault == "full disk" and "00002" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", check_and_save)
    before = digests(base)
    with pytest.raises(error, match=message):
        merge(base, adapter, workplace / "merged")
    assert list(workplace.iterdir()) == []
    assert digests(base) == before


def test_probabilities_prove_a_copy_as_well_as_masks(
    lively_checkpoint: Path, adapter: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_changed(tensors: dict, path: Path, metadata: dict) -> None:
        save_file({n: 1.5 * t if n == "text_hidden_fcs.2.weight" else t for n, t in tensors.items()}, path)

    monkeypatch.setattr(merging, "MIN_DICE", 0)
    monkeypatch.setattr(checkpoint, "save_file", save_changed)
    with pytest.raises(CheckpointError, match=r"probabilities 0\.0\d+ apart, at most 0\.0003"):
        merge(lively_checkpoint, adapter, workplace / "merged")
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize("num_empty", [0, 7, 8])
def test_pictures_in_which_vessel_is_found_are_searched(
    lively_checkpoint: Path, adapter: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, num_empty: int
) -> None:
    """Of 8 pictures vessel is found in all but the first ones; two are compared, or the one there is."""
    predict, masks = Predictor.predict, []

    def predict_late(self: Predictor, image: np.ndarray) -> object:
        masks.append(np.full(image.shape[:2], len(masks) >= num_empty))
        return predict(self, image)._replace(mask=masks[-1])

    monkeypatch.setattr(Predictor, "predict", predict_late)
    if num_empty == 8:  # two empty masks are no proof
        with pytest.raises(CheckpointError, match="find no vessel in 8 test pictures: nothing would prove"):
            merge(lively_checkpoint, adapter, workplace / "merged")
        assert list(workplace.iterdir()) == []
    else:
        assert merge(lively_checkpoint, adapter, workplace / "merged")["verified_dice"] == 1
        num_compared = min(2, 8 - num_empty)
        assert sum(mask.all() for mask in masks) == 2 * num_compared


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


def test_the_verbs_merge_and_predict(
    lively_checkpoint: Path, adapter: Path, workplace: Path, capsys: pytest.CaptureFixture
) -> None:
    image, merged, out = (str(workplace / name) for name in ("001.png", "merged", "out"))
    Image.fromarray(np.zeros((40, 72, 3), np.uint8)).save(image)
    words = ["--base_model", str(lively_checkpoint), "--lora_weights", str(adapter.parent)]
    assert main(["merge", *words, "--output_model", merged]) == 0
    assert "Dice 1.0000" in capsys.readouterr().out
    before = digests(workplace / "merged")
    assert main(["merge", *words, "--output_model", merged]) == 1
    message = f"error: {merged} exists already; choose another --output_model"
    assert capsys.readouterr().err.startswith(message)
    assert digests(workplace / "merged") == before
    assert main(["predict", *words, "--output_dir", out, "--image", image]) == 0
    assert f"1 images written to {out}" in capsys.readouterr().out.replace("\n", "")
