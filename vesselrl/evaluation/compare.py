"""Many run folders -> one honest table, and which run to deploy. Needs no torch.

A run folder holds `training_info.json`, `test_after.json` (the best adapter on the test split, written
once) and `test_before.json` (the same images before training). Runs are put in one table only if image
list, true masks and metric specification are equal; otherwise `CompareError` names the runs and the images
that differ.

The rule for "deploy this one" (`choose`), on one metric, the one the table is ranked by:

1. A run qualifies if at most 5 % of its predictions failed and its gain over the baseline, paired by image
   and resampled by patient, has a 95 % interval wholly on the better side of zero.
2. Of the runs that qualify, the one with the best patient mean is named.
3. If no run qualifies, the answer is to keep the baseline.

The sentence also names every metric of the table that got clearly worse, and a runner-up the data cannot tell
from the winner. The intervals are per run; they are not yet corrected for looking at many runs.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vesselrl.evaluation.results import (
    LOWER_IS_BETTER,
    MAX_FAILED_SHARE,
    NO_DIRECTION,
    Evaluation,
    before_after_table,
    csv_text,
    read_evaluation,
    set_mismatch,
)

logger = logging.getLogger(__name__)

DEFAULT_METRICS = ("reward", "dice", "recall", "precision", "cldice", "beta0_error", "length_ratio")
OWN_BASE = "the base before training"
_GAIN_COLUMNS = {"gain": "difference", "gain_low": "low", "gain_high": "high", "gain_verdict": "verdict"}


class CompareError(ValueError):
    """The runs cannot be compared; the message says which and why. The command ends with exit code 2."""


@dataclass(frozen=True)
class Run:
    """One finished run: its name, its test scores after training and, if stored, before."""

    name: str
    after: Evaluation
    before: Evaluation | None = None


@dataclass(frozen=True)
class Comparison:
    """The result: `lines` ranked best first, `gains` per run as from `before_after_table`, and the decision.

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


def find_runs(root: Path) -> list[Path]:
    """All folders at or below `root` that hold a `training_info.json`, sorted.

    Raises:
        CompareError: `root` is not a folder or holds no run.
    """
    root = Path(root)
    if not root.is_dir():
        raise CompareError(f"There is no folder {root}. Give the folder that holds the runs (--output_dir).")
    folders = sorted(path.parent for path in root.rglob("training_info.json"))
    if not folders:
        raise CompareError(f"No run found under {root}: no folder holds a training_info.json. Train first.")
    return folders


