"""Curves, panels and cases of a run, and the SVG charts of reports."""

import json
import logging
import math
import re

import numpy as np
import pytest
from PIL import Image

from vesselrl.evaluation import figures
from vesselrl.evaluation.figures import (
    Case,
    choose_cases,
    curves_figure,
    plot_curves,
    plot_panels,
    write_cases,
)
from vesselrl.evaluation.report import read_cases

CURVE = {"thresholds": [0.25, 0.5, 0.75], "chosen": 0.75}
CURVE |= {"dice": [0.7, 0.8, 0.75], "recall": [0.9, 0.8, 0.65], "precision": [0.6, 0.8, 0.9]}


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_metrics_are_read_sorted_and_the_last_of_a_step_counts(tmp_path, caplog):
    entries = [
        {"step": 0, "val/dice": 0.7, "note": "text", "done": True},
        {"step": 20, "val/dice": 0.8, "train/reward": float("nan")},
        {"step": 10, "val/dice": 0.9},
        {"step": 10, "val/dice": 0.75},
    ]
    with write_lines(path := tmp_path / "metrics.jsonl", entries).open("a") as file:
        file.write('{"st\n{"val/dice": 0.1}\n[1]\n{"step": 30, "val/di')
    with caplog.at_level(logging.WARNING):
        series = figures.read_metrics(path)
    assert list(series) == ["val/dice"]
    assert [column.tolist() for column in series["val/dice"]] == [[0, 10, 20], [0.7, 0.75, 0.8]]
    assert re.findall(r"line (\d) is damaged", caplog.text) == ["5", "6", "7", "8"]


def test_metrics_without_a_curve_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "other": 2}\n')
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_curves_have_a_panel_for_each_kind_of_value_and_the_loss_for_supervised_runs_only(tmp_path):
    entries = [{"step": step, "train/loss": 0.5, "train/grad_norm": 1.0} for step in range(3)]
    rewarded = [entry | {"train/reward": 1.0, "train/reward/dice": 1.0, "val/iou": 1.0} for entry in entries]
    drawn = [curves_figure(write_lines(tmp_path / "a.jsonl", lines)) for lines in (entries, rewarded)]
    titles = [[axes.get_title(loc="left") for axes in figure.axes] for figure in drawn]
    assert titles == [["Loss", "Gradient norm"], ["Reward", "Reward terms (training)", "Gradient norm"]]
    with Image.open(plot_curves(tmp_path / "a.jsonl", tmp_path / "figures" / "b.png")) as picture:
        assert picture.width > 3 * picture.height
        assert np.asarray(picture.convert("L")).std() > 5
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["b.png"]


def test_a_long_run_is_drawn_with_few_points_and_its_true_mean(tmp_path):
    entries = [{"step": step, "train/reward": float(step % 2)} for step in range(5000)]
    (axes,) = curves_figure(write_lines(tmp_path / "a.jsonl", entries)).axes
    assert [len(line.get_xdata()) for line in axes.lines] == [1000, 1000]
    assert axes.lines[1].get_ydata() == pytest.approx(0.5, abs=0.01)
    assert axes.lines[1].get_xdata()[-1] == 4995


def case(key="P001_S1_F0001", **changes):
    truth = np.zeros((40, 60), bool)
    truth[19:22, 5:55] = True  # 150 px
    before = truth & ~np.isin(np.arange(60), range(20, 30))  # 120 px found: a break
    before[2, 2] = True  # one false component: Dice 240 / 271
    image = np.full((40, 60, 3), 90, np.uint8)
    return Case(**({"key": key, "image": image, "truth": truth, "before": before, "after": truth} | changes))


def test_panels_show_errors_by_colour_and_mark_breaks_and_false_components(tmp_path):
    shares = []
    for panel in (case(before=case().truth), case(after=case().before)):
        with Image.open(plot_panels([panel], tmp_path / "panels.png")) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)[: int(picture.height * 0.85)]
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        yellow = (red > 200) & (green > 190) & (blue < 120)  # a break
        pale_blue = (blue > 180) & (blue - red > 60) & (green > 145)  # a false component
        missed = (pixels == [209, 77, 22]).all(-1)  # 0.15 * 90 + 0.85 * colour
        shares.append((yellow.sum(), pale_blue.sum(), missed.sum()))
    assert shares[0] == (0, 0, 0)
    assert min(shares[1]) > 5
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_panels([], tmp_path / "none.png")


def rows(scores, patients):
    named = enumerate(zip(patients, scores, strict=True))
    return [{"key": f"{name}{k}", "patient": name, "dice": score} for k, (name, score) in named]


