"""Evaluating adapters on the held-out side of their own split, with the run's own settings."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vesselrl.cli import main
from vesselrl.data.annotations import find_samples
from vesselrl.data.splits import split_by_patient, write_split
from vesselrl.errors import CheckpointError, DataError, RunError
from vesselrl.evaluation.held_out import EvaluationPlan, evaluate_held_out
from vesselrl.evaluation.results import Evaluation, csv_text, read_evaluation
from vesselrl.experiment.config import get_preset
from vesselrl.inference.predictor import Prediction, Predictor
from vesselrl.training.train import train


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that results may be written into."""
    return Path(shutil.copytree(finished_run, tmp_path / finished_run.name))


def keys(evaluation: Evaluation) -> set[str]:
    return {row["key"] for row in evaluation.rows}


def split_keys(run: Path, side: str) -> set[str]:
    return set(json.loads((run / "data_split.json").read_text())["samples"][side])


def change_settings(run: Path, change: Callable[[dict], object]) -> None:
    values = json.loads((run / "config.json").read_text())
    change(values["args"])
    (run / "config.json").write_text(json.dumps(values))


def test_the_test_side_gives_the_numbers_of_the_training(run: Path) -> None:
    before = read_evaluation(run / "test_before.json")
    after = read_evaluation(run / "test_after.json")
    assert csv_text(after.rows) != csv_text(before.rows)  # else an adapter that is not loaded would pass
    done = evaluate_held_out(EvaluationPlan(lora_weights=str(run)))
    result, path = done.evaluation, done.path
    assert path == run / "evaluation" / "test_best_lora.json"
    assert csv_text(result.rows) == csv_text(after.rows)
    assert csv_text(read_evaluation(path).rows) == csv_text(after.rows)
    assert path.with_suffix(".csv").exists()
    from_adapter = evaluate_held_out(EvaluationPlan(lora_weights=str(run / "best_lora"))).evaluation
    assert csv_text(from_adapter.rows) == csv_text(after.rows)


def test_the_validation_side_gives_the_numbers_of_the_last_validation(run: Path) -> None:
    done = evaluate_held_out(EvaluationPlan(lora_weights=str(run / "final_lora"), side="val"))
    result, path = done.evaluation, done.path
    assert path.name == "val_final_lora.json"
    expected = read_evaluation(run / "val_latest.json").rows
    assert sorted(map(str, result.rows)) == sorted(map(str, expected))


@pytest.mark.parametrize("side", ["train", "val", "test"])
def test_each_side_is_the_one_of_the_run_even_for_another_seed(
    run: Path, angiograms: Path, side: str
) -> None:
    other = split_by_patient(find_samples(angiograms), seed=7)
    assert {sample.key for sample in other.test} != split_keys(run, "test")  # seed 42
    write_split(run / "data_split.json", other)
    result = evaluate_held_out(EvaluationPlan(lora_weights=str(run), side=side)).evaluation
    assert keys(result) == {sample.key for sample in getattr(other, side)}


def test_all_sides_together(run: Path) -> None:
    result = evaluate_held_out(EvaluationPlan(lora_weights=str(run), side="all")).evaluation
    assert len(result.rows) == 20
    assert keys(result) == split_keys(run, "train") | split_keys(run, "val") | split_keys(run, "test")


