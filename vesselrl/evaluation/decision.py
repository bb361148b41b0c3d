"""Which run to deploy, by a stated rule. Needs no torch.

The rule, on one metric, the one the table is ranked by:

1. A run qualifies if its split does not leak, at most 5 % of its predictions failed, and its gain over the
   baseline is proven: paired by image, resampled by patient, p < 0.05 after Holm's adjustment for the number
   of runs looked at.
2. Of the runs that qualify, the one with the best patient mean is named.
3. If no run qualifies, the answer is to keep the baseline.

The sentence also names every metric of the table that got clearly worse, and a runner-up the data cannot tell
from the winner. Holm's adjustment is made for each metric over the runs, so "better" anywhere in a column is
wrong with a probability of at most 5 % for the column; the metrics are not adjusted for each other.
"""

from collections.abc import Sequence
from typing import Any

from vesselrl.evaluation.finished_runs import Run
from vesselrl.evaluation.results import MAX_FAILED_SHARE, before_after_table, verdict
from vesselrl.evaluation.statistics import SIGNIFICANT, holm


def adjust_for_runs(gains: dict[str, list[dict[str, Any]]]) -> None:
    """Adds `p_adjusted` to every line (Holm over the runs, per metric) and judges `verdict` by it.

    Args:
        gains: per run the lines of `before_after_table`; changed in place.
    """
    for metric in {line["metric"] for table in gains.values() for line in table}:
        lines = [line for table in gains.values() for line in table if line["metric"] == metric]
        for line, p in zip(lines, holm([line["p"] for line in lines]), strict=True):
            line["p_adjusted"] = p
            line["verdict"] = verdict(metric, line["difference"]) if p < SIGNIFICANT else ""


def choose(
    ranked: Sequence[Run], gains: dict[str, list[dict[str, Any]]], rank_by: str, baseline: str
) -> tuple[str | None, str]:
    """Name the run to deploy, or None to keep the baseline, and say why in one or two sentences.

    The rule is in the module docstring. `ranked` is best first; `gains` as in `Comparison`.
    """
    qualified = []
    for run in ranked:
        gain = gain_of(gains.get(run.name, []), rank_by)
        sound = not (run.after.too_many_failed or run.after.is_leaky)
        if gain is not None and gain["verdict"] == "better" and sound:
            qualified.append((run, gain))
    if not qualified:
        others = [run for run in ranked if run.name != baseline]
        why = "; ".join(f"{run.name}: {_why_not(run, gains, rank_by)}" for run in others)
        why = why or "there is no other run"
        return None, f"Keep {baseline}: no run has a proven gain in {rank_by} ({why})."
    winner, gain = qualified[0]
    reason = (
        f"Deploy {winner.name}, because its {rank_by} is {abs(gain['difference']):.3f} "
        f"{'higher' if gain['difference'] > 0 else 'lower'} than that of {baseline} "
        f"(95 % interval {gain['low']:+.3f} to {gain['high']:+.3f}, {gain['n_patients']} patients, "
        f"{_p_text(gain)})"
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


def gain_of(table: list[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The line of one metric in a before/after table, None if it has none."""
    return next((line for line in table if line["metric"] == metric), None)


def _why_not(run: Run, gains: dict[str, list[dict[str, Any]]], rank_by: str) -> str:
    """Why a run does not qualify."""
    gain = gain_of(gains.get(run.name, []), rank_by)
    if run.after.too_many_failed:
        failed, images = run.after.summary["n_failed"], run.after.summary["n_images"]
        return f"{failed} of {images} predictions failed, more than {MAX_FAILED_SHARE:.0%}"
    if run.after.is_leaky:
        return "its split leaks, so it proves nothing about new patients"
    if gain is None:
        return "nothing to compare with"
    if gain["reason"]:
        return f"{gain['difference']:+.3f}, {gain['reason']}"
    interval = f"interval {gain['low']:+.3f} to {gain['high']:+.3f}"
    return f"{gain['difference']:+.3f}, {interval}, {_p_text(gain)}"


def _p_text(gain: dict[str, Any]) -> str:
    """The adjusted p value as text."""
    p = gain["p_adjusted"]
    return "adjusted p < 0.001" if p < 0.001 else f"adjusted p = {p:.3f}"
