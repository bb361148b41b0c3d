"""The learning benchmark with pretended trainings: it goes on where it was left, and test chooses nothing."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.learning import learning
from benchmarks.trainings import FIXED_POST, METHODS, SUITES, TABLE, prepare_split, run_command
from vesselrl.errors import DataError, RunError
from vesselrl.evaluation.results import read_extra
from vesselrl.experiment.config import TrainConfig
from vesselrl.training.checkpoint import STATE_FILE


@pytest.fixture
def options(finished: Path, published: Path, tmp_path: Path) -> dict:
    """Options that go on with a copy of the finished output folder."""
    output = shutil.copytree(finished, tmp_path / "output")
    return {"seeds": 2, "output_dir": str(output), "data_root": str(published)}


def kill(options: dict, name: str) -> Path:
    """Leaves a training as if killed: a run folder without its last file."""
    (info,) = (Path(options["output_dir"]) / "synthetic" / name).glob("*/training_info.json")
    info.unlink()
    return info.parent


def test_a_second_call_trains_only_what_is_missing_and_says_the_same(training, options: dict) -> None:
    (kill(options, "rl_seed43") / "left_over").touch()
    folder = Path(options["output_dir"]) / "synthetic"
    report = (folder / "report.md").read_text()
    assert learning(**options) == 0
    assert training.trained == ["rl_seed43"]
    assert list(folder.rglob("left_over")) == []
    assert (folder / "report.md").read_text() == report


@pytest.mark.parametrize("since", ["nothing", "a new setting", "another value"])
def test_a_training_that_was_cut_off_goes_on_if_its_settings_are_the_same(
    training, options: dict, since: str
) -> None:
    """Hours of training are never removed unasked: with another value it is an error."""
    run = kill(options, "rl_seed43")
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
            learning(**options)
        assert training.trained == []
    else:
        assert learning(**options) == 0
        assert (training.trained, training.resumed) == (["rl_seed43"], [run])


def test_failures_stop_no_other_and_the_exit_code_says_so(
    training, options: dict, capsys: pytest.CaptureFixture
) -> None:
    for name in ("sft_cldice_seed42", "sft_rl_seed42", "unet_seed43"):
        kill(options, name)
    training.failing, training.killed = {"sft_cldice_seed42"}, {"sft_rl_seed42"}
    assert learning(**options) == 1
    assert sorted(training.trained) == ["sft_cldice_seed42", "sft_rl_seed42", "unet_seed43"]
    err = capsys.readouterr().err
    assert "Failed: sft_cldice_seed42: exit code 3" in err
    assert "train.log (the last words)" in err
    assert "ended without a training_info.json" in err
    assert "Left out: supervised then PPO, post-processed." in err
    report = (Path(options["output_dir"]) / "synthetic" / "report.md").read_text()
    assert "| C7 best of C2 to C4" in report  # of those that are there
    assert "| C4" not in report


def test_a_foreign_folder_is_refused(training, options: dict) -> None:
    (Path(options["output_dir"]) / "synthetic" / "rl_seed42" / "arm.json").unlink()
    with pytest.raises(RunError, match="is not of this benchmark"):
        learning(**options)
    assert training.trained == []


def test_a_training_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert run_command(["trian"], tmp_path / "train.log") == 2
    assert "Unknown verb 'trian'" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("half", ["test", pytest.param("train", marks=pytest.mark.slow)])
def test_choices_depend_on_validation_truths_alone(
    training, published: Path, finished: Path, tmp_path: Path, half: str
) -> None:
    def choices(output: Path) -> dict[str, tuple]:
        names = ("source", "threshold", "min_component_px", "close_gaps")
        files = (output / "synthetic").glob("*/test*.json")
        return {f"{p.parent.name}/{p.stem}": tuple(map(read_extra(p).get, names)) for p in files}

    changed = shutil.copytree(published, tmp_path / "changed")
    for path in sorted((changed / "masks").glob(f"{half}_*.png")):
        Image.fromarray(np.asarray(Image.open(path)) & (np.arange(48) % 4 == 0)[:, None]).save(path)
    learning(seeds=2, output_dir=str(tmp_path / "output"), data_root=str(changed))
    one, other = choices(finished), choices(tmp_path / "output")
    assert len(one) == 2 * (12 + 2 * 4)  # every method, and C1 and C3 at the recall of four RL methods
    moved = {name for name in one if one[name] != other[name]}
    assert not moved if half == "test" else {"rl_post_seed42/test", "sft_tuned_seed42/test"} & moved
    for name, (_, _, *post) in one.items():  # only the base and tuned masks differ from the fixed ones
        method, _, rl = name.replace("_seed", "/").replace("test_at_recall_of_", "").split("/")
        kind = METHODS[rl if rl in METHODS else method].post  # a control gets that of the RL method
        fixed = [FIXED_POST.min_component_px, FIXED_POST.close_gaps]
        assert kind == "tuned" or post == ([0, 0.0] if kind == "raw" else fixed), name


def test_the_report_has_every_method_verdict_and_ledger_row(finished: Path, repository: Path) -> None:
    folder = finished / "synthetic"
    page = (folder / "report.md").read_text()
    assert all(f"| {method.label} |" in page for method in METHODS.values())
    assert "2 seeds, 16 image passes" in page  # 4 images x 2 epochs x 2 passes
    assert (folder / "pareto.png").stat().st_size > 10_000
    verdicts = [line for line in page.splitlines() if line.startswith(("- E2", "- E3"))]
    assert len(verdicts) == 4 + 8  # E2 of four RL methods, E3 of each against C1 and C3
    assert verdicts[0].startswith("- E2, PPO, against C7 best of C2 to C4, post-processed: holds: ")
    assert verdicts[4].startswith("- E3, PPO, against C1 base, tuned threshold at equal recall: holds: ")
    assert "does not hold: validation recall differs by 0.210" in verdicts[5]
    rows = [*csv.DictReader((folder / "ledger_rows.csv").open(encoding="utf-8"))]
    assert ",".join(rows[0]) == (repository / "docs" / "results.csv").read_text("utf-8").partition("\n")[0]
    assert len(rows) == 5
    assert all(row["commit"].startswith("0123456") and row["seeds"] == "42, 43" for row in rows)


def test_the_published_halves_stay_apart(
    pretended, published: Path, angiograms: Path, tmp_path: Path
) -> None:
    suite, path = SUITES["synthetic"], tmp_path / "data_split.json"
    split = prepare_split(suite, published, path)
    stems = {s.image_path.stem for s in (*split.train, *split.val)}
    assert stems == {f"train_{number:03d}" for number in (1, 3, 4, 5, 6, 7, 8)}  # 2 is dropped
    assert len(split.val) == 3
    assert {s.image_path.stem for s in split.test} == {f"test_{number:03d}" for number in range(9, 15)}
    with pytest.raises(DataError, match=r"is of other images.*another --output_dir"):
        prepare_split(suite._replace(num_val_patients=2), published, path)
    with pytest.raises(DataError, match="need train_"):
        prepare_split(suite, angiograms, path)


@pytest.mark.parametrize(("name", "sizes"), [("coronary80", (30, 8, 40)), ("chase_db1", (16, 4, 8))])
def test_the_real_suites(shared_folder: Path, tmp_path: Path, name: str, sizes: tuple) -> None:
    split = prepare_split(SUITES[name], shared_folder / "data" / name, tmp_path / "data_split.json")
    assert (len(split.train), len(split.val), len(split.test)) == sizes
    assert SUITES[f"{name}_reduced"].num_epochs < SUITES[name].num_epochs


def test_options_are_settings_that_keep_passes_and_post_processing_equal() -> None:
    for method in METHODS.values():
        options = set(method.options or {})
        assert options <= set(TrainConfig().to_dict()) - set(TABLE["common"]) - {"num_epochs", "val_freq"}
