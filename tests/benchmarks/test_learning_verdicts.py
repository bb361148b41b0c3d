"""Verdicts on numbers made by hand: each condition alone turns E2 over; E3 wants equal recall and a gain."""

import numpy as np
import pytest

from vesselrl.benchmarks.learning import judge
from vesselrl.benchmarks.learning_comparison import (
    COMPARED,
    Contest,
    best_control,
    contest,
    pareto_front,
    pooled,
    verdict_e2,
    verdict_e3,
)
from vesselrl.benchmarks.learning_outcome import EqualRecall
from vesselrl.benchmarks.learning_scores import ArmResult
from vesselrl.evaluation.results import Evaluation, summarise
from vesselrl.evaluation.statistics import Difference
from vesselrl.scoring.postprocessing import THRESHOLD_ONLY

# (mean, low, high) of arm minus control; β0 relative. Together they satisfy E2.
GOOD = {"dice": (-0.002, -0.0049, 0.001), "length_error": (-0.05, -0.09, -0.01), "reward": (0.2, 0.05, 0.4)}
GOOD_BETA0 = (-0.2, -0.3, -0.05)


def difference(metric: str, mean: float, low: float, high: float, reason: str = "") -> Difference:
    return Difference(mean, low, high, 100, 13, 0, reason, metric)


def made_contest(beta0: tuple = GOOD_BETA0, **changes: tuple) -> Contest:
    values = {name: (0.0, -0.01, 0.01) for name in COMPARED} | GOOD | changes
    return Contest(
        {name: difference(name, *numbers) for name, numbers in values.items()},
        difference("beta0_error", *beta0),
    )


def made(seeds: int = 1, **columns: list[float]) -> list[Evaluation]:
    """One evaluation per seed, of as many patients as there are values; every compared column is there."""
    number = len(next(iter(columns.values())))
    evaluations = []
    for seed in range(seeds):
        rows = []
        for place in range(number):
            row = {"key": f"P{place}_S1_F1", "patient": f"P{place}", "sequence": f"P{place}_S1"}
            row |= {"failed": False, "truth_hash": f"truth{place}"} | dict.fromkeys(COMPARED, 1.0)
            rows.append(row | {name: values[place] + seed for name, values in columns.items()})
        evaluations.append(summarise(rows, {"version": 1}))
    return evaluations


# ---- E2


def test_e2_holds_where_every_condition_does() -> None:
    verdict = verdict_e2(made_contest())
    assert verdict.holds
    assert verdict.words.startswith(
        "holds: Dice -0.002 (-0.005 to +0.001) against a margin of -0.005; β0 error"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dice": (0.01, -0.0051, 0.03)}, "Dice"),  # better on average, but not proven non-inferior
        ({"beta0": (-0.19, -0.3, -0.1)}, "β0 error"),  # proven, but less than a fifth
        ({"beta0": (-0.4, -0.9, 0.01)}, "β0 error"),  # large, but not proven
        ({"length_error": (-0.05, -0.12, 0.001)}, "Length error"),
        ({"length_error": (0.05, 0.01, 0.09)}, "Length error"),
        ({"reward": (0.2, -0.001, 0.4)}, "Reward"),
        ({"reward": (-0.2, -0.4, -0.1)}, "Reward"),
    ],
)
def test_e2_falls_with_each_condition_alone(changes: dict, named: str) -> None:
    verdict = verdict_e2(made_contest(**changes))
    assert not verdict.holds
    assert verdict.words.startswith(f"does not hold: {named} ")
    assert ";" not in verdict.words  # nothing else is blamed


def test_e2_needs_an_interval() -> None:
    few = made_contest(
        dice=(0.1, float("nan"), float("nan"), "only 2 patients: an interval needs at least 3")
    )
    assert "Dice +0.100 (only 2 patients" in verdict_e2(few).words


# ---- E3


def test_e3_wants_one_gain_at_equal_recall() -> None:
    assert not verdict_e3(made_contest(), 0.0).holds
    by_precision = verdict_e3(made_contest(precision=(0.02, 0.01, 0.03)), 0.009)
    assert by_precision.holds
    assert "Precision +0.020" in by_precision.words
    assert "Topology" not in by_precision.words
    assert verdict_e3(made_contest(topology_score=(0.02, 0.01, 0.03)), -0.009).holds
    assert not verdict_e3(made_contest(precision=(-0.02, -0.03, -0.01)), 0.0).holds


def test_e3_claims_nothing_at_unequal_recall() -> None:
    verdict = verdict_e3(made_contest(precision=(0.02, 0.01, 0.03)), -0.02)
    assert not verdict.holds
    assert "validation recall differs by 0.020" in verdict.words


# ---- Differences, seeds, the strongest control


def test_unequal_recall_of_seeds_is_no_equal_recall_on_average() -> None:
    """The arm is better in precision; its recall is off by 0.03 with each seed, once up and once down."""
    arm = made(2, precision=[1.2, 1.3, 1.25, 1.2])
    control = tuple(made(2, precision=[1.0, 1.1, 1.05, 1.0]))
    results = {"rl": [ArmResult(one, one, "rl", THRESHOLD_ONLY) for one in arm]}
    for gaps, holds in (((0.005, -0.005), True), ((0.03, -0.03), False)):
        (claim,) = judge(results, {("rl", "base_tuned"): EqualRecall(control, (0.5, 0.5), gaps)}).claims
        assert (claim.name, claim.verdict.holds) == ("E3", holds)


def test_a_contest_is_arm_minus_control() -> None:
    (control,) = made(dice=[0.5, 0.6, 0.7, 0.8], beta0_error=[10, 20, 30, 40])
    (arm,) = made(dice=[0.6, 0.7, 0.8, 0.9], beta0_error=[5, 10, 15, 20])
    result = contest(control, arm)
    assert result.differences["dice"].mean == pytest.approx(0.1)
    assert result.differences["beta0_error"].mean == pytest.approx(-12.5)
    assert result.beta0_relative.mean == pytest.approx(-0.5)


def test_other_images_are_no_contest() -> None:
    (four,), (five,) = made(dice=[0.5] * 4), made(dice=[0.5] * 5)
    with pytest.raises(ValueError, match="cannot be compared: the images differ"):
        contest(four, five)
    with pytest.raises(ValueError, match="seeds cannot be averaged"):
        pooled([four, five])


def test_seeds_are_averaged_image_by_image_before_patients_are_drawn() -> None:
    """A seed adds no patient: three seeds of four patients stay four patients."""
    together = pooled(made(seeds=3, dice=[0.1, 0.2, 0.3, 0.4]))
    assert [row["dice"] for row in together.rows] == pytest.approx([1.1, 1.2, 1.3, 1.4])
    assert together.summary["n_patients"] == 4
    undefined = pooled([*made(dice=[0.1, 0.2, 0.3]), *made(dice=[0.1, float("nan"), 0.3])])
    assert np.isnan(undefined.rows[1]["dice"])


def test_the_strongest_control_has_the_highest_mean_validation_reward() -> None:
    low, high, middle = (made(reward=[value] * 3) for value in (1.0, 3.0, 2.5))
    assert best_control({"sft": [*low, *high], "sft_tuned": [*middle, *middle]}) == "sft_tuned"
    assert best_control({"sft": high, "sft_tuned": middle}) == "sft"
    assert best_control({"sft": high, "sft_tuned": high}) == "sft_tuned"  # tuning that changed nothing


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = {"a": (0.80, 50.0), "b": (0.80, 60.0), "c": (0.70, 40.0), "d": (0.75, 55.0), "e": (0.80, 50.0)}
    assert pareto_front(points) == {"a", "c", "e"}
