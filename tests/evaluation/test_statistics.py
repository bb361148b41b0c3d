import math

import numpy as np
import pytest
from scipy import stats

from vesselrl.evaluation.statistics import (
    bootstrap_interval,
    holm,
    paired_difference,
    patient_means,
    relative_difference,
    small_sample_stretch,
)


def rows(values, patients):
    return [
        {"key": f"{patient}_F{number:04d}", "patient": patient, "dice": value}
        for number, (patient, value) in enumerate(zip(patients, values, strict=True))
    ]


def test_patient_means_weigh_patients_not_frames():
    # Three frames of P001 and one of P002: image mean 0.45, patient mean (0.3 + 0.9) / 2 = 0.6.
    interval = bootstrap_interval([0.2, 0.3, 0.4, 0.9], ["P001", "P001", "P001", "P002"])
    assert interval.mean == pytest.approx(0.6)
    assert (interval.n_images, interval.n_patients) == (4, 2)


def test_undefined_values_are_left_out_and_counted():
    values = [0.5, math.nan, 0.7, math.nan, 0.9]
    patients = ["P001", "P001", "P002", "P003", "P004"]
    assert patient_means(values, patients) == {"P001": 0.5, "P002": 0.7, "P004": 0.9}
    interval = bootstrap_interval(values, patients)
    assert interval.mean == pytest.approx(0.7)
    assert (interval.n_images, interval.n_patients, interval.n_undefined) == (3, 3, 2)


def test_infinite_values_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="Value 1 is infinite"):
        patient_means([0.1, math.inf], ["P001", "P002"])
    with pytest.raises(ValueError, match="one length"):
        patient_means([0.1, 0.2], ["P001"])
    with pytest.raises(ValueError, match="n >= 100"):
        bootstrap_interval([0.1] * 3, ["P001", "P002", "P003"], n=5)


# Two-sided t and normal quantiles of printed tables.
@pytest.mark.parametrize(
    ("patients", "level", "student", "normal"),
    [(3, 0.95, 4.3027, 1.9600), (11, 0.95, 2.2281, 1.9600), (21, 0.99, 2.8453, 2.5758)],
)
def test_stretch_is_that_of_printed_tables(patients, level, student, normal):
    expected = student / normal * math.sqrt(patients / (patients - 1))
    assert small_sample_stretch(patients, level) == pytest.approx(expected, rel=1e-4)


def test_interval_is_scipys_percentile_bootstrap_stretched():
    means = np.array([0.71, 0.64, 0.88, 0.79, 0.55, 0.83, 0.90, 0.74])
    scipy_interval = stats.bootstrap(
        (means,), np.mean, n_resamples=20000, method="percentile", random_state=1
    ).confidence_interval
    # t(0.975, 7) = 2.3646, z = 1.9600, sqrt(8/7) = 1.0690 -> 1.2897
    stretch = 2.3646 / 1.9600 * 1.0690
    assert small_sample_stretch(8) == pytest.approx(stretch, abs=1e-3)
    ours = bootstrap_interval(means, [f"P{i}" for i in range(8)], n=20000)
    assert ours.low == pytest.approx(means.mean() + stretch * (scipy_interval.low - means.mean()), abs=2e-3)
    assert ours.high == pytest.approx(means.mean() + stretch * (scipy_interval.high - means.mean()), abs=2e-3)


def test_interval_is_repeatable_kept_in_bounds_and_not_shrunk_by_more_frames():
    values, patients = [0.99, 0.98, 0.70], ["P001", "P002", "P003"]
    free = bootstrap_interval(values, patients, seed=3)
    assert free == bootstrap_interval(values, patients, seed=3)
    assert free.high > 1
    assert bootstrap_interval(values, patients, seed=3, bounds=(0, 1)).high == 1
    often = bootstrap_interval(np.repeat(values, 30), list(np.repeat(patients, 30)), seed=3)
    assert (often.low, often.high) == pytest.approx((free.low, free.high))


@pytest.mark.parametrize("num_patients", [4, 20])
def test_coverage_is_near_nominal(num_patients):
    """1000 simulated studies: patients differ (0.05), frames differ (0.03), 1 to 6 frames each."""
    generator = np.random.default_rng(20)
    hits = 0
    for study in range(1000):
        patients = np.repeat(np.arange(num_patients), generator.integers(1, 7, num_patients))
        effect = generator.normal(0.02, 0.05, num_patients)
        values = effect[patients] + generator.normal(0, 0.03, len(patients))
        interval = bootstrap_interval(values, [f"P{i:03d}" for i in patients], n=400, seed=study)
        hits += interval.low <= 0.02 <= interval.high
    assert 930 <= hits <= 970


