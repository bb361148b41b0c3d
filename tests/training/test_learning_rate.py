"""The learning-rate schedule, by hand."""

import pytest

from vesselrl.training.batches import staged_warm_cosine, warm_cosine


def test_warm_up_then_half_a_cosine() -> None:
    # 10 steps of warm-up; step 55 is half way through the other 90.
    assert [warm_cosine(step, 100, 0.1) for step in (0, 9, 10, 55)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert warm_cosine(100, 100, 0.1) == pytest.approx(0.0)


def test_it_ends_at_zero_and_stays_there() -> None:
    assert [warm_cosine(step, 10, 0.0) for step in (10, 11, 50)] == pytest.approx([0.0] * 3)


def test_one_step_is_enough() -> None:
    assert warm_cosine(0, 1, 0.05) == 1.0


def test_each_stage_warms_up_and_falls_on_its_own() -> None:
    """10 steps at a peak of 2, then 100 at 0.1, each with a tenth of warm-up; by hand."""
    stages = [(10, 2.0), (100, 0.1)]
    rates = [staged_warm_cosine(step, stages, 0.1) for step in (0, 1, 10, 19, 20, 65, 110, 200)]
    assert rates == pytest.approx([2.0, 2.0, 0.01, 0.1, 0.1, 0.05, 0.0, 0.0])
    assert staged_warm_cosine(9, stages, 0.1) < 0.1  # the first stage has all but ended
