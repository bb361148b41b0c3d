"""Figures of a run and of its reports: curves, cases, charts. Matplotlib is imported with the first."""

import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vesselrl.experiment.run_folder import atomic_write, write_json
from vesselrl.scoring.overlap import dice
from vesselrl.scoring.overlay import HIT, INVENTED, MISSED, TopologyErrors, overlay, topology_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# Okabe and Ito's palette without its yellow, which is too pale on white.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
BLUE, VERMILION, GREEN = LINE_COLOURS[:3]
INK, GRID, QUIET = "#333333", "#E3E3E3", "#8A8A8A"
# A verdict is told by the marker's shape as well as by its colour.
VERDICT_MARKERS = {"better": (BLUE, "o"), "worse": (VERMILION, "X"), "changed": (INK, "D"), "": (QUIET, "|")}
BREAK_MARKER = {"marker": "o", "ms": 6, "mfc": "none", "mec": "#F0E442", "mew": 1.2}
FALSE_MARKER = {"marker": "s", "ms": 3.6, "mfc": "none", "mec": "#7FC8F8", "mew": 0.5}
MAX_POINTS = 1000
SCORES = {"dice": "Dice", "recall": "recall", "precision": "precision", "cldice": "clDice"}
# Title, logged keys with their legend entries (None: the title says it), lower end of the axis.
PANELS = (
    ("Reward", {"train/reward": "training", "val/reward": "validation"}, None),
    ("Reward terms (training)", {}, None),
    ("Validation scores", {f"val/{key}": label for key, label in SCORES.items()}, None),
    ("Loss", {"train/loss": None}, None),
    ("KL to the policy that sampled", {"train/approx_kl": None}, 0.0),
    ("Share of clipped ratios", {"train/clipfrac": None}, 0.0),
    ("Gradient norm", {"train/grad_norm": None}, 0.0),
)
CASES_FORMAT = "vesselrl cases 1"
CASES_FOLDER = "cases"
RANKS = ("best", "median", "worst")


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this size in inches, without pyplot's global state and without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def svg(figure: "Figure", name: str) -> str:
    """A figure as one `<svg>` element with `name` as spoken text; equal numbers give equal text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "vesselrl", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue().partition("<svg")[2].rstrip()
    unwanted = r'<metadata>.*?</metadata>| xmlns(:\w+)?="[^"]*"|xlink:(?=href)'  # the first holds the date
    text = re.sub(unwanted, "", text, flags=re.DOTALL)
    prefix = f"c{hashlib.sha256((name + text).encode()).hexdigest()[:8]}-"
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{prefix}", text)
    return f'<svg role="img" aria-label="{escape(name)}"{text}'


def _finish(axes: "Axes", title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Light grid behind the data, no frame at the top and right, the legend between title and data."""
    handles, _ = axes.get_legend_handles_labels()
    pad = 8 + 16 * math.ceil(len(handles) / 5)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=pad)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if handles:
        style = {"frameon": False, "fontsize": 8.5, "handlelength": 1.6, "columnspacing": 1.1}
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=5, **style)


def save_png(figure: "Figure", out_png: Path) -> None:
    """Writes a figure."""
    with atomic_write(out_png) as partial:
        figure.savefig(partial, format="png", dpi=130)


def interval_figure(panels: Mapping[str, Mapping[str, Mapping[str, Any] | None]]) -> "Figure":
    """Forest plot: panel title -> label, the same in all panels -> line of `before_after_table` or None."""
    from matplotlib.ticker import MaxNLocator

    labels = list(next(iter(panels.values())))
    figure = new_figure(max(7.0, 2.2 + 3.6 * len(panels)), 1.1 + 0.36 * len(labels))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        _finish(axes, title)
        axes.axvline(0, color=INK, lw=1)
        for place, line in enumerate(lines.values()):
            if line is None or math.isnan(line["difference"]):
                continue
            colour, marker = VERDICT_MARKERS[line["verdict"]]
            if not (math.isnan(line["low"]) or math.isnan(line["high"])):
                axes.plot([line["low"], line["high"]], [place, place], color=colour, lw=2.2)
            axes.plot(line["difference"], place, marker=marker, ms=8, mew=2, color=colour)
        axes.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: "0" if abs(value) < 1e-12 else f"{value:+.4g}")
    return figure


def patient_figure(before: Mapping[str, float], after: Mapping[str, float], metric: str) -> "Figure":
    """One line per patient from its value before to its value after, lowest value before first."""
    patients = sorted(before, key=lambda patient: (before[patient], patient))
    figure = new_figure(7.4, 1.3 + 0.21 * len(patients))
    axes = figure.add_subplot()
    for place, patient in enumerate(patients):
        first, last = before[patient], after[patient]
        axes.plot([first, last], [place, place], color=BLUE if last >= first else VERMILION, lw=2.2)
        axes.plot(first, place, "o", ms=5.5, mfc="white", mec=INK, label="before" if place == 0 else None)
        axes.plot(last, place, "o", ms=5.5, color=INK, label="after" if place == 0 else None)
    axes.set(yticks=range(len(patients)), yticklabels=patients, ylim=(-0.8, len(patients) - 0.2))
    _finish(axes, xlabel=f"{metric}, mean of the patient's images")
    axes.grid(axis="y", visible=False)
    return figure


