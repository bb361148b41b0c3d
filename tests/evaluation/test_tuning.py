"""Held-out evaluation at 0.5 and at the threshold chosen on validation; flips; a second observer."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vesselrl.data.annotations import find_samples, load_image, load_mask
from vesselrl.data.splits import Split, read_split
from vesselrl.errors import DataError
from vesselrl.evaluation.held_out import EvaluationPlan, evaluate_held_out
from vesselrl.evaluation.results import csv_text, read_evaluation
from vesselrl.inference.predictor import Prediction, Predictor
from vesselrl.scoring.metrics import dice


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that results may be written into."""
    return Path(shutil.copytree(finished_run, tmp_path / finished_run.name))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.json")}


def test_both_thresholds_from_one_prediction_of_each_image(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, told = [], []
    predict = Predictor.predict
    monkeypatch.setattr(Predictor, "predict", lambda self, image: asked.append(1) or predict(self, image))
    result = evaluate_held_out(
        EvaluationPlan(lora_weights=str(run)), lambda done, total: told.append((done, total))
    )
    counts = json.loads((run / "data_split.json").read_text())["counts"]
    total = counts["test"] + counts["val"]
    assert len(asked) == total
    assert told == [(done, total) for done in range(1, total + 1)]
    stem = "test_best_lora"
    assert names(run / "evaluation") == {f"{stem}.json", f"{stem}_tuned.json", f"{stem}_thresholds.json"}
    assert str(read_evaluation(result.tuned_path)) == str(result.tuned)  # with its calibration
    extra = json.loads(result.tuned_path.read_text())["extra"]
    assert extra["threshold"] == result.tuning.curve.best.threshold
    assert extra["chosen_on"] == "val"
    monkeypatch.undo()
    again = evaluate_held_out(
        EvaluationPlan(lora_weights=str(run), threshold=extra["threshold"], tune=False, output_dir=str(run))
    )
    assert csv_text(again.evaluation.rows) == csv_text(result.tuned.rows)
    assert "chosen_on" not in json.loads(again.path.read_text())["extra"]
    assert names(run) >= {f"{run.name}_{stem}.json"}
    assert not list(run.glob("*_tuned.json"))


def test_the_threshold_is_the_best_one_on_validation(
    run: Path, angiograms: Path, tiny_checkpoint: Path
) -> None:
    result = evaluate_held_out(EvaluationPlan(lora_weights=str(run)))
    curve = json.loads(result.curve_path.read_text())
    assert curve["side"] == "val"
    assert curve["chosen"] == result.tuning.curve.best.threshold
    split = read_split(run / "data_split.json", find_samples(angiograms))
    predictor = Predictor.from_pretrained(tiny_checkpoint, run)

    def score(side: tuple, threshold: float) -> float:
        means: dict[str, list[float]] = {}
        for sample in side:
            probabilities = predictor.predict(load_image(sample)).probabilities
            means.setdefault(sample.patient, []).append(
                dice(probabilities > np.float32(threshold), load_mask(sample))
            )
        return float(np.mean([np.mean(values) for values in means.values()]))

    at = dict(zip(curve["thresholds"], curve["dice"], strict=True))
    for threshold in (0.1, 0.5, curve["chosen"], 0.9):
        assert at[threshold] == pytest.approx(score(split.val, threshold))
    assert at[curve["chosen"]] == max(at.values())


def test_post_processing_is_chosen_for_the_reward_on_validation(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A false speck of 25 px must go, a true piece of 52 px beyond a gap at 0.07 must stay and be joined."""
    asked = []

    def predict(self: Predictor, image: np.ndarray) -> Prediction:
        asked.append(1)
        values = np.where(image.mean(axis=2) < 115, 0.9, 0.0005).astype(np.float32)  # vessels are dark
        values[:, 44:47] = np.minimum(values[:, 44:47], 0.07)
        values[2:7, 2:7] = 0.95
        return Prediction(values > 0.5, values, np.zeros_like(values))

    monkeypatch.setattr(Predictor, "predict", predict)
    result = evaluate_held_out(EvaluationPlan(lora_weights=str(run), tune_post=True))
    assert len(asked) == result.tuning.curve.n_images + len(result.evaluation.rows)
    chosen = {"threshold": 0.5, "min_component_px": 40, "close_gaps": 0.001}  # of equal ones the first
    assert asdict(result.tuning.choices["tuned_post"]) == chosen
    assert {row["beta0_error"] for row in result.evaluation.rows} == {2}
    assert {row["beta0_error"] for row in result.tuned.rows} == {1}  # a low threshold closes the gap
    assert {row["beta0_error"] for row in result.tuned_post.rows} == {0}
    assert min(row["dice"] for row in result.tuned_post.rows) > 0.99
    extra = json.loads(result.tuned_post_path.read_text())["extra"]
    assert extra["chosen_on"] == "val"
    assert extra.items() >= chosen.items()
    grid = json.loads((run / "evaluation" / "test_best_lora_post_processing.json").read_text())
    assert (grid["side"], grid["chosen"]) == ("val", chosen)
    assert max(reward for *_, reward in grid["candidates"]) == pytest.approx(grid["reward"])
    worst = min(row["reward"] for row in result.tuned_post.rows)
    assert grid["reward"] == pytest.approx(worst, abs=0.1)  # nearly perfect on either side
    column = "threshold 0.5, components from 40 px, gaps closed above 0.001, tuned for reward"
    for report in (result.report_path.with_suffix(".md"), run / "report.md"):
        assert f"| {column} |" in report.read_text()
    again = evaluate_held_out(EvaluationPlan(lora_weights=str(run), output_dir=str(run), **chosen))
    assert csv_text(again.evaluation.rows) == csv_text(result.tuned_post.rows)
    with pytest.raises(ValueError, match="leave out --no-tune"):
        evaluate_held_out(EvaluationPlan(lora_weights=str(run), tune=False, tune_post=True))


@pytest.mark.parametrize("side", ["val", "train", "all"])
def test_on_other_sides_nothing_is_tuned(run: Path, side: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vesselrl")
    result = evaluate_held_out(EvaluationPlan(lora_weights=str(run), side=side))
    assert result.tuned is result.tuned_path is result.tuning is result.curve_path is None
    assert names(run / "evaluation") == {f"{side}_best_lora.json"}
    assert f"No score at a tuned threshold: the side is {side}" in caplog.text


def test_without_validation_nothing_is_tuned(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vesselrl")

    def without_validation(path: Path, samples: list) -> Split:
        split = read_split(path, samples)
        return Split(split.train + split.val, (), split.test, split.seed)

    monkeypatch.setattr("vesselrl.evaluation.held_out.read_split", without_validation)
    result = evaluate_held_out(EvaluationPlan(lora_weights=str(run)))
    assert result.tuned is None
    assert names(run / "evaluation") == {"test_best_lora.json"}
    assert "no validation images, and it is never chosen on test" in caplog.text


def test_test_images_take_no_part_in_the_choice(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = evaluate_held_out(EvaluationPlan(lora_weights=str(run))).tuning.curve

    def other_test(path: Path, samples: list) -> Split:
        split = read_split(path, samples)
        return Split(split.test, split.val, split.train, split.seed)

    monkeypatch.setattr("vesselrl.evaluation.held_out.read_split", other_test)
    assert evaluate_held_out(EvaluationPlan(lora_weights=str(run))).tuning.curve == chosen


def test_flips_are_kept_apart(run: Path) -> None:
    plain = evaluate_held_out(EvaluationPlan(lora_weights=str(run)))
    before = plain.path.read_bytes()
    flipped = evaluate_held_out(EvaluationPlan(lora_weights=str(run), flips=True))
    assert flipped.path.name == "test_best_lora_flips.json"
    assert flipped.tuned_path.name == "test_best_lora_flips_tuned.json"
    assert flipped.curve_path.name == "test_best_lora_flips_thresholds.json"
    assert plain.path.read_bytes() == before
    assert csv_text(flipped.evaluation.rows) != csv_text(plain.evaluation.rows)
    for path in (flipped.path, flipped.tuned_path):
        assert json.loads(path.read_text())["extra"]["flips"] is True
    assert json.loads(flipped.curve_path.read_text())["flips"] is True
    assert json.loads(plain.path.read_text())["extra"]["flips"] is False


def test_the_calibration_is_stored_with_the_scores(run: Path) -> None:
    result = evaluate_held_out(EvaluationPlan(lora_weights=str(run)))
    stored = json.loads(result.path.read_text())["calibration"]
    assert stored == result.evaluation.calibration
    assert stored["n_pixels"] == 64 * 64 * len(result.evaluation.rows)
    assert 0 <= stored["expected_calibration_error"] <= 1


def test_a_second_observer_is_scored_beside_the_model(run: Path, angiograms: Path, tmp_path: Path) -> None:
    folder = tmp_path / "masks_2nd"
    folder.mkdir()
    for file in (angiograms / "masks").iterdir():
        mask = np.asarray(Image.open(file)).astype(bool)
        Image.fromarray(np.roll(mask, 1, axis=0)).save(folder / file.name)
    result = evaluate_held_out(EvaluationPlan(lora_weights=str(run), second_masks=str(folder)))
    assert result.human_path == run / "evaluation" / "test_human_agreement.json"
    assert result.human.image_list_hash == result.evaluation.image_list_hash
    assert result.human.label_hash == result.evaluation.label_hash
    for sample in find_samples(angiograms):
        for row in result.human.rows:
            if row["key"] == sample.key:
                truth = load_mask(sample)
                assert row["dice"] == dice(np.roll(truth, 1, axis=0), truth)
    with pytest.raises(DataError, match="There is no folder"):
        evaluate_held_out(EvaluationPlan(lora_weights=str(run), second_masks=str(tmp_path / "none")))
