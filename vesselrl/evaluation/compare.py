"""Many run folders -> one honest table, and which run to deploy. Needs no torch.

A run folder holds `training_info.json`, `test_after.json` (the best adapter on the test split, written
once) and `test_before.json` (the same images before training). Runs are put in one table only if image
list, true masks and metric specification are equal; otherwise `CompareError` names the runs and the images
that differ.

Every run is compared with the baseline by the paired differences of each patient; the p values are adjusted
for the number of runs (Holm), and a verdict is given by the adjusted ones. The interval of a rank says which
ranks the run has when the patients are drawn anew. Which run to deploy is decided in `decision.py`, by the
rule stated there. Where a second observer marked the test images, the last line is "human agreement": it is
no run, takes no rank and is not compared.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vesselrl.errors import CompareError
from vesselrl.evaluation.decision import adjust_for_runs, choose, gain_of
from vesselrl.evaluation.finished_runs import Run, check_comparable, find_runs, load_runs
from vesselrl.evaluation.results import (
    LOWER_IS_BETTER,
    NO_DIRECTION,
    Evaluation,
    before_after_table,
    csv_text,
    set_mismatch,
)
from vesselrl.evaluation.statistics import rank_intervals

__all__ = [
    "HUMAN",
    "CompareError",
    "Comparison",
    "Run",
    "check_comparable",
    "choose",
    "compare_runs",
    "find_runs",
    "gain_of",
    "load_runs",
]

logger = logging.getLogger(__name__)

HUMAN = "human agreement"

DEFAULT_METRICS = ("reward", "dice", "recall", "precision", "cldice", "beta0_error", "length_ratio")
OWN_BASE = "the base before training"
_GAIN_COLUMNS = {
    "gain": "difference",
    "gain_low": "low",
    "gain_high": "high",
    "gain_p_adjusted": "p_adjusted",
    "gain_verdict": "verdict",
}
_UNDEFINED = dict.fromkeys(("patient_mean", "low", "high"), math.nan)


@dataclass(frozen=True)
class Comparison:
    """The result: `lines` ranked best first, the paired `gains` per run, and the decision.

    A line has `rank` with its 95 % range `rank_low` to `rank_high`, `run`, the counts, and per metric its
    mean, interval and gain. The line "human agreement" comes last; its rank is "" and its gains are None.
    `gains` are as from `before_after_table`, with `p_adjusted` for the number of runs and `verdict` by it.
    `deploy` is the name of a run, or None for "keep the baseline"; `reason` is the sentence that says why.
    """

    rank_by: str
    metrics: tuple[str, ...]
    baseline: str
    lines: list[dict[str, Any]]
    gains: dict[str, list[dict[str, Any]]]
    deploy: str | None
    reason: str
    n_images: int
    n_patients: int
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def compare_runs(
    runs: Sequence[Run],
    baseline: str | None = None,
    rank_by: str | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    skipped: dict[str, str] | None = None,
) -> Comparison:
    """Rank runs on their test scores and give paired differences against a baseline; works for one run too.

    Args:
        runs: as from `load_runs`.
        baseline: name of the run to compare with; None: each run with its own base before training.
        rank_by: metric to rank and choose by; None: "reward" if all runs were scored by one reward, else
            "dice".
        metrics: columns of the table; those some run lacks are left out, `reward` also if it is not one
            reward.
        skipped: runs left out and why, shown in the report.

    Raises:
        CompareError: sets differ, the baseline or metric is unknown, or rewards of different definition are
            ranked.
    """
    check_comparable(runs)
    rank_by = _rank_metric(runs, rank_by)
    by_name = {run.name: run for run in runs}
    if baseline is not None and baseline not in by_name:
        raise CompareError(
            f"There is no run {baseline!r} to compare with. The runs are: {', '.join(by_name)}."
        )
    metrics = tuple(name for name in metrics if all(name in run.after.metrics for run in runs))
    if not _one_reward(runs):
        metrics = tuple(name for name in metrics if name != "reward")
    if rank_by not in metrics:
        metrics = (rank_by, *metrics)

    gains: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        reference = run.before if baseline is None else by_name[baseline].after
        if reference is not None and run.name != baseline:
            shared = [name for name in metrics if name in reference.metrics]
            if reference.reward_spec != run.after.reward_spec:
                shared = [name for name in shared if name != "reward"]
            gains[run.name] = before_after_table(reference, run.after, shared)
    adjust_for_runs(gains)
    ranked = sorted(runs, key=lambda run: -_ranking_value(run.after, rank_by))
    deploy, reason = choose(ranked, gains, rank_by, baseline or OWN_BASE)
    return Comparison(
        rank_by=rank_by,
        metrics=metrics,
        baseline=baseline or OWN_BASE,
        lines=[*_ranked_lines(ranked, rank_by, metrics, gains), *_human_line(runs, metrics)],
        gains=gains,
        deploy=deploy,
        reason=reason,
        n_images=runs[0].after.summary["n_images"],
        n_patients=runs[0].after.summary["n_patients"],
        skipped=dict(skipped or {}),
        notes=_notes(runs, baseline),
    )


def _rank_metric(runs: Sequence[Run], rank_by: str | None) -> str:
    """The metric to rank by, refused if some run lacks it or the runs mean different rewards by it."""
    if rank_by is None:
        return "reward" if _one_reward(runs) else "dice"
    if rank_by in NO_DIRECTION:
        raise CompareError(
            f"Cannot rank by {rank_by!r}: more of it is neither better nor worse. Rank by dice."
        )
    missing = [run.name for run in runs if rank_by not in run.after.metrics]
    if missing:
        known = ", ".join(runs[0].after.metrics)
        raise CompareError(
            f"Cannot rank by {rank_by!r}: {', '.join(missing)} has no such score. Choose of: {known}."
        )
    if rank_by == "reward" and not _one_reward(runs):
        raise CompareError("Cannot rank by reward: the runs were scored by different rewards. Rank by dice.")
    return rank_by


def _one_reward(runs: Sequence[Run]) -> bool:
    """True if every run has a reward and all mean the same by it."""
    specs = [run.after.reward_spec for run in runs]
    return all("reward" in run.after.metrics for run in runs) and all(spec == specs[0] for spec in specs)


def _ranking_value(evaluation: Evaluation, metric: str) -> float:
    """Patient mean of a metric, turned so that higher is better; undefined is lowest."""
    mean = evaluation.summary["metrics"][metric]["patient_mean"]
    if math.isnan(mean):
        return -math.inf
    return -mean if metric in LOWER_IS_BETTER else mean


def _ranked_lines(
    ranked: Sequence[Run], rank_by: str, metrics: Sequence[str], gains: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The lines of the runs, best first, each with the range of its rank."""
    sign = -1 if rank_by in LOWER_IS_BETTER else 1
    tables = [{row["key"]: sign * row[rank_by] for row in run.after.rows} for run in ranked]
    patients = {row["key"]: row["patient"] for row in ranked[0].after.rows}
    values = [[table[key] for key in patients] for table in tables]
    ranges = rank_intervals(values, list(patients.values()))
    lines = []
    for number, (run, (low, high)) in enumerate(zip(ranked, ranges, strict=True), start=1):
        rank = {"rank": number, "rank_low": low, "rank_high": high}
        lines.append(rank | _line(run.name, run.after, metrics, gains.get(run.name, [])))
    return lines


