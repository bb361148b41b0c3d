"""Figures of a run: training curves, before/after panels, overlays. Matplotlib is imported when first needed.

Colours are colour-blind safe and mean the same in every picture: white is a vessel found, red (vermilion) a
vessel missed, blue a vessel invented.
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vesselrl.evaluation.charts import INK, LINE_COLOURS, legend_above, new_figure, plain_axes
from vesselrl.scoring.metrics import dice
from vesselrl.scoring.overlay import HIT, INVENTED, MISSED, TopologyErrors, overlay, topology_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

LEGEND_COLUMNS = 5
MAX_POINTS = 1000
BREAK_MARK = {"marker": "o", "ms": 6, "mfc": "none", "mec": "#F0E442", "mew": 1.2}
PIECE_MARK = {"marker": "s", "ms": 3.6, "mfc": "none", "mec": "#7FC8F8", "mew": 0.5}
PANELS = (
    ("Reward", ("train/reward", "val/reward"), None),
    ("Reward terms (training)", ("train/reward/",), None),
    ("Validation scores", ("val/dice", "val/recall", "val/precision", "val/cldice"), None),
    ("Loss", ("train/loss",), None),
    ("KL to the policy that sampled", ("train/approx_kl",), 0.0),
    ("Share of clipped ratios", ("train/clipfrac",), 0.0),
    ("Gradient norm", ("train/grad_norm",), 0.0),
)
# Legend entries that differ from the last part of the key; "" = named by the panel's title.
NAMES = {
    "train/reward": "training",
    "val/reward": "validation",
    "val/dice": "Dice",
    "val/cldice": "clDice",
    "train/reward/dice": "Dice",
    "train/loss": "",
    "train/approx_kl": "",
    "train/clipfrac": "",
    "train/grad_norm": "",
}


def read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read a metrics.jsonl: key -> (steps, values), steps ascending, values finite.

    A step logged twice, as after a resume, keeps its last value. A last line cut off by a crash is skipped
    with a warning.

    Raises:
        ValueError: another line is no JSON object with a "step"; the message names the line.
    """
    path = Path(path)
    series: dict[str, dict[int, float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                logger.warning("%s: the last line is cut off and was skipped.", path)
                continue
            raise ValueError(f"{path} line {number} is not JSON ({error}). Remove or repair it.") from error
        if not isinstance(entry, dict) or "step" not in entry:
            raise ValueError(
                f"{path} line {number} has no 'step': got {line[:60]!r}. Log a step on every line."
            )
        for key, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                series.setdefault(key, {})[int(entry["step"])] = float(value)
    ordered = {key: sorted(points.items()) for key, points in series.items() if key != "step"}
    return {
        key: (np.array([step for step, _ in points]), np.array([value for _, value in points]))
        for key, points in ordered.items()
    }


def plot_curves(metrics_jsonl_path: Path, out_png: Path) -> Path:
    """Draw the curves of a run as PNG; see `curves_figure`.

    Raises:
        ValueError: the file is damaged, or holds none of the known keys.
    """
    return _save(curves_figure(metrics_jsonl_path), out_png)


def curves_figure(metrics_jsonl_path: Path) -> "Figure":
    """The curves of a run: reward, its terms, validation scores, loss, KL, clipped share, gradient norm.

    Panels without data are left out; the loss is shown for supervised runs only. Training values are drawn
    pale, with a running mean over a tenth of the run on top; validation values as points.

    Raises:
        ValueError: the file is damaged, or holds none of the known keys.
    """
    series = read_metrics(metrics_jsonl_path)
    if "train/reward" in series:
        series.pop("train/loss", None)  # of PPO: its size says nothing about learning
    panels = [(title, _matching(series, keys), floor) for title, keys, floor in PANELS]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        known = ", ".join(key for _, keys, _ in PANELS for key in keys)
        raise ValueError(f"{metrics_jsonl_path} holds nothing to draw: found {sorted(series)}, know {known}.")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.6 * columns, 3.3 * rows)
    last_step = max(int(steps[-1]) for _, keys, _ in panels for steps in [series[key][0] for key in keys])
    for position, (title, keys, floor) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, position)
        for key, colour in zip(keys, _cycle(len(keys)), strict=True):
            _draw_series(axes, key, *series[key], colour)
        _style(axes, title, last_step, floor)
    return figure