def threshold_figure(curve: Mapping) -> "Figure":
    """Dice, recall and precision by threshold, and precision by recall; 0.5 and the chosen one are marked."""
    figure = new_figure(10.4, 3.9)
    left, right = figure.subplots(1, 2)
    chosen, chosen_label = curve["chosen"], f"chosen {curve['chosen']:.3g}"
    for name, colour, style in (("dice", BLUE, "-"), ("recall", VERMILION, "--"), ("precision", GREEN, "-.")):
        left.plot(curve["thresholds"], curve[name], style, color=colour, lw=1.8, label=SCORES[name])
    left.axvline(0.5, color=QUIET, lw=1.2, ls=":", label="0.5")
    left.axvline(chosen, color=INK, lw=1.2, label=chosen_label)
    left.set_xlim(0, 1)
    _finish(left, "Scores by threshold", "threshold on the probability")
    right.plot(curve["recall"], curve["precision"], color=BLUE, lw=1.8)
    for threshold, fill, label in ((0.5, "white", "0.5"), (chosen, INK, chosen_label)):
        place = nearest(curve["thresholds"], threshold)
        point = curve["recall"][place], curve["precision"][place]
        right.plot(*point, "o", ms=7, mfc=fill, mec=INK, label=label, ls="none")
    _finish(right, "Precision and recall", "recall", "precision")
    return figure


def reliability_figure(bins: Sequence[Mapping]) -> "Figure":
    """Share of true vessel pixels by predicted probability; a calibrated model lies on the diagonal."""
    figure = new_figure(5.0, 3.9)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=QUIET, lw=1.2, ls=":", label="calibrated")
    points = [[line[axis] for line in bins] for axis in ("predicted", "observed")]
    axes.plot(*points, marker="o", ms=4.5, color=BLUE, lw=1.8, label="measured")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    _finish(axes, "", "predicted probability", "share that is vessel")
    return figure


def nearest(values: Sequence[float], wanted: float) -> int:
    """Position of the value nearest to the wanted one."""
    return int(np.abs(np.subtract(values, wanted)).argmin())