def test_the_base_alone_gives_the_numbers_before_training(
    run: Path, tiny_checkpoint: Path, angiograms: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = EvaluationPlan(str(tiny_checkpoint), data_root=str(angiograms), output_dir=str(tmp_path / "base"))
    done = evaluate_held_out(plan)
    result, path = done.evaluation, done.path
    assert path == tmp_path / "base" / "test_base.json"
    assert csv_text(result.rows) == csv_text(
        read_evaluation(run / "test_before.json").rows
    )  # the same seed, 42
    assert "splitting by patient anew (seed 42)" in caplog.text


def test_the_threshold_moves_the_masks(run: Path) -> None:
    foreground = {}
    for threshold in (1e-6, 0.5, 0.999):  # a random model is sure of nearly every pixel
        done = evaluate_held_out(EvaluationPlan(lora_weights=str(run), threshold=threshold))
        foreground[threshold] = sum(row["foreground"] for row in done.evaluation.rows)
        assert json.loads(done.path.read_text())["extra"]["threshold"] == threshold
    assert foreground[1e-6] > foreground[0.5] > foreground[0.999]


def test_small_components_are_removed_as_in_the_run_or_as_asked(run: Path) -> None:
    def masks(**plan) -> tuple[list[float], list[float], int]:
        done = evaluate_held_out(EvaluationPlan(lora_weights=str(run), **plan))
        kept = json.loads(done.path.read_text())["extra"]["min_component_px"]
        return (
            [row["foreground"] for row in done.evaluation.rows],
            [row["foreground"] for row in done.tuned.rows],
            kept,
        )

    plain, tuned, kept = masks()
    assert kept == 0
    assert all(plain)
    assert all(tuned)
    change_settings(run, lambda args: args.update(min_component_px=10**6))
    nothing = [0.0] * len(plain)
    assert masks() == (nothing, nothing, 10**6)
    curve = evaluate_held_out(EvaluationPlan(lora_weights=str(run))).tuning.curve
    assert (curve.best.recall, curve.best.threshold) == (0, 0.5)  # chosen on masks as they are used
    assert masks(min_component_px=0) == (plain, tuned, 0)
    with pytest.raises(ValueError, match="min_component_px is -1"):
        masks(min_component_px=-1)


def test_predicting_removes_what_the_run_removed(run: Path, angiograms: Path, tmp_path: Path) -> None:
    def predicted(*options: str) -> int:
        image = next((angiograms / "images").iterdir())
        out = tmp_path / "out"
        arguments = ["--image", str(image), "--lora_weights", str(run), "--output_dir", str(out)]
        base = json.loads((run / "config.json").read_text())["args"]["model_path"]
        assert main(["predict", *arguments, "--base_model", base, *options]) == 0
        return int(np.asarray(Image.open(next(out.glob("*_mask.png")))).sum())

    assert predicted() > 0
    change_settings(run, lambda args: args.update(min_component_px=10**6))
    assert predicted() == 0
    assert predicted("--min_component_px", "0") > 0


def test_gaps_are_closed_as_in_the_run_or_as_asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A predictor with a bar of 0.9 that a faint stretch of 0.3 cuts in two."""
    values = np.full((64, 64), 0.01, np.float32)
    values[30:34, 5:60] = 0.9
    values[30:34, 30:35] = 0.3
    prediction = Prediction(values > 0.5, values, np.zeros_like(values))
    monkeypatch.setattr(Predictor, "predict", lambda self, image: prediction)

    def foreground(**plan) -> set[tuple[float, float]]:
        done = evaluate_held_out(EvaluationPlan(lora_weights=str(run), **plan))
        assert done.tuning.curve.to_json()["thresholds"]
        return {row["foreground"] * 64**2 for row in done.evaluation.rows}

    assert foreground() == {4 * 50}
    change_settings(run, lambda args: args.update(close_gaps=0.2))
    assert foreground() == {4 * 55}
    assert foreground(close_gaps=0.0) == {4 * 50}
    assert foreground(close_gaps=0.25, min_component_px=150) == {0}  # 100 px on either side


def test_the_reward_is_the_one_of_the_run(run: Path) -> None:
    change_settings(run, lambda args: args.update(reward_type="simple_dice"))
    result = evaluate_held_out(EvaluationPlan(lora_weights=str(run))).evaluation
    assert [row["reward"] for row in result.rows] == pytest.approx([10 * row["dice"] for row in result.rows])


def test_other_data_is_split_anew(run: Path, angiograms: Path, tmp_path: Path) -> None:
    other = shutil.copytree(angiograms, tmp_path / "other")
    for folder in ("images", "masks"):
        for file in sorted((tmp_path / "other" / folder).iterdir())[:8]:
            file.unlink()
    plan = EvaluationPlan(lora_weights=str(run), data_root=str(other), side="all")
    result = evaluate_held_out(plan).evaluation
    assert len(result.rows) == 12


def test_a_copy_of_the_data_keeps_the_split_of_the_run(run: Path, angiograms: Path, tmp_path: Path) -> None:
    """A new split would score training patients as test."""
    other = split_by_patient(find_samples(angiograms), seed=7)
    write_split(run / "data_split.json", other)
    copy = shutil.copytree(angiograms, tmp_path / "moved")
    result = evaluate_held_out(EvaluationPlan(lora_weights=str(run), data_root=str(copy))).evaluation
    assert keys(result) == {sample.key for sample in other.test}
    assert result.marks == ()


def test_where_no_split_tells_who_was_trained_on_the_result_says_so(
    run: Path, angiograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "vesselrl.evaluation.held_out.split_by_patient",
        lambda samples, shares: asked.append(shares) or split_by_patient(samples, shares=shares),
    )
    base = json.loads((run / "config.json").read_text())["args"]["model_path"]
    alone = shutil.copytree(run / "best_lora", tmp_path / "alone" / "best_lora")
    fewer = Path(shutil.copytree(angiograms, tmp_path / "fewer"))
    for folder in ("images", "masks"):
        min((fewer / folder).iterdir()).unlink()
    places = {"base_model": base, "output_dir": str(tmp_path / "out")}
    for weights, root in ((alone, angiograms), (run, fewer)):
        plan = EvaluationPlan(lora_weights=str(weights), data_root=str(root), **places)
        done = evaluate_held_out(plan)
        assert [mark.split(":")[0] for mark in done.evaluation.marks] == ["UNKNOWN PATIENTS"]
        assert "UNKNOWN PATIENTS" in done.report_path.read_text()
        assert asked[-1].keys() == {sample.key for sample in find_samples(root)}  # dealt as training deals
    known = replace(plan, lora_weights=str(alone), data_root=str(angiograms), output_dir=str(tmp_path / "b"))
    result = evaluate_held_out(replace(known, split_file=str(run / "data_split.json"))).evaluation
    assert keys(result) == split_keys(run, "test")
    assert result.marks == ()


def test_the_doubts_of_the_run_stay_with_its_results(run: Path) -> None:
    content = json.loads((run / "data_split.json").read_text())
    (run / "data_split.json").write_text(json.dumps(content | {"doubts": ["NEAR DUPLICATES: alike."]}))
    assert evaluate_held_out(EvaluationPlan(lora_weights=str(run))).evaluation.marks == (
        "NEAR DUPLICATES: alike.",
    )


def test_the_result_of_another_model_is_not_replaced(
    run: Path, angiograms: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        shutil.copytree(run / "best_lora", tmp_path / name / "best_lora")
    shared = {"data_root": str(angiograms), "output_dir": str(tmp_path / "out"), "tune": False}
    plan = EvaluationPlan(str(tiny_checkpoint), str(tmp_path / "first" / "best_lora"), **shared)
    before = evaluate_held_out(plan).path.read_bytes()
    with pytest.raises(RunError, match="holds the evaluation of another model"):
        evaluate_held_out(replace(plan, lora_weights=str(tmp_path / "second" / "best_lora")))
    assert evaluate_held_out(plan).path.read_bytes() == before


def test_predict_asks_what_the_run_asked(
    run: Path, angiograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_settings(run, lambda args: args.update(prompt="Find the coronary tree."))
    asked, load = [], Predictor.from_pretrained
    monkeypatch.setattr(
        Predictor,
        "from_pretrained",
        lambda *args, **options: asked.append(options["prompt"]) or load(*args, **options),
    )
    base = json.loads((run / "config.json").read_text())["args"]["model_path"]
    arguments = ["predict", "--base_model", base, "--image", str(next((angiograms / "images").iterdir()))]
    arguments += ["--output_dir", str(tmp_path / "out")]
    own, other = ["--lora_weights", str(run)], ["--prompt", "Segment."]
    for options in ([], own, own + other):
        assert main([*arguments, *options]) == 0
    assert asked == ["Please segment the blood vessel.", "Find the coronary tree.", "Segment."]


def test_results_of_several_runs_in_one_folder_do_not_replace_each_other(
    finished_run: Path, tmp_path: Path
) -> None:
    paths = []
    for name in ("first", "second"):
        shutil.copytree(finished_run, tmp_path / name)
        for weights in ("best_lora", "final_lora"):
            plan = EvaluationPlan(
                lora_weights=str(tmp_path / name / weights), output_dir=str(tmp_path / "both")
            )
            paths.append(evaluate_held_out(plan).path)
    assert len(set(paths)) == 4
    written = {path.name for path in (tmp_path / "both").glob("*.json")}
    kinds = ("best_lora", "best_lora_tuned", "best_lora_thresholds")
    kinds += ("final_lora", "final_lora_tuned", "final_lora_thresholds")
    assert written == {f"{run}_test_{kind}.json" for run in ("first", "second") for kind in kinds}


def test_a_debug_run_can_be_evaluated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its random model and its drawn data are nowhere named; both follow from the settings."""
    monkeypatch.setattr("vesselrl.training.train.plot_panels", lambda cases, path: None)
    folder = train(get_preset("debug", output_dir=str(tmp_path / "output"), seed=5), ["vesselrl"]).folder
    files = sorted((tmp_path / "output").iterdir())
    monkeypatch.chdir(tmp_path)
    result = evaluate_held_out(EvaluationPlan(lora_weights=str(folder))).evaluation
    assert csv_text(result.rows) == csv_text(read_evaluation(folder / "test_after.json").rows)
    assert sorted((tmp_path / "output").iterdir()) == files
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


# ---- What cannot be evaluated


def test_an_unknown_side_names_the_choices(run: Path) -> None:
    with pytest.raises(DataError, match="--split held-out is unknown; choose one of test, val, train, all"):
        evaluate_held_out(EvaluationPlan(lora_weights=str(run), side="held-out"))


@pytest.mark.parametrize("threshold", [0.0, 1.0, 50])
def test_a_threshold_that_is_no_probability(run: Path, threshold: float) -> None:
    with pytest.raises(ValueError, match="give a probability between 0 and 1"):
        evaluate_held_out(EvaluationPlan(lora_weights=str(run), threshold=threshold))
    assert not (run / "evaluation").exists()


def test_a_missing_adapter_is_found_before_data_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "nowhere"))):
        evaluate_held_out(EvaluationPlan(lora_weights=str(tmp_path / "nowhere")))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_found_before_scoring(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "evaluation").write_text("a file")
    monkeypatch.setattr("vesselrl.evaluation.held_out.predict_once", None)
    with pytest.raises(RunError, match="evaluation is a file"):
        evaluate_held_out(EvaluationPlan(lora_weights=str(run)))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_damaged_settings_of_the_run(run: Path, content: str) -> None:
    (run / "config.json").write_text(content)
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        evaluate_held_out(EvaluationPlan(lora_weights=str(run)))


