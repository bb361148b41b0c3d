"""What flatters a score is said wherever the score is shown."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vesselrl.cli import main
from vesselrl.data.annotations import find_samples
from vesselrl.data.splits import split_by_patient
from vesselrl.evaluation.compare import compare_runs
from vesselrl.evaluation.finished_runs import Run
from vesselrl.evaluation.marks import marks_of
from vesselrl.evaluation.results import Evaluation, read_evaluation


def test_a_clean_side_has_no_mark(angiograms: Path) -> None:
    samples = find_samples(angiograms)
    assert marks_of(split_by_patient(samples), samples) == ()
    assert marks_of(None, [], {"P001_S1_F0001"}) == ()


def test_a_frame_split_and_a_base_that_has_seen_the_patients(angiograms: Path) -> None:
    samples = find_samples(angiograms)
    leaky, in_sample = marks_of(split_by_patient(samples, unit="frame"), samples, {samples[0].key, "other"})
    assert leaky.startswith("LEAKY: ")
    assert in_sample.startswith(
        "IN-SAMPLE BASELINE: the base model was trained on patients of 1 of 20 images"
    )


@pytest.fixture(scope="module")
def leaky_run(tiny_checkpoint: Path, angiograms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("leaky")
    given = [
        "--model_path",
        str(tiny_checkpoint),
        "--data_root",
        str(angiograms),
        "--output_dir",
        str(output),
    ]
    marked = ["--split_unit", "frame", "--base_trained_on", "all", "--stage", "sft"]
    assert main(["train", "--preset", "debug", *given, *marked]) == 0
    (run,) = output.glob("sa2va_lora_ppo_*")
    return run


@pytest.mark.parametrize("file", ["report.html", "report.md", "test_after.json", "val_best.json"])
def test_every_output_of_a_leaky_run_says_so(leaky_run: Path, file: str) -> None:
    text = (leaky_run / file).read_text()
    assert "LEAKY: split by frame" in text
    assert "IN-SAMPLE BASELINE" in text


def test_the_mark_survives_reading_and_reaches_evaluation_and_comparison(
    leaky_run: Path, capsys: pytest.CaptureFixture
) -> None:
    assert read_evaluation(leaky_run / "test_after.json").is_leaky
    assert main(["evaluate", "--lora_weights", str(leaky_run)]) == 0
    assert "LEAKY" in capsys.readouterr().out
    assert read_evaluation(leaky_run / "evaluation" / "test_best_lora_tuned.json").is_leaky
    assert main(["compare", "--output_dir", str(leaky_run.parent)]) == 0
    assert "LEAKY" in capsys.readouterr().out


def test_a_leaky_run_is_never_deployed(made: Callable[..., Evaluation]) -> None:
    before = made([0.60, 0.61, 0.62, 0.63, 0.64, 0.65])
    run = Run("one", made([0.80, 0.82, 0.81, 0.84, 0.83, 0.86]), before)
    assert compare_runs([run], rank_by="dice").deploy == "one"
    leaky = replace(run, after=replace(run.after, marks=("LEAKY: split by frame.",)))
    chosen = compare_runs([leaky], rank_by="dice")
    assert chosen.deploy is None
    assert "leaks" in chosen.reason
    assert chosen.notes[0] == "one: LEAKY: split by frame."