def plot_panels(
    cases: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]], out_png: Path
) -> Path:
    """Draw image | truth | before | after, one row per case, errors coloured and marked, Dice below.

    Marks and their definition: `topology_errors`.

    Args:
        cases: (key, image uint8 (H, W, 3), truth, before, after), masks bool (H, W); None for before or
            after is a failed prediction and is drawn as an empty mask. Up to about eight cases stay
            legible.
        out_png: file to write.

    Raises:
        ValueError: no cases, or sizes within a case differ.
    """
    if not cases:
        raise ValueError("There is nothing to draw: got 0 cases. Give at least one (key, image, truth, ...).")
    figure = new_figure(11.0, 2.95 * len(cases) + 0.75)
    grid = figure.subplots(len(cases), 4, squeeze=False)
    for column, title in enumerate(("image", "truth", "before", "after")):
        grid[0, column].set_title(title, fontsize=12, fontweight="bold", color=INK, pad=8)
    for line, (key, image, truth, before, after) in zip(grid, cases, strict=True):
        line[0].imshow(image)
        line[0].set_ylabel(key, fontsize=9, color=INK)
        line[1].imshow(overlay(image, truth, truth))
        for axes, mask in ((line[2], before), (line[3], after)):
            _draw_errors(axes, image, mask, truth)
        for axes in line:
            axes.set(xticks=[], yticks=[], xlim=line[0].get_xlim(), ylim=line[0].get_ylim())
            for spine in axes.spines.values():
                spine.set_visible(False)
    _colour_key(figure)
    return _save(figure, out_png)


def _draw_errors(axes: "Axes", image: np.ndarray, mask: np.ndarray | None, truth: np.ndarray) -> None:
    """One prediction over its image: errors coloured, breaks and false pieces marked, Dice below."""
    drawn = np.zeros(np.shape(truth), dtype=bool) if mask is None else mask
    errors = topology_errors(drawn, truth)
    axes.imshow(overlay(image, drawn, truth))
    for places, style in ((errors.false_pieces, PIECE_MARK), (errors.breaks, BREAK_MARK)):
        rows, columns = [place[0] for place in places], [place[1] for place in places]
        axes.plot(columns, rows, ls="none", **style)
    failed = "failed, " if mask is None else ""
    axes.set_xlabel(f"{failed}Dice {dice(drawn, truth):.3f}, {count_errors(errors)}", fontsize=9, color=INK)


def count_errors(errors: TopologyErrors) -> str:
    """The number of breaks and of false pieces as words."""
    parts = ((len(errors.breaks), "break"), (len(errors.false_pieces), "false piece"))
    return ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in parts)


def _matching(series: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """The logged keys a panel shows, in its order; a key ending in "/" stands for all keys below it."""
    found: list[str] = []
    for key in keys:
        found += [name for name in series if name.startswith(key)] if key.endswith("/") else [key]
    return [key for key in found if key in series]


def _cycle(count: int) -> list[str]:
    """`count` line colours, repeated when there are more lines than colours."""
    return [LINE_COLOURS[number % len(LINE_COLOURS)] for number in range(count)]


def _draw_series(axes: "Axes", key: str, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """One curve: points for few values or validation, else pale values with a running mean on top."""
    label = NAMES.get(key, key.rsplit("/", 1)[-1].replace("_", " ")) or None
    if key.startswith("val/") or len(values) < 20:
        axes.plot(steps, values, color=colour, lw=1.8, marker="o", ms=3.5, clip_on=False, label=label)
        return
    mean = _running_mean(values, max(3, len(values) // 10))
    some = slice(None, None, math.ceil(len(values) / MAX_POINTS))  # a long run draws every k-th step
    axes.plot(steps[some], values[some], color=colour, lw=0.8, alpha=0.3)
    axes.plot(steps[some], mean[some], color=colour, lw=1.8, label=label)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` values, over fewer at both ends; same length as the input."""
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _style(axes: "Axes", title: str, last_step: int, floor: float | None) -> None:
    """Title, legend, whole steps on one range for all panels."""
    plain_axes(axes, title, "step")
    legend_above(axes, LEGEND_COLUMNS)
    axes.set_xlim(-0.02 * max(last_step, 1), 1.02 * max(last_step, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if floor is not None and axes.dataLim.ymin >= floor:
        axes.set_ylim(bottom=floor)


def _colour_key(figure: "Figure") -> None:
    """The meaning of colours and marks, below all panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    meanings = (("found", HIT), ("missed", MISSED), ("invented", INVENTED))
    entries: list[Any] = [
        Patch(facecolor=np.array(colour) / 255, edgecolor="#888888", linewidth=0.8, label=label)
        for label, colour in meanings
    ]
    for label, style in (("break", BREAK_MARK), ("false piece", PIECE_MARK)):
        entries.append(Line2D([], [], ls="none", label=label, **(style | {"ms": 9})))
    legend = figure.legend(handles=entries, loc="outside lower center", ncols=5, fontsize=10)
    legend.get_frame().set(facecolor="#D9D9D9", edgecolor="none")


def _save(figure: "Figure", out_png: Path) -> Path:
    """Write the figure as PNG, whole or not at all."""
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_png.with_name(f".{out_png.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=130)
    os.replace(temporary, out_png)
    return out_png
