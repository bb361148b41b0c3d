"""Evaluating adapters on the held-out subset of their own split, with the run's own settings and tuned."""

import csv
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from vesselrl.cli import main
from vesselrl.data.samples import find_samples, load_mask
from vesselrl.data.splits import Split, read_split, split_by_patient, write_split
from vesselrl.errors import RunError
from vesselrl.evaluation.held_out import evaluate_held_out
from vesselrl.evaluation.results import Caveat, csv_text, read_evaluation
from vesselrl.experiment.options import Evaluate
from vesselrl.inference.predictor import Prediction, Predictor
from vesselrl.scoring.measurements import vessel_measurements

HELD_OUT = "vesselrl.evaluation.held_out"
STEM = "test_best_lora"


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch):
    """A copy of the finished run to write into, without reports, which take longer than all else."""
    monkeypatch.setattr(f"{HELD_OUT}.write_run_report", lambda run: None)
    monkeypatch.setattr(f"{HELD_OUT}.write_evaluation_report", lambda path: (path, path))
    return Path(shutil.copytree(finished_run, tmp_path / finished_run.name))


def evaluated(weights, **options):
    texts = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return evaluate_held_out(Evaluate(**texts), weights and str(weights))


def scores(evaluation):
    return csv_text(evaluation.rows)


def keys(evaluation):
    return {row["key"] for row in evaluation.rows}


def settings_of(run, **changed):
    """The stored settings of a run, changed in its file if asked for."""
    values = json.loads((run / "config.json").read_text())
    values["args"] |= changed
    values.pop("args_sha256", None)
    (run / "config.json").write_text(json.dumps(values))
    return values["args"]


def test_the_numbers_are_those_of_the_training(run, tiny_checkpoint, angiograms, tmp_path):
    before, after = (read_evaluation(run / f"test_{name}.json") for name in ("before", "after"))
    assert scores(after) != scores(before)  # else an adapter that is not loaded would pass
    done = evaluated(run)
    assert scores(done.evaluation) == scores(evaluated(run / "best_lora").evaluation) == scores(after)
    assert str(read_evaluation(done.scored[""][1])) == str(done.evaluation)
    last = evaluated(run / "final_lora", split="val").evaluation.rows
    assert sorted(map(str, last)) == sorted(map(str, read_evaluation(run / "val_latest.json").rows))
    base = evaluated(None, base_model=tiny_checkpoint, data_root=angiograms, output_dir=tmp_path / "base")
    assert scores(base.evaluation) == scores(before)  # the same seed, 42


def test_the_vessels_of_true_and_predicted_masks_are_measured(run, angiograms):
    done = evaluated(run, pixel_mm=0.25)
    rows = list(csv.DictReader((run / "evaluation" / f"{STEM}_measurements.csv").open()))
    foreground = {row["key"]: row["foreground"] for row in done.evaluation.rows}
    found = {row["key"]: float(row["foreground"]) for row in rows if row["mask"] == "predicted"}
    assert found == pytest.approx(foreground, abs=1e-6)
    samples = {sample.key: sample for sample in find_samples(angiograms)}
    for row in (row for row in rows if row["mask"] == "true"):
        expected = vessel_measurements(load_mask(samples[row["key"]]))
        assert float(row["length_px"]) == pytest.approx(expected["length_px"], abs=1e-4)
        assert float(row["length_mm"]) == pytest.approx(expected["length_px"] / 4, abs=1e-4)
    with pytest.raises(ValueError, match="--pixel_mm is 0"):
        evaluated(run, pixel_mm=0.0)


def test_each_subset_is_that_of_the_run_also_for_a_copy_of_the_data(run, angiograms, tmp_path):
    """A new split of the same data would score training patients as test."""
    other = split_by_patient(find_samples(angiograms), seed=7)
    assert {sample.key for sample in other.test} != keys(read_evaluation(run / "test_after.json"))  # seed 42
    write_split(run / "data_split.json", other)
    copy = shutil.copytree(angiograms, tmp_path / "moved")
    for subset, root in (("train", None), ("val", None), ("test", None), ("test", copy)):
        result = evaluated(run, split=subset, data_root=root, tune=False).evaluation
        assert keys(result) == {sample.key for sample in getattr(other, subset)}
        assert result.caveats == {}
    assert len(evaluated(run, split="all", tune=False).evaluation.rows) == 20


def test_where_no_split_tells_who_was_trained_on_the_result_says_so(run, angiograms, tmp_path, monkeypatch):
    split = mock.Mock(side_effect=split_by_patient)
    monkeypatch.setattr(f"{HELD_OUT}.split_by_patient", split)
    alone, other = (shutil.copytree(run / "best_lora", tmp_path / name / "best_lora") for name in "ab")
    fewer = Path(shutil.copytree(angiograms, tmp_path / "fewer"))
    for folder in ("images", "masks"):
        min((fewer / folder).iterdir()).unlink()
    options = {"base_model": settings_of(run)["model_path"], "tune": False, "output_dir": tmp_path / "out"}
    for weights, root in ((alone, angiograms), (alone, angiograms), (run, fewer)):
        done = evaluated(weights, data_root=root, **options)
        assert list(done.evaluation.caveats) == [Caveat.UNKNOWN_PATIENTS]
        assert split.call_args.kwargs["shares"].keys() == {sample.key for sample in find_samples(root)}
    options |= {"data_root": angiograms}
    with pytest.raises(RunError, match="holds the evaluation of another model"):
        evaluated(other, **options)
    result = evaluated(alone, split_file=run / "data_split.json", **options).evaluation
    assert (keys(result), result.caveats) == (keys(read_evaluation(run / "test_after.json")), {})


