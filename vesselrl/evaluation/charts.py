"""SVG charts of reports: intervals, patients, thresholds, calibration, and the style that all figures share.

Matplotlib is imported with the first chart. Equal numbers give equal text: no date, no random identifier.
"""

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too pale on white.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
BLUE, VERMILION, GREEN = LINE_COLOURS[:3]
INK, GRID, QUIET = "#333333", "#E3E3E3", "#8A8A8A"
# A verdict is told by the marker's shape as well as by its colour.
VERDICT_MARKERS = {"better": (BLUE, "o"), "worse": (VERMILION, "X"), "changed": (INK, "D"), "": (QUIET, "|")}


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this size in inches, without pyplot's global state and without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def svg(figure: "Figure", name: str) -> str:
    """A figure as one `<svg>` element for a page, with identifiers of its own and `name` as spoken text."""
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


def legend_above(axes: "Axes", columns: int = 5) -> None:
    """Puts the legend between title and data, where it covers nothing."""
    handles, _ = axes.get_legend_handles_labels()
    if not handles:
        return
    pad = 8 + 16 * math.ceil(len(handles) / columns)
    title = axes.get_title(loc="left")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=pad)
    style = {"frameon": False, "fontsize": 8.5, "handlelength": 1.6, "columnspacing": 1.1}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=columns, **style)


def interval_figure(panels: Mapping[str, Mapping[str, Mapping[str, Any] | None]]) -> "Figure":
    """Forest plot of differences with 0 marked: panel title -> label -> line of `before_after_table` or None.

    Panels have the same labels. A difference without an interval is a bare marker.
    """
    from matplotlib.ticker import MaxNLocator

    labels = list(next(iter(panels.values())))
    figure = new_figure(max(7.0, 2.2 + 3.6 * len(panels)), 1.1 + 0.36 * len(labels))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        plain_axes(axes, title)
        axes.axvline(0, color=INK, lw=1)
        for place, line in enumerate(lines.values()):
            if line is None or math.isnan(line["difference"]):
                continue
            colour, marker = VERDICT_MARKERS[line["verdict"]]
            if not (math.isnan(line["low"]) or math.isnan(line["high"])):
                axes.plot([line["low"], line["high"]], [place, place], color=colour, lw=2.2)
            axes.plot(line["difference"], place, marker=marker, ms=8, mew=2, color=colour)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
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


def threshold_figure(curve: Mapping) -> "Figure":
    """Dice, recall and precision by threshold, and precision by recall; 0.5 and the chosen one are marked."""
    figure = new_figure(10.4, 3.9)
    left, right = figure.subplots(1, 2)
    chosen, chosen_label = curve["chosen"], f"chosen {curve['chosen']:.3g}"
    plain_axes(left, "Scores by threshold", "threshold on the probability")
    for name, colour, style in (("dice", BLUE, "-"), ("recall", VERMILION, "--"), ("precision", GREEN, "-.")):
        label = "Dice" if name == "dice" else name
        left.plot(curve["thresholds"], curve[name], style, color=colour, lw=1.8, label=label)
    left.axvline(0.5, color=QUIET, lw=1.2, ls=":", label="0.5")
    left.axvline(chosen, color=INK, lw=1.2, label=chosen_label)
    left.set_xlim(0, 1)
    legend_above(left)

    plain_axes(right, "Precision and recall", "recall", "precision")
    right.plot(curve["recall"], curve["precision"], color=BLUE, lw=1.8)
    for threshold, fill, label in ((0.5, "white", "0.5"), (chosen, INK, chosen_label)):
        place = nearest(curve["thresholds"], threshold)
        point = curve["recall"][place], curve["precision"][place]
        right.plot(*point, "o", ms=7, mfc=fill, mec=INK, label=label, ls="none")
    legend_above(right)
    return figure


def reliability_figure(bins: Sequence[Mapping]) -> "Figure":
    """Share of true vessel pixels by predicted probability; a calibrated model lies on the diagonal."""
    figure = new_figure(5.0, 3.9)
    axes = figure.add_subplot()
    plain_axes(axes, "", "predicted probability", "share that is vessel")
    axes.plot([0, 1], [0, 1], color=QUIET, lw=1.2, ls=":", label="calibrated")
    points = [[line[axis] for line in bins] for axis in ("predicted", "observed")]
    axes.plot(*points, marker="o", ms=4.5, color=BLUE, lw=1.8, label="measured")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    legend_above(axes)
    return figure


def nearest(values: Sequence[float], wanted: float) -> int:
    """Position of the value nearest to the wanted one."""
    return min(range(len(values)), key=lambda place: abs(values[place] - wanted))
