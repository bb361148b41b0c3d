"""Curves, panels and cases of a run, and the SVG charts of reports."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from vesselrl.evaluation import figures
from vesselrl.evaluation.figures import Case, choose_cases, write_cases
from vesselrl.evaluation.report import read_cases

TORN = '{"st\n{"val/dice": 0.1}\n[1]\n{"step": 30, "val/di'


def write_lines(path, entries, end=""):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + end)
    return path


def test_metrics_are_read_sorted_and_the_last_of_a_step_counts(tmp_path, caplog):
    entries = [{"step": 0, "val/dice": 0.7, "note": "text"}, {"step": 20, "val/dice": 0.8, "x": math.nan}]
    entries += [{"step": 10, "val/dice": 0.9}, {"step": 10, "val/dice": 0.75}]
    series = figures.read_metrics(write_lines(tmp_path / "metrics.jsonl", entries, TORN))
    assert list(series) == ["val/dice"]
    assert [column.tolist() for column in series["val/dice"]] == [[0, 10, 20], [0.7, 0.75, 0.8]]
    assert re.findall(r"line (\d) is damaged", caplog.text) == ["5", "6", "7", "8"]


def case(key="P001_S1_F0001", **changes):
    truth = np.zeros((40, 60), bool)
    truth[19:22, 5:55] = True  # 150 px
    before = truth & ~np.isin(np.arange(60), range(20, 30))  # 120 px found: a break
    before[2, 2] = True  # one false component: Dice 240 / 271
    image = np.full((40, 60, 3), 90, np.uint8)
    return Case(**({"key": key, "image": image, "truth": truth, "before": before, "after": truth} | changes))


def test_best_median_and_worst_are_chosen_by_dice_from_different_patients(made):
    nine = made([0.3, 0.9, 0.5, 0.1, 0.7, 0.8, 0.2, 0.6, 0.4], "ABCDEFGHI").rows
    chosen = {"B_S1_F0001": "best", "C_S1_F0002": "median", "D_S1_F0003": "worst"}
    assert choose_cases(nine, count=1) == chosen
    chosen = choose_cases(made([0.99, 0.98, 0.97, 0.9, 0.8, 0.7, 0.2, 0.1, 0.3], "AAABCDEEF").rows)
    assert [key[0] for key, rank in chosen.items() if rank == "best"] == ["A", "B"]
    assert [key for key, rank in chosen.items() if rank == "worst"] == ["E_S1_F0007", "F_S1_F0008"]


def test_cases_are_stored_with_pictures_of_their_errors_scores_and_topology_errors(tmp_path):
    for cases in ([], [case(), case()], [case("../x")], [case(".hidden")]):
        with pytest.raises(ValueError, match="distinct keys"):
            write_cases(tmp_path, cases)
    assert read_cases(tmp_path) == []
    right, wrong = case(before=case().truth, rank="best"), case("P2", after=case().before, rank="worst")
    write_cases(tmp_path, [right, wrong, case("P3", before=None)])
    stored = read_cases(tmp_path)
    assert [one["file"] for one in stored] == ["cases/P001_S1_F0001.png", "cases/P2.png", "cases/P3.png"]
    states = [state for one in stored for state in (one["before"], one["after"])]
    found = [[state[name] for name in ("dice", "failed", "breaks", "false_pieces")] for state in states]
    good, bad = [1.0, False, 0, 0], [pytest.approx(240 / 271), False, 1, 1]
    assert found == [good, good, bad, bad, [0.0, True, 0, 0], good]
    pictures = [np.asarray(Image.open(tmp_path / one["file"]).convert("RGB")) for one in stored[:2]]
    missed = [(picture == [202, 70, 15]).all(-1).sum() for picture in pictures]  # 0.15 * 45 + 0.85 * colour
    assert missed[0] == 0
    assert missed[1] > 5


def test_charts_draw_the_given_numbers():
    values = (0.2, 0.1, 0.3, "better"), (-0.1, -0.2, -0.05, "worse"), (0.0, math.nan, math.nan, "")
    names = ("difference", "low", "high", "verdict")
    lines = [dict(zip(names, line, strict=True)) for line in values]
    lines = dict(zip(("first", "second", "third", "no line"), (*lines, None), strict=True))
    figure = figures.interval_figure({"Dice": lines})
    (axes,) = figure.axes
    drawn = [list(np.atleast_1d(line.get_xdata())) for line in axes.lines[1:]]
    assert drawn == [[0.1, 0.3], [0.2], [-0.2, -0.05], [-0.1], [0.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second", "third", "no line"]
    text = figures.svg(figure, 'Runs <"&">')
    assert text == figures.svg(figure, 'Runs <"&">')
    assert text.startswith('<svg role="img" aria-label="Runs &lt;&quot;&amp;&quot;&gt;"')

    curve = {"thresholds": [0.25, 0.5, 0.75], "chosen": 0.75}
    curve |= {"dice": [0.7, 0.8, 0.75], "recall": [0.9, 0.8, 0.65], "precision": [0.6, 0.8, 0.9]}
    left, right = figures.threshold_figure(curve).axes
    assert [[*line.get_ydata()] for line in left.lines[:3]] == [*curve.values()][2:]
    points = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in right.lines[1:]]
    assert points == [(0.8, 0.8), (0.65, 0.9)]  # (recall, precision) at 0.5 and at 0.75
