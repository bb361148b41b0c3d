"""Which trainings the learning benchmark asks for, on which images, and which folders it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vesselrl import cli
from vesselrl.benchmarks import learning_arms, learning_runner
from vesselrl.benchmarks.learning_arms import Suite, get_seeds, get_suite
from vesselrl.benchmarks.learning_data import prepare_suite
from vesselrl.benchmarks.learning_runner import command, plan_jobs, run_training, train_arm, train_jobs
from vesselrl.errors import DataError, RunError
from vesselrl.experiment.config import TrainConfig


@pytest.fixture
def jobs(pretended: Suite, tmp_path: Path) -> list:
    return plan_jobs(pretended, prepare_suite(pretended, tmp_path), tmp_path, (42, 43))


def names(side: tuple) -> set[str]:
    return {sample.image_path.stem for sample in side}


# ---- Arms and sizes


def test_every_command_line_gives_back_its_settings(jobs: list) -> None:
    for job in jobs:
        assert cli.parse(TrainConfig, command(job.config)[1:], "train") == job.config


def test_only_what_an_arm_is_named_for_differs(jobs: list) -> None:
    first, *others = (job.config.to_dict() for job in jobs if job.seed == 42)
    changed = {name for other in others for name in other if other[name] != first[name]}
    assert changed == {"stage", "sft_loss", "control", "output_dir"}
    assert {job.config.split_file for job in jobs} == {first["split_file"]}


def test_passes_that_cannot_be_equal_are_refused_before_training(
    pretended: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = replace(learning_arms.BY_NAME["rl"], settings={"stage": "rl", "num_epochs": 3})
    arms = tuple(longer if arm.name == "rl" else arm for arm in learning_arms.ARMS)
    monkeypatch.setattr(learning_runner, "ARMS", arms)
    with pytest.raises(RunError, match="would see each image a different number of times"):
        plan_jobs(pretended, prepare_suite(pretended, tmp_path), tmp_path, (42,))


@pytest.mark.parametrize("name", ["coronary80", "chase_db1"])
def test_a_reduced_suite_has_a_folder_of_its_own_and_less_to_do(name: str) -> None:
    full, reduced = get_suite(name), get_suite(name, reduced=True)
    assert reduced.name == f"{name}_reduced"
    assert reduced.settings["num_epochs"] < full.settings["num_epochs"]


@pytest.mark.parametrize("suite", list(learning_arms.SUITES.values()), ids=lambda suite: suite.name)
def test_every_training_is_validated_without_specks_and_gaps(suite: Suite) -> None:
    for name in ("min_component_px", "close_gaps"):
        assert suite.settings[name] == getattr(learning_arms.FIXED_POST, name) > 0
        assert not any(name in (arm.settings or {}) for arm in learning_arms.ARMS)


def test_unknown_suites_and_no_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="--suite is 'drive'; choose one of synthetic"):
        get_suite("drive")
    with pytest.raises(ValueError, match="--seeds is 0"):
        get_seeds(0)


# ---- Images


def test_the_published_halves_stay_apart(pretended: Suite, tmp_path: Path) -> None:
    split = prepare_suite(pretended, tmp_path).split
    training = names(split.train) | names(split.val)
    assert training == {f"train_{number:03d}" for number in (1, 3, 4, 5, 6, 7, 8)}  # 2 is dropped
    assert len(split.val) == 3
    assert names(split.test) == {f"test_{number:03d}" for number in range(9, 15)}


def test_the_split_is_written_once_and_then_kept(pretended: Suite, tmp_path: Path) -> None:
    first = prepare_suite(pretended, tmp_path)
    stamp = first.split_file.stat().st_mtime_ns
    assert prepare_suite(pretended, tmp_path).fingerprint == first.fingerprint
    assert first.split_file.stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match=r"written for other train, val images.*another --output_dir"):
        prepare_suite(replace(pretended, num_val_patients=2), tmp_path)


def test_data_without_published_halves_is_refused(pretended: Suite, angiograms: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither published half of synthetic"):
        prepare_suite(pretended, tmp_path, str(angiograms))
    with pytest.raises(DataError, match=r"There is no folder .*--data_root"):
        prepare_suite(pretended, tmp_path, str(tmp_path / "nowhere"))


def test_the_split_by_patient_is_cut_to_the_sizes(angiograms: Path, tmp_path: Path) -> None:
    suite = Suite("made", "made", str(angiograms), num_train=5, num_test=1)
    split = prepare_suite(suite, tmp_path).split
    assert (len(split.train), len(split.val), len(split.test)) == (5, 2, 1)
    assert len(split.patients("train")) == 5  # the choice goes round the patients


@pytest.mark.parametrize(("name", "sizes"), [("coronary80", (30, 8, 40)), ("chase_db1", (16, 4, 8))])
def test_the_real_suites(shared_folder: Path, tmp_path: Path, name: str, sizes: tuple) -> None:
    split = prepare_suite(get_suite(name), tmp_path, str(shared_folder / "data" / name)).split
    assert (len(split.train), len(split.val), len(split.test)) == sizes
    assert not {"train_017", "train_030"} & (names(split.train) | names(split.val)) or name == "chase_db1"
    assert all(stem.startswith("test_") for stem in names(split.test))


# ---- Folders


def test_a_folder_of_someone_else_is_left_alone(training, jobs: list) -> None:
    jobs[3].folder.mkdir(parents=True)
    (jobs[3].folder / "thesis.txt").touch()
    with pytest.raises(RunError, match="is no arm of this benchmark"):
        train_jobs(jobs, 2)
    assert training.trained == []
    assert (jobs[3].folder / "thesis.txt").exists()


def test_a_training_that_leaves_no_result_is_a_failure(training, jobs: list) -> None:
    training.killed = {jobs[0].folder.name}
    assert "ended without a training_info.json" in train_arm(jobs[0])
    assert jobs[0].run is None


def test_a_setting_that_came_later_had_its_default_then(training, jobs: list) -> None:
    train_arm(jobs[0])
    path = jobs[0].folder / "arm.json"
    stored = json.loads(path.read_text())
    del stored["settings"]["kl_coef"]
    path.write_text(json.dumps(stored))
    train_jobs(jobs[:1], 1)
    assert training.trained == [jobs[0].folder.name]  # the first time only


def test_a_training_runs_in_a_process_with_one_thread(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    assert run_training(["trian"], log) == 2
    assert "Unknown verb 'trian'" in log.read_text()
