"""The constrained objective: a price rises while its floor is missed, falls while it is kept, and steers."""

import numpy as np
import pytest

from vesselrl.scoring.rewards import MultiObjectiveReward
from vesselrl.scoring.topology import topology
from vesselrl.training.credit import overlap_credit
from vesselrl.training.goals import LIMIT, Goals

MISSED = {"dice": 0.67, "recall": 0.83, "precision": 0.75}


def goals(**floors: float) -> Goals:
    return Goals(MultiObjectiveReward(), floors)


def test_a_price_rises_by_what_is_missed_and_falls_by_what_is_kept() -> None:
    one = goals(recall=0.85, precision=0.74)
    one.multipliers["precision"] = 4.0
    one.validated(MISSED)  # recall 0.02 short: 2 points; precision 0.01 above: 1 point less
    assert one.figures() == {
        "train/price/recall": pytest.approx(2.0),
        "train/price/precision": pytest.approx(3.0),
    }


def test_prices_stay_between_zero_and_the_limit() -> None:
    one = goals(recall=0.85, precision=0.7)
    for _ in range(100):
        one.validated(MISSED)
    assert one.multipliers == {"recall": LIMIT, "precision": 0.0}


def test_overlap_is_dice_and_price_times_score_above_the_floor() -> None:
    one = goals(recall=0.8, precision=0.7)
    one.multipliers["precision"] = 2.0
    terms = one.overlap_terms(np.array([60.0]), np.array([20.0]), np.array([40.0]))
    assert terms["dice"] == pytest.approx(5 * 120 / 180)
    assert terms["recall_floor"] == 0.0  # a goal without a price
    assert terms["precision_floor"] == pytest.approx(2.0 * (0.75 - 0.7))
    assert set(terms) == {"dice", "recall_floor", "precision_floor"}


def test_a_price_for_recall_pays_vessel_pixels_alone() -> None:
    one = goals(recall=0.85, precision=0.7)
    without = overlap_credit(one, 60, 20, 40)
    one.multipliers["recall"] = 3.0
    gain = overlap_credit(one, 60, 20, 40) - without
    assert (gain[1] > 0).all()
    assert not gain[0].any()  # recall does not see a false alarm


def test_structure_is_that_of_the_reward() -> None:
    truth = np.zeros((16, 16), bool)
    truth[7:10, 2:14] = True
    broken = truth.copy()
    broken[:, 7:9] = False
    reward = MultiObjectiveReward()
    assert goals(dice=0.8).structure_terms(broken, truth, topology(truth)) == reward.structure_terms(
        broken, truth
    )
