"""The whole training on a random miniature: the files of a run, that it repeats, and its stages."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vesselrl.data.dataset import TrainBatch
from vesselrl.errors import LearningError
from vesselrl.evaluation.results import read_evaluation
from vesselrl.experiment.config import get_preset
from vesselrl.training.ppo import PPOUpdate
from vesselrl.training.train import TrainResult, train

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
INFO_KEYS = {
    "args", "counts", "initial_metrics", "final_metrics", "best_metrics", "test_metrics", "best_val_dice",
    "total_steps", "adapter_delta_norm", "grad_norm_max", "reward_time_share", "findings", "metric_spec",
    "provenance",
}  # fmt: skip


@pytest.fixture(scope="module")
def result(tiny_checkpoint: Path, angiograms: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return short_run(tiny_checkpoint, angiograms, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def places(tiny_checkpoint: Path, angiograms: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    return tiny_checkpoint, angiograms, tmp_path


def short_run(checkpoint: Path, data: Path, output: Path, **changes: object) -> TrainResult:
    settings = {"model_path": str(checkpoint), "data_root": str(data), "output_dir": str(output)}
    return train(get_preset("debug", **(settings | {"learning_rate": 1e-2} | changes)), ["vesselrl", "train"])


def metrics_of(result: TrainResult) -> list[dict]:
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def split_of(result: TrainResult) -> dict[str, list[str]]:
    return json.loads((result.folder / "data_split.json").read_text())["samples"]


# ---- The files of a run


def test_run_folder_is_complete(result: TrainResult) -> None:
    names = {path.name for path in result.folder.iterdir()}
    assert {"config.json", "data_split.json", "metrics.jsonl", "curves.png", "panel.png", "tensorboard",
            "val_before.json", "val_latest.json", "val_best.json", "test_before.json", "test_after.json",
            "report.html", "report.md", "cases", "diagnosis.json"} <= names  # fmt: skip
    for folder in ("best_lora", "final_lora", "checkpoint_epoch_1"):
        assert {path.name for path in (result.folder / folder).iterdir()} == ADAPTER_FILES
    assert not [name for name in names if "partial" in name]
    assert b"train/contact_sheet" in next((result.folder / "tensorboard").iterdir()).read_bytes()


def test_no_name_or_id_is_written_and_no_patient_is_in_two_subsets(result: TrainResult) -> None:
    for path in result.folder.rglob("*"):
        if path.is_file():
            assert b"ZHANG" not in path.read_bytes(), path
            assert b"123456789" not in path.read_bytes(), path
    patients = [{key.split("_")[0] for key in keys} for keys in split_of(result).values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 10


def test_training_info_has_the_promised_keys(result: TrainResult) -> None:
    info = json.loads((result.folder / "training_info.json").read_text())
    assert set(info) == INFO_KEYS
    assert info["adapter_delta_norm"] > 0
    assert info["grad_norm_max"] > 0
    assert info["total_steps"] == 2
    assert set(info["test_metrics"]) == {"before", "after"}
    assert {"git_commit", "command", "packages", "device", "date"} <= set(info["provenance"])
    train_counts = info["counts"]["train"]
    assert train_counts["requested"] == train_counts["used"] == 4


def test_metrics_start_before_the_first_update(result: TrainResult) -> None:
    lines = metrics_of(result)
    assert lines[0]["step"] == 0
    assert "val/dice" in lines[0]
    assert "train/reward" not in lines[0]
    assert [line["step"] for line in lines if "train/reward" in line] == [1, 2]
    assert all(line["train/first_ratio_gap"] <= 1e-4 for line in lines if "train/first_ratio_gap" in line)
    assert lines[1]["train/reward_std"] > 0


def test_the_same_seed_repeats_exactly(result: TrainResult, places: tuple) -> None:
    again = short_run(*places)
    assert metrics_of(again) == metrics_of(result)
    first, second = (
        load_file(run.folder / "final_lora" / "adapter_model.safetensors") for run in (result, again)
    )
    assert all(bool((first[name] == second[name]).all()) for name in first)
    assert metrics_of(short_run(*places, seed=1)) != metrics_of(result)


def test_best_lora_exists_without_any_improvement(places: tuple) -> None:
    """A hopeless learning rate: the best adapter is the one from before the first update."""
    done = short_run(*places, val_freq=999, learning_rate=1e-9)
    assert load_file(done.folder / "best_lora" / "adapter_model.safetensors")
    assert done.info["best_metrics"]["reward"] >= done.info["initial_metrics"]["reward"]


def test_a_run_that_never_moves_is_an_error(places: tuple) -> None:
    with pytest.raises(LearningError):
        short_run(*places, learning_rate=0.0)
    (folder,) = places[2].glob("sa2va_lora_ppo_*")
    assert not (folder / "training_info.json").exists()


# ---- Stages


@pytest.mark.parametrize("stage", ["sft", "sft+rl"])
def test_each_stage_has_steps_a_rate_moments_and_a_reference_of_its_own(
    places: tuple, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Supervised steps move the adapter far; PPO must still begin with ratio 1 and KL 0."""
    num_moments = []
    step = PPOUpdate.step

    def looked_at(self: PPOUpdate, batch: TrainBatch) -> dict[str, float]:
        num_moments.append(len(self.optimizer.state))
        return step(self, batch)

    monkeypatch.setattr(PPOUpdate, "step", looked_at)
    done = short_run(*places, stage=stage, num_epochs=4, learning_rate=0.02)
    steps = [line for line in metrics_of(done) if "train/grad_norm" in line]
    rates = {"sft": [], "rl": []}
    for line in steps:
        rates["rl" if "train/reward" in line else "sft"].append(line["train/learning_rate"])
    # 2 batches an epoch; a supervised epoch goes through them twice, PPO passes twice over each.
    assert [len(rates["sft"]), len(rates["rl"])] == ([16, 0] if stage == "sft" else [12, 2])
    assert done.info["total_steps"] == len(steps)
    assert done.info["adapter_delta_norm"] > 0
    assert max(rates["sft"]) == 0.02
    if stage == "sft+rl":
        assert max(rates["rl"]) == pytest.approx(5e-4)
        assert num_moments[0] == 0  # those of the supervised loss are gone
        assert all(num_moments[1:])
        first = next(line for line in steps if "train/first_ratio_gap" in line)
        assert first["train/first_ratio_gap"] <= 1e-4


def test_multipliers_follow_the_validation_before_ppo_and_each_one_since(places: tuple) -> None:
    """By hand from the logged means; validations of the supervised stage but the last change none."""
    bounds = {"recall": 0.4, "precision": 0.1}
    done = short_run(
        *places, stage="sft+rl", num_epochs=3, num_passes=1, val_freq=1, learning_rate=1e-3,
        objective="constrained", recall_target=bounds["recall"], precision_target=bounds["precision"],
    )  # fmt: skip
    multipliers, validated, seen = dict.fromkeys(bounds, 0.0), None, []
    for line in metrics_of(done):
        if "val/dice" in line:
            validated = line
        if "train/price/recall" in line:
            for name, bound in bounds.items():
                multiplier = multipliers[name] + 100 * (bound - validated[f"val/{name}"])
                multipliers[name] = min(max(multiplier, 0.0), 20.0)
                assert line[f"train/price/{name}"] == pytest.approx(multipliers[name], abs=1e-9)
            seen.append(tuple(multipliers.values()))
    assert len(set(seen)) == 2  # two steps of PPO, a validation between
    first = next(line for line in metrics_of(done) if "train/first_ratio_gap" in line)
    assert abs(first["train/kl_ref"]) <= 1e-6  # with a single pass it is measured before any update


def test_starting_from_an_adapter_keeps_its_split(result: TrainResult, places: tuple) -> None:
    done = short_run(*places, init_lora=str(result.folder / "final_lora"), seed=9)
    assert split_of(done) == split_of(result)
    # KL is measured to the adapter that the run started from, not to the bare base model.
    first = next(line for line in metrics_of(done) if "train/first_ratio_gap" in line)
    assert first["train/first_ratio_gap"] <= 1e-4


def test_sanity_overfit_trains_and_validates_on_the_same_images(
    places: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vesselrl.training.setup.SANITY_STEPS", 4)
    done = short_run(*places, sanity_overfit=2, stage="sft")
    assert done.info["total_steps"] == 4 * 2  # each batch is gone through twice
    assert done.test == []
    assert done.info["counts"]["train"]["used"] == done.info["counts"]["val"]["used"] == 2
    assert math.isfinite(done.info["best_val_dice"])


# ---- Post-processing and the user's own reward


def test_small_components_are_gone_in_validation_and_test(places: tuple) -> None:
    """Larger than any image: nothing is left of any mask, before and after."""
    done = short_run(*places, min_component_px=10**6)
    for name in ("val_before", "val_latest", "test_before", "test_after"):
        rows = read_evaluation(done.folder / f"{name}.json").rows
        assert [row["foreground"] for row in rows] == [0.0] * len(rows)


def test_ones_own_reward_can_be_seen_to_move(
    result: TrainResult, places: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function's values, in every validation, in the rows and in the tables; also at weight 0."""
    (places[2] / "own_terms.py").write_text(
        "def half(pred, gt):\n    return 0.5 * float(pred[:, : pred.shape[1] // 2].mean())\n"
    )
    monkeypatch.syspath_prepend(places[2])
    scores = []
    for weight in (4.0, 0.0):
        done = short_run(*places, reward_fn="own_terms:half", reward_fn_weight=weight)
        scores.append([row["custom_score"] for row in read_evaluation(done.folder / "val_before.json").rows])
        logged = [line["val/custom_score"] for line in metrics_of(done) if "val/custom_score" in line]
        assert len(logged) >= 2
        assert {table[-1]["metric"] for table in (done.validation, done.test)} == {"custom_score"}
    assert all(0 < score <= 0.5 for score in scores[0])
    assert scores[0] == pytest.approx(scores[1])
    assert "custom_score" not in result.info["initial_metrics"]
