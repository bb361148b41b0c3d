"""Killed trainings end as uninterrupted ones; caches and a second process at the same time change nothing."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.kills import RUNS, run_kills
from tests.training.runs import same_weights, train_debug
from tests.training.test_checkpoint import flip
from vesselrl.inference.predictor import Prediction
from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.sa2va import HEAD, LANGUAGE, MASKS
from vesselrl.training import policy as policy_module
from vesselrl.training.policy import MaskPolicy

FROZEN = {
    "stage": "sft+rl", "num_epochs": 2, "learning_rate": 1e-2, "val_freq": 9, "max_val_samples": 1,
    "lora_scope": ["projector", "mask_decoder"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    assert run_kills(list(RUNS), 10, 1, tmp_path) == 0


def test_cold_warm_damaged_and_no_cache_give_the_same_weights(
    angiograms: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, supervised and PPO, with one flipped bit in every cached file.

    A full cache needs no language model; without its part the model has no parameters of it, in any pass.
    """
    sizes, parts, predict = [], [], MaskPolicy.predict

    def load(*given: object, without: tuple[str, ...], **options: object) -> tuple:
        parts.append(without)
        return load_sa2va(*given, without=without, **options)

    def watch(policy: MaskPolicy, image: np.ndarray) -> Prediction:
        names = [n for n, _ in policy.model.named_parameters() if n.startswith(LANGUAGE)]
        sizes.append(len(names) + (policy._language is not None))
        return predict(policy, image)

    monkeypatch.setattr(policy_module, "load_sa2va", load)
    monkeypatch.setattr(MaskPolicy, "predict", watch)

    def train(**changes: object) -> Path:
        return train_debug(tmp_path, **FROZEN | {"data_root": angiograms} | changes).folder / "final_lora"

    rng, cold = random.Random(0), train()
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    # Features of 4 training, 1 validation and 2 test images; their states, and that of a negative.
    assert len(files) == 7 + 8
    assert parts == [LANGUAGE, MASKS + HEAD]
    assert same_weights(train(), cold)  # warm
    assert parts[2:] == [LANGUAGE]
    assert set(sizes) == {0}
    assert same_weights(train(cache_gb=0), cold)
    for file in files:
        flip(file, rng)
    assert same_weights(train(), cold)
    assert caplog.text.count("computed again") == 7 + 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_new_runs_at_once_share_data_and_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vesselrl", "train", "--preset", "debug", "--output_dir", str(tmp_path)]
    command += "--lora_scope projector mask_decoder --stage sft --learning_rate 0.01".split()
    both = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    one, other = tmp_path.glob("sa2va_lora_ppo_*")
    assert same_weights(one / "final_lora", other / "final_lora")
    assert len([*(tmp_path / "data").iterdir()]) == 1
