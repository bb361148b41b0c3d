"""An interrupted training goes on as if nothing had happened."""

import errno
import json
import random
import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.training.runs import metrics_of, no_charts, same_weights, train_debug
from vesselrl import cli
from vesselrl.data.samples import find_samples
from vesselrl.data.splits import read_split
from vesselrl.errors import DataError, RefusedError, RunError
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import RunFolder, damaged_files, run_settings
from vesselrl.scoring.rewards import get_reward_function, import_function, source_hash
from vesselrl.training import checkpoint, health, setup
from vesselrl.training import train as training
from vesselrl.training.checkpoint import PREVIOUS_FILE, STATE_FILE, read_state, write_state
from vesselrl.training.health import Health
from vesselrl.training.logging import Monitor

# Twelve supervised steps in two epochs, then four of PPO, validated in the midst of each.
STAGES = {
    "stage": "sft+rl", "num_epochs": 3, "rl_epochs": 1, "batch_size": 1, "num_passes": 2, "val_freq": 3,
    "learning_rate": 1e-2, "rl_learning_rate": 5e-3, "lora_dropout": 0.1, "augment": "light",
    "curriculum": True, "objective": "constrained", "detail_head": "random",
    "deep_supervision": 0.1,
}  # fmt: skip
CONSTRAINED = {"objective": "constrained", "num_epochs": 3, "val_freq": 1, "learning_rate": 1e-2}
UNET = {"control": "unet", "num_epochs": 3, "num_passes": 1, "val_freq": 3, "learning_rate": 4e-3}
# Settings and the steps after which the plug is pulled; 0.25: before the first validation; 5.5: after the
# files of a validation, before the state of the run that goes with them; 5: there with a damaged newest
# state; 12.75: after the state, before the checkpoint of the epoch.
RUNS = {"two stages": (STAGES, (8, 12.75, 16)), "unet": (UNET, (0.25, 5))}
RUNS["constrained, going wrong"] = (CONSTRAINED, (5.5,))


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

    def show_image(self: Monitor, path: Path) -> None:
        copy(self.run.path, 0.25)

    def write(folder: Path, state: dict) -> None:
        copy(folder, state["step"] + 0.5)
        write_state(folder, state)
        copy(folder, state["step"] + 0.75)

    Monitor_log_step = Monitor.log_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "log_step", log_step)
        patch.setattr(Monitor, "show_image", show_image)
        patch.setattr(checkpoint, "write_state", write)
        return train_debug(output / "whole", **settings)


