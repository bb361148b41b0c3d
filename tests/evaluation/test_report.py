"""Reports of a run, an evaluation and a comparison: stored pages, and what no page may do."""

import contextlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jinja2 import Environment, nodes

from vesselrl.evaluation import report, words
from vesselrl.evaluation.compare import Run, compare_runs
from vesselrl.evaluation.figures import Case, write_cases
from vesselrl.evaluation.report import write_evaluation_report, write_run_report
from vesselrl.evaluation.results import Caveat, read_evaluation, write_evaluation
from vesselrl.evaluation.words import translate
from vesselrl.experiment.run_folder import damaged_files
from vesselrl.training.health import RULES

GOLDEN = Path(__file__).parent / "golden"
BEFORE = [0.70, 0.72, 0.60, 0.80, 0.66]
AFTER = [0.75, 0.78, 0.64, 0.87, 0.70]  # 0.748 against 0.696: +0.052
LUCKY = [0.99, 0.60, 0.75, 0.80, 0.68]
WORSE = [0.65, 0.66, 0.56, 0.73, 0.62]
CAVEATS = {kind: kind.text() for kind in (Caveat.PATIENT_LEAKAGE, Caveat.NEAR_DUPLICATES)}
INPUTS = json.loads((GOLDEN / "inputs.json").read_text())
EXTRA = {"plan": INPUTS["plan"], "threshold": 0.5, "flips": False}


def case(key, rank):
    truth = np.zeros((30, 30), bool)
    truth[14:17, 3:27] = True
    before = None if rank == "worst" else truth & ~np.isin(np.arange(30), range(12, 17))
    return Case(key, np.full((30, 30, 3), 90, np.uint8), truth, before, truth, rank)


def add_later(run, made, **extra):
    """The files of an evaluation of the best adapter at 0.5 and at a tuned threshold."""
    folder, tuned = run / "evaluation", [score + 0.01 for score in AFTER]
    given = replace(made(AFTER), calibration=INPUTS["calibration"])
    write_evaluation(folder, "test_best_lora", given, {"threshold": 0.5})
    write_evaluation(folder, "test_best_lora_tuned", made(tuned, **extra), {"threshold": 0.42})
    write_evaluation(folder, "test_human_agreement", made(BEFORE))
    (folder / "test_best_lora_thresholds.json").write_text(json.dumps(INPUTS["curve"]))


@pytest.fixture
def run(made, tmp_path):
    """A run without cases and without a later evaluation."""
    folder = tmp_path / "sa2va_lora_ppo_20261122_135948"
    folder.mkdir()
    (folder / "training_info.json").write_text(json.dumps(INPUTS["info"]))
    recall = [[0.9, 0.8, 0.7, 0.9, 0.8], [0.8, 0.7, 0.6, 0.85, 0.7]]  # every patient loses
    for before, after in (("val_before", "val_latest"), ("test_before", "test_after")):
        write_evaluation(folder, before, made(BEFORE, recall=recall[0], beta0_error=[9.0] * 5))
        last = made(AFTER, failed=[2], recall=recall[1], beta0_error=[9, 8, 8, 6, np.nan])
        write_evaluation(folder, after, replace(last, caveats=CAVEATS))
    steps = [{"step": 0, "val/dice": 0.696}]
    steps += [{"step": step, "train/reward": 1.0, "train/reward/dice": 2.0} for step in range(1, 31)]
    lines = [json.dumps(line) + "\n" for line in [*steps, {"step": 30, "val/dice": 0.748}]]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def run_pages(made, run):
    write_cases(run, [case("P002_S1_F0001", "worst"), case("P001_S1_F0001", "best")])
    add_later(run, made)
    return write_run_report(run)


def evaluation_pages(made, folder):
    given = made(AFTER, failed=[2], recall=[0.5] * 4 + [np.nan])
    given = replace(given, calibration=INPUTS["calibration"], caveats=CAVEATS)
    path = write_evaluation(folder, "test_base", given, EXTRA | {"close_gaps": 0.1})
    write_evaluation(folder, "test_base_tuned_post", made(AFTER), EXTRA | {"min_component_px": 20})
    write_evaluation(folder, "test_human_agreement", made(BEFORE))
    (folder / "test_base_thresholds.json").write_text(json.dumps(INPUTS["curve"]))
    return write_evaluation_report(path)


