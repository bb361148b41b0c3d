"""Verdicts of the learning benchmark: does reinforcement learning beat its controls on the test patients?

The patient is the unit. Over several seeds an image's score is the mean over the seeds first, so that the
interval is one over patients; every seed is also judged alone. Nothing here is chosen on test images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vesselrl.evaluation.metric_words import metric_name, number, with_interval
from vesselrl.evaluation.results import (
    IDENTITY_COLUMNS,
    LOWER_IS_BETTER,
    Evaluation,
    set_mismatch,
    summarise,
)
from vesselrl.evaluation.statistics import Difference, paired_difference, relative_difference

DICE_MARGIN = 0.005
BETA0_GAIN = 0.20
RECALL_TOLERANCE = 0.01  # of "equal" recall on validation; thresholds come in steps of 0.01
# Columns whose paired differences are reported.
COMPARED = ("dice", "recall", "precision", "cldice", "topology_score", "beta0_error", "beta1_error",
            "length_error", "reward")  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """One thing that a verdict asks for: whether it holds, and the numbers in words."""

    holds: bool
    words: str


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds, and the conditions that it rests on."""

    holds: bool
    conditions: tuple[Condition, ...]

    @property
    def words(self) -> str:
        """`holds: ...` or `does not hold: ...`, the latter with what failed."""
        if self.holds:
            return "holds: " + "; ".join(c.words for c in self.conditions if c.holds)
        return "does not hold: " + "; ".join(c.words for c in self.conditions if not c.holds)


@dataclass(frozen=True)
class Contest:
    """An arm against a control on the same images.

    Attributes:
        differences: by column, arm minus control.
        beta0_relative: relative change of the mean β0 error.
    """

    differences: dict[str, Difference]
    beta0_relative: Difference


def pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several seeds: every score of an image is its mean over them; nan if any is.

    Raises:
        ValueError: the evaluations are of different images.
    """
    first = evaluations[0]
    tables = [{row["key"]: row for row in evaluation.rows} for evaluation in evaluations]
    for other in evaluations[1:]:
        if mismatch := set_mismatch(first, other, "one seed", "another"):
            raise ValueError(f"The seeds cannot be averaged: {mismatch}. Delete the scores and run again.")
    rows = []
    for row in first.rows:
        same = [table[row["key"]] for table in tables]
        identity = {name: row[name] for name in IDENTITY_COLUMNS} | {"failed": any(r["failed"] for r in same)}
        rows.append(identity | {name: float(np.mean([r[name] for r in same])) for name in first.metrics})
    return summarise(rows, first.metric_spec, first.reward_spec)


def contest(control: Evaluation, arm: Evaluation) -> Contest:
    """The paired differences of an arm against a control.

    Raises:
        ValueError: they were scored on different images or by different definitions.
    """
    if mismatch := set_mismatch(control, arm, "the control", "the arm"):
        raise ValueError(f"The arms cannot be compared: {mismatch}. Delete the scores and run again.")
    differences = {name: paired_difference(control.rows, arm.rows, name) for name in COMPARED}
    return Contest(differences, relative_difference(control.rows, arm.rows, "beta0_error"))


def best_control(validation: Mapping[str, Sequence[Evaluation]]) -> str:
    """The control with the highest validation reward, as a mean over seeds; of equal ones the last.

    Args:
        validation: control -> its validation scores, one per seed; from the plainest to the most tuned.
    """
    rewards = {
        name: np.mean([patient_mean(e, "reward") for e in seeds]) for name, seeds in validation.items()
    }
    return max(reversed(rewards), key=rewards.__getitem__)


def patient_mean(evaluation: Evaluation, metric: str) -> float:
    """The mean over patients of one score."""
    return evaluation.summary["metrics"][metric]["patient_mean"]


def verdict_e2(result: Contest) -> Verdict:
    """E2: Dice not lower, by a margin of 0.005, and better structure, length and reward.

    β0 error lower by at least a fifth, |length ratio - 1| lower and reward higher, each with an interval that
    leaves out 0; the lower end of the interval of Dice above -0.005.
    """
    dice, beta0 = result.differences["dice"], result.beta0_relative
    fewer_pieces = not beta0.reason and beta0.mean <= -BETA0_GAIN and beta0.high < 0
    conditions = (
        Condition(dice.low > -DICE_MARGIN, f"{_words(dice)} against a margin of -0.005"),
        Condition(fewer_pieces, f"β0 error {_percent(beta0)} against -20 %"),
        _better(result.differences["length_error"]),
        _better(result.differences["reward"]),
    )
    return Verdict(all(condition.holds for condition in conditions), conditions)


def verdict_e3(result: Contest, recall_gap: float) -> Verdict:
    """E3: at equal recall, higher precision or a higher topology score, the interval leaving out 0.

    Args:
        result: of the RL arm against the control at its recall.
        recall_gap: by how much validation recall of the RL arm and of the control differ, mean over seeds
            whatever the sign; where no threshold comes nearer than 0.01, nothing can be claimed.
    """
    equal = Condition(
        abs(recall_gap) <= RECALL_TOLERANCE,
        f"validation recall differs by {abs(recall_gap):.3f} (test: {_words(result.differences['recall'])})",
    )
    gains = tuple(_better(result.differences[name]) for name in ("precision", "topology_score"))
    return Verdict(equal.holds and any(gain.holds for gain in gains), (equal, *gains))


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The points that no other beats: none has a Dice as high and a β0 error as low, one of them better.

    Args:
        points: name -> (Dice, β0 error).

    >>> sorted(pareto_front({"a": (0.8, 50.0), "b": (0.7, 60.0), "c": (0.7, 40.0)}))
    ['a', 'c']
    """
    return {name for name, point in points.items() if not any(dominates(p, point) for p in points.values())}


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether (Dice, β0 error) `one` is nowhere worse than `other`, and somewhere better."""
    return one[0] >= other[0] and one[1] <= other[1] and one != other


def _better(difference: Difference) -> Condition:
    """That a score is better, with an interval that leaves out 0."""
    lower = difference.metric in LOWER_IS_BETTER
    return Condition(
        difference.clear and (difference.high < 0 if lower else difference.low > 0), _words(difference)
    )


def _words(difference: Difference) -> str:
    """A difference with its interval, or with the reason why there is none."""
    name = metric_name(difference.metric)
    if difference.reason:
        return f"{name} {number(difference.metric, difference.mean, sign=True)} ({difference.reason})"
    text = with_interval(difference.metric, difference.mean, difference.low, difference.high, sign=True)
    return f"{name} {text}"


def _percent(relative: Difference) -> str:
    """A relative difference in percent."""
    mean = "undefined" if math.isnan(relative.mean) else f"{100 * relative.mean:+.1f} %"
    if relative.reason:
        return f"{mean} ({relative.reason})"
    return f"{mean} ({100 * relative.low:+.1f} to {100 * relative.high:+.1f} %)"
