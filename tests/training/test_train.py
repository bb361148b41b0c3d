"""The whole training on a random miniature: what it logs, that it repeats, and its stages."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call

import pytest

from tests.training.runs import metrics_of, same_weights, train_debug
from vesselrl.data.dataset import TrainBatch
from vesselrl.training.ppo import PPOUpdate
from vesselrl.training.train import TrainResult

BOUNDS = {"recall": 0.9, "precision": 0.7}  # of the constrained run: violated, and kept
Run = Callable[..., TrainResult]


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, angiograms: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("runs")
    return partial(train_debug, output, model_path=tiny_checkpoint, data_root=angiograms, learning_rate=1e-2)


def test_metrics_start_before_the_first_update_and_repeat_with_the_seed(run: Run) -> None:
    result, again = run(), run()
    assert b"train/contact_sheet" in next((result.folder / "tensorboard").iterdir()).read_bytes()
    lines = metrics_of(result.folder)
    assert lines[0]["step"] == 0
    assert "val/dice" in lines[0]
    assert "train/reward" not in lines[0]
    assert [line["step"] for line in lines if "train/reward" in line] == [1, 2]
    assert lines[1]["train/first_ratio_gap"] <= 1e-4
    assert lines[1]["train/reward_std"] > 0
    assert result.info["total_steps"] == 2
    assert result.info["grad_norm_max"] == max(line.get("train/grad_norm", 0) for line in lines) > 0
    assert metrics_of(again.folder) == lines
    assert same_weights(again.folder / "final_lora", result.folder / "final_lora")


@pytest.fixture(scope="module")
def two_stages(run: Run) -> tuple[list[dict], list[int]]:
    """Metrics of a constrained run, six supervised steps and two of PPO; moments that PPO found at each."""
    num_moments, step = [], PPOUpdate.step

    def looked_at(self: PPOUpdate, batch: TrainBatch) -> dict[str, float]:
        num_moments.append(len(self.optimizer.state))
        return step(self, batch)

    settings = {"stage": "sft+rl", "num_epochs": 4, "num_passes": 1, "val_freq": 1, "learning_rate": 0.02}
    settings |= {f"{name}_target": bound for name, bound in BOUNDS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPOUpdate, "step", looked_at)
        done = run(objective="constrained", **settings)
    return metrics_of(done.folder), num_moments


def test_trackers_get_settings_and_every_metric(tmp_path: Path, angiograms: Path, monkeypatch) -> None:
    """Through accelerate, by trackers whose packages are not installed here; no path to data reaches them."""
    tracker = Mock()
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"swanlab": tracker, "mlflow": tracker})
    monkeypatch.setattr("vesselrl.training.setup.find_spec", lambda name: name)
    folder = train_debug(
        tmp_path, report_to=("tensorboard", "swanlab", "mlflow"), data_root=str(angiograms)
    ).folder
    name = folder.name
    assert tracker.mock_calls[0] == call("vesselrl", experiment_name=name)
    assert call("vesselrl", run_name=name) in tracker.mock_calls
    run = tracker.return_value
    names = [done[0] for done in run.mock_calls]
    assert names[:2] == ["start", "store_init_configuration"]
    assert names[-2:] == ["finish", "finish"]
    (settings,) = run.store_init_configuration.call_args_list[0].args
    assert settings["data_root"] == "DATA_ROOT"
    logged = [str({"step": done.kwargs["step"]} | done.args[0]) for done in run.log.call_args_list[::2]]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged == [*map(str, lines)]


def test_each_stage_has_steps_a_rate_moments_and_a_reference_of_its_own(two_stages: tuple) -> None:
    """Supervised steps move the adapter far; PPO must still begin with ratio 1 and KL 0."""
    lines, num_moments = two_stages
    steps = [line for line in lines if "train/epoch" in line]
    assert ["train/reward" in line for line in steps] == [False] * 6 + [True] * 2
    rates = [line["train/learning_rate"] for line in steps]
    assert [max(rates[:6]), max(rates[6:])] == pytest.approx([0.02, 5e-4])
    assert num_moments[0] == 0  # those of the supervised loss are gone
    assert num_moments[1]
    first = next(line for line in lines if "train/first_ratio_gap" in line)
    assert first["train/first_ratio_gap"] <= 1e-4
    assert abs(first["train/kl_ref"]) <= 1e-6  # with a single pass it is measured before any update


def test_multipliers_follow_the_validation_before_ppo_and_each_one_since(two_stages: tuple) -> None:
    """By hand from the logged means; validations of the supervised stage but the last change none."""
    multipliers, validated, seen = dict.fromkeys(BOUNDS, 0.0), None, []
    for line in two_stages[0]:
        if "val/dice" in line:
            validated = line
        if "train/price/recall" in line:
            for name, bound in BOUNDS.items():
                multiplier = multipliers[name] + 100 * (bound - validated[f"val/{name}"])
                multipliers[name] = min(max(multiplier, 0.0), 20.0)
                assert line[f"train/price/{name}"] == pytest.approx(multipliers[name], abs=1e-9)
            seen.append(list(multipliers.values()))
    # Two steps of PPO with a validation between: one multiplier rises up to its limit, the other stays.
    assert 0 < seen[0][0] < seen[1][0] == 20
    assert seen[0][1] == seen[1][1] == 0