def comparison_pages(made, folder):
    scores = {"good_<1>": AFTER, "a|lucky": LUCKY, "worse": WORSE}
    runs = [Run(name, made(values), made(BEFORE)) for name, values in scores.items()]
    runs[1] = replace(runs[1], human=made(WORSE), after=replace(runs[1].after, caveats=CAVEATS))
    return report.write_comparison_report(folder, compare_runs(runs, skipped={"half": "no test_after.json"}))


@pytest.mark.parametrize("make", [run_pages, evaluation_pages, comparison_pages])
def test_the_page_is_whole_and_needs_nothing_else(make, made, run):
    """After a wanted change delete the stored pages, run this twice, and read what git says has changed."""
    kind = make.__name__.partition("_")[0]
    html, text = (path.read_text() for path in make(made, run)[:2])
    for page in (html, text):
        for caveat in CAVEATS.values():
            assert kind == "comparison" or page.index(caveat) < page.index("Dice on 5 test images")
            assert caveat in page
        assert "jane.doe" not in page
        assert "/tmp" not in page
    assert not re.search(r"<(script|iframe|object|embed|\d)", html)
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', html)) <= set(ids)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:src|href|data|action)="([^"]*)"|url\(([^)]*)\)', html)
    assert all("".join(target).startswith(("#", "data:")) for target in targets)
    assert not {"://", "@import"} & set(re.findall("://|@import", html))
    assert "default-src 'none'" in html

    html = re.sub(r"(?s)<svg.*?(aria-label=\"[^\"]*\").*?</svg>", r"<svg \1></svg>", html)
    html = re.sub(r"(?s)<style>.*?</style>|(?<=base64,)[^\"]*", "", html)
    for file, page in {GOLDEN / f"{kind}.html": html, GOLDEN / f"{kind}.md": text}.items():
        stored = file.read_text() if file.exists() else file.write_text(page)
        assert stored == page


@pytest.mark.parametrize("make", [run_pages, evaluation_pages])
def test_the_chinese_report_has_the_figures_of_the_english_one_and_no_english_sentence(make, made, run):
    make(made, run)
    is_run = make is run_pages
    page = report.run_page(run) if is_run else report.evaluation_page(run / "test_base.json")
    template = "run.j2" if is_run else "evaluation.j2"
    english, chinese = (report.render(template, "md", page, lang) for lang in ("en", "zh"))
    one, other = (Counter(re.findall(r"\d+(?:\.\d+)?", text)) for text in (english, chinese))
    assert one == other
    text = re.sub(r"vesselrl train|--stage sft|The reward is", "", chinese)  # the last is of no rule
    assert re.findall(r"[A-Za-z]{2,},? [a-z]{2,}", text) == []
    assert "患者" in chinese


def constants(template: str) -> set[str]:
    """The sentences and titles in a template."""
    environment, found = Environment(), []
    tree = environment.parse((words.TEMPLATES / template).read_text())
    parts = [*tree.find_all(nodes.Concat)]
    inside = {id(part) for whole in parts for part in whole.nodes}
    for node in [*parts, *tree.find_all(nodes.Const)]:
        with contextlib.suppress(nodes.Impossible):
            found += [node.as_const()] * (id(node) not in inside)
    return {text for text in found if isinstance(text, str) and re.match("[A-Z%]", text)}


def test_all_that_a_report_can_say_has_its_chinese():
    said = {text for table in words.LABELS.values() for value in table.values() for text in np.ravel(value)}
    said |= {kind.value for kind in Caveat} - {Caveat.OTHER.value, Caveat.CONTROL.value}
    values = defaultdict(lambda: 0.5, images=3)
    for rule in RULES:
        now = 0.5 if rule.metrics else values
        said |= {rule.sentence.format(0.5, now=now, first=now, fit=values), rule.code.replace("_", " ")}
        said |= {rule.advice, rule.rl_advice} - {"", "{fit[teaching]}"}
    for template in ("run.j2", "evaluation.j2", "parts.j2"):
        said |= constants(template)
    said = {text.format(seen=1, total=2, masks="threshold 0.5") for text in said}
    names = r"--\w+|\w+(?:[/_.]\w+)+|%\(\w+\)s|\b(?:Dice|clDice|Frangi|Sa2VA|Betti)\b"
    left = {text: re.sub(names, "", translate(text, "zh")) for text in said}
    assert {text for text, rest in left.items() if re.search("[a-z]{3}", rest)} == set()


def cells(text, section):
    """Rows of the first table below a heading of a Markdown report, header first."""
    table = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines if not line.startswith(("| ---", "| --:"))]


