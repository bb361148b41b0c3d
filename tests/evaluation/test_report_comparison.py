"""The comparison as Markdown, CSV and HTML."""

import re
from dataclasses import replace

from vesselrl.evaluation.compare import compare_runs
from vesselrl.evaluation.finished_runs import Run
from vesselrl.evaluation.report import markdown, write_comparison_report

BASE = [0.70, 0.72, 0.60, 0.80, 0.66]
GOOD = [0.75, 0.78, 0.64, 0.87, 0.70]
LUCKY = [0.99, 0.60, 0.75, 0.80, 0.68]
WORSE = [0.65, 0.66, 0.56, 0.73, 0.62]


def compared(made):
    runs = [Run(name, made(scores), made(BASE)) for name, scores in
            (("good_<1>", GOOD), ("lucky", LUCKY), ("worse", WORSE))]  # fmt: skip
    return compare_runs(runs, skipped={"half": "no test_after.json"})


def test_the_page_opens_with_the_decision_and_holds_ranking_chart_and_notes(made, tmp_path):
    comparison = compared(made)
    html_path, markdown_path, csv_path = write_comparison_report(tmp_path, comparison)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (html_path, markdown_path, csv_path)
    )
    html = html_path.read_text()
    decision = comparison.reason.replace("<", "&lt;").replace(">", "&gt;")
    assert html.index(f"<p>{decision}</p>") < html.index("<h2>Ranking by dice</h2>")
    assert html.count("<svg") == 1
    assert ">good_&lt;1&gt;</text>" in html
    assert "Left out: half: no test_after.json." in html
    assert "<script" not in html
    assert "http:" not in html
    assert "https:" not in html
    assert markdown_path.read_text() == markdown(comparison)


def test_runs_come_in_order_of_rank_with_difference_and_verdict(made):
    text = markdown(compared(made))
    ranking, differences = text.split("## Paired difference")
    names = [r"good_\<1>", "lucky", "worse"]
    assert re.findall(r"^\| \d[^|]*\| (\S+) \|", ranking, re.MULTILINE) == ["lucky", names[0], "worse"]
    rows = {line.split(" | ")[0].strip("| "): line for line in differences.splitlines() if " | " in line}
    assert " +0.052 (" in rows[names[0]]
    assert "better" in rows[names[0]]
    assert "worse |" in rows["worse"]
    assert "better" not in rows["lucky"]
    assert "worse" not in rows["lucky"]


def test_the_second_observer_has_a_line_without_rank_or_difference(made):
    runs = [Run("good", made(GOOD), made(BASE)), Run("lucky", made(LUCKY), made(BASE))]
    runs[0] = replace(runs[0], human=made(WORSE))
    text = markdown(compare_runs(runs))
    ranking, differences = text.split("## Paired difference")
    assert "|  | human agreement | 0.644 (" in ranking
    assert "human agreement" not in differences
    assert text.splitlines()[2].startswith("2 runs, ")


def test_runs_without_a_base_have_no_chart_and_say_so(made, tmp_path):
    comparison = compare_runs([Run("alone", made(GOOD))])
    html = write_comparison_report(tmp_path, comparison)[0].read_text()
    assert "<svg" not in html
    assert "No run has anything to be compared with." in html
    assert "nan" not in markdown(comparison)
