"""The report of a run, from a folder with the files that a training and a later evaluation leave."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from vesselrl.evaluation.cases import Case, write_cases
from vesselrl.evaluation.results import write_evaluation
from vesselrl.evaluation.run_report import write_run_report
from vesselrl.evaluation.thresholds import read_sweep

BEFORE = [0.70, 0.72, 0.60, 0.80, 0.66]
AFTER = [0.75, 0.78, 0.64, 0.87, 0.70]  # 0.748 against 0.696: +0.052
BINS = [
    {"low": 0.0, "high": 0.1, "predicted": 0.05, "observed": 0.02, "pixels": 9000},
    {"low": 0.9, "high": 1.0, "predicted": 0.95, "observed": 0.81, "pixels": 1000},
]
LISTS = {
    "thresholds": [0.4, 0.5, 0.6],
    "dice": [0.71, 0.73, 0.72],
    "recall": [0.8, 0.75, None],
    "precision": [0.6, 0.7, 0.8],
    "chosen": 0.42,
    "side": "val",
    "n_images": 7,
    "n_patients": 5,
}


def add_later(run, made, **extra):
    """The files of an evaluation of the best adapter at 0.5 and at a tuned threshold."""
    curve = {"expected_calibration_error": 0.041, "n_pixels": 10000, "n_failed": 0, "bins": BINS}
    folder, tuned = run / "evaluation", [score + 0.01 for score in AFTER]
    write_evaluation(folder, "test_best_lora", replace(made(AFTER), calibration=curve), {"threshold": 0.5})
    write_evaluation(folder, "test_best_lora_tuned", made(tuned, **extra), {"threshold": 0.42})
    (folder / "test_best_lora_thresholds.json").write_text(json.dumps(LISTS))


def write_info(run, **changes):
    info = {
        "args": {"data_root": "/home/jane.doe/angio", "recall_target": 0.875, "lora_scope": ["a", "b"]},
        "counts": {"patients": 12, "val": {"used": 7, "available": 9}, "trainable": {"projector": 12288}},
        "total_steps": 50,
        "provenance": {
            "command": ["vesselrl", "train", "--data_root=/home/jane.doe/angio", "--output_dir", "~/runs"],
            "date": "2026-11-22T13:59:50+00:00",
            "packages": {"torch": "2.13.0"},
        },
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "training_info.json").write_text(json.dumps(info | changes))


@pytest.fixture
def run(made, tmp_path):
    folder = tmp_path / "sa2va_lora_ppo_20261122_135948"
    write_info(folder)
    recall = [[0.9, 0.8, 0.7, 0.9, 0.8], [0.8, 0.7, 0.6, 0.85, 0.7]]  # every patient loses
    for side in ("val", "test"):
        write_evaluation(folder, f"{side}_before", made(BEFORE, recall=recall[0], beta0_error=[9.0] * 5))
        name = "test_after" if side == "test" else "val_latest"
        write_evaluation(
            folder, name, made(AFTER, recall=recall[1], beta0_error=[9, 8, 8, 6, 9.0], failed=[2])
        )
    steps = [{"step": 0, "val/dice": 0.696}]
    steps += [{"step": step, "train/reward": 1.0, "train/reward/dice": 2.0} for step in range(1, 31)]
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in [*steps, {"step": 30, "val/dice": 0.748}])
    return folder


def add_cases(run):
    truth = np.zeros((30, 30), bool)
    truth[14:17, 3:27] = True
    image = np.full((30, 30, 3), 90, np.uint8)
    broken = truth.copy()
    broken[:, 12:17] = False
    cases = [
        Case("P002_S1_F0001", image, truth, broken, broken, rank="worst"),
        Case("P001_S1_F0001", image, truth, broken, truth, rank="best"),
    ]
    write_cases(run, cases)


def test_the_answer_comes_first_and_losses_are_named(run):
    html_path, markdown_path = write_run_report(run)
    assert (html_path.name, markdown_path.name) == ("report.html", "report.md")
    lines = [line for line in markdown_path.read_text().splitlines() if line]
    assert lines[0] == "# Report of sa2va_lora_ppo_20261122_135948"
    assert re.fullmatch(
        r"Dice on 5 test images of 5 patients: 0\.696 before, 0\.748 after, \+0\.052 "
        r"\(95 % interval \+0\.0\d\d to \+0\.0\d\d\): better\.",
        lines[2],
    )
    assert lines[3] == "Clearly better: Dice."
    assert lines[4] == "Clearly worse: Recall."
    assert lines[5] == "Failed predictions, counted as empty masks: 0 before, 1 after."
    html = html_path.read_text()
    for line in lines[2:6]:
        assert f"<p>{line}</p>" in html


def test_every_metric_is_in_the_tables_of_both_sides_with_intervals(run):
    text = write_run_report(run)[1].read_text()
    assert "## Calibration" not in text
    assert "## Threshold" not in text
    assert "## Cases" not in text
    for side in ("## Test", "## Validation"):
        table = text.split(f"{side}\n")[1].split("\n## ")[0]
        assert re.search(r"\| Dice \| higher \| 0\.696 \(0\.\d+ to 0\.\d+\) \| 0\.748 \(.*better \|", table)
        assert re.search(r"\| Recall \| higher \| 0\.820 .*\| -0\.090 \(.*worse \|", table)
        assert re.search(r"\| Pieces wrong \(β0 error\) \| lower \| 9\.0 .*\| 8\.0 ", table)
    assert "Dice rose in 5 of 5 patients." in text
    assert "| P001 | 1 | 0.700 | 0.750 | +0.050 |" in text


def test_the_best_validation_is_shown_where_stored_else_the_last_and_that_is_said(run, made):
    assert "After is the last validation" in write_run_report(run)[1].read_text()
    write_evaluation(run, "val_best", made([score + 0.1 for score in BEFORE]))
    text = write_run_report(run)[1].read_text()
    assert "After is the last validation" not in text
    assert "| +0.100 " in text.split("## Validation\n")[1].split("\n## ")[0]


def test_html_and_markdown_tables_are_the_same(run, made):
    add_later(run, made)
    html, text = (path.read_text() for path in write_run_report(run))
    cells = [
        [cell.strip().replace("\\<", "<") for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith(("| ---", "| --:"))
    ]
    found = re.findall(r"<tr>(.*?)</tr>", html, flags=re.DOTALL)
    assert len(found) == len(cells) > 30
    for row, expected in zip(found, cells, strict=True):
        plain = re.sub(r"<[^>]*>|\s", "", row).replace("&gt;", ">").replace("&lt;", "<")
        assert plain == re.sub(r"[\s|]", "", "".join(expected))


def test_no_change_is_called_so_and_two_patients_prove_nothing(run, made):
    for name in ("test_before", "test_after"):
        write_evaluation(run, name, made(BEFORE))
    assert "Clearly better: nothing." in write_run_report(run)[1].read_text()
    for name, scores in (("test_before", BEFORE[:2]), ("test_after", AFTER[:2])):
        write_evaluation(run, name, made(scores))
    text = write_run_report(run)[1].read_text()
    assert "+0.055: only 2 patients: an interval needs at least 3." in text


def test_targets_and_folders_of_the_machine_are_not_shown_with_results(run):
    html, text = (path.read_text() for path in write_run_report(run))
    for report in (html, text):
        assert "jane.doe" not in report
        assert ".../angio" in report
        results, settings = report.rsplit("Settings and origin", 1)
        assert "0.875" not in results
        assert "0.875" in settings


def test_cases_are_shown_best_first_with_their_errors(run):
    add_cases(run)
    html, text = (path.read_text() for path in write_run_report(run))
    assert html.count("data:image/png;base64,") == 2
    assert text.index("### Best: P001_S1_F0001") < text.index("### Worst: P002_S1_F0001")
    assert "1.000 after; breaks 1 and 0; false pieces 0 and 0." in text
    assert "![Best: P001_S1_F0001](cases/P001_S1_F0001.png)" in text
    assert "a break: a stretch of the true centreline that the prediction misses" in text


def test_a_threshold_sweep_is_shown_where_it_was_stored(run, made):
    add_later(run, made)
    html, text = (path.read_text() for path in write_run_report(run))
    assert "Measured on 7 validation images of 5 patients. The threshold 0.42 was chosen on them." in text
    assert "| 0.4 (chosen) | 0.710 | 0.800 | 0.600 |" in text
    assert "| 0.6 | 0.720 | undefined | 0.800 |" in text
    assert "Precision and recall</text>" in html


@pytest.mark.parametrize("change", [{"dice": [0.7]}, {"dice": None}, {"thresholds": []}, {"chosen": None}])
def test_a_damaged_sweep_is_named(tmp_path, change):
    path = tmp_path / "evaluation" / "test_base_thresholds.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LISTS | change))
    with pytest.raises(ValueError, match=r"test_base_thresholds\.json in evaluation"):
        read_sweep(path)


def test_calibration_and_later_settings_are_shown_where_present(run, made):
    add_later(run, made)
    write_evaluation(run / "evaluation", "test_human_agreement", made(BEFORE))
    html, text = (path.read_text() for path in write_run_report(run))
    header = "| score | better is | threshold 0.5 | threshold 0.42, tuned | human agreement |"
    assert header in text
    assert re.search(r"\| Dice \| higher \| 0\.748 \(.*\| 0\.758 \(.*\| 0\.696 \(", text)
    assert "Expected calibration error, 0 is perfect: 0.0410." in text
    assert "| 0.9 to 1.0 | 0.950 | 0.810 | 1,000 |" in text
    assert "share that is vessel</text>" in html


def test_a_later_evaluation_of_other_labels_is_left_out(run, made):
    add_later(run, made, truth="corrected")
    text = write_run_report(run)[1].read_text()
    assert "not those of the rest: test_best_lora_tuned." in text
    assert "| score | better is | threshold 0.5 |\n" in text
    assert "## Threshold" not in text


def test_a_later_evaluation_with_another_prompt_is_left_out(run, made):
    """Its tuned threshold is that of another question."""
    add_later(run, made)
    folder = run / "evaluation"
    for prompt, ending in (("Segment.", ""), ("Another?", "_tuned"), ("Segment.", "_tuned_post")):
        facts = {"threshold": 0.5, "plan": {"base_model": None, "prompt": prompt}}
        write_evaluation(folder, f"test_best_lora{ending}", made(AFTER), facts)
    write_evaluation(folder, "test_human_agreement", made(BEFORE))
    text = write_run_report(run)[1].read_text()
    assert "are not those of the rest: test_best_lora_tuned." in text
    header = "| score | better is | threshold 0.5 | threshold 0.5, tuned for reward | human agreement |"
    assert header in text


def test_a_run_without_test_says_so_and_an_unfinished_one_is_refused(run, tmp_path):
    for path in run.glob("test_*"):
        path.unlink()
    text = write_run_report(run)[1].read_text()
    assert "Dice on 5 validation images of 5 patients" in text
    assert "there is no test result" in text
    bare = tmp_path / "bare"
    write_info(bare)
    assert "no stored evaluation" in write_run_report(bare)[1].read_text()
    with pytest.raises(ValueError, match="nothing is no finished run"):
        write_run_report(tmp_path / "nothing")
    (bare / "training_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"training_info\.json of bare is no valid JSON"):
        write_run_report(bare)


def test_reports_are_made_without_torch_and_are_small_and_repeatable(run):
    add_cases(run)
    code = (
        "import sys, vesselrl.evaluation.run_report as report\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numba', 'jinja2', 'PIL'} & set(sys.modules)\n"
        f"paths = report.write_run_report({str(run)!r})\n"
        "sys.exit(sorted(heavy | ({'torch', 'transformers'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first = (run / "report.html").read_bytes()
    assert len(first) < 1_000_000
    assert write_run_report(run)[0].read_bytes() == first


def test_what_the_log_noticed_is_shown_where_there_was_something(run):
    write_info(run)
    assert "What the log noticed" not in write_run_report(run)[1].read_text()
    found = {
        "step": 50,
        "code": "below_start",
        "sign": "The reward is 2.9.",
        "advice": "Lower --learning_rate.",
    }
    write_info(run, findings=[found])
    for page in write_run_report(run):
        text = page.read_text().replace("<wbr>", "")
        assert "What the log noticed" in text
        assert "below start" in text
        assert found["sign"] in text
        assert found["advice"] in text