def test_every_output_of_a_leaky_run_says_so(tiny_checkpoint, angiograms, tmp_path, capsys):
    given = ["--model_path", tiny_checkpoint, "--data_root", angiograms, "--output_dir", tmp_path]
    leaky = ["--split_unit", "frame", "--base_trained_on", "all", "--stage", "sft"]
    assert main(["train", "--preset", "debug", *map(str, given), *leaky]) == 0
    (run,) = tmp_path.glob("sa2va_lora_ppo_*")
    for file in ("report.html", "report.md", "test_after.json", "val_best.json"):
        assert "LEAKY: split by frame" in (run / file).read_text()
        assert "IN-SAMPLE BASELINE" in (run / file).read_text()
    content = json.loads((run / "data_split.json").read_text())
    doubts = [*content.get("doubts", ()), "NEAR DUPLICATES: alike."]
    (run / "data_split.json").write_text(json.dumps(content | {"doubts": doubts, "checksum": None}))
    capsys.readouterr()
    for arguments in (["evaluate", "--lora_weights", str(run)], ["compare", "--output_dir", str(tmp_path)]):
        assert main(arguments) == 0
        assert "LEAKY" in capsys.readouterr().out
    caveats = read_evaluation(run / "evaluation" / f"{STEM}_tuned.json").caveats
    assert [*caveats] == [Caveat.PATIENT_LEAKAGE, Caveat.NEAR_DUPLICATES, Caveat.PRETRAINING_OVERLAP]


def test_masks_reward_and_prompt_are_those_of_the_run_or_as_asked(run, angiograms, tmp_path, monkeypatch):
    """A predictor with a bar of 0.9 that a faint stretch of 0.3 cuts in two."""
    values, asked, load = np.full((64, 64), 0.01, np.float32), [], Predictor.from_pretrained
    values[30:34, 5:60], values[30:34, 30:35] = 0.9, 0.3
    monkeypatch.setattr(
        Predictor, "predict_batch",
        lambda self, images: [Prediction(self.post.mask(values), values, values) for _ in images],
    )  # fmt: skip
    monkeypatch.setattr(
        Predictor, "from_pretrained",
        lambda *args, **one: asked.append((one["prompt"], one["flips"])) or load(*args, **one),
    )  # fmt: skip

    def pixels(**options):
        rows = evaluated(run, **options).evaluation.rows
        assert [row["reward"] for row in rows] == pytest.approx([10 * row["dice"] for row in rows])
        return {row["foreground"] * 64**2 for row in rows}

    def predicted_pixels(*options):
        image = next((angiograms / "images").iterdir())
        arguments = ["--image", str(image), "--lora_weights", str(run), "--base_model", base]
        assert main(["predict", *arguments, "--output_dir", str(tmp_path / "out"), *options]) == 0
        return int((np.asarray(Image.open(next((tmp_path / "out").glob("*_mask.png")))) > 0).sum())

    base = settings_of(run, reward_type="simple_dice", prompt="Find the tree.")["model_path"]
    assert pixels(threshold=0.2) == {220}
    settings_of(run, close_gaps=0.2)
    assert pixels() == {predicted_pixels()} == {220}
    assert pixels(close_gaps=0.0) == {predicted_pixels("--close_gaps", "0", "--flips")} == {200}
    assert pixels(close_gaps=0.35, min_component_px=150) == {0}  # 100 px on either side
    assert asked == [("Find the tree.", flips) for flips in (False, False, False, False, True, False)]
    settings_of(run, min_component_px=10**6)
    best = evaluated(run).tuning.curve.best
    assert (best.recall, best.threshold) == (0, 0.5)  # of masks as they are used


def test_what_is_tuned_is_chosen_on_validation_and_flips_are_kept_apart(run):
    result = evaluated(run, tune_post=True)
    curve = json.loads((run / "evaluation" / f"{STEM}_thresholds.json").read_text())
    assert curve["side"] == "val"
    assert curve["dice"][curve["thresholds"].index(curve["chosen"])] == max(curve["dice"])
    assert result.tuning.choices["tuned"].threshold == curve["chosen"]
    for ending, post in result.tuning.choices.items():
        path = result.scored[ending][1]
        assert read_evaluation(path).extra.items() >= (asdict(post) | {"chosen_on": "val"}).items()
        again = evaluated(run, tune=False, output_dir=run, **asdict(post))
        assert scores(again.evaluation) == scores(read_evaluation(path)) != scores(result.evaluation)
    flipped = evaluated(run, flips=True, tune=False)
    assert flipped.scored[""][1].stem == f"{STEM}_flips"
    assert scores(flipped.evaluation) != scores(result.evaluation)


def test_nothing_is_tuned_but_for_the_test_subset_on_validation(run, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "vesselrl")
    chosen = evaluated(run).tuning.curve
    result = evaluated(run, split="val")
    assert (list(result.scored), result.tuning) == ([""], None)
    assert not list((run / "evaluation").glob("val_*_t*"))
    assert "No score at a tuned threshold: the subset is val" in caplog.text

    def changed(make):
        def read(path, samples):
            split = read_split(path, samples)
            return Split(*make(split), split.seed)

        monkeypatch.setattr(f"{HELD_OUT}.read_split", read)

    changed(lambda split: (split.test, split.val, split.train))
    assert evaluated(run).tuning.curve == chosen  # other test images take no part
    changed(lambda split: (split.train + split.val, (), split.test))
    assert list(evaluated(run).scored) == [""]
    assert "no validation images, and it is never chosen on test" in caplog.text
