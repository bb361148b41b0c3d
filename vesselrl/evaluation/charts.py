"""Charts for reports: the common style, a figure as SVG text, and the charts that are not curves over steps.

Matplotlib is imported when the first chart is drawn. A chart drawn twice from the same numbers is the same
text: no date, no random name, nothing fetched from elsewhere.
"""

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too pale on white.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
BLUE, VERMILION, GREEN = LINE_COLOURS[:3]
INK, GRID, QUIET = "#333333", "#E3E3E3", "#8A8A8A"
# A verdict is told by the marker's shape as well as by its colour.
VERDICT_MARKS = {"better": (BLUE, "o"), "worse": (VERMILION, "X"), "changed": (INK, "D"), "": (QUIET, "|")}


@dataclass(frozen=True)
class Estimate:
    """One line of an interval chart: a difference with its interval (nan = none) and its verdict."""

    label: str
    value: float
    low: float
    high: float
    verdict: str = ""


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this size in inches, without pyplot's global state and without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def svg(figure: "Figure", name: str) -> str:
    """A figure as one `<svg>` element to put inside a page; `name` is read out in place of the picture.

    Identifiers are made unique to the chart, so that several charts can share a page.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "vesselrl", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)  # holds the date
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    prefix = f"c{hashlib.sha256((name + text).encode()).hexdigest()[:8]}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'href="#', f'href="#{prefix}', text).replace("url(#", f"url(#{prefix}")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)


def plain_axes(axes: "Axes", title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Light grid behind the data, no frame at the top and right, small labels."""
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def interval_figure(panels: Mapping[str, Sequence[Estimate]]) -> "Figure":
    """Forest plot: one panel per title, one line per estimate, 0 = no difference marked.

    Panels share the order of the lines of the first one. An estimate without an interval is a bare mark.
    """
    from matplotlib.ticker import MaxNLocator

    lines = max(len(estimates) for estimates in panels.values())
    figure = new_figure(max(7.0, 2.2 + 3.6 * len(panels)), 1.1 + 0.36 * lines)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, estimates) in zip(grid, panels.items(), strict=True):
        plain_axes(axes, title)
        axes.axvline(0, color=INK, lw=1)
        for place, estimate in enumerate(estimates):
            colour, mark = VERDICT_MARKS[estimate.verdict]
            if not (math.isnan(estimate.low) or math.isnan(estimate.high)):
                axes.plot([estimate.low, estimate.high], [place, place], color=colour, lw=2.2)
            if not math.isnan(estimate.value):
                axes.plot(estimate.value, place, marker=mark, ms=8, mew=2, color=colour)
        axes.set_yticks(range(len(estimates)), [estimate.label for estimate in estimates])
        axes.set_ylim(lines - 0.4, -0.6)
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
    plain_axes(axes, xlabel=f"{metric}, mean of the patient's images")
    for place, patient in enumerate(patients):
        first, last = before[patient], after[patient]
        axes.plot([first, last], [place, place], color=BLUE if last >= first else VERMILION, lw=2.2)
        axes.plot(first, place, "o", ms=5.5, mfc="white", mec=INK, label="before" if place == 0 else None)
        axes.plot(last, place, "o", ms=5.5, color=INK, label="after" if place == 0 else None)
    axes.set_yticks(range(len(patients)), patients)
    axes.set_ylim(-0.8, len(patients) - 0.2)
    axes.grid(axis="y", visible=False)
    legend_above(axes)
    return figure


def threshold_figure(sweep: Mapping) -> "Figure":
    """Dice, recall and precision by threshold, and precision by recall; 0.5 and the chosen one are marked.

    Args:
        sweep: `thresholds`, `dice`, `recall`, `precision` (lists of one length) and `chosen`.
    """
    figure = new_figure(10.4, 3.9)
    left, right = figure.subplots(1, 2)
    plain_axes(left, "Scores by threshold", "threshold on the probability")
    for name, colour, style in (("dice", BLUE, "-"), ("recall", VERMILION, "--"), ("precision", GREEN, "-.")):
        label = "Dice" if name == "dice" else name
        left.plot(sweep["thresholds"], sweep[name], style, color=colour, lw=1.8, label=label)
    left.axvline(0.5, color=QUIET, lw=1.2, ls=":", label="0.5")
    left.axvline(sweep["chosen"], color=INK, lw=1.2, label=f"chosen {sweep['chosen']:.3g}")
    left.set_xlim(0, 1)
    legend_above(left)

    plain_axes(right, "Precision and recall", "recall", "precision")
    right.plot(sweep["recall"], sweep["precision"], color=BLUE, lw=1.8)
    marks = ((0.5, "o", "white", "0.5"), (sweep["chosen"], "o", INK, f"chosen {sweep['chosen']:.3g}"))
    for threshold, mark, fill, label in marks:
        place = nearest(sweep["thresholds"], threshold)
        point = sweep["recall"][place], sweep["precision"][place]
        right.plot(*point, mark, ms=7, mfc=fill, mec=INK, label=label, ls="none")
    legend_above(right)
    return figure


def reliability_figure(curves: Mapping[str, Sequence[Mapping]]) -> "Figure":
    """Share of true vessel pixels by predicted probability; a calibrated model lies on the diagonal.

    Args:
        curves: name -> bins, each with `predicted` and `observed` (means over the pixels of the bin).
    """
    figure = new_figure(5.0, 3.9)
    axes = figure.add_subplot()
    plain_axes(axes, "", "predicted probability", "share that is vessel")
    axes.plot([0, 1], [0, 1], color=QUIET, lw=1.2, ls=":", label="calibrated")
    for (name, bins), colour, mark in zip(curves.items(), LINE_COLOURS, "os^", strict=False):
        points = [[line[axis] for line in bins] for axis in ("predicted", "observed")]
        axes.plot(*points, marker=mark, ms=4.5, color=colour, lw=1.8, label=name)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    legend_above(axes)
    return figure


def nearest(values: Sequence[float], wanted: float) -> int:
    """Position of the value nearest to the wanted one."""
    return min(range(len(values)), key=lambda place: abs(values[place] - wanted))


def legend_above(axes: "Axes", columns: int = 5) -> None:
    """The legend between title and data, where it covers nothing."""
    handles, _ = axes.get_legend_handles_labels()
    if not handles:
        return
    axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=11, fontweight="bold", color=INK,
                   pad=8 + 16 * math.ceil(len(handles) / columns))  # fmt: skip
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=columns, frameon=False, fontsize=8.5,
                handlelength=1.6, columnspacing=1.1)  # fmt: skip
