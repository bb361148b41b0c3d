"""Verdicts on numbers made by hand: each condition alone turns E2 over; E3 wants equal recall and a gain."""

import numpy as np
import pytest

from benchmarks.scores import MethodResult
from benchmarks.verdicts import (
    COMPARED,
    RELATIVE,
    AtRecall,
    best_control,
    judge,
    pooled,
    verdict_e2,
    verdict_e3,
)
from vesselrl.evaluation.results import Evaluation, summarise
from vesselrl.evaluation.statistics import Difference
from vesselrl.scoring.postprocessing import THRESHOLD_ONLY

# (mean, low, high) of method minus control; together they satisfy E2.
GOOD = {
    "dice": (-0.002, -0.0049, 0.001),
    "length_error": (-0.05, -0.09, -0.01),
    "reward": (0.2, 0.05, 0.4),
    RELATIVE: (-0.2, -0.3, -0.05),
}


def found(**changes: tuple) -> dict[str, Difference]:
    values = dict.fromkeys((*COMPARED, RELATIVE), (0.0, -0.01, 0.01)) | GOOD | changes
    return {name: Difference(*v[:3], 100, 13, 0, *v[3:], metric=name) for name, v in values.items()}


def made(seeds: int = 1, **columns: list[float]) -> list[Evaluation]:
    """One evaluation per seed, of as many patients as there are values; every compared column is there."""
    evaluations = []
    for seed in range(seeds):
        rows = []
        for place in range(len(next(iter(columns.values())))):
            row = {"key": f"P{place}_S1_F1", "patient": f"P{place}", "sequence": f"P{place}_S1"}
            row |= {"failed": False, "truth_hash": f"truth{place}"} | dict.fromkeys(COMPARED, 1.0)
            rows.append(row | {name: values[place] + seed for name, values in columns.items()})
        evaluations.append(summarise(rows, {"version": 1}))
    return evaluations


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dice": (0.01, -0.0051, 0.03)}, "Dice"),  # better on average, but not proven non-inferior
        ({RELATIVE: (-0.19, -0.3, -0.1)}, "β0 error"),  # proven, but less than a fifth
        ({RELATIVE: (-0.4, -0.9, 0.01)}, "β0 error"),  # large, but not proven
        ({"length_error": (-0.05, -0.12, 0.001)}, "Length error"),
        ({"length_error": (0.05, 0.01, 0.09)}, "Length error"),
        ({"reward": (0.2, -0.001, 0.4)}, "Reward"),
        ({"reward": (-0.2, -0.4, -0.1)}, "Reward"),
    ],
)
def test_e2_falls_with_each_condition_alone(changes: dict, named: str) -> None:
    good, words = verdict_e2(found())
    assert good
    assert words.startswith(
        "holds: Dice -0.002 (-0.005 to +0.001) against a margin of -0.005; β0 error -20.0 %"
    )
    holds, words = verdict_e2(found(**changes))
    assert not holds
    assert words.startswith(f"does not hold: {named} ")
    assert ";" not in words  # nothing else is blamed


def test_e2_needs_an_interval() -> None:
    holds, words = verdict_e2(found(dice=(0.1, np.nan, np.nan, "only 2 patients")))
    assert not holds
    assert "Dice +0.100 (only 2 patients)" in words


@pytest.mark.parametrize(
    ("changes", "gap", "holds", "named"),
    [
        ({}, 0.0, False, "Precision"),
        ({"precision": (0.02, 0.01, 0.03)}, 0.009, True, "Precision +0.020"),
        ({"topology_score": (0.02, 0.01, 0.03)}, -0.009, True, "Topology score +0.020"),
        ({"precision": (-0.02, -0.03, -0.01)}, 0.0, False, "Precision"),
        ({"precision": (0.02, 0.01, 0.03)}, -0.02, False, "validation recall differs by 0.020"),
    ],
)
def test_e3_wants_one_gain_at_equal_recall(changes: dict, gap: float, holds: bool, named: str) -> None:
    verdict, words = verdict_e3(found(**changes), gap)
    assert verdict == holds
    assert named in words


def test_unequal_recall_of_seeds_is_no_equal_recall_on_average() -> None:
    """The method is better in precision; its recall is off by 0.03 with each seed, once up and once down."""
    precise = made(2, precision=[1.2, 1.3, 1.25, 1.2])
    control = made(2, precision=[1.0, 1.1, 1.05, 1.0])
    results = {"rl": [MethodResult(one, one, "rl", THRESHOLD_ONLY) for one in precise]}
    for gaps, holds in (((0.005, -0.005), True), ((0.03, -0.03), False)):
        equal = [AtRecall(test, 0.5, gap) for test, gap in zip(control, gaps, strict=True)]
        (hypothesis,) = judge(results, {("rl", "base_tuned"): equal}, {}).hypotheses
        assert (hypothesis.name, hypothesis.holds) == ("E3", holds)


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
    assert best_control({"sft": high, "sft_tuned": high}) == "sft_tuned"  # tuning that changed nothing