def test_every_number_is_that_of_the_stored_files(run, made, tmp_path):
    text = write_run_report(run)[1].read_text()
    stored = [read_evaluation(run / f"test_{name}.json").summary["metrics"] for name in ("before", "after")]
    rows = cells(text, "Test")[1:]
    assert [row[0] for row in rows] == ["Dice", "Recall", "Betti-0 error"]
    for row, metric in zip(rows, ("dice", "recall", "beta0_error"), strict=True):
        for cell, score in zip(row[2:4], (one[metric] for one in stored), strict=True):
            expected = [score[name] for name in ("patient_mean", "low", "high")]
            values = [float(value) for value in re.findall(r"-?\d+\.\d+", cell)]
            assert values == pytest.approx(expected, abs=0.051 if metric == "beta0_error" else 0.00051)
    assert rows[0][4].startswith("+0.052 (+0.0")
    assert [row[5:] for row in rows] == [["better"], ["worse"], []]
    many = made([0.9, 0.9, 0.9, 0.3, 0.6], patients=["P003", "P003", "P003", "P002", "P001"])
    text = write_evaluation_report(write_evaluation(tmp_path, "test_base", many, EXTRA))[1].read_text()
    assert cells(text, "Scores")[3][2].startswith("0.600 (")  # a patient with many frames counts once
    patients = [["P002", "1", "0", "0.300"], ["P001", "1", "0", "0.600"], ["P003", "3", "0", "0.900"]]
    assert cells(text, "Patients")[1:] == patients


def test_nothing_unproven_gets_a_verdict(run, made):
    for name, values in (("test_before", BEFORE[:2]), ("test_after", AFTER[:2])):
        write_evaluation(run, name, made(values))
    text = write_run_report(run)[1].read_text()
    assert "Clearly better: nothing.\n\nClearly worse: nothing." in text
    assert "+0.055: only 2 patients: an interval needs at least 3." in text


def test_scores_on_images_of_the_training_are_no_test_result(tmp_path, made):
    for side in ("test", "val", "train", "all"):
        plan = INPUTS["plan"] | {"side": side, "lora_weights": "output/run/best_lora"}
        path = write_evaluation(tmp_path, f"{side}_best_lora", made(AFTER), EXTRA | {"plan": plan})
        text = write_evaluation_report(path)[1].read_text()
        warned = "no test result" in text or "nothing about new patients" in text
        assert warned == (side != "test")


def test_missing_files_leave_their_part_out(run):
    for path in [path for path in run.iterdir() if path.name != "training_info.json"]:
        path.unlink()
    (run / "training_info.json").write_text(json.dumps(INPUTS["info"] | {"findings": []}))
    sections = re.findall("^## (.*)", write_run_report(run)[1].read_text(), flags=re.MULTILINE)
    assert sections == ["Model and images", "How to read this", "Settings and origin"]


def test_later_evaluations_of_other_labels_or_prompts_are_left_out(run, made):
    add_later(run, made, truth="corrected")
    text = write_run_report(run)[1].read_text()
    assert "not those of the rest: test_best_lora_tuned." in text
    assert cells(text, "Test at other settings")[0][2:] == ["threshold 0.5", "human agreement"]
    assert "## Threshold" not in text
    for prompt, ending in (("Segment.", ""), ("Another?", "_tuned"), ("Segment.", "_tuned_post")):
        facts = {"threshold": 0.5, "plan": {"base_model": None, "prompt": prompt}}
        write_evaluation(run / "evaluation", f"test_best_lora{ending}", made(AFTER), facts)
    labels = ["threshold 0.5", "threshold 0.5, tuned for reward", "human agreement"]
    assert cells(write_run_report(run)[1].read_text(), "Test at other settings")[0][2:] == labels


def test_the_best_adapter_has_a_model_card_of_its_own_scores(finished_run: Path, angiograms: Path) -> None:
    text = (finished_run / "best_lora" / "README.md").read_text(encoding="utf-8")
    paths = (finished_run / f"test_{name}.json" for name in ("before", "after"))
    before, after = (read_evaluation(path).headline for path in paths)
    (row,) = re.findall(r"^\| Dice \| higher \| ([0-9.]+).*? \| ([0-9.]+)", text, re.MULTILINE)
    assert row == (f"{before['dice']:.3f}", f"{after['dice']:.3f}")
    assert "| train images |" in text
    assert str(angiograms) not in text
    assert damaged_files(finished_run / "best_lora") == []
