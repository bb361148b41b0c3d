"""An interrupted training goes on as if nothing had happened."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vesselrl import cli
from vesselrl.errors import RunError
from vesselrl.experiment.config import get_preset
from vesselrl.training import checkpoint, health
from vesselrl.training import train as training
from vesselrl.training.checkpoint import STATE_FILE, read_state, write_state
from vesselrl.training.health import Health
from vesselrl.training.logging import Monitor

# Ten supervised steps in two epochs, then eight of PPO in two, validated in the midst of each.
STAGES = {
    "stage": "sft+rl", "num_epochs": 4, "rl_epochs": 2, "batch_size": 1, "num_passes": 2, "val_freq": 3,
    "learning_rate": 1e-2, "rl_learning_rate": 5e-3, "lora_dropout": 0.1, "augment": "light",
    "curriculum": True, "objective": "constrained",
}  # fmt: skip
CONSTRAINED = {"objective": "constrained", "num_epochs": 3, "val_freq": 1, "learning_rate": 1e-2}
UNET = {"control": "unet", "num_epochs": 4, "val_freq": 3, "learning_rate": 4e-3}
# Settings and the steps after which the plug is pulled; 4.5: after the files of a validation, before the
# state of the run that goes with them; 4.75: after that, before the checkpoint of the epoch.
RUNS = {
    "two stages": (STAGES, (9, 10.75, 15)),
    "constrained, going wrong": (CONSTRAINED, (4, 4.5, 4.75)),
    "unet": (UNET, (4,)),
}


def places(tiny_checkpoint: Path, data: Path, output: Path) -> dict[str, str]:
    return {"model_path": str(tiny_checkpoint), "data_root": str(data), "output_dir": str(output)}


def train_and_copy(settings: dict, cuts: tuple, copies: Path) -> training.TrainResult:
    """A whole run; on its way the folder is copied as it would be left behind by a cut at that moment."""

    def copy(folder: Path, moment: float) -> None:
        if moment in cuts:
            shutil.copytree(folder, copies / str(moment))

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
        return training.train(get_preset("debug", **settings), ["first"])


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def same_weights(first: Path, second: Path) -> bool:
    (one,), (two,) = (list(folder.glob("*.safetensors")) for folder in (first, second))
    one, two = load_file(one), load_file(two)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two corrections: before the cut in step 4, and with it; weights are good after one step."""
    after_validation = Health.after_validation

    def take_back(self: Health, step: int, scores: dict[str, float], is_last: bool = False) -> None:
        after_validation(self, step, scores, is_last)
        if step in (3, 4):
            self.roll_back(step, "It went wrong.")

    monkeypatch.setattr(Health, "after_validation", take_back)
    monkeypatch.setattr(health, "WINDOW", 2)


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_as_the_uninterrupted_one(
    tiny_checkpoint: Path, angiograms: Path, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    """Every metric, every weight and every score is the same to the last bit."""
    changes, cuts = RUNS[name]
    if name == "constrained, going wrong":
        request.getfixturevalue("goes_wrong")
    settings = places(tiny_checkpoint, angiograms, tmp_path / "whole") | changes
    whole = train_and_copy(settings, cuts, tmp_path / "cut")
    assert not (whole.folder / STATE_FILE).exists()
    corrections = [one for one in whole.info["findings"] if one["code"] == "correction"]
    assert len(corrections) == (2 if name == "constrained, going wrong" else 0)
    kind = "control" if name == "unet" else "lora"
    for cut in cuts:
        folder = tmp_path / "cut" / str(cut)
        assert read_state(folder)["step"] < cut
        done = training.resume(folder, ["second"])
        assert done.folder == folder
        assert metrics(folder) == metrics(whole.folder)
        for weights in (f"best_{kind}", f"final_{kind}", *(f"checkpoint_epoch_{k}" for k in (1, 2, 3))):
            assert same_weights(folder / weights, whole.folder / weights), weights
        for scores in ("val_before", "val_best", "val_latest", "test_before", "test_after"):
            first, second = (json.loads((f / f"{scores}.json").read_text()) for f in (folder, whole.folder))
            assert (first["rows"], first["marks"]) == (second["rows"], second["marks"]), scores
        may_differ = {"provenance", "reward_time_share"}
        assert {k: v for k, v in done.info.items() if k not in may_differ} == {
            k: v for k, v in whole.info.items() if k not in may_differ
        }
        assert done.info["provenance"]["command"] == ["first"]
        assert [one["command"] for one in done.info["provenance"]["resumed"]] == [["second"]]
        assert not (folder / STATE_FILE).exists()


def test_the_best_adapter_of_a_lost_validation_is_not_kept(
    tiny_checkpoint: Path, angiograms: Path, tmp_path: Path
) -> None:
    """On a GPU the steps that were lost do not come out the same to the last bit."""
    settings = places(tiny_checkpoint, angiograms, tmp_path / "whole") | CONSTRAINED
    train_and_copy(settings, (2.5,), tmp_path / "cut")
    folder = tmp_path / "cut" / "2.5"
    best = {name.replace(".default", ""): value for name, value in read_state(folder)["best_values"].items()}
    file = folder / "best_lora" / "adapter_model.safetensors"
    file.write_bytes(b"of a validation that is lost")
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "run_epochs", lambda t: kept.append(load_file(file)))
        training.resume(folder, ["second"])
    assert kept[0].keys() == best.keys()
    assert all(torch.equal(kept[0][name], best[name]) for name in best)


