"""The engine is fast and right, caches change no loss, and the embedded miniature can be rebuilt."""

import hashlib
from pathlib import Path

import pytest
import torch

from benchmarks import caching, pretrain, scoring
from vesselrl.data.samples import find_samples
from vesselrl.models.checkpoint import EMBEDDED, read_tensors


def test_the_engine_is_much_faster_than_the_naive_way_and_gives_its_numbers() -> None:
    """Ratios in one process, below the aims of the benchmark: a shared machine must not fail this."""
    result = scoring.measure(512, num_truths=1, preds_per_truth=3, num_rounds=3)
    ratios = {row["name"]: row["ratio"] for row in result["rows"]}
    assert ratios["one thread"] > 8
    assert ratios["HD95 and NSD"] > 4
    assert result["same_numbers"]


@pytest.mark.parametrize("scope", caching.SCOPES.values())
def test_losses_are_the_same_to_the_last_bit(tiny_checkpoint: Path, angiograms: Path, scope: tuple) -> None:
    assert caching.measure(find_samples(angiograms)[:3], scope, 1, str(tiny_checkpoint))["same_losses"]


def test_the_shipped_miniature_is_small_and_documented() -> None:
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}
    digest = hashlib.sha256((EMBEDDED / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (EMBEDDED / "README.md").read_text()


def test_pretraining_writes_a_checkpoint_with_a_card(tmp_path: Path, monkeypatch) -> None:
    small = {"NUM_THREADS": torch.get_num_threads(), "UNSEEN_PATIENTS": range(2001, 2003)}
    for name, value in (small | {"BATCH_SIZE": 1, "NUM_PATIENTS": 1, "NUM_FRAMES": 1}).items():
        monkeypatch.setattr(pretrain, name, value)
    assert pretrain.pretrain(str(tmp_path), num_steps=1) == 0
    assert {name for name, _ in read_tensors(tmp_path)} == {name for name, _ in read_tensors(EMBEDDED)}
    assert "--num_steps 1 --seed 0" in (tmp_path / "README.md").read_text()