def _human_line(runs: Sequence[Run], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The line of the second observer, if a run has one for these images; else none."""
    for run in runs:
        if run.human is None:
            continue
        mismatch = set_mismatch(run.after, run.human, "test_after", "test_human_agreement")
        if mismatch:
            logger.warning("Run %s: its human agreement is left out, %s", run.name, mismatch)
            continue
        line = dict.fromkeys(("rank", "rank_low", "rank_high"), "") | _line(HUMAN, run.human, metrics, [])
        if run.human.reward_spec != run.after.reward_spec and "reward" in metrics:
            line |= dict.fromkeys(("reward", "reward_low", "reward_high"), math.nan)
        return [line]
    return []


def _line(
    name: str, evaluation: Evaluation, metrics: Sequence[str], table: list[dict[str, Any]]
) -> dict[str, Any]:
    """One line of the table as a flat dict: scores with intervals and the paired differences."""
    summary = evaluation.summary
    line: dict[str, Any] = {"run": name}
    line |= {name: summary[name] for name in ("n_images", "n_patients", "n_failed")}
    for name in metrics:
        score, gain = summary["metrics"].get(name, _UNDEFINED), gain_of(table, name) or {}
        line |= {name: score["patient_mean"], f"{name}_low": score["low"], f"{name}_high": score["high"]}
        line |= {f"{name}_{column}": gain.get(source) for column, source in _GAIN_COLUMNS.items()}
    return line


def _notes(runs: Sequence[Run], baseline: str | None) -> tuple[str, ...]:
    """What a reader must know before believing the table."""
    notes = list(dict.fromkeys(f"{run.name}: {mark}" for run in runs for mark in run.after.marks))
    if len(runs) > 1:
        notes.append(
            f"The best of {len(runs)} runs was picked on these test images, so its score is somewhat "
            "flattering. The verdicts are adjusted for the number of runs (Holm); the intervals are not. "
            "Confirm on new patients."
        )
    if any("reward" in run.after.metrics for run in runs) and not _one_reward(runs):
        notes.append("The reward is left out: the runs were not all scored by the same one.")
    befores = {csv_text(run.before.rows) for run in runs if run.before is not None}
    if baseline is None and len(befores) > 1:
        notes.append(
            "The runs did not start from the same base; each difference is against the run's own base."
        )
    missing = [run.name for run in runs if run.before is None]
    if baseline is None and missing:
        notes.append(f"No difference for {', '.join(missing)}: it has no test scores of a base model.")
    return tuple(notes)