@pytest.fixture(scope="module")
def cut(tiny_checkpoint: Path, angiograms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut off after its first step."""
    output = tmp_path_factory.mktemp("runs")
    data = shutil.copytree(angiograms, output / "data")
    settings = places(tiny_checkpoint, data, output) | {"learning_rate": 1e-2}
    train_and_copy(settings, (1,), output / "cut")
    return output / "cut" / "1"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


BROKEN = {
    "cut short": "cannot be read",
    "no state in it": "cannot be read",
    "of another version": "its version is 1",
    "not there": "first validation",
    "finished": "has finished",
    # Adapters begin with other random values, and there are fewer images.
    "changed": "^The run cannot be resumed.*: training images, values of the adapters",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_cannot_be_resumed_is_said_and_left_alone(
    cut: Path, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(cut, tmp_path / "run")
    file = folder / STATE_FILE
    if broken == "cut short":
        file.write_bytes(file.read_bytes()[:5000])
    elif broken == "no state in it":
        shutil.copy(folder / "best_lora" / "adapter_model.safetensors", file)
    elif broken == "of another version":
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "STATE_VERSION", "1")
            write_state(folder, {})
    elif broken == "changed":
        config = json.loads((folder / "config.json").read_text())
        config["args"] |= {"seed": 43, "max_train_samples": 3}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        file.unlink()
    if broken == "finished":
        (folder / "training_info.json").write_text("{}")
    before = contents(folder)
    with pytest.raises(RunError, match=BROKEN[broken]) as error:
        training.resume(folder, [])
    assert "validation images" not in str(error.value)
    assert contents(folder) == before


def full_disk(tensors: dict, path: Path, metadata: dict) -> None:
    path.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_state_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also tensors that occur twice, of any type, and an older file stays until the new one is complete."""
    weight = torch.randn(3, 2)
    state = {
        "twice": [weight, {"inside": weight}],
        "column": weight[:, 0],
        "count": torch.tensor(7.0),
        "bits": torch.arange(5, dtype=torch.uint8),
        "plain": {"big": 2**100, "none": None, "text": "a", "nan": float("nan"), "tenth": 0.1},
    }
    write_state(tmp_path, state)
    again = read_state(tmp_path)
    assert torch.equal(again["twice"][0], weight)
    assert again["twice"][1]["inside"] is again["twice"][0]
    for name in ("column", "count", "bits"):
        assert torch.equal(again[name], state[name])
        assert again[name].dtype == state[name].dtype
    assert str(again["plain"]) == str(state["plain"])
    with pytest.raises(TypeError):
        write_state(tmp_path, {"no JSON": object()})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk)
        with pytest.raises(RunError, match=r"resume\.safetensors cannot be written \(No space left"):
            write_state(tmp_path, {"count": torch.tensor(8.0)})
    assert torch.equal(read_state(tmp_path)["count"], state["count"])
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_the_command_line_resumes(cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(cut, tmp_path / "run")
    assert cli.main(["train", "--resume_from", str(folder), "--num_epochs", "9"]) == 2
    assert "num_epochs" in capsys.readouterr().err
    assert (folder / STATE_FILE).exists()
    assert cli.main(["train", f"--resume_from={folder}"]) == 0
    assert (folder / "report.html").exists()
    assert cli.main(["train", "--resume_from", str(folder)]) == 1
    assert "has finished" in capsys.readouterr().err
