"""The learning benchmark with pretended trainings: it goes on where it was left, and test chooses nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.learning import learning
from benchmarks.methods import FIXED_POST, METHODS, SUITES, Suite, get_suite, prepare_suite
from benchmarks.trainings import run_command
from vesselrl.errors import DataError, RunError
from vesselrl.evaluation.results import read_extra
from vesselrl.experiment.config import TrainConfig
from vesselrl.training.checkpoint import STATE_FILE


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished output folder."""
    return shutil.copytree(finished, tmp_path / "output")


def choices(output: Path) -> dict[str, tuple]:
    """Source and post-processing of every method and seed, and at equal recall, from the files."""
    names = ("source", "threshold", "min_component_px", "close_gaps")
    files = [p for p in (output / "synthetic").glob("*/test*.json") if p.name != "test_curve.json"]
    return {f"{p.parent.name}/{p.stem}": tuple(map(read_extra(p).get, names)) for p in files}


def kill(output: Path, name: str) -> Path:
    """Leaves a training as if killed: a run folder without its last file."""
    (info,) = (output / "synthetic" / name).glob("*/training_info.json")
    info.unlink()
    return info.parent


# ---- It goes on where it was left


def test_a_second_call_trains_nothing_and_says_the_same(training, output: Path) -> None:
    folder = output / "synthetic"
    report = (folder / "report.md").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*seed4*/*.json")}
    assert learning(seeds=2, output_dir=str(output)) == 0
    assert training.trained == []
    assert (folder / "report.md").read_text() == report
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # scores were read, not made again


def test_a_killed_training_is_trained_again_and_no_other(training, output: Path) -> None:
    (kill(output, "rl_seed43") / "left_over").touch()
    scored = output / "synthetic" / "rl_post_seed43" / "test.json"
    before = scored.stat().st_mtime_ns
    learning(seeds=2, output_dir=str(output))
    assert training.trained == ["rl_seed43"]
    assert list((output / "synthetic" / "rl_seed43").rglob("left_over")) == []
    assert scored.stat().st_mtime_ns > before  # scored again


@pytest.mark.parametrize("since", ["nothing", "a new setting", "another value"])
def test_a_training_that_was_cut_off_goes_on_if_its_settings_are_the_same(
    training, output: Path, since: str
) -> None:
    """Hours of training are never removed unasked: with another value it is an error."""
    run = kill(output, "rl_seed43")
    (run / STATE_FILE).touch()
    file = run.parent / "arm.json"
    document = json.loads(file.read_text())
    assert document["settings"]["stage"] == "rl"
    if since == "a new setting":  # one that a newer version brings had its default before
        del document["settings"]["kl_coef"]
    if since == "another value":
        document["settings"]["kl_coef"] += 1
    file.write_text(json.dumps(document))
    if since == "another value":
        with pytest.raises(RunError, match=r"kl_coef 1.01, now 0.01.*Delete that folder"):
            learning(seeds=2, output_dir=str(output))
        assert training.trained == training.resumed == []
    else:
        assert learning(seeds=2, output_dir=str(output)) == 0
        assert (training.trained, training.resumed) == (["rl_seed43"], [run])
        assert "seconds" not in json.loads(file.read_text())


def test_failures_stop_no_other_and_the_exit_code_says_so(
    training, output: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("sft_cldice_seed42", "sft_rl_seed42", "unet_seed43"):
        kill(output, name)
    training.failing, training.killed = {"sft_cldice_seed42"}, {"sft_rl_seed42"}
    assert learning(seeds=2, output_dir=str(output)) == 1
    assert sorted(training.trained) == ["sft_cldice_seed42", "sft_rl_seed42", "unet_seed43"]
    err = capsys.readouterr().err
    assert "error: sft_cldice_seed42 failed: exit code 3" in err
    assert "train.log (the last words)" in err
    assert "ended without a training_info.json" in err
    report = (output / "synthetic" / "report.md").read_text()
    assert (
        "Left out: C4 supervised with soft clDice, supervised then PPO, supervised then PPO, post-" in report
    )
    assert "| C7 best of C2 to C4" in report  # of those that are there


def test_unfair_or_foreign_folders_are_refused(training, tmp_path: Path) -> None:
    training.num_passes = {"sft_seed42": 4}
    with pytest.raises(RunError, match=r"same number of images.*sft_seed42 32.*rl_seed42 24"):
        learning(seeds=1, output_dir=str(tmp_path))
    (tmp_path / "synthetic" / "rl_seed42" / "arm.json").unlink()
    training.trained.clear()
    with pytest.raises(RunError, match="is not of this benchmark"):
        learning(seeds=1, output_dir=str(tmp_path))
    assert training.trained == []


def test_a_training_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert run_command(["trian"], tmp_path / "train.log") == 2
    assert "Unknown verb 'trian'" in (tmp_path / "train.log").read_text()


# ---- Test chooses nothing


@pytest.mark.parametrize("half", ["test", pytest.param("train", marks=pytest.mark.slow)])
def test_choices_depend_on_validation_truths_alone(
    training, pretended: Suite, finished: Path, tmp_path: Path, half: str
) -> None:
    changed = shutil.copytree(pretended.data_root, tmp_path / "changed")
    for path in sorted((changed / "masks").glob(f"{half}_*.png")):
        Image.fromarray(np.asarray(Image.open(path)) & (np.arange(48) % 4 == 0)[:, None]).save(path)
    learning(seeds=2, output_dir=str(tmp_path / "output"), data_root=str(changed))
    one, other = choices(finished), choices(tmp_path / "output")
    assert len(one) == 2 * (12 + 2 * 4)  # every method, and C1 and C3 at the recall of four RL methods
    moved = {name for name in one if one[name] != other[name]}
    assert not moved if half == "test" else {"rl_post_seed42/test", "sft_tuned_seed42/test"} & moved


def test_only_the_base_and_tuned_masks_differ_from_the_fixed_post_processing(finished: Path) -> None:
    fixed = (FIXED_POST.min_component_px, FIXED_POST.close_gaps)
    for name, (_, _, *post) in choices(finished).items():
        method, _, rl = name.replace("_seed", "/").replace("test_at_recall_of_", "").split("/")
        kind = METHODS[rl if rl in METHODS else method].post  # a control gets that of the RL method
        assert kind == "tuned" or tuple(post) == ((0, 0.0) if kind == "raw" else fixed), name


def test_the_report_has_every_method_verdict_and_ledger_row(finished: Path) -> None:
    folder = finished / "synthetic"
    page, ledger = ((folder / name).read_text() for name in ("report.md", "ledger_rows.md"))
    assert all(f"| {method.label} |" in page for method in METHODS.values())
    assert "every training looked at 24 images" in page  # 4 images x 2 epochs x 3 passes
    assert (folder / "pareto.png").stat().st_size > 10_000
    verdicts = [line for line in page.splitlines() if line.startswith(("- E2", "- E3"))]
    assert len(verdicts) == 4 + 8  # E2 of four RL methods, E3 of each against C1 and C3
    assert any(
        v.startswith("- E2, PPO, against C7 best of C2 to C4, post-processed: holds: ") for v in verdicts
    )
    assert any(
        v.startswith("- E3, PPO, against C1 base, tuned threshold at equal recall: holds") for v in verdicts
    )
    rows = ledger.splitlines()[2:]
    assert len(rows) == 5
    assert all(row.count(" | ") == 7 and row.startswith("| R??? |") for row in rows)
    assert all("| 0123456" in row and "| 42, 43 |" in row for row in rows)


# ---- Images and options


def test_the_published_halves_stay_apart(pretended: Suite, angiograms: Path, tmp_path: Path) -> None:
    _, split = prepare_suite(pretended, tmp_path)
    stems = {s.image_path.stem for s in (*split.train, *split.val)}
    assert stems == {f"train_{number:03d}" for number in (1, 3, 4, 5, 6, 7, 8)}  # 2 is dropped
    assert len(split.val) == 3
    assert {s.image_path.stem for s in split.test} == {f"test_{number:03d}" for number in range(9, 15)}
    with pytest.raises(DataError, match=r"written for other train, val images.*another --output_dir"):
        prepare_suite(pretended._replace(num_val_patients=2), tmp_path)
    with pytest.raises(DataError, match="neither published half of synthetic"):
        prepare_suite(pretended, tmp_path, str(angiograms))


@pytest.mark.parametrize(("name", "sizes"), [("coronary80", (30, 8, 40)), ("chase_db1", (16, 4, 8))])
def test_the_real_suites(shared_folder: Path, tmp_path: Path, name: str, sizes: tuple) -> None:
    _, split = prepare_suite(get_suite(name), tmp_path, str(shared_folder / "data" / name))
    assert (len(split.train), len(split.val), len(split.test)) == sizes
    full, reduced = get_suite(name), get_suite(name, reduced=True)
    assert reduced.name == f"{name}_reduced"
    assert reduced.options["num_epochs"] < full.options["num_epochs"]


def test_options_are_settings_that_keep_passes_and_post_processing_equal() -> None:
    known, post = TrainConfig().to_dict(), {"min_component_px", "close_gaps"}
    for suite in list(SUITES.values())[1:]:  # the first is made for these tests
        assert set(suite.options) <= set(known)
        assert {name: suite.options[name] for name in post} == {
            name: getattr(FIXED_POST, name) for name in post
        }
    for method in METHODS.values():
        assert set(method.options or {}) <= set(known) - {"num_epochs", "num_passes", *post}
