"""Killed trainings end as uninterrupted ones; caches and a second process at the same time change nothing."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kills import RUNS, run_kills
from vesselrl.experiment.config import get_preset
from vesselrl.training import train as training

FROZEN = {
    "stage": "sft+rl", "num_epochs": 2, "learning_rate": 1e-2, "val_freq": 2,
    "lora_scope": ["projector", "mask_decoder"],
}  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final_lora" / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    assert run_kills(list(RUNS), 10, 1, tmp_path) == 0


def test_cold_warm_damaged_and_no_cache_give_the_same_weights(
    angiograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To the last bit, supervised and PPO, with one flipped bit in every cached file."""
    for name in ("draw", "score_test", "write_results"):
        monkeypatch.setattr(training, name, lambda t, *_: t.run.path)
    rng = random.Random(0)

    def train(**changes: object) -> dict[str, torch.Tensor]:
        places = {"data_root": str(angiograms), "output_dir": str(tmp_path)}
        return weights(training.train(get_preset("debug", **FROZEN | places | changes), []))

    cold, files = train(), sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 4
    assert same(train(), cold)  # warm
    assert same(train(cache_gb=0), cold)
    for file in files:
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    assert same(train(), cold)
    assert len([record for record in caplog.records if "computed again" in record.message]) == 4
    assert same(train(), cold)


@pytest.mark.slow
def test_two_new_runs_at_once_share_data_and_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vesselrl", "train", "--preset", "debug", "--output_dir", str(tmp_path)]
    command += "--lora_scope projector mask_decoder --stage sft --learning_rate 0.01".split()
    both = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    one, other = tmp_path.glob("sa2va_lora_ppo_*")
    assert same(weights(one), weights(other))
    assert len([*(tmp_path / "data").iterdir()]) == 1
