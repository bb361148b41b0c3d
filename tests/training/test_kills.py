"""Killed trainings end as uninterrupted ones, and caches change nothing."""

import random
from pathlib import Path

import pytest

from tests.kills import RUNS, run_kills
from tests.training.runs import same_weights, train_debug
from tests.training.test_checkpoint import flip

FROZEN = {
    "stage": "sft+rl", "num_epochs": 2, "learning_rate": 1e-2, "val_freq": 9, "max_val_samples": 1,
    "lora_scope": ["projector", "mask_decoder"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    assert run_kills(list(RUNS), 10, 1, tmp_path) == 0


def test_cold_warm_damaged_and_no_cache_give_the_same_weights(
    angiograms: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To the last bit, supervised and PPO, with one flipped bit in every cached file."""

    def train(**changes: object) -> Path:
        return train_debug(tmp_path, **FROZEN | {"data_root": angiograms} | changes).folder / "final_lora"

    rng, cold = random.Random(0), train()
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 4
    assert same_weights(train(), cold)  # warm
    assert same_weights(train(cache_gb=0), cold)
    for file in files:
        flip(file, rng)
    assert same_weights(train(), cold)
    assert caplog.text.count("computed again") == 4