def read_metrics(path: Path) -> dict[str, tuple[np.ndarray, ...]]:
    """Reads a metrics.jsonl: key -> (steps, values), ascending and finite; logs lines that are damaged."""
    series: dict[str, dict[int, float]] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = int(entry.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.warning("%s line %d is damaged and was skipped.", path, number)
            continue
        for key, value in entry.items():
            if type(value) in (int, float) and math.isfinite(value):
                series.setdefault(key, {})[step] = float(value)
    return {k: tuple(map(np.array, zip(*sorted(v.items()), strict=True))) for k, v in series.items()}


def curves_figure(metrics_jsonl_path: Path) -> "Figure":
    """The curves of a run as `PANELS` lists them, training values pale, their running mean strong."""
    series = read_metrics(metrics_jsonl_path)
    if "train/reward" in series:
        series.pop("train/loss", None)  # of PPO: its size says nothing about learning
    terms = {key: key.removeprefix("train/reward/") for key in series if key.startswith("train/reward/")}
    terms = {key: "Dice" if term == "dice" else term.replace("_", " ") for key, term in terms.items()}
    panels = []
    for title, keys, floor in PANELS:
        found = {key: label for key, label in (keys or terms).items() if key in series}
        panels += [(title, found, floor)] if found else []
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.6 * columns, 3.3 * rows)
    last_step = max(int(series[key][0][-1]) for _, keys, _ in panels for key in keys)
    for position, (title, keys, floor) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, position)
        for (key, label), colour in zip(keys.items(), cycle(LINE_COLOURS), strict=False):
            steps, values = series[key]
            style = {"color": colour, "lw": 1.8, "label": label}
            if key.startswith("val/") or len(values) < 20:
                axes.plot(steps, values, marker="o", ms=3.5, clip_on=False, **style)
                continue
            window = np.ones(max(3, len(values) // 10))
            mean = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
            some = slice(None, None, math.ceil(len(values) / MAX_POINTS))  # a long run draws every k-th step
            axes.plot(steps[some], values[some], color=colour, lw=0.8, alpha=0.3)
            axes.plot(steps[some], mean[some], **style)
        _finish(axes, title, "step")
        axes.set_xlim(-0.02 * max(last_step, 1), 1.02 * max(last_step, 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        if floor is not None and axes.dataLim.ymin >= floor:
            axes.set_ylim(bottom=floor)
    return figure


@dataclass(frozen=True, eq=False)
class Case:
    """An image, uint8 (H, W, 3), its truth and the masks before and after, bool (H, W); None = failed."""

    key: str  # pseudonym of the image; names its files
    image: np.ndarray
    truth: np.ndarray
    before: np.ndarray | None
    after: np.ndarray | None
    rank: str = ""  # one of RANKS, as from `choose_cases`

    @cached_property
    def judged(self) -> dict[str, tuple[np.ndarray, dict[str, Any], TopologyErrors]]:
        """By state: the mask, empty for a failed prediction, its scores, and where its errors lie."""
        found = {}
        for state, mask in (("before", self.before), ("after", self.after)):
            shown = np.zeros(self.truth.shape, bool) if mask is None else mask
            errors = topology_errors(shown, self.truth)
            numbers = {"breaks": len(errors.breaks), "false_pieces": len(errors.false_pieces)}
            scores = {"dice": dice(shown, self.truth), "failed": mask is None, **numbers}
            found[state] = shown, scores, errors
        return found


def plot_panels(cases: Sequence[Case], out_png: Path) -> None:
    """Draws image | truth | before | after, one row per case, with coloured errors and Dice below."""
    figure = new_figure(11.0, 2.95 * len(cases) + 0.75)
    grid = figure.subplots(len(cases), 4, squeeze=False)
    for axes, title in zip(grid[0], ("image", "truth", "before", "after"), strict=True):
        axes.set_title(title, fontsize=12, fontweight="bold", color=INK, pad=8)
    for line, case in zip(grid, cases, strict=True):
        line[0].imshow(case.image)
        line[0].set_ylabel(case.key, fontsize=9, color=INK)
        line[1].imshow(overlay(case.image, case.truth, case.truth))
        for axes, (mask, scores, errors) in zip(line[2:], case.judged.values(), strict=True):
            axes.imshow(overlay(case.image, mask, case.truth))
            for places, style in ((errors.false_pieces, FALSE_MARKER), (errors.breaks, BREAK_MARKER)):
                axes.plot([column for _, column in places], [row for row, _ in places], ls="none", **style)
            numbers = ((scores["breaks"], "break"), (scores["false_pieces"], "false component"))
            counted = ", ".join(f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in numbers)
            failed = "failed,\n" if scores["failed"] else ""
            axes.set_xlabel(f"{failed}Dice {scores['dice']:.3f}, {counted}", fontsize=9, color=INK)
        for axes in line:
            axes.set(xticks=[], yticks=[], xlim=line[0].get_xlim(), ylim=line[0].get_ylim())
            axes.spines[:].set_visible(False)
    _colour_key(figure)
    save_png(figure, out_png)


def _colour_key(figure: "Figure") -> None:
    """The meaning of colours and markers, below all panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Any] = [
        Patch(facecolor=np.array(colour) / 255, edgecolor="#888888", linewidth=0.8, label=label)
        for label, colour in (("found", HIT), ("missed", MISSED), ("invented", INVENTED))
    ]
    for label, style in (("break", BREAK_MARKER), ("false component", FALSE_MARKER)):
        entries.append(Line2D([], [], ls="none", label=label, **(style | {"ms": 9})))
    legend = figure.legend(handles=entries, loc="outside lower center", ncols=5, fontsize=10)
    legend.get_frame().set(facecolor="#D9D9D9", edgecolor="none")


def choose_cases(rows: Sequence[Mapping[str, Any]], count: int = 2) -> dict[str, str]:
    """Keys of the best, median and worst images by Dice -> their rank, best first; no image twice.

    Each rank gets `count` images, fewer of few rows, of different patients where there are enough.
    """
    falling = sorted(rows, key=lambda row: (-row["dice"], row["key"]))
    if len(falling) == 1:
        return {falling[0]["key"]: "median"}
    each = max(1, min(count, len(falling) // 3))
    best = _first(falling, each)
    worst = _first([row for row in reversed(falling) if row not in best], each)
    centre, rest = (len(falling) - 1) / 2, [row for row in falling if row not in (*best, *worst)]
    middle = sorted(rest, key=lambda row: abs(falling.index(row) - centre))
    chosen = zip(RANKS, (best, _first(middle, each), worst), strict=True)
    return {row["key"]: rank for rank, ranked in chosen for row in ranked}


def _first(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The first rows of different patients, filled up with further rows where the patients do not suffice."""
    firsts = {row["patient"]: row for row in reversed(rows)}
    return sorted(rows, key=lambda row: row is not firsts[row["patient"]])[:count]


def write_cases(folder: Path, cases: Sequence[Case]) -> None:
    """Writes FOLDER/panel.png, FOLDER/cases/KEY.png for every case and FOLDER/cases/cases.json."""
    keys = [case.key for case in cases]
    unfit = [key for key in keys if Path(key).name != key or key.startswith(".")]
    if not cases or len(set(keys)) < len(keys) or unfit:
        raise ValueError(f"Cases need distinct keys that can be file names: got {keys}. Use Sample.key.")
    plot_panels(cases, Path(folder) / "panel.png")
    described = []
    for case in cases:
        file = f"{CASES_FOLDER}/{case.key}.png"
        plot_panels([case], Path(folder) / file)
        scores = {state: scores for state, (_, scores, _) in case.judged.items()}
        described.append({"key": case.key, "rank": case.rank, "side": "val", "file": file} | scores)
    write_json(Path(folder) / CASES_FOLDER / "cases.json", {"format": CASES_FORMAT, "cases": described})