def load_runs(folders: Sequence[Path]) -> tuple[list[Run], dict[str, str]]:
    """Read run folders: the runs that have a test result, and for each other folder why it is left out.

    Raises:
        CompareError: a file is damaged, two folders share a name, or no folder has a test result.
    """
    names = Counter(folder.name for folder in folders)
    runs: list[Run] = []
    skipped: dict[str, str] = {}
    for folder in folders:
        name = folder.name if names[folder.name] == 1 else f"{folder.parent.name}/{folder.name}"
        if not (folder / "test_after.json").is_file():
            skipped[name] = "no test_after.json: the run did not finish, or was made without a test split"
            logger.warning("Run %s left out: %s", name, skipped[name])
            continue
        try:
            after = read_evaluation(folder / "test_after.json")
            has_before = (folder / "test_before.json").is_file()
            before = read_evaluation(folder / "test_before.json") if has_before else None
        except ValueError as error:
            raise CompareError(f"Run {name} cannot be read: {error}") from error
        runs.append(Run(name, after, before))
    if not runs:
        raise CompareError(
            f"None of the {len(folders)} runs has a test result ({'; '.join(skipped.values())})."
        )
    return runs, skipped


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse runs that were not scored on the same images, true masks and metric specification.

    The most frequent set (the first, if tied) is taken as the reference; every run that deviates is named.

    Raises:
        CompareError: some run deviates from the others, or from its own evaluation before training.
    """
    fingerprints = [_fingerprint(run.after) for run in runs]
    reference = runs[fingerprints.index(Counter(fingerprints).most_common(1)[0][0])]
    problems = []
    for run in runs:
        mismatch = set_mismatch(reference.after, run.after, reference.name, run.name)
        if mismatch:
            problems.append(f"{run.name} against {reference.name}: {mismatch}")
        elif run.before is not None:
            mismatch = set_mismatch(run.before, run.after, "test_before", "test_after")
            if mismatch:
                problems.append(f"{run.name}, before against after: {mismatch}")
    if problems:
        raise CompareError(
            "These runs cannot share a table. "
            + ". ".join(problems)
            + ". Evaluate them again on one data split, "
            "or compare them in separate folders."
        )


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
    ranked = sorted(runs, key=lambda run: -_ranking_value(run.after, rank_by))
    deploy, reason = choose(ranked, gains, rank_by, baseline or OWN_BASE)
    return Comparison(
        rank_by=rank_by,
        metrics=metrics,
        baseline=baseline or OWN_BASE,
        lines=[_line(rank, run, metrics, gains.get(run.name, [])) for rank, run in enumerate(ranked, 1)],
        gains=gains,
        deploy=deploy,
        reason=reason,
        n_images=runs[0].after.summary["n_images"],
        n_patients=runs[0].after.summary["n_patients"],
        skipped=dict(skipped or {}),
        notes=_notes(runs, baseline),
    )


def choose(
    ranked: Sequence[Run], gains: dict[str, list[dict[str, Any]]], rank_by: str, baseline: str
) -> tuple[str | None, str]:
    """Name the run to deploy, or None to keep the baseline, and say why in one or two sentences.

    The rule is in the module docstring. `ranked` is best first; `gains` as in `Comparison`.
    """
    qualified = []
    for run in ranked:
        gain = gain_of(gains.get(run.name, []), rank_by)
        if gain is not None and gain["verdict"] == "better" and not run.after.too_many_failed:
            qualified.append((run, gain))
    if not qualified:
        others = [run for run in ranked if run.name != baseline]
        why = "; ".join(f"{run.name}: {_why_not(run, gains.get(run.name, []), rank_by)}" for run in others)
        why = why or "there is no other run"
        return None, f"Keep {baseline}: no run has a proven gain in {rank_by} ({why})."
    winner, gain = qualified[0]
    reason = (
        f"Deploy {winner.name}, because its {rank_by} is {abs(gain['difference']):.3f} "
        f"{'higher' if gain['difference'] > 0 else 'lower'} than that of {baseline} "
        f"(95 % interval {gain['low']:+.3f} to {gain['high']:+.3f}, {gain['n_patients']} patients)"
    )
    reason += (
        "." if len(qualified) == 1 else f", and it ranks first of {len(qualified)} runs with a proven gain."
    )
    worse = [line for line in gains[winner.name] if line["verdict"] == "worse"]
    if worse:
        losses = ", ".join(f"{line['metric']} {line['difference']:+.3f}" for line in worse)
        reason += f" It pays for that: clearly worse are {losses}."
    for runner_up, _ in qualified[1:2]:
        (between,) = before_after_table(runner_up.after, winner.after, [rank_by])
        if not between["verdict"]:
            reason += f" These patients cannot tell it from {runner_up.name} ({between['difference']:+.3f})."
    return winner.name, reason


def _fingerprint(evaluation: Evaluation) -> tuple[str, str, str]:
    """What must be equal for two evaluations to share a table."""
    spec = json.dumps(evaluation.metric_spec, sort_keys=True)
    return evaluation.image_list_hash, evaluation.label_hash, spec


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


def _line(rank: int, run: Run, metrics: Sequence[str], table: list[dict[str, Any]]) -> dict[str, Any]:
    """One run as a flat dict: scores with intervals and the paired differences."""
    summary = run.after.summary
    line: dict[str, Any] = {"rank": rank, "run": run.name}
    line |= {name: summary[name] for name in ("n_images", "n_patients", "n_failed")}
    for name in metrics:
        score, gain = summary["metrics"][name], gain_of(table, name) or {}
        line |= {name: score["patient_mean"], f"{name}_low": score["low"], f"{name}_high": score["high"]}
        line |= {f"{name}_{column}": gain.get(source) for column, source in _GAIN_COLUMNS.items()}
    return line


def gain_of(table: list[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The line of one metric in a before/after table, None if it has none."""
    return next((line for line in table if line["metric"] == metric), None)


def _why_not(run: Run, table: list[dict[str, Any]], rank_by: str) -> str:
    """Why a run does not qualify."""
    gain = gain_of(table, rank_by)
    if run.after.too_many_failed:
        failed, images = run.after.summary["n_failed"], run.after.summary["n_images"]
        return f"{failed} of {images} predictions failed, more than {MAX_FAILED_SHARE:.0%}"
    if gain is None:
        return "nothing to compare with"
    if math.isnan(gain["low"]):
        return f"{gain['difference']:+.3f}, {gain['reason']}"
    return f"{gain['difference']:+.3f}, interval {gain['low']:+.3f} to {gain['high']:+.3f}"


def _notes(runs: Sequence[Run], baseline: str | None) -> tuple[str, ...]:
    """What a reader must know before believing the table."""
    notes = []
    if len(runs) > 1:
        notes.append(
            f"The best of {len(runs)} runs was picked on these test images, so its score is somewhat "
            "flattering; the intervals are not corrected for the number of runs. Confirm on new patients."
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
        notes.append(f"No difference for {', '.join(missing)}: there is no test_before.json.")
    return tuple(notes)
