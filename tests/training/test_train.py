"""The whole training on a random miniature: what it writes, that it repeats, and its stages."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vesselrl.errors import LearningError
from vesselrl.evaluation.results import read_evaluation
from vesselrl.experiment.config import get_preset
from vesselrl.training.batches import TrainBatch
from vesselrl.training.ppo import PPOUpdate
from vesselrl.training.train import TrainResult, train

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
INFO_KEYS = {
    "args", "counts", "initial_metrics", "final_metrics", "best_metrics", "test_metrics", "best_val_dice",
    "total_steps", "adapter_delta_norm", "grad_norm_max", "reward_time_share", "findings", "metric_spec",
    "provenance",
}  # fmt: skip


def short_run(tiny_checkpoint: Path, angiograms: Path, output: Path, **changes: object) -> TrainResult:
    settings = {"model_path": str(tiny_checkpoint), "data_root": str(angiograms), "output_dir": str(output)}
    return train(get_preset("debug", **(settings | {"learning_rate": 1e-2} | changes)), ["vesselrl", "train"])


def metrics_of(result: TrainResult) -> list[dict]:
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def result(tiny_checkpoint: Path, angiograms: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return short_run(tiny_checkpoint, angiograms, tmp_path_factory.mktemp("runs"))


def test_run_folder_is_complete(result: TrainResult) -> None:
    names = {path.name for path in result.folder.iterdir()}
    assert {"config.json", "data_split.json", "metrics.jsonl", "curves.png", "panel.png", "tensorboard",
            "val_before.json", "val_latest.json", "val_best.json", "test_before.json", "test_after.json",
            "report.html", "report.md", "cases", "diagnosis.json"} <= names  # fmt: skip
    for folder in ("best_lora", "final_lora", "checkpoint_epoch_1"):
        assert {path.name for path in (result.folder / folder).iterdir()} == ADAPTER_FILES
    assert not [name for name in names if "partial" in name]
    assert list((result.folder / "tensorboard").iterdir())


def test_training_info_has_the_promised_keys(result: TrainResult) -> None:
    info = json.loads((result.folder / "training_info.json").read_text())
    assert set(info) == INFO_KEYS
    assert info["adapter_delta_norm"] > 0
    assert info["grad_norm_max"] > 0
    assert b"train/contact_sheet" in next((result.folder / "tensorboard").iterdir()).read_bytes()
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


def test_splits_do_not_share_patients(result: TrainResult) -> None:
    split = json.loads((result.folder / "data_split.json").read_text())
    patients = [{key.split("_")[0] for key in split["samples"][side]} for side in ("train", "val", "test")]
    assert not patients[0] & patients[1]
    assert not patients[0] & patients[2]
    assert not patients[1] & patients[2]


def test_no_name_or_id_is_written(result: TrainResult) -> None:
    for path in result.folder.rglob("*"):
        if path.is_file():
            assert b"ZHANG" not in path.read_bytes(), path
            assert b"123456789" not in path.read_bytes(), path


def test_the_same_seed_repeats_exactly(
    result: TrainResult, tiny_checkpoint: Path, angiograms: Path, tmp_path: Path
) -> None:
    again = short_run(tiny_checkpoint, angiograms, tmp_path)
    assert metrics_of(again) == metrics_of(result)
    first, second = (
        load_file(run.folder / "final_lora" / "adapter_model.safetensors") for run in (result, again)
    )
    assert all(bool((first[name] == second[name]).all()) for name in first)
    other = short_run(tiny_checkpoint, angiograms, tmp_path, seed=1)
    assert metrics_of(other) != metrics_of(result)


def test_best_lora_exists_without_any_improvement(
    tiny_checkpoint: Path, angiograms: Path, tmp_path: Path
) -> None:
    """A hopeless learning rate: the best adapter is the untouched one from before the first update."""
    done = short_run(tiny_checkpoint, angiograms, tmp_path, val_freq=999, learning_rate=1e-9)
    weights = load_file(done.folder / "best_lora" / "adapter_model.safetensors")
    assert weights
    assert done.info["best_metrics"]["reward"] >= done.info["initial_metrics"]["reward"]


@pytest.mark.parametrize("stage", ["sft", "sft+rl"])
def test_other_stages(tiny_checkpoint: Path, angiograms: Path, tmp_path: Path, stage: str) -> None:
    done = short_run(tiny_checkpoint, angiograms, tmp_path, stage=stage, num_epochs=2)
    steps = [line for line in metrics_of(done) if "train/grad_norm" in line]
    kinds = ["sft" if "train/reward" not in line else "rl" for line in steps]
    # 2 batches an epoch; a supervised epoch goes through them twice, PPO passes twice over each.
    assert kinds == (["sft"] * 8 if stage == "sft" else ["sft"] * 4 + ["rl"] * 2)
    assert done.info["total_steps"] == len(kinds)
    assert done.info["adapter_delta_norm"] > 0


def test_ppo_after_supervised_steps_measures_kl_to_where_it_began(
    tiny_checkpoint: Path, angiograms: Path, tmp_path: Path
) -> None:
    """Supervised steps move the adapter far; PPO must still begin with ratio 1 and KL 0."""
    done = short_run(
        tiny_checkpoint, angiograms, tmp_path, stage="sft+rl", num_epochs=8, learning_rate=0.02, num_passes=1
    )
    first = next(line for line in metrics_of(done) if "train/first_ratio_gap" in line)
    assert abs(first["train/kl_ref"]) <= 1e-6


def test_ppo_after_supervised_steps_has_a_rate_and_moments_of_its_own(
    tiny_checkpoint: Path, angiograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = []
    step = PPOUpdate.step

    def looked_at(self: PPOUpdate, batch: TrainBatch) -> dict[str, float]:
        moments.append(len(self.optimizer.state))
        return step(self, batch)

    monkeypatch.setattr(PPOUpdate, "step", looked_at)
    done = short_run(
        tiny_checkpoint, angiograms, tmp_path, stage="sft+rl", num_epochs=3, learning_rate=1e-3, log_freq=1
    )
    lines = [line for line in metrics_of(done) if "train/learning_rate" in line]
    peaks = {
        is_ppo: max(x["train/learning_rate"] for x in lines if ("train/policy_loss" in x) == is_ppo)
        for is_ppo in (False, True)
    }
    assert peaks == pytest.approx({False: 1e-3, True: 2.5e-5})
    assert moments[0] == 0  # those of the supervised loss are gone
    assert all(moments[1:])


def test_goals_are_priced_by_the_validation_before_ppo_and_by_each_one_since(
    tiny_checkpoint: Path, angiograms: Path, tmp_path: Path
) -> None:
    """By hand from the logged means; those of the supervised stage but the last set no price."""
    floors = {"recall": 0.4, "precision": 0.1}
    done = short_run(
        tiny_checkpoint, angiograms, tmp_path, stage="sft+rl", num_epochs=3, num_passes=1, val_freq=1,
        learning_rate=1e-3, objective="constrained", recall_target=floors["recall"],
        precision_target=floors["precision"],
    )  # fmt: skip
    prices, validated, seen = dict.fromkeys(floors, 0.0), None, []
    for line in metrics_of(done):
        if "val/dice" in line:
            validated = line
        if "train/price/recall" in line:
            for name, floor in floors.items():
                price = prices[name] + 100 * (floor - validated[f"val/{name}"])
                prices[name] = min(max(price, 0.0), 20.0)
                assert line[f"train/price/{name}"] == pytest.approx(prices[name], abs=1e-9)
            seen.append(tuple(prices.values()))
    assert len(set(seen)) == 2  # two steps of PPO, a validation between


def test_small_components_are_gone_in_validation_and_test(
    tiny_checkpoint: Path, angiograms: Path, tmp_path: Path
) -> None:
    """Larger than any image: nothing is left of any mask, before and after, and in the pictures."""
    done = short_run(tiny_checkpoint, angiograms, tmp_path, num_epochs=1, min_component_px=10**6)
    for name in ("val_before", "val_latest", "test_before", "test_after"):
        rows = read_evaluation(done.folder / f"{name}.json").rows
        assert [row["foreground"] for row in rows] == [0.0] * len(rows)


def test_ones_own_reward_can_be_seen_to_move(
    tiny_checkpoint: Path, angiograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the function returned, in every validation, in the rows and in the tables; also at weight 0."""
    (tmp_path / "own_terms.py").write_text(
        "def half(pred, gt):\n    return 0.5 * float(pred[:, : pred.shape[1] // 2].mean())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    done = short_run(
        tiny_checkpoint, angiograms, tmp_path, num_epochs=1, reward_fn="own_terms:half", reward_fn_weight=4.0
    )
    rows = read_evaluation(done.folder / "val_before.json").rows
    assert all(0 < row["custom_score"] <= 0.5 for row in rows)
    logged = [line["val/custom_score"] for line in metrics_of(done) if "val/custom_score" in line]
    assert len(logged) >= 2
    for table in (done.validation, done.test):
        assert [line["metric"] for line in table][-1] == "custom_score"
    unpaid = short_run(
        tiny_checkpoint, angiograms, tmp_path, num_epochs=1, reward_fn="own_terms:half", reward_fn_weight=0.0
    )
    again = read_evaluation(unpaid.folder / "val_before.json").rows
    assert [row["custom_score"] for row in again] == pytest.approx([row["custom_score"] for row in rows])
    plain = short_run(tiny_checkpoint, angiograms, tmp_path, num_epochs=1)
    assert "custom_score" not in plain.info["initial_metrics"]


