"""Verdicts on numbers made by hand: each condition alone turns E2 over; E3 wants equal recall and a gain."""

import numpy as np
import pytest

from benchmarks.learning import COMPARED, compare, decide, judge, pooled
from benchmarks.scores import MethodResult
from vesselrl.evaluation.results import Evaluation, summarise, verdict
from vesselrl.scoring.postprocessing import THRESHOLD_ONLY

# (mean, low, high) of method minus control; together they satisfy E2.
GOOD = {"dice": (-0.002, -0.0049, 0.001), "beta0": (-20.0, -30.0, -5.0)}
GOOD |= {"length_error": (-0.05, -0.09, -0.01), "reward": (0.2, 0.05, 0.4)}


def found(**changes: tuple) -> dict[str, dict]:
    lines = {}
    for name, (mean, low, high) in (dict.fromkeys(COMPARED, (0.0, -0.01, 0.01)) | GOOD | changes).items():
        line = {"metric": name.replace("beta0", "beta0_error"), "difference": mean, "low": low, "high": high}
        lines[name] = line | {"reason": "", "verdict": verdict(name, mean) if low > 0 or high < 0 else ""}
    return lines


def made(seeds: int = 1, **columns: list[float]) -> list[Evaluation]:
    """One evaluation per seed, of as many patients as there are values; every compared column is there."""
    evaluations = []
    for seed in range(seeds):
        rows = []
        for place in range(len(next(iter(columns.values())))):
            row = {"key": f"P{place}_S1_F1", "patient": f"P{place}", "sequence": f"P{place}_S1"}
            row |= {"failed": False, "truth_hash": f"truth{place}", "beta0_error": 1.0}
            row |= dict.fromkeys(COMPARED, 1.0)
            rows.append(row | {name: values[place] + seed for name, values in columns.items()})
        evaluations.append(summarise(rows, {"version": 1}))
    return evaluations


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dice": (0.01, -0.0051, 0.03)}, "Dice"),  # better on average, but not proven non-inferior
        ({"dice": (0.1, np.nan, np.nan)}, "Dice"),
        ({"beta0": (-19.0, -30.0, -10.0)}, "Betti-0 error"),  # proven, but less than a fifth
        ({"beta0": (-40.0, -90.0, 1.0)}, "Betti-0 error"),  # large, but not proven
        ({"beta0": (np.nan, np.nan, np.nan)}, "Betti-0 error"),
        ({"length_error": (-0.05, -0.12, 0.001)}, "Length error"),
        ({"length_error": (0.05, 0.01, 0.09)}, "Length error"),
        ({"reward": (0.2, -0.001, 0.4)}, "Reward"),
        ({"reward": (-0.2, -0.4, -0.1)}, "Reward"),
    ],
)
def test_e2_falls_with_each_condition_alone(changes: dict, named: str) -> None:
    assert decide(found())[0]
    holds, words = decide(found(**changes))
    assert not holds
    assert words.startswith(f"does not hold: {named} ")
    assert ";" not in words  # nothing else is blamed


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
    result, words = decide(found(**changes), gap)
    assert result == holds
    assert named in words


def test_unequal_recall_of_seeds_is_no_equal_recall_on_average() -> None:
    """The method is better in precision; its recall is off by 0.03 with each seed, once up and once down."""
    precise = made(2, precision=[1.2, 1.3, 1.25, 1.2])
    control = made(2, precision=[1.0, 1.1, 1.05, 1.0])
    results = {"rl": [MethodResult(one, one, "rl", THRESHOLD_ONLY) for one in precise]}
    for gaps, expected in (((0.005, -0.005), True), ((0.03, -0.03), False)):
        ((holds, _),) = judge(results, {("rl", "base_tuned"): [*zip(control, gaps, strict=True)]}).values()
        assert holds == expected


@pytest.mark.parametrize(("last", "best"), [(2.5, "sft_tuned"), (2.0, "sft_tuned"), (1.5, "sft")])
def test_the_strongest_control_has_the_highest_mean_validation_reward(last: float, best: str) -> None:
    """Of equal ones the last: tuning that changed nothing."""
    rewards = {"sft": (1.0, 3.0), "sft_tuned": (last, last), "rl": (9.0, 9.0)}
    evaluations = {
        name: [made(reward=[value] * 3)[0] for value in values] for name, values in rewards.items()
    }
    results = {n: [MethodResult(e, e, n, THRESHOLD_ONLY) for e in seeds] for n, seeds in evaluations.items()}
    assert [*judge(results, {})] == [("E2", "rl", best)]


def test_seeds_are_averaged_image_by_image_before_patients_are_drawn() -> None:
    """A seed adds no patient: three seeds of four patients stay four patients."""
    together = pooled(made(seeds=3, dice=[0.1, 0.2, 0.3, 0.4]))
    assert [row["dice"] for row in together.rows] == pytest.approx([1.1, 1.2, 1.3, 1.4])
    assert together.summary["n_patients"] == 4
    undefined = pooled([*made(dice=[0.1, 0.2, 0.3]), *made(dice=[0.1, float("nan"), 0.3])])
    assert np.isnan(undefined.rows[1]["dice"])


def test_the_change_of_the_beta0_error_is_that_of_the_means_over_patients() -> None:
    """Means 25 and 15; every draw takes the same patients of both, so that equal halves have no spread."""
    before, after = made(beta0_error=[20, 20, 40, 20])[0], made(beta0_error=[10, 20, 20, 10])[0]
    line = compare(before, after)["beta0"]
    assert line["difference"] == pytest.approx(-40)
    # An independent bootstrap of the ratio, widened by t(3) / z * sqrt(4 / 3), as every interval.
    pairs = np.array([(20, 10), (20, 20), (40, 20), (20, 10)], float)
    drawn = np.random.default_rng(1).choice(pairs, (20000, 4)).mean(axis=1)
    limits = -40 + 1.875 * (np.quantile(100 * drawn[:, 1] / drawn[:, 0] - 100, [0.025, 0.975]) + 40)
    assert (line["low"], line["high"]) == pytest.approx(tuple(limits), abs=3)
    halves = compare(made(beta0_error=[10, 30, 300, 7])[0], made(beta0_error=[5, 15, 150, 3.5])[0])["beta0"]
    assert (halves["low"], halves["high"]) == pytest.approx((-50, -50))
    assert np.isnan(compare(made(beta0_error=[0, 0, 0, 1])[0], after)["beta0"]["high"])
