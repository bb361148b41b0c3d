"""Verdicts of the learning benchmark: does reinforcement learning beat its controls on the test patients?

The patient is the unit. Over several seeds an image's score is the mean over the seeds first, so that the
interval is one over patients; every seed is also judged alone. Nothing here is chosen on test images.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.methods import METHODS, RL, STRONG_CONTROLS
from benchmarks.scores import MethodResult
from vesselrl.evaluation.results import IDENTITY_COLUMNS, Evaluation, set_mismatch, summarise, verdict
from vesselrl.evaluation.statistics import Difference, paired_difference, relative_difference
from vesselrl.evaluation.words import metric_name, number, with_interval

DICE_MARGIN = 0.005
BETA0_GAIN = 0.20
RECALL_TOLERANCE = 0.01  # of "equal" recall on validation; thresholds come in steps of 0.01
COMPARED = "dice recall precision cldice topology_score beta0_error beta1_error length_error reward".split()
RELATIVE = "beta0_relative"  # key of the relative change of the mean β0 error

Pair = tuple[str, str]  # RL method, control
Differences = dict[str, Difference]  # method minus control, by column of COMPARED, and RELATIVE
Verdict = tuple[bool, str]  # whether a hypothesis holds, and what it rests or fails on


class AtRecall(NamedTuple):
    """A control with one seed at the validation recall of an RL method."""

    test: Evaluation
    threshold: float
    gap: float  # validation recall of the RL method minus that of the control


class Hypothesis(NamedTuple):
    """E2 or E3 of an RL method against a control, over the seeds together."""

    name: str
    method: str
    control: str
    holds: bool
    words: str


class Outcome(NamedTuple):
    """Everything that was found, on the test images."""

    results: dict[str, list[MethodResult]]  # by method, one per seed
    together: dict[str, Evaluation]  # each image's scores as the mean over the seeds
    differences: dict[Pair, Differences]
    at_recall: dict[Pair, Differences]  # to the control at the RL method's recall
    best_control: str  # the strongest of C2, C3, C4 and C7 on validation
    hypotheses: list[Hypothesis]
    curves: dict[str, dict[str, list[float]]]  # scores by threshold, by method

    def words(self) -> list[str]:
        """The verdicts in words, or why there are none."""
        nothing = "Nothing can be judged: no RL method and control have both finished for every seed."
        return [hypothesis.words for hypothesis in self.hypotheses] or [nothing]

    def front(self) -> set[str]:
        """The Pareto front of Dice and β0 error."""
        points = {
            n: (patient_mean(e, "dice"), -patient_mean(e, "beta0_error")) for n, e in self.together.items()
        }
        return pareto_front(points)


def judge(
    results: dict[str, list[MethodResult]],
    equal: Mapping[Pair, Sequence[AtRecall]],
    curves: dict[str, dict[str, list[float]]],
) -> Outcome:
    """All comparisons and verdicts, over the seeds together and for each alone."""
    together = {name: pooled([one.test for one in seeds]) for name, seeds in results.items()}
    methods, controls = ([name for name in results if (name in RL) == rl] for rl in (True, False))
    differences = {(m, c): compare(together[c], together[m]) for m in methods for c in controls}
    strong = {name: [one.val for one in results[name]] for name in STRONG_CONTROLS if name in results}
    best = best_control(strong) if strong else ""
    hypotheses = []
    for method in methods if best else ():
        pairs = zip(results[best], results[method], strict=True)
        alone = [verdict_e2(compare(control.test, one.test)) for control, one in pairs]
        hypotheses.append(_hypothesis("E2", method, best, verdict_e2(differences[method, best]), alone))
    at_recall = {}
    for (method, control), seeds in equal.items():
        result = compare(pooled([at.test for at in seeds]), together[method])
        pairs = zip(seeds, results[method], strict=True)
        alone = [verdict_e3(compare(at.test, one.test), at.gap) for at, one in pairs]
        overall = verdict_e3(result, float(np.mean([abs(at.gap) for at in seeds])))
        hypotheses.append(_hypothesis("E3", method, control, overall, alone))
        at_recall[method, control] = result
    return Outcome(results, together, differences, at_recall, best, hypotheses, curves)


def _hypothesis(name: str, method: str, control: str, overall: Verdict, alone: list[Verdict]) -> Hypothesis:
    at = " at equal recall" if name == "E3" else ""
    words = (
        f"{name}, {METHODS[method].label}, against {METHODS[control].label}{at}: {overall[1]}. Alone it holds"
    )
    num_alone = sum(holds for holds, _ in alone)
    return Hypothesis(name, method, control, overall[0], f"{words} in {num_alone} of {len(alone)} seeds.")


def pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several seeds: every score of an image is its mean over them; nan if any is."""
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


