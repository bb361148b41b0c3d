"""An interrupted training goes on as if nothing had happened."""

import errno
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import metrics_of, no_charts, same_weights, train_debug
from vesselrl import cli
from vesselrl.errors import RunError
from vesselrl.training import checkpoint, health
from vesselrl.training import train as training
from vesselrl.training.checkpoint import STATE_FILE, read_state, write_state
from vesselrl.training.health import Health
from vesselrl.training.logging import Monitor

# Twelve supervised steps in two epochs, then four of PPO, validated in the midst of each.
STAGES = {
    "stage": "sft+rl", "num_epochs": 3, "rl_epochs": 1, "batch_size": 1, "num_passes": 2, "val_freq": 3,
    "learning_rate": 1e-2, "rl_learning_rate": 5e-3, "lora_dropout": 0.1, "augment": "light",
    "curriculum": True, "objective": "constrained",
}  # fmt: skip
CONSTRAINED = {"objective": "constrained", "num_epochs": 3, "val_freq": 1, "learning_rate": 1e-2}
UNET = {"control": "unet", "num_epochs": 3, "num_passes": 1, "val_freq": 3, "learning_rate": 4e-3}
# Settings and the steps after which the plug is pulled; 5.5: after the files of a validation, before the
# state of the run that goes with them; 12.75: after that, before the checkpoint of the epoch.
RUNS = {
    "two stages": (STAGES, (8, 12.75, 16)),
    "constrained, going wrong": (CONSTRAINED, (5.5,)),
    "unet": (UNET, (4,)),
}


class PlugPulledError(Exception):
    """Stands in for a power cut."""


def train_and_copy(settings: dict, cuts: tuple, output: Path, is_whole: bool = True) -> training.TrainResult:
    """A run; on its way its folder is copied to `output`, as a cut at that moment would leave it behind."""

    def copy(folder: Path, moment: float) -> None:
        if moment in cuts:
            shutil.copytree(folder, output / str(moment))
            if not is_whole:
                raise PlugPulledError

    def log_step(self: Monitor, step: int, metrics: dict[str, float]) -> None:
        Monitor_log_step(self, step, metrics)
        copy(self.run.path, step)

    def write(folder: Path, state: dict) -> None:
        copy(folder, state["step"] + 0.5)
        write_state(folder, state)
        copy(folder, state["step"] + 0.75)

    Monitor_log_step = Monitor.log_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "log_step", log_step)
        patch.setattr(checkpoint, "write_state", write)
        return train_debug(output / "whole", **settings)


def goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two corrections: before the cut in step 5, and with it, to the weights of step 2."""
    after_validation = Health.after_validation

    def take_back(self: Health, step: int, scores: dict[str, float], is_last: bool = False) -> None:
        after_validation(self, step, scores, is_last)
        if step in (4, 5):
            self.roll_back(step, "It went wrong.")

    monkeypatch.setattr(Health, "after_validation", take_back)
    monkeypatch.setattr(health, "WINDOW", 2)


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_as_the_uninterrupted_one(
    tiny_checkpoint: Path, angiograms: Path, tmp_path: Path, name: str, monkeypatch
) -> None:
    """Every metric, every weight and every score is the same to the last bit."""
    changes, cuts = RUNS[name]
    if "wrong" in name:
        goes_wrong(monkeypatch)
    whole = train_and_copy({"model_path": tiny_checkpoint, "data_root": angiograms} | changes, cuts, tmp_path)
    assert not (whole.folder / STATE_FILE).exists()
    codes = [one["code"] for one in whole.info["findings"]]
    assert codes.count("correction") == (2 if "wrong" in name else 0)
    kind = "control" if name == "unet" else "lora"
    for cut in cuts:
        folder = tmp_path / str(cut)
        assert read_state(folder)["step"] < cut
        done = no_charts(training.resume)(folder, ["second"])
        assert done.folder == folder
        assert metrics_of(folder) == metrics_of(whole.folder)
        for weights in (f"best_{kind}", f"final_{kind}", *(f"checkpoint_epoch_{k}" for k in (1, 2, 3))):
            assert same_weights(folder / weights, whole.folder / weights), weights
        for scores in ("val_before", "val_best", "val_latest", "test_before", "test_after"):
            first, second = (json.loads((f / f"{scores}.json").read_text()) for f in (folder, whole.folder))
            assert (first["rows"], first["marks"]) == (second["rows"], second["marks"]), scores
        may_differ = {name: done.info[name] for name in ("provenance", "reward_time_share")}
        assert done.info == whole.info | may_differ
        assert done.info["provenance"]["command"] == ["vesselrl", "train"]
        assert [one["command"] for one in done.info["provenance"]["resumed"]] == [["second"]]
        assert not (folder / STATE_FILE).exists()


@pytest.fixture(scope="module")
def cut_once(tiny_checkpoint: Path, angiograms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    data = shutil.copytree(angiograms, output / "data")
    settings = {"model_path": tiny_checkpoint, "data_root": data, "learning_rate": 1e-2}
    with pytest.raises(PlugPulledError):
        train_and_copy(settings, (1,), output, is_whole=False)
    return output / "1"


@pytest.fixture
def cut(cut_once: Path, tmp_path: Path) -> Path:
    """A run that was cut off after its first step."""
    return shutil.copytree(cut_once, tmp_path / "run")


def test_the_best_adapter_of_a_lost_validation_is_not_kept(cut: Path, monkeypatch) -> None:
    """On a GPU the steps that were lost do not come out the same to the last bit."""
    best = {name.replace(".default", ""): value for name, value in read_state(cut)["best_values"].items()}
    file = cut / "best_lora" / "adapter_model.safetensors"
    file.write_bytes(b"of a validation that is lost")
    monkeypatch.setattr(training, "run_epochs", Mock(side_effect=PlugPulledError))
    with pytest.raises(PlugPulledError):
        training.resume(cut, ["second"])
    kept = load_file(file)
    assert kept.keys() == best.keys()
    assert all(torch.equal(kept[name], best[name]) for name in best)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("cut short", "cannot be read"),
        ("no state in it", "cannot be read"),
        ("of another version", "its version is 1"),
        ("not there", "first validation"),
        ("finished", "has finished"),
        # Adapters begin with other random values, and there are fewer images.
        ("changed", "^The run cannot be resumed.*: training images, values of the adapters"),
    ],
)
def test_what_cannot_be_resumed_is_left_alone(cut: Path, broken: str, message: str, monkeypatch) -> None:
    file = cut / STATE_FILE
    if broken == "cut short":
        file.write_bytes(file.read_bytes()[:5000])
    elif broken == "no state in it":
        shutil.copy(cut / "best_lora" / "adapter_model.safetensors", file)
    elif broken == "of another version":
        monkeypatch.setattr(checkpoint, "STATE_VERSION", "1")
        write_state(cut, {})
        monkeypatch.undo()
    elif broken == "changed":
        config = json.loads((cut / "config.json").read_text())
        config["args"] |= {"seed": 43, "max_train_samples": 3}
        (cut / "config.json").write_text(json.dumps(config))
    else:
        file.unlink()
    if broken == "finished":
        (cut / "training_info.json").write_text("{}")
    before = contents(cut)
    with pytest.raises(RunError, match=message) as error:
        training.resume(cut, [])
    assert "validation images" not in str(error.value)
    assert contents(cut) == before


def test_a_state_stays_until_a_new_one_is_complete(tmp_path: Path, monkeypatch) -> None:
    state = {"count": torch.tensor(7.0), "big": 2**100, "nan": float("nan"), "none": None}
    write_state(tmp_path, state)

    def full_disk(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(RunError, match=r"No space left .* Make room, then go on with --resume_from"):
        write_state(tmp_path, {"count": torch.tensor(8.0)})
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    assert str(read_state(tmp_path)) == str(state)


def test_a_resumed_run_takes_no_other_settings(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(cut)
    assert cli.main(["train", "--resume_from", str(cut), "--num_epochs", "9"]) == 2
    assert "num_epochs" in capsys.readouterr().err
    assert contents(cut) == before
