"""Compares finished runs in one table of paired differences and decides which one to deploy."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vesselrl.errors import CompareError
from vesselrl.evaluation import results
from vesselrl.evaluation.results import Caveat, Evaluation, before_after_table, read_evaluation, set_mismatch
from vesselrl.evaluation.statistics import SIGNIFICANT, holm

logger = logging.getLogger(__name__)

OWN_BASE = "the base before training"

# Run -> metric -> line of `before_after_table`, with `p_adjusted` for the number of runs and `verdict` by it.
Gains = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Run:
    """One finished run: its test scores after training, those of its base before, and a second observer's."""

    name: str
    after: Evaluation
    before: Evaluation | None = None
    human: Evaluation | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs ranked best first, their paired differences, and the decision."""

    rank_by: str
    metrics: tuple[str, ...]
    baseline: str
    # rank, run, counts, and per metric mean, interval and gain; last "human agreement", whose rank is "".
    lines: list[dict[str, Any]]
    gains: Gains
    deploy: str | None  # name of a run, or None for "keep the baseline"
    reason: str
    n_images: int
    n_patients: int
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load_runs(root: Path) -> tuple[list[Run], dict[str, str]]:
    """Reads all runs at or below `root` that have a test result; says why each other folder is left out."""
    if not root.is_dir():
        raise CompareError(f"There is no folder {root}. Give the folder that holds the runs (--output_dir).")
    if not (folders := sorted(path.parent for path in root.rglob("training_info.json"))):
        raise CompareError(f"No run found under {root}: no folder holds a training_info.json. Train first.")
    names = Counter(folder.name for folder in folders)
    runs, skipped = [], {}
    for folder in folders:
        name = folder.name if names[folder.name] == 1 else f"{folder.parent.name}/{folder.name}"
        if not (folder / "test_after.json").is_file():
            skipped[name] = "no test_after.json: the run did not finish, or was made without a test split"
            logger.warning("Run %s left out: %s", name, skipped[name])
            continue
        try:
            after = read_evaluation(folder / "test_after.json")
            human, before = (folder / f"{n}.json" for n in ("evaluation/test_human_agreement", "test_before"))
            is_control = Caveat.CONTROL in after.caveats  # that starts from no base model
            human = read_evaluation(human) if human.is_file() else None
            before = read_evaluation(before) if before.is_file() and not is_control else None
        except ValueError as error:
            raise CompareError(f"Run {name} cannot be read: {error}") from error
        runs.append(Run(name, after, before, human))
    if not runs:
        reasons = "; ".join(skipped.values())
        raise CompareError(f"None of the {len(folders)} runs has a test result ({reasons}).")
    return runs, skipped


def compare_sets(
    runs: Sequence[Run], baseline: str | None = None, rank_by: str | None = None, skipped: dict | None = None
) -> list[Comparison]:
    """A comparison for every test set, that of most runs first: runs on other images are never ranked.

    Runs are of one set if half of the smaller one's true masks are in both; where they are not all, as in
    other splits of the same images, `compare_runs` refuses them.
    """
    if baseline not in (None, *(run.name for run in runs)):
        names = ", ".join(run.name for run in runs)
        raise CompareError(f"There is no run {baseline!r} to compare with, only {names}.")
    groups: list[tuple[set, list[Run]]] = []
    for run in runs:
        masks = {(row["key"], row["truth_hash"]) for row in run.after.rows}
        same = (g for m, g in groups if 2 * len(m & masks) >= min(len(m), len(masks)))
        if (group := next(same, None)) is None:
            groups.append((masks, group := []))
        group.append(run)
    found = []
    for group in sorted((group for _, group in groups), key=len, reverse=True):
        names = [run.name for run in group]
        one = compare_runs(group, baseline if baseline in names else None, rank_by, skipped)
        others = ", ".join(run.name for run in runs if run.name not in names)
        note = f"Scored on other images or masks, and in a table of their own: {others}."
        found.append(replace(one, notes=(note, *one.notes)) if others else one)
    return found


def compare_runs(
    runs: Sequence[Run], baseline: str | None = None, rank_by: str | None = None, skipped: dict | None = None
) -> Comparison:
    """Ranks runs on their test scores and compares each with a baseline (None: its own base before training).

    They are ranked by "reward" if all were scored by one, else "dice". What some run lacks is left out.
    """
    _check_comparable(runs)
    rank_by = _rank_metric(runs, rank_by)
    by_name = {run.name: run for run in runs}
    shared = [name for name in results.HEADLINE if all(name in run.after.metrics for run in runs)]
    same = [name for name in shared if name != "reward" or _one_reward(runs)]
    metrics = tuple(same if rank_by in same else (rank_by, *same))

    def loss(run: Run) -> float:
        mean = run.after.summary["metrics"][rank_by]["patient_mean"]
        return math.inf if math.isnan(mean) else mean if rank_by in results.LOWER_IS_BETTER else -mean

    gains: Gains = {}
    for run in runs:
        reference = run.before if baseline is None else by_name[baseline].after
        if reference is not None and run.name != baseline:
            table = before_after_table(reference, run.after, metrics)
            gains[run.name] = {line["metric"]: line for line in table}
    # p values are adjusted for the number of runs (Holm), per metric.
    for metric in {metric for table in gains.values() for metric in table}:
        tested = [table[metric] for table in gains.values() if metric in table]
        for line, p in zip(tested, holm([line["p"] for line in tested]), strict=True):
            line["p_adjusted"] = p
            line["verdict"] = results.verdict(metric, line["difference"]) if p < SIGNIFICANT else ""
    ranked = sorted(runs, key=loss)
    lines = [_line(run.name, run.after, metrics, gains, rank) for rank, run in enumerate(ranked, start=1)]
    lines += _human_line(runs, metrics)
    notes, against = _notes(runs, baseline), baseline or OWN_BASE
    choice = _choose(ranked, gains, rank_by, against)
    counted = [runs[0].after.summary[name] for name in ("n_images", "n_patients")]
    return Comparison(rank_by, metrics, against, lines, gains, *choice, *counted, skipped or {}, notes)


def _check_comparable(runs: Sequence[Run]) -> None:
    """Refuses runs on other sets than the most frequent one (the first, if tied), naming each of them."""
    afters = [run.after for run in runs]
    sets = [(e.image_list_hash, e.label_hash, str(sorted(e.metric_spec.items()))) for e in afters]
    reference = runs[sets.index(Counter(sets).most_common(1)[0][0])]
    problems = []
    for run in runs:
        if mismatch := set_mismatch(reference.after, run.after, reference.name, run.name):
            problems.append(f"{run.name} against {reference.name}: {mismatch}")
        elif run.before and (mismatch := set_mismatch(run.before, run.after, "test_before", "test_after")):
            problems.append(f"{run.name}, before against after: {mismatch}")
    if problems:
        advice = "Train on one split (--split_file), or keep each data set's runs apart (--output_dir)."
        raise CompareError(f"These runs cannot share a table. {'. '.join(problems)}. {advice}")


def _rank_metric(runs: Sequence[Run], rank_by: str | None) -> str:
    """The metric to rank by, refused if some run lacks it or the runs mean different rewards by it."""
    if rank_by is None:
        return "reward" if _one_reward(runs) else "dice"
    if rank_by in results.NO_DIRECTION:
        raise CompareError(f"Cannot rank by {rank_by!r}: neither more nor less is better. Rank by dice.")
    if missing := ", ".join(run.name for run in runs if rank_by not in run.after.metrics):
        known = ", ".join(runs[0].after.metrics)
        raise CompareError(f"Cannot rank by {rank_by!r}: {missing} has no such score. Choose of: {known}.")
    if rank_by in results.UNBOUNDED and not _one_reward(runs):
        other = f"Cannot rank by {rank_by}: the runs were scored by different rewards."
        raise CompareError(f"{other} Rank by dice.")
    return rank_by


def _one_reward(runs: Sequence[Run]) -> bool:
    specs = [run.after.reward_spec for run in runs]
    return all("reward" in run.after.metrics for run in runs) and all(spec == specs[0] for spec in specs)


def _choose(ranked: Sequence[Run], gains: Gains, rank_by: str, baseline: str) -> tuple[str | None, str]:
    """Names the run to deploy, the first with a proven gain, or None for the baseline, and why."""
    why_not = {run.name: _why_not(run, gains.get(run.name, {}).get(rank_by)) for run in ranked}
    if not (qualified := [run for run in ranked if not why_not[run.name]]):
        reasons = "; ".join(f"{name}: {why}" for name, why in why_not.items() if name != baseline)
        reasons = reasons or "there is no other run"
        return None, f"Keep {baseline}: no run has a proven gain in {rank_by} ({reasons})."
    winner, gain = qualified[0], gains[qualified[0].name][rank_by]
    reason = (
        f"Deploy {winner.name}, because its {rank_by} is {abs(gain['difference']):.3f} "
        f"{'higher' if gain['difference'] > 0 else 'lower'} than that of {baseline} "
        f"(95 % interval {gain['low']:+.3f} to {gain['high']:+.3f}, {gain['n_patients']} patients, "
        f"{_p_text(gain)})"
    )
    if len(qualified) > 1:
        reason += f", and it ranks first of {len(qualified)} runs with a proven gain"
    worse = [line for line in gains[winner.name].values() if line["verdict"] == "worse"]
    if losses := ", ".join(f"{line['metric']} {line['difference']:+.3f}" for line in worse):
        reason += f". It pays for that: clearly worse are {losses}"
    reason += "."
    for runner_up in qualified[1:2]:
        (between,) = before_after_table(runner_up.after, winner.after, [rank_by])
        if not between["verdict"]:
            reason += f" These patients cannot tell it from {runner_up.name} ({between['difference']:+.3f})."
    return winner.name, reason


def _why_not(run: Run, gain: dict[str, Any] | None) -> str:
    """Why a run does not qualify: failed predictions, leaking patients, no proven gain; "" if it does."""
    if run.after.too_many_failed:
        failed, images = run.after.summary["n_failed"], run.after.summary["n_images"]
        return f"{failed} of {images} predictions failed, more than {results.MAX_FAILED_SHARE:.0%}"
    if Caveat.PATIENT_LEAKAGE in run.after.caveats:
        return "its split leaks, so it proves nothing about new patients"
    if gain is None:
        return "nothing to compare with"
    if gain["reason"]:
        return f"{gain['difference']:+.3f}, {gain['reason']}"
    interval = f"interval {gain['low']:+.3f} to {gain['high']:+.3f}"
    return "" if gain["verdict"] == "better" else f"{gain['difference']:+.3f}, {interval}, {_p_text(gain)}"


def _p_text(gain: dict[str, Any]) -> str:
    p = gain["p_adjusted"]
    return "adjusted p < 0.001" if p < 0.001 else f"adjusted p = {p:.3f}"


def _line(
    run: str, evaluation: Evaluation, metrics: Sequence[str], gains: Gains, rank: int | str
) -> dict[str, Any]:
    summary = evaluation.summary
    line: dict[str, Any] = {"rank": rank, "run": run}
    line |= {name: summary[name] for name in ("n_images", "n_patients", "n_failed")}
    for name in metrics:
        score, gain = summary["metrics"].get(name, {}), gains.get(run, {}).get(name, {})
        line |= {name: score.get("patient_mean", math.nan)}
        line |= {f"{name}_{end}": score.get(end, math.nan) for end in ("low", "high")}
        line |= {f"{name}_gain": gain.get("difference")}
        line |= {f"{name}_gain_{end}": gain.get(end) for end in ("low", "high", "p_adjusted", "verdict")}
    return line


def _human_line(runs: Sequence[Run], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The line of the second observer, if a run has one for these images; else none."""
    for run in (run for run in runs if run.human is not None):
        if mismatch := set_mismatch(run.after, run.human, "test_after", "test_human_agreement"):
            logger.warning("Run %s: its human agreement is left out, %s", run.name, mismatch)
            continue
        line = _line("human agreement", run.human, metrics, {}, "")
        if run.human.reward_spec != run.after.reward_spec and "reward" in metrics:
            line |= dict.fromkeys(("reward", "reward_low", "reward_high"), math.nan)
        return [line]
    return []


def _notes(runs: Sequence[Run], baseline: str | None) -> tuple[str, ...]:
    """Sentences a reader must know before believing the table."""
    said = {run.name: run.after.caveats.values() for run in runs}
    sentences = dict.fromkeys(sentence for one in said.values() for sentence in one)
    notes = [f"{', '.join(name for name in said if one in said[name])}: {one}" for one in sentences]
    if len(runs) > 1:
        notes.append(
            f"The best of {len(runs)} runs was picked on these test images, so its score is somewhat "
            "flattering. The verdicts are adjusted for the number of runs (Holm); the intervals are not. "
            "Confirm on new patients."
        )
    if any("reward" in run.after.metrics for run in runs) and not _one_reward(runs):
        notes.append("The reward is left out: the runs were not all scored by the same one.")
    befores = {results.csv_text(run.before.rows) for run in runs if run.before is not None}
    if baseline is None and len(befores) > 1:
        notes += ["The runs did not start from the same base; each difference is against the run's own base."]
    missing = ", ".join(run.name for run in runs if run.before is None)
    if baseline is None and missing:
        notes.append(f"No difference for {missing}: it has no test scores of a base model.")
    return tuple(notes)
