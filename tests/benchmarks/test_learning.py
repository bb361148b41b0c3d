"""The learning benchmark with pretended trainings: it goes on where it was left, and test chooses nothing."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vesselrl import cli
from vesselrl.benchmarks.learning import benchmark_learning
from vesselrl.benchmarks.learning_arms import ARMS
from vesselrl.errors import RunError
from vesselrl.evaluation.results import read_evaluation, read_extra
from vesselrl.training.resuming import STATE_FILE

TRAINED = [arm.name for arm in ARMS if arm.settings is not None]


def choices(folder: Path) -> dict[str, dict]:
    """Source, threshold and component size of every arm and seed, and at equal recall, from the files."""
    chosen = {}
    for path in sorted(folder.glob("*/test*.json")):
        if path.name != "test_curve.json":
            extra = read_extra(path)
            chosen[f"{path.parent.name}/{path.stem}"] = {
                name: extra[name] for name in ("source", "threshold", "min_component_px", "close_gaps")
            }
    return chosen


def kill(output: Path, arm: str) -> None:
    """Leaves an arm as a killed training does: a run folder without its last file."""
    (info,) = (output / "synthetic" / arm).glob("*/training_info.json")
    info.unlink()
    (info.parent / "left_over").touch()


# ---- It goes on where it was left


def test_every_arm_is_trained_once_per_seed(
    training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vesselrl.benchmarks.learning.score_arms", lambda jobs, scorers: {})
    result = benchmark_learning("synthetic", 2, tmp_path, workers=2)
    assert sorted(training.trained) == sorted(f"{name}_seed{seed}" for name in TRAINED for seed in (42, 43))
    assert result.verdicts == (
        "Nothing can be judged: no RL arm and control have both finished for every seed.",
    )


def test_a_second_call_trains_nothing_and_says_the_same(training, finished, output: Path) -> None:
    folder = output / "synthetic"
    report = (folder / "report.md").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*seed4*/*.json")}
    result = benchmark_learning("synthetic", 2, output, argv=["vesselrl", "bench", "learning"])
    assert training.trained == []
    assert (result.verdicts, result.failures) == (finished[1].verdicts, {})
    assert (folder / "report.md").read_text() == report
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # scores were read, not made again


def test_what_was_chosen_from_another_grid_is_chosen_again(training, output: Path) -> None:
    """Of the untouched base too, which no change of settings makes anybody delete."""
    path = output / "synthetic" / "base_seed42" / "grid.json"
    right = json.loads(path.read_text())
    path.write_text(
        json.dumps({"origin": right["origin"] | {"grid": [[0.5], [0], [0.0]]}, "rewards": [[1.0]]})
    )
    benchmark_learning("synthetic", 2, output)
    assert json.loads(path.read_text()) == right
    assert training.trained == []


def test_a_third_seed_trains_only_that_seed(training, output: Path) -> None:
    benchmark_learning("synthetic", 3, output)
    assert sorted(training.trained) == sorted(f"{name}_seed44" for name in TRAINED)


def test_a_killed_arm_is_trained_again_and_no_other(training, output: Path) -> None:
    kill(output, "rl_seed43")
    scores = [output / "synthetic" / f"{name}_seed43" / "test.json" for name in ("rl", "rl_post")]
    before = [path.stat().st_mtime_ns for path in scores]
    assert benchmark_learning("synthetic", 2, output).failures == {}
    assert training.trained == ["rl_seed43"]
    assert list((output / "synthetic" / "rl_seed43").rglob("left_over")) == []
    after = [path.stat().st_mtime_ns for path in scores]
    assert all(new > old for new, old in zip(after, before, strict=True))  # scored again


@pytest.mark.parametrize("since", ["nothing", "a new setting", "another value"])
def test_an_arm_that_was_cut_off_goes_on_if_its_settings_are_the_same(
    training, output: Path, since: str
) -> None:
    """Hours of training are never removed unasked: with another value it is an error."""
    kill(output, "rl_seed43")
    arm = output / "synthetic" / "rl_seed43"
    (run,) = (path.parent for path in arm.glob("*/config.json"))
    (run / STATE_FILE).touch()
    document = json.loads((arm / "arm.json").read_text())
    if since == "a new setting":  # one that a newer version brings had its default before
        del document["settings"]["kl_coef"]
    if since == "another value":
        document["settings"]["kl_coef"] += 1
    (arm / "arm.json").write_text(json.dumps(document))
    if since == "another value":
        with pytest.raises(RunError, match=r"kl_coef 1.01, now 0.01.*Delete that folder"):
            benchmark_learning("synthetic", 2, output)
        assert training.trained == training.resumed == []
    else:
        assert benchmark_learning("synthetic", 2, output).failures == {}
        assert training.trained == ["rl_seed43"]
        assert training.resumed == [run]
        assert "seconds" not in json.loads((arm / "arm.json").read_text())
    assert run.exists()


def test_a_failed_arm_stops_no_other_and_the_exit_code_says_so(
    training, output: Path, capsys: pytest.CaptureFixture
) -> None:
    for arm in ("sft_cldice_seed42", "sft_rl_seed42", "unet_seed43"):
        kill(output, arm)
    training.failing = {"sft_cldice_seed42", "sft_rl_seed42"}
    arguments = ["bench", "learning", "--seeds", "2", "--output_dir", str(output)]
    assert cli.main(arguments) == 1
    assert sorted(training.trained) == ["sft_cldice_seed42", "sft_rl_seed42", "unet_seed43"]
    log = output / "synthetic" / "sft_cldice_seed42" / "train.log"
    err = capsys.readouterr().err
    assert re.search(rf"error: sft_cldice_seed42 failed: exit code 3 .*{log} \(the last words\)", err)
    report = (output / "synthetic" / "report.md").read_text()
    assert (
        "Left out: C4 supervised with soft clDice, supervised then PPO, supervised then PPO, post-processed."
        in report
    )
    assert "| C7 best of C2 to C4" in report  # of those that are there
    training.failing = set()
    assert cli.main(arguments) == 0


def test_another_setting_is_an_error_that_says_what_to_do(
    training, pretended, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pretended.settings, "learning_rate", 0.5)
    with pytest.raises(RunError, match=r"learning_rate None, now 0.5.*Delete that folder"):
        benchmark_learning("synthetic", 2, output)
    assert training.trained == []


def test_unequal_passes_are_refused(training, tmp_path: Path) -> None:
    training.num_passes = {"sft_seed42": 4}
    with pytest.raises(
        RunError, match=r"did not look at the same number of images.*sft_seed42 32.*rl_seed42 24"
    ):
        benchmark_learning("synthetic", 1, tmp_path)


# ---- Test chooses nothing


def test_no_choice_depends_on_the_test_truths(training, pretended, finished, tmp_path: Path) -> None:
    changed = shutil.copytree(pretended.data_root, tmp_path / "changed")
    rng = np.random.default_rng(5)
    for path in sorted((changed / "masks").glob("test_*.png")):
        Image.fromarray(rng.random((48, 48)) < 0.3).save(path)
    benchmark_learning("synthetic", 2, tmp_path / "output", data_root=str(changed))
    folders = finished[0] / "synthetic", tmp_path / "output" / "synthetic"
    one, other = map(choices, folders)
    assert len(one) == 2 * (12 + 2 * 4)  # every arm, and C1 and C3 at the recall of four RL arms
    assert one == other
    evaluations = [read_evaluation(folder / "rl_seed42" / "test.json") for folder in folders]
    dice = [evaluation.summary["metrics"]["dice"]["patient_mean"] for evaluation in evaluations]
    assert dice[0] > dice[1] + 0.3  # the truths did change
    first, second = ((folder / "report.md").read_text() for folder in folders)
    assert re.search("Strongest control on validation: (.*)", first)[0] in second


def test_validation_truths_do_choose(training, pretended, finished, tmp_path: Path) -> None:
    """The counterpart: what is chosen moves when the validation truths do."""
    changed = shutil.copytree(pretended.data_root, tmp_path / "changed")
    for path in sorted((changed / "masks").glob("train_*.png")):
        Image.fromarray(np.asarray(Image.open(path)) & (np.arange(48) % 4 == 0)[:, None]).save(path)
    benchmark_learning("synthetic", 1, tmp_path / "output", data_root=str(changed))
    one, other = choices(finished[0] / "synthetic"), choices(tmp_path / "output" / "synthetic")
    moved = {name for name in other if other[name]["threshold"] != one[name]["threshold"]}
    assert {"rl_post_seed42/test", "sft_tuned_seed42/test_at_recall_of_rl"} <= moved


# ---- The report


def test_the_report_has_every_arm_verdict_and_ledger_row(finished) -> None:
    output, result = finished
    html, page, ledger = (path.read_text() for path in result.files)
    assert [path.name for path in result.files] == ["report.html", "report.md", "ledger_rows.md"]
    assert all(f"| {arm.label} |" in page for arm in ARMS)
    assert "every training looked at 24 images" in page  # 4 images x 2 epochs x 3 passes
    assert "<svg" in html
    assert (output / "synthetic" / "pareto.png").stat().st_size > 10_000
    rows = ledger.splitlines()[2:]
    assert len(rows) == 5
    assert all(row.count(" | ") == 7 and row.startswith("| R??? |") for row in rows)
    assert all("`vesselrl bench learning` | 0123456" in row and "42, 43" in row for row in rows)


def test_the_verdicts_are_those_of_arms_made_good_and_bad(finished) -> None:
    verdicts = finished[1].verdicts
    assert len(verdicts) == 4 + 8  # E2 of four RL arms, E3 of each against C1 and C3
    by_start = {words.split(": ")[0]: words for words in verdicts}
    good = by_start["E2, PPO, against C7 best of C2 to C4, post-processed"]
    assert ": holds: " in good
    assert good.endswith(" of 2 seeds.")
    equal = by_start["E3, PPO, against C1 base, tuned threshold at equal recall"]
    assert ": holds: " in equal


def test_the_arm_files_tell_the_settings(finished) -> None:
    path = finished[0] / "synthetic" / "sft_rl_seed42" / "arm.json"
    stored = json.loads(path.read_text())["settings"]
    assert (stored["stage"], stored["seed"], stored["split_seed"]) == ("sft+rl", 42, 42)


def test_only_the_untouched_base_and_tuned_sizes_differ_in_the_smallest_component(finished) -> None:
    chosen = choices(finished[0] / "synthetic")
    sizes = {}
    for name, values in chosen.items():
        arm, _, side = name.partition("/test_at_recall_of_")
        if side:  # C1 and C3 get the size of the arm that they are compared with
            seed = arm.rpartition("_seed")[2]
            assert values["min_component_px"] == chosen[f"{side}_seed{seed}/test"]["min_component_px"]
            continue
        sizes.setdefault(name.partition("_seed")[0], set()).add(values["min_component_px"])
    assert sizes.pop("base") == {0}
    tuned = {name: sizes.pop(name) for name in list(sizes) if name.endswith("_post")}
    assert len(tuned) == 3
    assert set(map(frozenset, sizes.values())) == {frozenset({20})}
