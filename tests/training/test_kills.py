"""Killed trainings end as uninterrupted ones, and caches change nothing."""

import random
from pathlib import Path

import numpy as np
import pytest

from tests.kills import RUNS, run_kills
from tests.test_faults import run, the_run
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
    sizes, parts, predict_batch = [], [], MaskPolicy.predict_batch

    def load(*given: object, without: tuple[str, ...], **options: object) -> tuple:
        parts.append(without)
        return load_sa2va(*given, without=without, **options)

    def watch(policy: MaskPolicy, images: list[np.ndarray]) -> list[Prediction]:
        names = [n for n, _ in policy.model.named_parameters() if n.startswith(LANGUAGE)]
        sizes.append(len(names) + (policy._language is not None))
        return predict_batch(policy, images)

    monkeypatch.setattr(policy_module, "load_sa2va", load)
    monkeypatch.setattr(MaskPolicy, "predict_batch", watch)

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


REWARD_FAULTS = [("raise ValueError('torn')", 1, "one of"), ("os.kill(os.getpid(), 11)", -11, "")]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("fault", "code", "said"), REWARD_FAULTS)
def test_a_run_that_a_users_reward_has_ended_goes_on_with_a_mended_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, code: int, said: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # which a new process takes over
    text = "import os\n\ncalls = []\n\n\ndef score(pred, gt):\n    calls.append(1)\n"
    (tmp_path / "own.py").write_text(f"{text}    if len(calls) > 12:\n        {fault}\n    return 0.0\n")
    done = run("train --preset debug --reward_fn own:score --output_dir out", tmp_path)
    assert done.code == code
    assert said in done.text
    folder = the_run(tmp_path)
    assert not (folder / "training_info.json").exists()
    words = f"train --resume_from {folder.relative_to(tmp_path)}"
    if said:
        assert f"Go on with: vesselrl {words}" in done.text
        assert "Traceback" not in done.text
    (tmp_path / "own.py").write_text(f"{text}    return 0.0\n")
    refused = run(words, tmp_path)
    assert (refused.code, "--allow_change reward" in refused.text) == (2, True)
    assert run(f"{words} --allow_change reward", tmp_path).code == 0
