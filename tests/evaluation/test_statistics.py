import math

import numpy as np
import pytest
from scipy import stats

from vesselrl.evaluation.statistics import (
    bootstrap_interval,
    paired_difference,
    patient_means,
    small_sample_stretch,
    student_quantile,
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


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_student_quantile_agrees_with_scipy(level):
    ours = [student_quantile(level, degrees) for degrees in range(1, 80)]
    assert ours == pytest.approx(stats.t.ppf((1 + level) / 2, np.arange(1, 80)), rel=1e-9)


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


def test_interval_is_repeatable_and_kept_in_bounds():
    values, patients = [0.99, 0.98, 0.70], ["P001", "P002", "P003"]
    free = bootstrap_interval(values, patients, seed=3)
    assert free == bootstrap_interval(values, patients, seed=3)
    assert free.high > 1
    assert bootstrap_interval(values, patients, seed=3, bounds=(0, 1)).high == 1


def test_frames_of_one_patient_do_not_shrink_the_interval():
    means = [0.6, 0.7, 0.75, 0.8]
    names = [f"P{i}" for i in range(4)]
    once = bootstrap_interval(means, names)
    often = bootstrap_interval(np.repeat(means, 30), list(np.repeat(names, 30)))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


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
def test_coverage_table_of_the_module_docstring(num_patients, plain, stretched):
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


def test_pairing_removes_the_spread_between_patients():
    values = np.linspace(0.2, 0.9, 12)
    gains = np.tile([0.01, 0.02, 0.03], 4)
    patients = [f"P{i:03d}" for i in range(12)]
    paired = paired_difference(rows(values, patients), rows(values + gains, patients), "dice")
    alone = bootstrap_interval(values, patients)
    assert paired.clear
    assert alone.high - alone.low > 20 * (paired.high - paired.low)


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