def compare(control: Evaluation, method: Evaluation) -> Differences:
    """The paired differences of a method and a control on the same images."""
    if mismatch := set_mismatch(control, method, "the control", "the method"):
        raise ValueError(f"The methods cannot be compared: {mismatch}. Delete the scores and run again.")
    found = {name: paired_difference(control.rows, method.rows, name) for name in COMPARED}
    return found | {RELATIVE: relative_difference(control.rows, method.rows, "beta0_error")}


def best_control(validation: Mapping[str, Sequence[Evaluation]]) -> str:
    """The control with the highest validation reward, as a mean over seeds; of equal ones the last."""
    rewards = {
        name: np.mean([patient_mean(e, "reward") for e in seeds]) for name, seeds in validation.items()
    }
    return max(reversed(rewards), key=rewards.__getitem__)


def patient_mean(evaluation: Evaluation, metric: str) -> float:
    """The mean over patients of one score."""
    return evaluation.summary["metrics"][metric]["patient_mean"]


def verdict_e2(found: Differences) -> Verdict:
    """E2: Dice not lower, by a margin of 0.005, and better structure, length and reward.

    β0 error lower by at least a fifth, |length ratio − 1| lower and reward higher, each with an interval that
    leaves out 0; the lower end of the interval of Dice above −0.005.
    """
    dice, beta0 = found["dice"], found[RELATIVE]
    fewer = not beta0.reason and beta0.mean <= -BETA0_GAIN and beta0.high < 0
    conditions = [
        (dice.low > -DICE_MARGIN, f"{in_words(dice)} against a margin of -0.005"),
        (fewer, f"β0 error {percent(beta0)} against -20 %"),
        *((is_better(found[name]), in_words(found[name])) for name in ("length_error", "reward")),
    ]
    return _verdict(all(holds for holds, _ in conditions), conditions)


def verdict_e3(found: Differences, recall_gap: float) -> Verdict:
    """E3: at equal recall, higher precision or a higher topology score, the interval leaving out 0.

    `recall_gap` is by how much validation recall of the two differs, mean over seeds whatever the sign; where
    no threshold comes nearer than 0.01, nothing can be claimed.
    """
    equal, gap = abs(recall_gap) <= RECALL_TOLERANCE, f"{abs(recall_gap):.3f}"
    gains = [(is_better(found[name]), in_words(found[name])) for name in ("precision", "topology_score")]
    first = (equal, f"validation recall differs by {gap} (test: {in_words(found['recall'])})")
    return _verdict(equal and any(better for better, _ in gains), [first, *gains])


def _verdict(holds: bool, conditions: Sequence[tuple[bool, str]]) -> Verdict:
    named = "; ".join(words for met, words in conditions if met == holds)
    return holds, f"{'holds' if holds else 'does not hold'}: {named}"


def is_better(difference: Difference) -> bool:
    """Whether a score is better, with an interval that leaves out 0."""
    return difference.clear and verdict(difference.metric, difference.mean) == "better"


def in_words(difference: Difference) -> str:
    """A difference with its interval, or with the reason why there is none."""
    metric, mean = difference.metric, difference.mean
    if difference.reason:
        return f"{metric_name(metric)} {number(metric, mean, sign=True)} ({difference.reason})"
    return f"{metric_name(metric)} {with_interval(metric, mean, difference.low, difference.high, sign=True)}"


def percent(relative: Difference) -> str:
    """A relative difference in percent, with its interval, or with the reason why there is none."""
    mean = "undefined" if math.isnan(relative.mean) else f"{100 * relative.mean:+.1f} %"
    return f"{mean} ({relative.reason or f'{100 * relative.low:+.1f} to {100 * relative.high:+.1f} %'})"


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The points that no other beats: as high in both coordinates, and higher in one.

    >>> sorted(pareto_front({"a": (0.8, -50.0), "b": (0.7, -60.0), "c": (0.7, -40.0)}))
    ['a', 'c']
    """

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] >= other[0] and one[1] >= other[1] and one != other

    return {name for name, point in points.items() if not any(beats(p, point) for p in points.values())}