def two_runs(generator, num_patients, effect):
    """Dice of a run before and after: patients differ by much, the change of each by 0.03, 1 to 6 frames."""
    patients = np.repeat(np.arange(num_patients), generator.integers(1, 7, num_patients))
    before = generator.beta(16, 4, num_patients)[patients] + generator.normal(0, 0.02, len(patients))
    change = generator.normal(effect, 0.03, num_patients)[patients] + generator.normal(0, 0.02, len(patients))
    names = [f"P{number:03d}" for number in patients]
    return rows(before, names), rows(before + change, names)


@pytest.mark.parametrize("num_patients", [8, 20])
def test_a_planted_zero_effect_is_significant_in_at_most_6_percent(num_patients):
    generator = np.random.default_rng(11)
    found = [paired_difference(*two_runs(generator, num_patients, 0.0), "dice", seed=k) for k in range(500)]
    assert sum(difference.clear for difference in found) <= 30
    assert sum(difference.clear for difference in found) >= 10  # a test that never speaks would pass as well
    # The p values of no effect are spread evenly: a quarter of them in every quarter.
    quarters = np.histogram([difference.p for difference in found], bins=4, range=(0, 1))[0]
    assert all(90 <= quarter <= 160 for quarter in quarters)


def test_p_value_is_the_interval_turned_round():
    generator = np.random.default_rng(5)
    for effect in (0.0, 0.01, 0.02, 0.03, 0.05):
        before, after = two_runs(generator, 9, effect)
        difference = paired_difference(before, after, "dice")
        for level in (0.5, 0.8, 0.95, 0.99):
            again = paired_difference(before, after, "dice", level=level)
            assert again.p == difference.p
            assert again.clear == (difference.p < 1 - level)
        assert paired_difference(after, before, "dice").p == pytest.approx(difference.p, abs=0.03)


def test_p_value_is_near_that_of_the_t_test_and_never_below_the_draws():
    values = np.array([0.03, 0.05, -0.01, 0.02, 0.04, 0.06, 0.01, 0.00, 0.03, 0.02, 0.05, -0.02])
    names = [f"P{number}" for number in range(12)]
    difference = paired_difference(rows(np.zeros(12), names), rows(values, names), "dice", n=20000)
    assert difference.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.003)
    sure = paired_difference(rows(np.zeros(12), names), rows(values + 9, names), "dice")
    assert sure.p == 1 / 2001
    few = paired_difference(rows([0, 0], ["P1", "P2"]), rows([1, 2], ["P1", "P2"]), "dice")
    assert math.isnan(few.p)


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and no value below the one before: .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04]) == [0.04]
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([math.nan, 0.02, 0.04]) == pytest.approx([math.nan, 0.04, 0.04], nan_ok=True)
    assert holm([]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_patients", "plain", "stretched"),
    [
        (3, (75.1, 72.4, 74.7), (94.5, 93.1, 95.7)),
        (5, (83.9, 82.7, 82.9), (94.9, 93.4, 95.1)),
        (10, (90.1, 89.3, 88.6), (94.5, 93.3, 94.1)),
        (20, (92.7, 92.2, 92.1), (94.6, 93.8, 94.6)),
    ],
)
def test_coverage_of_plain_and_stretched_intervals(num_patients, plain, stretched):
    generator = np.random.default_rng(7)
    draw = {
        "normal": (lambda: generator.normal(0, 1, num_patients), 0.0),
        "beta": (lambda: generator.beta(8, 2, num_patients), 0.8),
        "heavy": (lambda: generator.standard_t(3, num_patients), 0.0),
    }
    patients = [f"P{i}" for i in range(num_patients)]
    stretch = small_sample_stretch(num_patients)
    for column, (values, truth) in enumerate(draw.values()):
        hits = np.zeros(2)
        for study in range(1500):
            found = bootstrap_interval(values(), patients, n=1000, seed=study)
            error = truth - found.mean
            for method, scale in enumerate((1 / stretch, 1.0)):
                low, high = scale * (found.low - found.mean), scale * (found.high - found.mean)
                hits[method] += low <= error <= high
        # Chance between two simulations of 1500 studies: 2.5 points near 95 %, 4.5 points near 75 %.
        assert 100 * hits[1] / 1500 == pytest.approx(stretched[column], abs=3)
        assert 100 * hits[0] / 1500 == pytest.approx(plain[column], abs=4.5)


def test_fewer_than_three_patients_give_no_interval():
    difference = paired_difference(rows([0.5, 0.6], ["P1", "P2"]), rows([0.7, 0.8], ["P1", "P2"]), "dice")
    assert difference.mean == pytest.approx(0.2)
    assert math.isnan(difference.low)
    assert math.isnan(difference.high)
    assert difference.reason == "only 2 patients: an interval needs at least 3"
    assert not difference.clear
    nothing = bootstrap_interval([math.nan], ["P001"])
    assert math.isnan(nothing.mean)
    assert nothing.n_patients == 0


