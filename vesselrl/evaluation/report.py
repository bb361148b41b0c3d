"""A comparison of runs as Markdown, CSV and HTML: decision, ranking, paired differences, what was left out.

Needs no torch; Matplotlib is imported only for the chart of the HTML form.
"""

import math
from pathlib import Path
from typing import Any

from vesselrl.evaluation.charts import Estimate, interval_figure, svg
from vesselrl.evaluation.compare import Comparison
from vesselrl.evaluation.decision import gain_of
from vesselrl.evaluation.document import (
    Block,
    Bullets,
    Chart,
    Document,
    Section,
    Table,
    Terms,
    Text,
    to_markdown,
)
from vesselrl.evaluation.html import to_html
from vesselrl.evaluation.metric_words import WORDS, count, metric_name, number, with_interval
from vesselrl.evaluation.results import csv_text
from vesselrl.experiment.run_folder import write_text

CHARTED = ("dice", "cldice")  # beside the metric that ranks
NO_VALUE = "-"
HOW_TO_READ = (
    "Every number is the mean over patients of per-patient means, with its 95 % interval (bootstrap over "
    "patients). A failed prediction counts as an empty mask.",
    "The range beside a rank holds the ranks that the run takes in 95 % of the resampled sets of patients. "
    "Runs whose ranges overlap are not told apart.",
    "A difference is paired: the same images, patient by patient. The adjusted p value allows for the number "
    "of runs that were looked at (Holm); better and worse are said where it is below 0.05. Without a verdict "
    "no change is proven.",
)


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown report."""
    return to_markdown(comparison_document(comparison, charts=False))


def write_comparison(folder: Path, comparison: Comparison) -> tuple[Path, Path]:
    """Write FOLDER/comparison.md and FOLDER/comparison.csv (one line per run) and return their paths."""
    markdown_path, csv_path = Path(folder) / "comparison.md", Path(folder) / "comparison.csv"
    write_text(markdown_path, markdown(comparison))
    write_text(csv_path, csv_text(comparison.lines))
    return markdown_path, csv_path


def write_comparison_report(folder: Path, comparison: Comparison) -> tuple[Path, Path, Path]:
    """Write FOLDER/comparison.html, .md and .csv and return their paths, in this order."""
    html_path = Path(folder) / "comparison.html"
    paths = write_comparison(folder, comparison)
    write_text(html_path, to_html(comparison_document(comparison)))
    return html_path, *paths


def comparison_document(comparison: Comparison, charts: bool = True) -> Document:
    """The comparison as a document; without `charts` nothing is drawn."""
    images, patients = count(comparison.n_images, "test image"), count(comparison.n_patients, "patient")
    num_runs = sum(line["rank"] != "" for line in comparison.lines)
    notes = [*comparison.notes, *(f"Left out: {name}: {why}." for name, why in comparison.skipped.items())]
    terms = tuple(WORDS[metric] for metric in comparison.metrics if metric in WORDS)
    sections = [
        Section(f"Ranking by {comparison.rank_by}", (_ranking(comparison),)),
        Section(f"Paired difference against {comparison.baseline}", _differences(comparison, charts)),
        *([Section("Notes", (Bullets(tuple(notes)),))] if notes else []),
        Section("How to read this", (Bullets(HOW_TO_READ), Terms(terms))),
    ]
    return Document(
        title="Comparison of experiments",
        subtitle=f"{count(num_runs, 'run')}, scored on {images} of {patients}",
        summary=(comparison.reason,),
        sections=tuple(sections),
    )


def _ranking(comparison: Comparison) -> Table:
    """All runs, best first, with every score; human agreement last, without a rank."""
    rows = []
    for line in comparison.lines:
        cells = [
            with_interval(name, line[name], line[f"{name}_low"], line[f"{name}_high"])
            for name in comparison.metrics
        ]
        rows.append((_rank(line), line["run"], *cells, str(line["n_failed"])))
    header = ("rank", "run", *(metric_name(name) for name in comparison.metrics), "failed")
    return Table(header, tuple(rows), text_columns=2, stacked=True)


def _differences(comparison: Comparison, charts: bool) -> tuple[Block, ...]:
    """Differences of every run as a chart and as a table."""
    blocks: list[Block] = []
    compared = [line["run"] for line in comparison.lines if comparison.gains.get(line["run"])]
    if not compared:
        return (Text("No run has anything to be compared with."),)
    if charts:
        blocks.append(_chart(comparison, compared))
    rows = []
    for run in [line["run"] for line in comparison.lines if line["rank"] != ""]:
        table = comparison.gains.get(run, [])
        ranked = gain_of(table, comparison.rank_by)
        cells = [_gain_cell(gain_of(table, name)) for name in comparison.metrics]
        rows.append((run, *cells, _p_value(ranked)))
    header = ("run", *(metric_name(name) for name in comparison.metrics),
              f"adjusted p ({metric_name(comparison.rank_by)})")  # fmt: skip
    blocks.append(Table(header, tuple(rows), stacked=True))
    return tuple(blocks)


def _chart(comparison: Comparison, runs: list[str]) -> Chart:
    """Forest plot of the paired differences in the ranking metric, Dice and clDice."""
    wanted = dict.fromkeys((comparison.rank_by, *(name for name in CHARTED if name in comparison.metrics)))
    panels = {}
    for metric in wanted:
        gains = {run: gain_of(comparison.gains[run], metric) for run in runs}
        panels[metric_name(metric)] = [_estimate(run, gain) for run, gain in gains.items()]
    caption = (
        f"Difference against {comparison.baseline} with its 95 % interval, runs in order of rank. Blue dot: "
        "better; red cross: worse; grey: no change proven, after adjustment for the number of runs."
    )
    return Chart(svg(interval_figure(panels), "Paired differences of the runs"), caption)


def _estimate(run: str, gain: dict[str, Any] | None) -> Estimate:
    """One run's difference as a line of the chart; empty if it has none."""
    if gain is None:
        return Estimate(run, math.nan, math.nan, math.nan)
    return Estimate(run, gain["difference"], gain["low"], gain["high"], gain["verdict"])


def _rank(line: dict[str, Any]) -> str:
    """A rank with the range it can have."""
    low, high = line.get("rank_low", ""), line.get("rank_high", "")
    return str(line["rank"]) if low in ("", None) or low == high else f"{line['rank']} ({low} to {high})"


def _gain_cell(gain: dict[str, Any] | None) -> str:
    """A paired difference as text, with its interval and verdict, or why there is no interval."""
    if gain is None:
        return NO_VALUE
    if gain["reason"]:
        return f"{number(gain['metric'], gain['difference'], sign=True)} ({gain['reason']})"
    text = with_interval(gain["metric"], gain["difference"], gain["low"], gain["high"], sign=True)
    return f"{text} {gain['verdict']}".rstrip()


def _p_value(gain: dict[str, Any] | None) -> str:
    """The adjusted p value as text."""
    p = math.nan if gain is None else gain.get("p_adjusted", math.nan)
    if math.isnan(p):
        return NO_VALUE
    return "below 0.001" if p < 0.001 else f"{p:.3f}"