def test_starting_from_an_adapter_keeps_its_split(
    result: TrainResult, tiny_checkpoint: Path, angiograms: Path, tmp_path: Path
) -> None:
    done = short_run(
        tiny_checkpoint, angiograms, tmp_path, init_lora=str(result.folder / "final_lora"), seed=9
    )
    first, second = (
        json.loads((folder / "data_split.json").read_text())["samples"]
        for folder in (result.folder, done.folder)
    )
    assert first == second
    # KL is measured to the adapter that the run started from, not to the bare base model.
    steps = [line for line in metrics_of(done) if "train/first_ratio_gap" in line]
    assert steps[0]["train/first_ratio_gap"] <= 1e-4


def test_sanity_overfit_trains_and_validates_on_the_same_images(
    tiny_checkpoint: Path, angiograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vesselrl.training.run_data.SANITY_STEPS", 4)
    done = short_run(tiny_checkpoint, angiograms, tmp_path, sanity_overfit=2, stage="sft")
    assert done.info["total_steps"] == 4 * 2  # each batch is gone through twice
    assert done.test == []
    assert done.info["counts"]["train"]["used"] == done.info["counts"]["val"]["used"] == 2
    assert math.isfinite(done.info["best_val_dice"])


def test_a_run_that_never_moves_is_an_error(tiny_checkpoint: Path, angiograms: Path, tmp_path: Path) -> None:
    with pytest.raises(LearningError):
        short_run(tiny_checkpoint, angiograms, tmp_path, learning_rate=0.0)
    folder = next(tmp_path.glob("sa2va_lora_ppo_*"))
    assert not (folder / "training_info.json").exists()
