"""The report of one held-out evaluation: what stands in its files stands on its page, and nothing else."""

import json
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vesselrl.cli import main
from vesselrl.data.splits import split_by_patient
from vesselrl.evaluation.evaluation_report import write_evaluation_report
from vesselrl.evaluation.held_out import EvaluationPlan, HeldOutResult, evaluate_held_out
from vesselrl.evaluation.metric_words import metric_name
from vesselrl.evaluation.results import write_evaluation

PLAN = {"side": "test", "lora_weights": None, "base_model": "/home/jane.doe/sa2va", "tune": True}
EXTRA = {"plan": PLAN, "threshold": 0.5, "flips": False}
DICE = [0.70, 0.72, 0.60, 0.80, 0.66]


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path, angiograms: Path, tmp_path_factory: pytest.TempPathFactory) -> HeldOutResult:
    """The untouched base with a second observer, whose masks are the first one's, one row lower."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "second").mkdir()
    for file in (angiograms / "masks").iterdir():
        mask = np.asarray(Image.open(file)).astype(bool)
        Image.fromarray(np.roll(mask, 1, axis=0)).save(folder / "second" / file.name)
    plan = EvaluationPlan(
        str(tiny_checkpoint), data_root=str(angiograms), output_dir=str(folder), flips=True, threshold=0.45,
        second_masks=str(folder / "second"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # 5 test patients, so that there are intervals
        patch.setattr(
            "vesselrl.evaluation.held_out.split_by_patient",
            lambda samples, shares: split_by_patient(samples, ratios=(0.2, 0.3, 0.5)),
        )
        return evaluate_held_out(plan)


def cells(text: str, section: str) -> list[list[str]]:
    """The cells of the first table below a heading of a Markdown report, header first."""
    table = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines if not line.startswith(("| ---", "| --:"))]


def numbers(cell: str) -> list[float]:
    return [float(value) for value in re.findall(r"-?\d+\.\d+", cell)]


def test_every_number_is_that_of_the_stored_files(base: HeldOutResult) -> None:
    text = base.report_path.with_suffix(".md").read_text()
    header, images, failed, *rows = cells(text, "Scores")
    stored = [json.loads(path.read_text()) for path in (base.path, base.tuned_path, base.human_path)]
    chosen = json.loads(base.curve_path.read_text())["chosen"]
    assert header[2:] == ["threshold 0.45", f"threshold {chosen:g}, tuned", "human agreement"]
    assert images[2:] == [str(len(one["rows"])) for one in stored]
    assert failed[2:] == ["0", "0", "0"]
    metrics = {metric_name(name): name for name in stored[0]["summary"]["metrics"]}
    assert [row[0] for row in rows] == list(metrics)
    for row in rows:
        decimals = 1 if row[0].startswith(("Pieces", "Loops", "HD95")) else 3
        for cell, one in zip(row[2:], stored, strict=True):
            score = one["summary"]["metrics"][metrics[row[0]]]
            expected = [score[name] for name in ("patient_mean", "low", "high") if score[name] is not None]
            assert len(expected) == 3 or score["reason"] in text
            assert numbers(cell) == pytest.approx(expected, abs=0.51 * 10**-decimals)

    header, *rows = cells(text, "Patients")
    assert header == ["patient", "images", "failed", "Dice", "clDice", "Recall", "Precision"]
    patients = stored[0]["patients"]
    assert {row[0] for row in rows} == set(patients)
    for row in rows:
        expected = [patients[row[0]][name] for name in ("dice", "cldice", "recall", "precision")]
        assert [float(cell) for cell in row[3:]] == pytest.approx(expected, abs=0.00051)
    dice = [float(row[3]) for row in rows]
    assert dice == sorted(dice)

    curve = json.loads(base.curve_path.read_text())
    for row in cells(text, "Threshold")[1:]:
        place = curve["thresholds"].index(float(row[0].removesuffix(" (chosen)")))
        assert ("chosen" in row[0]) == (curve["thresholds"][place] == chosen)
        expected = [curve[name][place] for name in ("dice", "recall", "precision")]
        assert [float(cell) for cell in row[1:]] == pytest.approx(expected, abs=0.00051)
    calibration = stored[0]["calibration"]
    assert f"0 is perfect: {calibration['expected_calibration_error']:.4f}." in text
    for row, line in zip(cells(text, "Calibration")[1:], calibration["bins"], strict=True):
        assert int(row[3].replace(",", "")) == line["pixels"]
        expected = [line["predicted"], line["observed"]]
        assert [float(cell) for cell in row[1:3]] == pytest.approx(expected, abs=0.00051)


def test_a_patient_with_many_frames_counts_once(tmp_path: Path, made) -> None:
    evaluation = made([0.9, 0.9, 0.9, 0.3, 0.6], patients=["P003", "P003", "P003", "P002", "P001"])
    text = write_evaluation_report(write_evaluation(tmp_path, "test_base", evaluation, EXTRA)[0])[
        1
    ].read_text()
    assert cells(text, "Scores")[3][2].startswith("0.600 (")
    assert cells(text, "Patients")[1:] == [["P002", "1", "0", "0.300"], ["P001", "1", "0", "0.600"],
                                           ["P003", "3", "0", "0.900"]]  # fmt: skip


@pytest.mark.parametrize("smallest", [0, 20])
def test_a_rule_that_changes_the_masks_is_said_at_the_top(tmp_path: Path, made, smallest: int) -> None:
    extra = EXTRA | {"min_component_px": smallest, "close_gaps": smallest / 200}
    _, page = write_evaluation_report(write_evaluation(tmp_path, "test_base", made(DICE), extra)[0])
    facts = "test_base, test patients, threshold 0.5"
    assert (facts + ", components from 20 px" in page.read_text()) == (smallest == 20)
    assert facts in page.read_text()
    assert (", gaps closed above 0.1" in page.read_text()) == (smallest == 20)


def test_the_page_says_what_the_markdown_says(base: HeldOutResult) -> None:
    html, text = base.report_path.read_text(), base.report_path.with_suffix(".md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row[0].startswith(("---", "--:"))]
    found = re.findall(r"<tr>(.*?)</tr>", html, flags=re.DOTALL)
    assert len(found) == len(rows) > 40
    for line, row in zip(found, rows, strict=True):
        plain = re.sub(r"<[^>]*>|\s", "", line).replace("&gt;", ">").replace("&lt;", "<")
        assert plain == re.sub(r"\s", "", "".join(row).replace("\\<", "<"))
    assert re.findall(r"<h2>(.*)</h2>", html) == re.findall("^## (.*)", text, flags=re.MULTILINE)
    sections = ["Scores", "Patients", "Threshold", "Calibration", "How to read this", "Settings"]
    assert re.findall(r"<h2>(.*)</h2>", html) == sections
    assert html.count("<svg") == 2


def test_the_page_needs_nothing_else(base: HeldOutResult) -> None:
    html = base.report_path.read_text()
    assert "://" not in html
    assert not re.search(r"<(script|iframe|object|embed|link(?! rel=\"icon\" href=\"data:))|@import", html)
    targets = re.findall(r"(?:src|href|data|action)=\"([^\"]*)\"|url\(([^)]*)\)", html)
    assert targets
    assert all("".join(target).startswith(("#", "data:")) for target in targets)


def test_pseudonyms_only(base: HeldOutResult, angiograms: Path) -> None:
    keys = [row["patient"] for row in base.evaluation.rows]
    for page in (base.report_path, base.report_path.with_suffix(".md")):
        text = page.read_text()
        assert all(key in text for key in keys)
        assert "ZHANG" not in text.upper()
        assert not re.search(r"(?<![\d.])\d{10}(?!\d)", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
        assert str(angiograms.parent) not in text
        assert f".../{angiograms.name}" in text


def test_marks_come_first(tmp_path: Path, made) -> None:
    marks = ("LEAKY: split by frame.", "IN-SAMPLE BASELINE: seen.")
    path, _ = write_evaluation(tmp_path, "test_base", replace(made(DICE, failed=[2]), marks=marks), EXTRA)
    html_path, markdown_path = write_evaluation_report(path)
    lines = [line for line in markdown_path.read_text().splitlines() if line]
    assert lines[:4] == ["# Evaluation of the untouched base model", lines[1], *marks]
    assert lines[4].startswith("Dice on 5 test images of 5 patients: 0.696 (95 % interval 0.")
    assert lines[5:7] == [
        "Lowest Dice of a patient: 0.600 (P003).",
        "Failed predictions, counted as empty masks: 1 of 5.",
    ]
    assert lines[7].startswith("More than 5 % failed")
    html = html_path.read_text()
    assert html.index(marks[0]) < html.index(marks[1]) < html.index("Dice on 5") < html.index("<h2>")
    assert "jane.doe" not in html


def test_files_of_another_evaluation_are_not_shown(tmp_path: Path, made) -> None:
    path, _ = write_evaluation(tmp_path, "test_base", made(DICE), EXTRA)
    other = {"plan": PLAN | {"base_model": "another"}, "threshold": 0.3, "flips": False}
    write_evaluation(tmp_path, "test_base_tuned", made(DICE), other)
    write_evaluation(tmp_path, "test_human_agreement", made(DICE, truth="corrected"))
    (tmp_path / "test_base_thresholds.json").write_text("{}")
    text = write_evaluation_report(path)[1].read_text()
    assert cells(text, "Scores")[0] == ["score", "better is", "threshold 0.5"]
    assert "## Threshold" not in text
    write_evaluation(tmp_path, "test_base_tuned", made(DICE), other | {"plan": PLAN})
    with pytest.raises(ValueError, match=r"test_base_thresholds\.json in .* is no threshold sweep"):
        write_evaluation_report(path)
    write_evaluation(tmp_path, "test_after", made(DICE))
    with pytest.raises(ValueError, match=r"test_after\.json is no evaluation of held-out patients"):
        write_evaluation_report(tmp_path / "test_after.json")


def test_undefined_scores_and_missing_intervals_are_said(tmp_path: Path, made) -> None:
    evaluation = made(DICE[:2], recall=[0.5, np.nan])
    text = write_evaluation_report(write_evaluation(tmp_path, "test_base", evaluation, EXTRA)[0])[
        1
    ].read_text()
    assert "undefined and left out: Recall (threshold 0.5) 1." in text
    assert "only 2 patients: an interval needs at least 3" in text
    assert cells(text, "Patients")[1:] == [["P001", "1", "0", "0.700", "0.500"],
                                           ["P002", "1", "0", "0.720", "undefined"]]  # fmt: skip


@pytest.mark.parametrize(("side", "warned"), [("test", False), ("val", True), ("train", True), ("all", True)])
def test_scores_on_images_of_the_training_are_no_test_result(
    tmp_path: Path, made, side: str, warned: bool
) -> None:
    plan = PLAN | {"side": side, "lora_weights": "output/run/best_lora"}
    path, _ = write_evaluation(tmp_path, f"{side}_best_lora", made(DICE), EXTRA | {"plan": plan})
    text = write_evaluation_report(path)[1].read_text()
    assert text.startswith("# Evaluation of the adapter best_lora\n")
    assert ("no test result" in text or "nothing about new patients" in text) == warned


def test_the_report_of_the_run_is_refreshed(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / finished_run.name))
    assert "## Threshold" not in (run / "report.md").read_text()
    (run / "report.md").unlink()
    evaluate_held_out(EvaluationPlan(lora_weights=str(run), output_dir=str(tmp_path / "elsewhere")))
    assert not (run / "report.md").exists()
    assert main(["evaluate", "--lora_weights", str(run)]) == 0
    assert "test_best_lora.html" in capsys.readouterr().out.replace("\n", "")
    report = (run / "report.md").read_text()
    for section in ("Test at other settings", "Threshold", "Calibration"):
        assert f"\n## {section}\n" in report
    page = (run / "evaluation" / "test_best_lora.md").read_text()
    assert cells(report, "Threshold") == cells(page, "Threshold")
    assert cells(report, "Test at other settings") == cells(page, "Scores")
    (run / "training_info.json").write_text("{")
    with caplog.at_level(logging.WARNING, "vesselrl"):
        evaluate_held_out(EvaluationPlan(lora_weights=str(run)))
    assert "The report of the run is the old one: training_info.json" in caplog.text


def test_a_report_is_made_without_torch(tmp_path: Path, made) -> None:
    path, _ = write_evaluation(tmp_path, "test_base", made(DICE), EXTRA)
    code = (
        "import sys, vesselrl.evaluation.evaluation_report as report\n"
        f"report.write_evaluation_report({str(path)!r})\n"
        "sys.exit(sorted({'torch', 'transformers', 'matplotlib', 'numba'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