def flip(file: Path, rng: random.Random) -> None:
    """Flips one bit of a file."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


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
    assert not {STATE_FILE, PREVIOUS_FILE, "run.lock"} & {path.name for path in whole.folder.iterdir()}
    codes = [one["code"] for one in whole.info["findings"]]
    assert codes.count("correction") == (2 if "wrong" in name else 0)
    kind = "control" if name == "unet" else "lora"
    for cut in cuts:
        folder = tmp_path / str(cut)
        newest = read_state(folder)["step"]
        if cut == 5:
            flip(folder / STATE_FILE, random.Random(0))
            assert read_state(folder)["step"] < newest
        assert newest < cut
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
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "run.lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("cut short", "cannot be read"),
        ("no state in it", "cannot be read"),
        ("of another version", "its version is 1"),
        ("not there", f"it has no {STATE_FILE}"),
        ("finished", "has finished"),
        ("no config", "it has no config.json"),
        ("torn config", "config.json is damaged"),
        ("in use", "is in use by another training"),
        ("settings", r"^The run .*: settings \(max_train_samples 4, now 3; seed 42, now 43\)\. "),
        ("reward", r"have changed since: reward \(source or version\)\. .* --allow_change reward\."),
        ("model", r"have changed since: model \(weights"),
        ("images", r"have changed since: images \(1 of \d+, such as P\d+_S1_F\d+\)\. "),
        ("masks", r"have changed since: masks \(1 of"),
        ("split", r"have changed since: split \(.*images, now"),
    ],
)
def test_what_cannot_be_resumed_is_left_alone(
    cut: Path, cut_once: Path, tmp_path: Path, broken: str, message: str, monkeypatch
) -> None:
    file, data = cut / STATE_FILE, shutil.copytree(cut_once.parent / "data", tmp_path / "as it was")
    monkeypatch.setattr(setup, "builtin_data", None)
    used, stack = read_state(cut)["fingerprint"]["images"], ExitStack()
    if broken in ("cut short", "no state in it", "not there", "finished"):
        (cut / PREVIOUS_FILE).unlink()
    if broken == "cut short":
        file.write_bytes(file.read_bytes()[:5000])
    elif broken == "no state in it":
        shutil.copy(cut / "best_lora" / "adapter_model.safetensors", file)
    elif broken == "of another version":
        monkeypatch.setattr(checkpoint, "STATE_VERSION", "1")
        write_state(cut, {})
        monkeypatch.undo()
        (cut / PREVIOUS_FILE).unlink()
    elif broken == "no config":
        (cut / "config.json").unlink()
    elif broken == "torn config":
        (cut / "config.json").write_text((cut / "config.json").read_text()[:500])
    elif broken == "in use":
        stack.enter_context(RunFolder(cut).locked())
    elif broken in ("reward", "model"):
        state = read_state(cut)
        state["fingerprint"][broken] = "another"
        write_state(cut, state)
    elif broken in ("images", "masks"):  # the pixels may be the same
        first = next(sample for sample in find_samples(cut_once.parent / "data") if sample.key in used)
        with (first.image_path if broken == "images" else first.mask_path).open("ab") as changed:
            changed.write(b"0")
    elif broken == "split":
        for place in ("images", "masks"):
            min((cut_once.parent / "data" / place).iterdir()).unlink()
    elif broken == "settings":
        config = json.loads((cut / "config.json").read_text())
        config["args"] |= {"seed": 43, "max_train_samples": 3}
        (cut / "config.json").write_text(json.dumps(config))
    else:
        file.unlink()
    if broken == "finished":
        (cut / "training_info.json").write_text("{}")
    before = contents(cut)
    try:
        with stack, pytest.raises(RefusedError, match=message):
            training.resume(cut, [])
    finally:
        shutil.rmtree(cut_once.parent / "data")
        shutil.move(data, cut_once.parent / "data")
    assert contents(cut) == before


def test_what_may_have_changed_is_taken_as_it_is_now(
    cut: Path, cut_once: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also scores of before are those of the images of now, and lost metrics are no obstacle."""
    folder, data = cut, shutil.copytree(cut_once.parent / "data", tmp_path / "data")
    config = json.loads((folder / "config.json").read_text())
    config["args"] |= {"data_root": str(data), "kl_coef": 0.5, "num_workers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match=r"settings \(kl_coef 0.01, now 0.5\)\. .*--allow_change settings"):
        training.resume(folder, [], allow_change=["images", "masks"])
    before = json.loads((folder / "val_before.json").read_text())["rows"]
    for sample in find_samples(data):
        Image.fromarray(~np.asarray(Image.open(sample.mask_path))).save(sample.mask_path)
    (folder / "metrics.jsonl").unlink()
    done = no_charts(training.resume)(folder, [], allow_change=["settings", "masks"])
    assert "taken as it is now: settings (kl_coef 0.01, now 0.5)" in caplog.text
    assert "metrics.jsonl has lost lines" in caplog.text
    now = json.loads((folder / "val_before.json").read_text())["rows"]
    assert [row["key"] for row in now] == [row["key"] for row in before]
    assert not {row["truth_hash"] for row in now} & {row["truth_hash"] for row in before}
    assert done.info["initial_metrics"]["dice"] != done.info["final_metrics"]["dice"]
    assert run_settings(folder)["data_root"] == str(data)  # config.json is whole again


def test_the_text_of_a_reward_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    hashes = {source_hash(get_reward_function()), source_hash(get_reward_function("simple_dice"))}
    for number in range(2):
        text = f"HALF = {number}\n\ndef score(pred, gt):\n    return HALF * 0.5\n"
        (tmp_path / f"own_reward_{number}.py").write_text(text)
        custom = import_function(f"own_reward_{number}:score")
        hashes.add(source_hash(get_reward_function(custom=custom)))
    assert len(hashes) == 4
    assert source_hash(get_reward_function(custom=custom)) in hashes


def test_one_flipped_bit_is_noticed_or_harmless(cut_once: Path, tmp_path: Path) -> None:
    """In 50 random places of every file that a run is gone on with or used by."""
    rng, cut, folder = random.Random(0), cut_once, tmp_path / "flipped"
    state = read_state(cut)
    assert "values" not in checkpoint._read_state(cut / PREVIOUS_FILE)
    samples = find_samples(cut.parent / "data")
    split, settings = read_split(cut / "data_split.json", samples), run_settings(cut)
    files = [*(cut / "best_lora").glob("adapter_*")]
    assert len(files) == 2
    assert damaged_files(cut / "best_lora") == []
    noticed = Counter()
    for _ in range(50):
        shutil.copytree(cut, folder)
        for name in (STATE_FILE, "data_split.json", "config.json"):
            flip(folder / name, rng)
        found = read_state(folder)
        assert "values" not in found or str(found) == str(state)
        noticed[STATE_FILE] += "values" not in found
        try:
            assert read_split(folder / "data_split.json", samples) == split
        except DataError:
            noticed["split"] += 1
        try:
            assert run_settings(folder) == settings
        except RefusedError:
            noticed["config"] += 1
        try:
            now = TrainConfig.from_dict(run_settings(folder, may_be_changed=True)).to_dict()
            if not checkpoint.check_fingerprint(state, {"settings": now}, []):
                assert now | {name: settings[name] for name in checkpoint.FREE_SETTINGS} == settings
        except (RefusedError, ValueError):
            noticed["resume"] += 1
        file = rng.choice(files)
        flip(folder / "best_lora" / file.name, rng)
        assert damaged_files(folder / "best_lora") == [file.name]
        shutil.rmtree(folder)
    assert noticed[STATE_FILE] > 45
    assert min(noticed.values()) > 15


def test_a_state_stays_until_a_new_one_is_complete(tmp_path: Path, monkeypatch) -> None:
    state = {"step": 7, "count": torch.tensor(7.0), "big": 2**100, "nan": float("nan"), "none": None}
    write_state(tmp_path, state)

    def full_disk(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(RunError, match=r"resume\.safetensors cannot be written \(No space left.*Make room"):
        write_state(tmp_path, {"count": torch.tensor(8.0)})
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    assert str(read_state(tmp_path)) == str(state)
    monkeypatch.undo()
    write_state(tmp_path, {"step": 8})
    assert {path.name for path in tmp_path.iterdir()} == {STATE_FILE, PREVIOUS_FILE}
    (tmp_path / STATE_FILE).unlink()  # killed between the two renames
    assert str(read_state(tmp_path)) == str(state)


def test_a_resumed_run_takes_no_other_settings(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(cut)
    assert cli.main(["train", "--resume_from", str(cut), "--num_epochs", "9"]) == 2
    assert "num_epochs" in capsys.readouterr().err
    assert contents(cut) == before
