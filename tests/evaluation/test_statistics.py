"""Means, intervals, p values: by hand, against SciPy and printed tables, and in simulated studies."""

import math

import numpy as np
import pytest
from scipy import stats

from vesselrl.evaluation import statistics
from vesselrl.evaluation.statistics import bootstrap_interval, holm, paired_difference, patient_means

FOUR = ["P1", "P2", "P3", "P4"]


def test_means_weigh_patients_and_leave_out_undefined_values():
    # Three frames of P1 and one of P2: image mean 0.45, patient mean (0.3 + 0.9) / 2 = 0.6.
    assert bootstrap_interval([0.2, 0.3, 0.4, 0.9], ["P1", "P1", "P1", "P2"]).mean == pytest.approx(0.6)
    values, patients = [0.5, math.nan, 0.7, math.nan, 0.9], ["P1", "P1", "P2", "P3", "P4"]
    assert patient_means(values, patients) == {"P1": 0.5, "P2": 0.7, "P4": 0.9}
    interval = bootstrap_interval(values, patients)
    assert interval.mean == pytest.approx(0.7)
    assert (interval.n_images, interval.n_patients, interval.n_undefined) == (3, 3, 2)
    assert math.isnan(bootstrap_interval([math.nan], ["P1"]).mean)
    with pytest.raises(ValueError, match="Value 1 is infinite"):
        patient_means([0.1, math.inf], ["P1", "P2"])


def test_interval_is_scipys_percentile_bootstrap_stretched():
    means = np.array([0.71, 0.64, 0.88, 0.79, 0.55, 0.83, 0.90, 0.74])
    plain = stats.bootstrap((means,), np.mean, n_resamples=20000, method="percentile", random_state=1)
    # t(0.975, 7) = 2.3646, z = 1.9600, sqrt(8/7) = 1.0690 -> 1.2897
    stretch = 2.3646 / 1.9600 * 1.0690
    ours = bootstrap_interval(means, [f"P{i}" for i in range(8)], n=20000)
    for end in ("low", "high"):
        expected = means.mean() + stretch * (getattr(plain.confidence_interval, end) - means.mean())
        assert getattr(ours, end) == pytest.approx(expected, abs=2e-3)


def two_runs(generator, num_patients, effect):
    """Dice of a run before and after: patients differ by much, the change of each by 0.03, 1 to 6 frames."""
    patients = np.repeat(np.arange(num_patients), generator.integers(1, 7, num_patients))
    before = generator.beta(16, 4, num_patients)[patients] + generator.normal(0, 0.02, len(patients))
    change = generator.normal(effect, 0.03, num_patients)[patients] + generator.normal(0, 0.02, len(patients))
    return before, before + change, patients.tolist()


@pytest.mark.parametrize(("num_patients", "plain"), [(3, 0.75), (4, 0.81), (8, 0.89), (20, 0.93)])
def test_a_planted_zero_effect_is_covered_and_significant_in_at_most_6_percent(num_patients, plain):
    """500 simulated studies; `plain` is the coverage of the interval without its stretch."""
    generator, stretch = np.random.default_rng(11), statistics.small_sample_stretch(num_patients)
    studies = (two_runs(generator, num_patients, 0.0) for _ in range(500))
    found = [paired_difference(*study, n=400, seed=k) for k, study in enumerate(studies)]
    assert 0.03 <= np.mean([one.clear for one in found]) <= 0.06
    assert all((one.p < 0.05) == one.clear == (one.low > 0 or one.high < 0) for one in found)
    plain_hits = [one.low <= one.mean * (1 - stretch) <= one.high for one in found]
    assert np.mean(plain_hits) == pytest.approx(plain, abs=0.04)
    if num_patients >= 8:  # the p values of no effect are spread evenly: a quarter of them in every quarter
        quarters = np.histogram([one.p for one in found], bins=4, range=(0, 1))[0]
        assert all(90 <= quarter <= 160 for quarter in quarters)


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and no value below the one before: .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([math.nan, 0.02, 0.04]) == pytest.approx([math.nan, 0.04, 0.04], nan_ok=True)


def test_few_or_equal_patients_prove_nothing():
    few = paired_difference(np.array([0.5, 0.6]), np.array([0.7, 0.8]), FOUR[:2])
    equal = paired_difference(np.full(4, 0.5), np.full(4, 0.75), FOUR)
    assert (few.mean, equal.mean) == (pytest.approx(0.2), 0.25)
    assert np.isnan([few.low, few.high, few.p, equal.p]).all()
    assert few.reason == "only 2 patients: an interval needs at least 3"
    assert "no spread" in equal.reason
    assert few.clear is equal.clear is False


def test_a_paired_difference_by_hand_and_undefined_pairs_dropped():
    before = np.array([0.50, 0.70, 0.40, 0.90, 0.60])
    after = np.array([0.60, 0.70, 0.50, 0.93, 0.65])
    # per image .10 0 .10 .03 .05; per patient .05 .10 .03 .05; mean .0575
    difference = paired_difference(before, after, ["P1", "P1", "P2", "P3", "P4"])
    assert (difference.n_images, difference.n_patients, difference.clear) == (5, 4, True)
    assert difference.mean == pytest.approx(0.0575)
    assert 0 < difference.low < 0.0575 < difference.high
    before, after = np.array([0.1, math.nan, 0.3, 0.4]), np.array([0.2, 0.9, 0.5, math.nan])
    difference = paired_difference(before, after, FOUR)
    assert difference.mean == pytest.approx((0.1 + 0.2) / 2)
    assert (difference.n_images, difference.n_undefined) == (2, 2)