def test_the_split_belongs_to_other_data(run: Path, angiograms: Path, tmp_path: Path) -> None:
    other = tmp_path / "renamed"
    shutil.copytree(angiograms, other)
    for folder in ("images", "masks"):
        file = min((other / folder).iterdir())
        file.rename(file.with_name(file.name.replace("0A1B2C3D", "0A1B2C3E")))
    change_settings(run, lambda args: args.update(data_root=str(other)))
    with pytest.raises(DataError, match=r"data_split\.json"):
        evaluate_held_out(EvaluationPlan(lora_weights=str(run)))


def test_the_verb_prints_no_person(
    run: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "vesselrl")
    assert main(["evaluate", "--lora_weights", str(run), "--split", "all"]) == 0
    out, err = capsys.readouterr()
    assert "20 images of 10 patients, 0 failed" in out.replace("\n", " ")
    written = "".join(file.read_text() for file in (run / "evaluation").iterdir())
    assert not re.search(r"ZHANG|123456789\d", out + err + caplog.text + written)


def test_the_runs_own_data_under_another_path_keeps_its_split(run: Path, angiograms: Path) -> None:
    """A new split of the same data would score training patients as test."""
    other = split_by_patient(find_samples(angiograms), seed=7)
    write_split(run / "data_split.json", other)
    path = f"{angiograms.parent}/./{angiograms.name}"
    result = evaluate_held_out(EvaluationPlan(lora_weights=str(run), data_root=path)).evaluation
    assert keys(result) == {sample.key for sample in other.test}


def test_an_untouched_base_can_be_marked(angiograms: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = EvaluationPlan(
        str(tiny_checkpoint), data_root=str(angiograms), output_dir=str(tmp_path), base_trained_on="all"
    )
    assert evaluate_held_out(plan).evaluation.marks[0].startswith("IN-SAMPLE BASELINE")