def test_best_median_and_worst_are_chosen_by_dice_from_different_patients():
    made = rows([0.3, 0.9, 0.5, 0.1, 0.7, 0.8, 0.2, 0.6, 0.4], "ABCDEFGHI")
    assert choose_cases(made, count=1) == {"B1": "best", "C2": "median", "D3": "worst"}
    two = choose_cases(made)
    assert list(two.values()) == ["best"] * 2 + ["median"] * 2 + ["worst"] * 2
    assert {key for key, rank in two.items() if rank == "worst"} == {"D3", "G6"}
    chosen = choose_cases(rows([0.99, 0.98, 0.97, 0.9, 0.8, 0.7, 0.2, 0.1, 0.3], "AAABCDEEF"))
    assert [key for key, rank in chosen.items() if rank == "best"] == ["A0", "B3"]
    assert [key for key, rank in chosen.items() if rank == "worst"] == ["E7", "F8"]
    amounts = [len(choose_cases(rows(np.linspace(0.5, 0.9, n), "A" * n))) for n in range(1, 9)]
    assert amounts == [1, 2, 3, 3, 3, 6, 6, 6]
    with pytest.raises(ValueError, match="Cannot choose 2 cases of 0 images"):
        choose_cases([])


def test_cases_are_stored_with_picture_scores_and_topology_errors(tmp_path):
    path = write_cases(tmp_path, [case(rank="best"), case("P002_S1_F0001", before=None, rank="worst")])
    first, second = read_cases(tmp_path)
    assert (first["key"], first["rank"], first["side"]) == ("P001_S1_F0001", "best", "val")
    names = ("dice", "failed", "breaks", "false_pieces")
    states = [
        [state[name] for name in names] for state in (first["before"], first["after"], second["before"])
    ]
    assert states == [[pytest.approx(240 / 271), False, 1, 1], [1.0, False, 0, 0], [0.0, True, 0, 0]]
    with Image.open(tmp_path / first["file"]) as picture:
        assert picture.width > 2.5 * picture.height
    names = {"cases.json", "P001_S1_F0001.png", "P002_S1_F0001.png"}
    assert {file.name for file in path.parent.iterdir()} == names


def test_bad_keys_and_damaged_cases_are_refused(tmp_path):
    for cases in ([], [case(), case()], [case("../x")], [case(".hidden")]):
        with pytest.raises(ValueError, match="distinct keys"):
            write_cases(tmp_path, cases)
    assert read_cases(tmp_path) == []
    (tmp_path / "cases").mkdir()
    for text in ("{", '{"format": "x"}'):
        (tmp_path / "cases" / "cases.json").write_text(text)
        with pytest.raises(ValueError, match=r"cases\.json of cases is no"):
            read_cases(tmp_path)


def forest():
    values = {"first": (0.2, 0.1, 0.3, "better"), "second": (-0.1, -0.2, -0.05, "worse")}
    values |= {"third": (0.0, math.nan, math.nan, "")}
    names = ("difference", "low", "high", "verdict")
    lines = {label: dict(zip(names, line, strict=True)) for label, line in values.items()}
    return figures.interval_figure({"Dice": lines | {"no line": None}})


def test_a_chart_is_one_element_whose_words_stay_words():
    text = figures.svg(forest(), 'Runs <"&">')
    assert text.startswith('<svg role="img" aria-label="Runs &lt;&quot;&amp;&quot;&gt;"')
    assert text.endswith("</svg>")
    assert text.count("<svg") == 1
    assert ">first</text>" in text


def test_charts_draw_the_given_numbers():
    (axes,) = forest().axes
    drawn = [list(np.atleast_1d(line.get_xdata())) for line in axes.lines[1:]]
    assert drawn == [[0.1, 0.3], [0.2], [-0.2, -0.05], [-0.1], [0.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second", "third", "no line"]
    assert axes.yaxis_inverted()  # the first line is on top
    assert len({axes.lines[place].get_color() for place in (2, 4, 5)}) == 3

    left, right = figures.threshold_figure(CURVE).axes
    curves = [CURVE["dice"], CURVE["recall"], CURVE["precision"]]
    assert [list(line.get_ydata()) for line in left.lines[:3]] == curves
    assert [line.get_xdata()[0] for line in left.lines[3:]] == [0.5, 0.75]
    points = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in right.lines[1:]]
    assert points == [(0.8, 0.8), (0.65, 0.9)]  # (recall, precision) at 0.5 and at 0.75

    (axes,) = figures.patient_figure({"P2": 0.5, "P1": 0.8}, {"P2": 0.6, "P1": 0.7}, "Dice").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["P2", "P1"]
    assert [list(map(float, line.get_xdata())) for line in axes.lines[::3]] == [[0.5, 0.6], [0.8, 0.7]]
    assert axes.lines[0].get_color() != axes.lines[3].get_color()
    bins = [{"predicted": 0.1, "observed": 0.3}, {"predicted": 0.9, "observed": 0.7}]
    (axes,) = figures.reliability_figure(bins).axes
    assert (list(axes.lines[1].get_xdata()), list(axes.lines[1].get_ydata())) == ([0.1, 0.9], [0.3, 0.7])
