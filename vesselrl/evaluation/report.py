"""A comparison as text files: Markdown report and CSV table. Needs no torch."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vesselrl.evaluation.compare import Comparison, gain_of
from vesselrl.evaluation.results import csv_text, write_text


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown report: decision, ranking, paired differences, what was left out."""
    metrics = comparison.metrics
    lines = [
        "# Comparison of experiments",
        "",
        comparison.reason,
        "",
        f"Scored on {_number(comparison.n_images, 'test image')} of "
        f"{_number(comparison.n_patients, 'patient')}. Every number is the mean over patients of per-patient "
        "means, with its 95 % interval (bootstrap over patients). A failed prediction counts as an empty "
        "mask.",
        "",
        f"## Ranking by {comparison.rank_by}",
        "",
        _markdown_row(["", "run", *metrics, "failed"]),
        _markdown_row(["--:", "---", *("---" for _ in metrics), "--:"]),
    ]
    for line in comparison.lines:
        cells = [_with_interval(line[name], line[f"{name}_low"], line[f"{name}_high"]) for name in metrics]
        lines.append(_markdown_row([str(line["rank"]), line["run"], *cells, str(line["n_failed"])]))
    lines += ["", f"## Paired difference against {comparison.baseline}", ""]
    lines += [_markdown_row(["run", *metrics]), _markdown_row(["---"] * (len(metrics) + 1))]
    for line in comparison.lines:
        table = comparison.gains.get(line["run"], [])
        lines.append(_markdown_row([line["run"], *(_gain_cell(gain_of(table, name)) for name in metrics)]))
    lines += [
        "",
        "An interval that contains 0 proves no change. `better` and `worse` mark those that do not.",
    ]
    notes = [*comparison.notes, *(f"Left out: {name}: {why}." for name, why in comparison.skipped.items())]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def write_comparison(folder: Path, comparison: Comparison) -> tuple[Path, Path]:
    """Write FOLDER/comparison.md and FOLDER/comparison.csv (one line per run) and return their paths."""
    markdown_path, csv_path = Path(folder) / "comparison.md", Path(folder) / "comparison.csv"
    write_text(markdown_path, markdown(comparison))
    write_text(csv_path, csv_text(comparison.lines))
    return markdown_path, csv_path


def _markdown_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def _with_interval(mean: float, low: float, high: float) -> str:
    """A mean and its interval as text."""
    if math.isnan(mean):
        return "undefined"
    return f"{mean:.3f}" if math.isnan(low) else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _gain_cell(gain: dict[str, Any] | None) -> str:
    """A paired difference as text, with its interval and verdict, or why there is no interval."""
    if gain is None:
        return "-"
    if gain["reason"]:
        return f"{gain['difference']:+.3f} ({gain['reason']})"
    text = f"{gain['difference']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
    return f"{text} {gain['verdict']}".rstrip()


def _number(count: int, noun: str) -> str:
    """A count with its noun in singular or plural."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