def test_equal_patients_prove_nothing():
    patients = ["P1", "P2", "P3", "P4"]
    difference = paired_difference(rows([0.5] * 4, patients), rows([0.75] * 4, patients), "dice")
    assert difference.mean == 0.25
    assert "no spread" in difference.reason
    assert not difference.clear


def test_paired_difference_pairs_by_key_in_any_order():
    patients = ["P1", "P1", "P2", "P3", "P4"]
    before = rows([0.50, 0.70, 0.40, 0.90, 0.60], patients)
    after = rows([0.60, 0.70, 0.50, 0.93, 0.65], patients)
    # per image .10 0 .10 .03 .05; per patient .05 .10 .03 .05; mean .0575
    difference = paired_difference(before, after[::-1], "dice")
    assert difference.mean == pytest.approx(0.0575)
    assert (difference.n_images, difference.n_patients) == (5, 4)
    assert difference.clear
    assert 0 < difference.low < 0.0575 < difference.high
    back = paired_difference(after, before, "dice")
    assert (back.mean, back.clear) == (pytest.approx(-0.0575), True)


def test_undefined_on_either_side_drops_the_pair():
    patients = ["P1", "P2", "P3", "P4", "P5"]
    before = rows([0.1, math.nan, 0.3, 0.4, 0.5], patients)
    after = rows([0.2, 0.9, 0.5, 0.7, None], patients)
    difference = paired_difference(before, after, "dice")
    assert difference.mean == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert (difference.n_images, difference.n_undefined) == (3, 2)


def test_unpaired_images_are_named():
    before, after = rows([0.1, 0.2], ["P1", "P2"]), rows([0.1, 0.2, 0.3], ["P1", "P2", "P3"])
    with pytest.raises(ValueError, match=r"1 only in after \(P3_F0002\)"):
        paired_difference(before, after, "dice")
    with pytest.raises(ValueError, match="P1_F0000 occurs twice in the before rows"):
        paired_difference(before + before, after, "dice")
    with pytest.raises(ValueError, match="has no 'recall' in the before rows"):
        paired_difference(before, before, "recall")
    moved = [{**row, "patient": "P9"} for row in before]
    with pytest.raises(ValueError, match="belongs to P1 before and P9 after"):
        paired_difference(before, moved, "dice")


def test_a_relative_difference_is_that_of_the_means_over_patients():
    patients = ["P001", "P001", "P002", "P003", "P004"]
    before = rows([10, 30, 20, 40, 20], patients)  # patient means 20, 20, 40, 20: mean 25
    after = rows([10, 10, 20, 20, 10], patients)  # 10, 20, 20, 10: mean 15
    change = relative_difference(before, after, "dice")
    assert change.mean == pytest.approx(15 / 25 - 1)
    assert change.low < -0.4 < change.high
    assert (change.n_images, change.n_patients, change.metric) == (5, 4, "dice")
    # Against an independent bootstrap of the ratio, widened as every interval here.
    pairs = np.array([(20, 10), (20, 20), (40, 20), (20, 10)], float)
    drawn = np.random.default_rng(1).choice(pairs, (20000, 4)).mean(axis=1)
    low, high = np.quantile(drawn[:, 1] / drawn[:, 0] - 1, [0.025, 0.975])
    stretch = small_sample_stretch(4)
    assert change.low == pytest.approx(-0.4 + stretch * (low + 0.4), abs=0.03)
    assert change.high == pytest.approx(-0.4 + stretch * (high + 0.4), abs=0.03)


def test_a_relative_difference_pairs_the_draws():
    """Every patient halves: however the patients are drawn, the mean halves."""
    before = rows([10, 30, 300, 7], ["P001", "P002", "P003", "P004"])
    after = [row | {"dice": row["dice"] / 2} for row in before]
    change = relative_difference(before, after, "dice")
    assert (change.low, change.mean, change.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert change.clear


def test_without_a_mean_before_there_is_no_relative_difference():
    four = ["P001", "P002", "P003", "P004"]
    assert (
        "can be 0" in relative_difference(rows([0, 0, 0, 1], four), rows([1, 1, 1, 1], four), "dice").reason
    )
    two = relative_difference(rows([1, 2], four[:2]), rows([2, 2], four[:2]), "dice")
    assert two.reason == "only 2 patients: an interval needs at least 3"
    assert two.mean == pytest.approx(4 / 3 - 1)
