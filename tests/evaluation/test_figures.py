import json
import logging

import numpy as np
import pytest
from PIL import Image

from vesselrl.evaluation.figures import curves_figure, plot_curves, plot_panels, read_metrics
from vesselrl.scoring.overlay import overlay


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_overlay_colours_by_hand():
    image = np.full((1, 4, 3), 100, np.uint8)
    mask = np.array([[True, True, False, False]])
    truth = np.array([[True, False, True, False]])
    # 0.15 * 100 + 0.85 * colour: found 231.75, invented (49, 134, 214.75), missed (210.5, 78.75, 23.5)
    drawn = overlay(image, mask, truth)
    assert drawn.tolist() == [[[232, 232, 232], [49, 134, 215], [210, 79, 24], [100, 100, 100]]]
    assert (image == 100).all()
    assert overlay(image, mask).tolist() == [[[49, 134, 215]] * 2 + [[100, 100, 100]] * 2]


def test_overlay_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"shape \(4, 5, 3\)"):
        overlay(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), bool))
    with pytest.raises(ValueError, match="float64"):
        overlay(np.zeros((4, 4, 3)), np.zeros((4, 4), bool))
    with pytest.raises(ValueError, match="differ in size"):
        overlay(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), bool), np.zeros((4, 5), bool))


def test_metrics_are_read_sorted_and_the_last_of_a_step_counts(tmp_path, caplog):
    path = write_lines(
        tmp_path / "metrics.jsonl",
        [
            {"step": 0, "val/dice": 0.7, "note": "text", "done": True},
            {"step": 20, "val/dice": 0.8, "train/reward": float("nan")},
            {"step": 10, "val/dice": 0.9},
            {"step": 10, "val/dice": 0.75},
        ],
    )
    with path.open("a") as file:
        file.write('{"step": 30, "val/di')
    with caplog.at_level(logging.WARNING):
        series = read_metrics(path)
    assert list(series) == ["val/dice"]
    assert [column.tolist() for column in series["val/dice"]] == [[0, 10, 20], [0.7, 0.75, 0.8]]
    assert "last line is cut off" in caplog.text


def test_damaged_metrics_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"val/dice": 1}\n')
    with pytest.raises(ValueError, match="line 2 has no 'step'"):
        read_metrics(path)
    path.write_text('{"step": 1, "other": 2}\n')
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_curves(path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_curves_draw_every_panel_that_has_data(tmp_path):
    entries = [{"step": 0, "val/dice": 0.7}]
    for step in range(1, 40):
        terms = {f"train/reward/term{number}": 0.1 * number for number in range(9)}
        entries.append({"step": step, "train/reward": 1.0, "train/approx_kl": 0.01, **terms})
    small = plot_curves(write_lines(tmp_path / "a.jsonl", entries[:1]), tmp_path / "a.png")
    large = plot_curves(write_lines(tmp_path / "b.jsonl", entries), tmp_path / "figures" / "b.png")
    with Image.open(small) as one, Image.open(large) as four:
        assert four.width == 3 * one.width
        assert four.height == 2 * one.height
        assert np.asarray(four.convert("L")).std() > 5
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["b.png"]


def test_the_loss_is_drawn_for_supervised_runs_only(tmp_path):
    entries = [{"step": step, "train/loss": 0.5, "train/grad_norm": 1.0} for step in range(3)]
    supervised = curves_figure(write_lines(tmp_path / "a.jsonl", entries))
    rewarded = [entry | {"train/reward": 1.0} for entry in entries]
    rl = curves_figure(write_lines(tmp_path / "b.jsonl", rewarded))
    titles = [[axes.get_title(loc="left") for axes in figure.axes] for figure in (supervised, rl)]
    assert titles == [["Loss", "Gradient norm"], ["Reward", "Gradient norm"]]


def test_a_long_run_is_drawn_with_few_points_and_its_true_mean(tmp_path):
    entries = [{"step": step, "train/reward": float(step % 2)} for step in range(5000)]
    (axes,) = curves_figure(write_lines(tmp_path / "a.jsonl", entries)).axes
    assert [len(line.get_xdata()) for line in axes.lines] == [1000, 1000]
    assert axes.lines[1].get_ydata() == pytest.approx(0.5, abs=0.01)
    assert axes.lines[1].get_xdata()[-1] == 4995


def test_panels_mark_breaks_and_false_pieces(tmp_path):
    image = np.full((60, 60, 3), 90, np.uint8)
    truth = np.zeros((60, 60), bool)
    truth[29:32, 5:55] = True
    broken = truth.copy()
    broken[:, 28:33] = False
    broken[10, 10] = True
    shares = []
    for after in (truth, broken):
        path = plot_panels([("P001_S1_F0001", image, truth, truth, after)], tmp_path / "panels.png")
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)[: int(picture.height * 0.85)]
        # yellow: a break; light blue: a false piece, paler than the invented pixel in it
        yellow = (pixels[..., 0] > 200) & (pixels[..., 1] > 190) & (pixels[..., 2] < 120)
        pale_blue = (pixels[..., 2] > 180) & (pixels[..., 2] - pixels[..., 0] > 60) & (pixels[..., 1] > 145)
        shares.append((yellow.sum(), pale_blue.sum()))
    assert shares[0] == (0, 0)
    assert min(shares[1]) > 5


def test_panels_show_the_error_colours(tmp_path):
    image = np.full((40, 40, 3), 90, np.uint8)
    truth = np.zeros((40, 40), bool)
    truth[10:30, 10:30] = True
    invented = np.zeros((40, 40), bool)
    invented[:5] = True
    path = plot_panels(
        [("P001_S1_F0001", image, truth, None, truth), ("P002_S1_F0001", image, truth, truth, invented)],
        tmp_path / "panels.png",
    )
    with Image.open(path) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=10**6)}
    # 0.15 * 90 + 0.85 * colour for missed and invented
    assert {(209, 77, 22), (48, 132, 213)} <= colours
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_panels([], tmp_path / "none.png")
