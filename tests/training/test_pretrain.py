"""The embedded miniature: what is shipped, and that the command which made it works."""

import hashlib
import re
from pathlib import Path

import pytest
import torch

from vesselrl.data.synthetic import TARGET
from vesselrl.inference.predictor import Predictor
from vesselrl.models.loading import EMBEDDED, read_tensors
from vesselrl.training import model_card
from vesselrl.training.model_card import score_domain, write_model_card
from vesselrl.training.pretrain import PretrainPlan, pretrain_miniature

SHORT = PretrainPlan(num_steps=2, batch_size=1, num_patients=2, num_frames=1)


@pytest.fixture
def threads():
    """Pre-training sets one thread; put back what the other tests use."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_shipped_miniature_is_small_and_documented() -> None:
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}
    card = (EMBEDDED / "README.md").read_text()
    digest = hashlib.sha256((EMBEDDED / "model.safetensors").read_bytes()).hexdigest()
    assert f"sha256 of model.safetensors: `{digest}`" in card
    assert re.search(
        r"Rebuilt by: `vesselrl pretrain --output_model FOLDER --num_steps \d+ --seed \d+`", card
    )


def test_the_shipped_miniature_keeps_the_users_geometry() -> None:
    """SAM input twice the image side, mask grid half of it, one tile; the user has 512 -> 1024, 256, 1."""
    predictor = Predictor.from_pretrained(device="cpu")
    config = predictor.model.config
    assert config.sam2.image_size == 2 * 256
    assert config.sam2.image_size // 4 == 256 // 2
    assert config.tile_px / 256 == 448 / 512


def test_the_shipped_miniature_starts_where_the_user_does(threads) -> None:
    """Thin and broken on the target domain; the exact figures are in its model card."""
    predictor = Predictor.from_pretrained(device="cpu")
    scores = score_domain(predictor, TARGET, seed=1000).summary["metrics"]
    assert 0.74 <= scores["dice"]["patient_mean"] <= 0.82
    assert 0.69 <= scores["recall"]["patient_mean"] <= 0.79
    assert scores["recall"]["patient_mean"] < scores["precision"]["patient_mean"]


def test_pretraining_repeats_and_writes_a_whole_checkpoint(tmp_path: Path, threads, monkeypatch) -> None:
    for name in ("a", "b"):
        pretrain_miniature(tmp_path / name, SHORT)
    first, second = (dict(read_tensors(tmp_path / name)) for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    monkeypatch.setattr(model_card, "NUM_PATIENTS", 3)
    card = write_model_card(tmp_path / "a", SHORT).read_text()
    assert "'num_steps': 2" in card
    assert "| target | " in card
