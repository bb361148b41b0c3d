"""The engine is fast and right, caches change no loss, and the embedded miniature can be rebuilt."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import caching, pretrain, scoring
from vesselrl.data.samples import find_samples
from vesselrl.inference.predictor import Predictor
from vesselrl.models.checkpoint import EMBEDDED, read_tensors
from vesselrl.synthetic.dataset import TARGET


def test_the_engine_is_much_faster_than_the_naive_way_and_gives_its_numbers() -> None:
    """Ratios in one process, below the aims of the benchmark: a shared machine must not fail this."""
    result = scoring.measure(512, num_truths=1, preds_per_truth=3, num_rounds=3)
    ratios = {row["name"]: row["ratio"] for row in result["rows"]}
    assert ratios["one thread"] > 8
    assert ratios["HD95 and NSD"] > 4
    assert result["same_numbers"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "numbers equal to the naive way: yes" in scoring.as_table(result)


def test_wrong_numbers_and_missed_aims_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"size": 64, "num_truths": 1, "preds_per_truth": 2, "num_rounds": 1}
    monkeypatch.setattr(scoring, "AIMS", {"one thread": 1e9})
    assert not scoring.measure(**sizes)["passed"]
    monkeypatch.setattr(scoring, "AIMS", {})
    assert scoring.measure(**sizes)["passed"]
    wrong = scoring.VARIANTS["one thread"]
    monkeypatch.setitem(scoring.VARIANTS, "one thread", lambda *m: [s | {"dice": 0.5} for s in wrong(*m)])
    assert not scoring.measure(**sizes)["passed"]


def test_naive_scores_by_hand() -> None:
    """A bar of 3 x 30, predicted to its half and with a ring elsewhere."""
    truth, pred = np.zeros((40, 60), bool), np.zeros((40, 60), bool)
    truth[10:13, 10:40] = pred[10:13, 10:25] = True
    pred[20:27, 20:27] = True
    pred[22:25, 22:25] = False
    scores = scoring.naive_scores(pred, truth)
    assert scores["dice"] == pytest.approx(2 * 45 / (85 + 90))
    assert scores["specificity"] == pytest.approx((2400 - 90 - 40) / (2400 - 90))
    assert (scores["beta0_error"], scores["beta1_error"]) == (1, 1)


def test_losses_are_the_same_to_the_last_bit(tiny_checkpoint: Path, angiograms: Path) -> None:
    result = caching.measure(find_samples(angiograms)[:5], str(tiny_checkpoint), num_rounds=1)
    assert [row["same_losses"] for row in result.values()] == [True, True]


def test_the_shipped_miniature_is_small_documented_and_of_the_published_geometry() -> None:
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}
    card = (EMBEDDED / "README.md").read_text()
    assert hashlib.sha256((EMBEDDED / "model.safetensors").read_bytes()).hexdigest() in card
    assert re.search(r"Rebuilt by: `.*pretrain --output_model FOLDER --num_steps \d+ --seed \d+`", card)
    config = Predictor.from_pretrained(device="cpu").model.config
    assert (config.sam2.image_size, config.tile_px) == (2 * 256, 256 * 448 // 512)


@pytest.mark.slow
def test_the_shipped_miniature_leaves_something_to_learn() -> None:
    """Thin and broken on the target domain; the exact figures are in its model card."""
    predictor = Predictor.from_pretrained(device="cpu")
    scores = pretrain.score_domain(predictor, TARGET, seed=1000).summary["metrics"]
    assert 0.74 <= scores["dice"]["patient_mean"] <= 0.82
    assert 0.69 <= scores["recall"]["patient_mean"] <= 0.79
    assert scores["recall"]["patient_mean"] < scores["precision"]["patient_mean"]


def test_pretraining_repeats_and_writes_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "NUM_THREADS", torch.get_num_threads())
    monkeypatch.setattr(pretrain, "NUM_PATIENTS", 3)
    plan = pretrain.Plan(num_steps=2, batch_size=1, num_patients=2, num_frames=1)
    for name in ("a", "b"):
        pretrain.train_miniature(tmp_path / name, plan)
    first, second = (dict(read_tensors(tmp_path / name)) for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    card = pretrain.write_model_card(tmp_path / "a", plan).read_text()
    assert "'num_steps': 2" in card
    assert "| target | " in card
