"""Dice against β0 error, and recall against precision: every arm as a point, thresholds as curves."""

from typing import TYPE_CHECKING

from vesselrl.benchmarks.learning_arms import ARMS, BY_NAME, RL_ARMS
from vesselrl.benchmarks.learning_comparison import pareto_front, patient_mean
from vesselrl.benchmarks.learning_outcome import Outcome
from vesselrl.evaluation.charts import INK, LINE_COLOURS, QUIET, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = dict(zip((arm.name for arm in ARMS if arm.predicts), LINE_COLOURS, strict=True))
# A control's label begins with its mark, C0 to C7; RL arms get one.
LABELS = {arm.name: arm.label for arm in ARMS} | {
    name: f"P{number} {BY_NAME[name].label}" for number, name in enumerate(RL_ARMS, start=1)
}
PANELS = (
    ("dice", "beta0_error", "Dice", "pieces wrong (β0 error)"),
    ("recall", "precision", "recall", "precision"),
)


def pareto_figure(outcome: Outcome) -> "Figure":
    """Two panels, means over test patients and seeds; a grey ring marks the front of Dice and β0 error.

    Each point has the mark of its arm in the legend, C0 to C7 or P1 to P4; RL arms are filled squares with
    solid curves. Arms with the same predictions share a colour. β0 error is linear below 1, else logarithmic.
    """
    figure = new_figure(11.4, 6.2)
    front = pareto_front(outcome.points())
    for axes, (x, y, xlabel, ylabel) in zip(figure.subplots(1, 2), PANELS, strict=True):
        plain_axes(axes, "", xlabel, ylabel)
        if y == "beta0_error":
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter("{x:g}")
        for name, evaluation in outcome.together.items():
            colour = COLOURS[outcome.results[name][0].source]
            symbol, fill, style = ("s", colour, "-") if name in RL_ARMS else ("o", "white", "--")
            if name in outcome.curves:
                curve = outcome.curves[name]
                axes.plot(curve[x], curve[y], color=colour, lw=1.1, ls=style, alpha=0.7)
            point = patient_mean(evaluation, x), patient_mean(evaluation, y)
            if name in front and y == "beta0_error":
                axes.plot(*point, "o", ms=15, mfc="none", mec=QUIET)
            axes.plot(*point, symbol, ms=7, mfc=fill, mec=colour, mew=1.8, label=LABELS[name])
            axes.annotate(
                LABELS[name].split()[0], point, (6, 5), textcoords="offset points", fontsize=9, color=INK
            )
    figure.axes[0].set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure
