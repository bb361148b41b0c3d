"""Patient-level statistics: means over patients, bootstrap intervals, paired differences.

Frames of one patient resemble each other, so the patient, not the frame, is the unit of every number here:
the headline is the mean over patients of per-patient means, and the bootstrap draws whole patients with
replacement.

The interval is the percentile bootstrap with a small-sample stretch. The plain percentile interval is too
narrow with few patients (it cannot leave the range of the patient means, and resampling m of m loses a
factor sqrt((m-1)/m)). We multiply both of its deviations from the mean by

    c(m) = t(m-1) / z * sqrt(m / (m-1))        (2.69 for 3 patients, 1.29 for 8, 1.10 for 20, 1.05 for 40)

with the Student and normal quantiles t and z of the level. The interval keeps the skew of the data and,
unlike the bootstrap-t, stays finite for 3 and 4 patients. Share of nominal 95 % intervals that held the
true mean, 1500 simulated studies each (normal / Beta(8,2), skewed as Dice is / Student t with 3 degrees of
freedom, heavy tails):

    patients   plain percentile      BCa                   bootstrap-t           stretched (used here)
    3          75.1 / 72.4 / 74.7    72.9 / 70.3 / 71.3    infinitely wide       94.5 / 93.1 / 95.7
    5          83.9 / 82.7 / 82.9    83.5 / 83.4 / 81.1    94.5 / 94.7 / 94.1    94.9 / 93.4 / 95.1
    10         90.1 / 89.3 / 88.6    90.2 / 90.0 / 85.5    94.4 / 94.9 / 92.7    94.5 / 93.3 / 94.1
    20         92.7 / 92.2 / 92.1    92.9 / 92.7 / 89.7    94.3 / 94.7 / 92.5    94.6 / 93.8 / 94.6

Very skewed data (an exponential) still reach only 88 to 91 % up to 20 patients.

The p value of a paired difference is that interval turned round: the smallest alpha whose interval of level
1 - alpha leaves out zero. So p < 0.05 says what "zero lies outside the 95 % interval" says. With n draws it
is never below 1 / (n + 1). Where several runs are looked at, `holm` adjusts their p values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

MIN_PATIENTS = 3
DRAWS = 2000
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Interval:
    """A mean over patients with its bootstrap interval; `low` and `high` are nan when `reason` forbids one.

    `n_images` and `n_patients` count what entered the mean, `n_undefined` the images left out because their
    value is nan (recall without any true vessel). `reason` is empty when the interval can be used.
    """

    mean: float
    low: float
    high: float
    n_images: int
    n_patients: int
    n_undefined: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Difference(Interval):
    """The paired difference after - before of one metric.

    `p` is two-sided, against no difference, not adjusted for other comparisons; nan without an interval.
    """

    metric: str = ""
    p: float = math.nan

    @property
    def clear(self) -> bool:
        """True if a usable interval lies wholly on one side of zero: only then may a change be claimed."""
        return not self.reason and (self.low > 0 or self.high < 0)


def patient_means(values: Sequence[float], patients: Sequence[str]) -> dict[str, float]:
    """Mean value of each patient, in the order of the patients' names.

    Undefined values (nan) are left out; a patient without any defined value is left out too.

    Raises:
        ValueError: the lengths differ, or a value is infinite.

    >>> patient_means([0.5, 0.7, 0.9], ["P001", "P001", "P002"])
    {'P001': 0.6, 'P002': 0.9}
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (len(patients),):
        raise ValueError(
            f"Values and patients must be lists of one length: got {numbers.shape} values and "
            f"{len(patients)} patients. Pass one patient name per value."
        )
    if np.isinf(numbers).any():
        raise ValueError(
            f"Value {int(np.flatnonzero(np.isinf(numbers))[0])} is infinite. Use nan for an undefined value; "
            "it is then left out and counted."
        )
    groups: dict[str, list[float]] = {}
    for patient, number in zip(patients, numbers, strict=True):
        if not math.isnan(number):
            groups.setdefault(patient, []).append(float(number))
    return {patient: float(np.mean(groups[patient])) for patient in sorted(groups)}


def bootstrap_interval(
    values: Sequence[float],
    patients: Sequence[str],
    n: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Mean over patients of per-patient means, with its patient-cluster bootstrap interval.

    Stretched percentile bootstrap; the method and its measured coverage are in the module docstring.

    Args:
        values: one number per image; nan is left out and counted.
        patients: one patient name per image.
        n: number of bootstrap draws, at least 100.
        seed: the same seed gives the same interval.
        level: share of intervals meant to hold the true mean, in (0, 1).
        bounds: possible range of the mean, e.g. (0, 1) for Dice; the interval is cut to it.

    Returns:
        Interval; with fewer than 3 patients, or no spread between them, `reason` says why it cannot be used
        (with fewer than 3 patients low and high are nan).

    Raises:
        ValueError: lengths differ, a value is infinite, or `n` or `level` is out of range.

    >>> interval = bootstrap_interval([0.6, 0.7, 0.8, 0.9], ["P001", "P002", "P003", "P004"])
    >>> round(interval.mean, 2), interval.low < 0.75 < interval.high
    (0.75, True)
    >>> bootstrap_interval([0.6, 0.7], ["P001", "P001"]).reason
    'only 1 patient: an interval needs at least 3'
    """
    return _bootstrap(values, patients, n, seed, level, bounds)[0]


def _bootstrap(
    values: Sequence[float],
    patients: Sequence[str],
    n: int,
    seed: int,
    level: float,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[Interval, np.ndarray | None]:
    """The interval and the n resampled means that it comes from; None where `reason` forbids one."""
    if n < 100 or not 0 < level < 1:
        raise ValueError(f"Bootstrap needs n >= 100 and 0 < level < 1: got n={n}, level={level}.")
    means = np.array(list(patient_means(values, patients).values()))
    num_patients = len(means)
    num_undefined = int(np.isnan(np.asarray(values, dtype=np.float64)).sum())
    counted = {
        "n_images": len(patients) - num_undefined,
        "n_patients": num_patients,
        "n_undefined": num_undefined,
    }
    mean = float(means.mean()) if num_patients else math.nan
    if num_patients < MIN_PATIENTS:
        reason = f"only {count_patients(num_patients)}: an interval needs at least {MIN_PATIENTS}"
        return Interval(mean, math.nan, math.nan, **counted, reason=reason), None
    if np.ptp(means) == 0:
        reason = "every patient has the same value: no spread to judge by"
        return Interval(mean, mean, mean, **counted, reason=reason), None

    chosen = np.random.default_rng(seed).integers(0, num_patients, (n, num_patients))
    resampled = means[chosen].mean(axis=1)
    limits = _stretched_limits(resampled, mean, num_patients, level)
    low, high = (float(limit) for limit in np.clip(limits, *bounds))
    return Interval(mean, low, high, **counted), resampled


def _stretched_limits(
    resampled: np.ndarray, mean: float, num_patients: int, level: float
) -> tuple[float, float]:
    """Both ends of the interval of one level; those of a higher level lie further out."""
    stretch = small_sample_stretch(num_patients, level)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return mean + stretch * (low - mean), mean + stretch * (high - mean)


def _p_value(resampled: np.ndarray, mean: float, num_patients: int) -> float:
    """The smallest alpha, to 1e-6, whose interval of level 1 - alpha leaves out zero; >= 1 / (n + 1)."""
    ordered = np.sort(resampled)

    def leaves_out_zero(alpha: float) -> bool:
        low, high = _stretched_limits(ordered, mean, num_patients, 1 - alpha)
        return low > 0 or high < 0

    inside, outside = 1 / (len(ordered) + 1), 1.0
    if leaves_out_zero(inside):
        return inside
    while outside - inside > 1e-6:
        middle = (inside + outside) / 2
        if leaves_out_zero(middle):
            outside = middle
        else:
            inside = middle
    return outside


def paired_difference(
    before_rows: Sequence[Mapping],
    after_rows: Sequence[Mapping],
    metric: str,
    n: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Mean over patients of after - before on the same images, with its patient-cluster bootstrap interval.

    Rows are paired by their `key`; an image undefined (nan) on either side is left out and counted.

    Args:
        before_rows: one mapping per image with `key`, `patient` and the metric; nan or None is undefined.
        after_rows: the same images after the change, in any order.
        metric: name of the column.
        n: number of bootstrap draws.
        seed: the same seed gives the same interval.
        level: share of intervals meant to hold the true difference.

    Raises:
        ValueError: the two sets of images differ (the message names the keys), a key occurs twice, an image
            belongs to two patients, or the metric is missing.

    >>> before = [{"key": f"P{i}_F1", "patient": f"P{i}", "dice": 0.7} for i in range(4)]
    >>> after = [{**row, "dice": 0.72 + 0.01 * i} for i, row in enumerate(before)]
    >>> paired_difference(before, after, "dice").clear
    True
    """
    patients, before, after = _paired(before_rows, after_rows, metric)
    interval, resampled = _bootstrap(after - before, patients, n, seed, level)
    p = math.nan if resampled is None else _p_value(resampled, interval.mean, interval.n_patients)
    return Difference(**vars(interval), metric=metric, p=p)


def relative_difference(
    before_rows: Sequence[Mapping], after_rows: Sequence[Mapping], metric: str, n: int = DRAWS, seed: int = 0
) -> Difference:
    """Relative change of the mean over patients, mean(after) / mean(before) - 1, with its 95 % interval.

    Rows are paired as in `paired_difference`, and every draw takes the same patients on both sides. -0.2 is
    a fifth less. Without an interval, or where a mean before is 0, `reason` says why.

    >>> before = [{"key": f"P{i}", "patient": f"P{i}", "beta0_error": 10.0 + i} for i in range(4)]
    >>> after = [{**row, "beta0_error": row["beta0_error"] / 2} for row in before]
    >>> relative_difference(before, after, "beta0_error").mean
    -0.5
    """
    patients, before, after = _paired(before_rows, after_rows, metric)
    undefined = np.isnan(before) | np.isnan(after)
    sides = [patient_means(np.where(undefined, math.nan, side), patients) for side in (before, after)]
    first, last = (np.array(list(side.values())) for side in sides)
    num_patients = len(first)
    counted = {"n_images": len(patients) - int(undefined.sum()), "n_patients": num_patients,
               "n_undefined": int(undefined.sum()), "metric": metric}  # fmt: skip
    ratio = last.mean() / first.mean() - 1 if num_patients and first.mean() > 0 else math.nan
    chosen = np.random.default_rng(seed).integers(0, max(num_patients, 1), (n, num_patients))
    reason = ""
    if num_patients < MIN_PATIENTS:
        reason = f"only {count_patients(num_patients)}: an interval needs at least {MIN_PATIENTS}"
    elif not (first[chosen].mean(axis=1) > 0).all():
        reason = "the mean before can be 0: there is no relative change"
    if reason:
        return Difference(float(ratio), math.nan, math.nan, **counted, reason=reason)
    resampled = last[chosen].mean(axis=1) / first[chosen].mean(axis=1) - 1
    low, high = _stretched_limits(resampled, ratio, num_patients, 0.95)
    p = _p_value(resampled, ratio, num_patients)
    return Difference(float(ratio), max(float(low), -1.0), float(high), **counted, p=p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: calling those below 0.05 errs at all in at most 5 % of the families.

    The k-th smallest of m is multiplied by m - k + 1, then raised to the one before it where it is lower, and
    cut to 1. nan (no test was possible) stays nan and is not counted in m.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted = np.array(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(adjusted))
    order = tested[np.argsort(adjusted[tested], kind="stable")]
    steps = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def rank_intervals(
    values: Sequence[Sequence[float]],
    patients: Sequence[str],
    n: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> list[tuple[int, int]]:
    """Lowest and highest rank that each run can have on these patients; rank 1 is the highest mean.

    The same resampled patients serve all runs, their means are stretched as for an interval and ranked in
    every draw; the range holds `level` of the ranks. Runs that tie in a draw share all ranks they cover. With
    fewer than 3 patients nothing is known: 1 to the number of runs.

    Args:
        values: per run one number per image, in one order of the images; an image that is nan for any run is
            left out for all.
        patients: one patient name per image.
        n: number of bootstrap draws.
        seed: the same seed gives the same ranges.
        level: share of the ranks that a range holds.

    >>> rank_intervals([[0.9, 0.8, 0.9, 0.8], [0.5, 0.6, 0.5, 0.4]], ["P001", "P002", "P003", "P004"])
    [(1, 1), (2, 2)]
    """
    table = np.array(values, dtype=np.float64)
    table[:, np.isnan(table).any(axis=0)] = math.nan
    means = np.array([list(patient_means(run, patients).values()) for run in table])
    num_runs, num_patients = means.shape
    if num_patients < MIN_PATIENTS:
        return [(1, num_runs)] * num_runs
    chosen = np.random.default_rng(seed).integers(0, num_patients, (n, num_patients))
    centre = means.mean(axis=1, keepdims=True)
    drawn = centre + small_sample_stretch(num_patients, level) * (means[:, chosen].mean(axis=2) - centre)
    ranges = []
    for run in drawn:
        best = 1 + (drawn > run).sum(axis=0)
        worst = (drawn >= run).sum(axis=0)
        low = np.quantile(best, (1 - level) / 2, method="lower")
        high = np.quantile(worst, (1 + level) / 2, method="higher")
        ranges.append((int(low), int(high)))
    return ranges


def key_difference(first: Mapping, second: Mapping, first_name: str, second_name: str, show: int = 5) -> str:
    """Words for which keys only one of two sets has; names at most `show` keys on each side.

    >>> key_difference({"a": 1, "b": 2}, {"b": 2}, "before", "after")
    '1 only in before (a)'
    """
    parts = []
    for name, only in (
        (first_name, first.keys() - second.keys()),
        (second_name, second.keys() - first.keys()),
    ):
        if only:
            listed = ", ".join(sorted(only)[:show]) + (", ..." if len(only) > show else "")
            parts.append(f"{len(only)} only in {name} ({listed})")
    return " and ".join(parts)


def small_sample_stretch(num_patients: int, level: float = 0.95) -> float:
    """Factor that widens a percentile bootstrap of m patients, t(m-1) / z * sqrt(m / (m-1)); tends to 1.

    >>> round(small_sample_stretch(20), 3)
    1.096
    """
    student = stdtrit(num_patients - 1, (1 + level) / 2)
    return float(student / ndtri((1 + level) / 2) * math.sqrt(num_patients / (num_patients - 1)))


def count_patients(number: int) -> str:
    """`1 patient`, `2 patients`."""
    return f"{number} patient{'' if number == 1 else 's'}"


def _paired(
    before_rows: Sequence[Mapping], after_rows: Sequence[Mapping], metric: str
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Patient, value before and value after of every image, in the order of the keys."""
    before, after = _by_key(before_rows, metric, "before"), _by_key(after_rows, metric, "after")
    if before.keys() != after.keys():
        raise ValueError(
            f"The two evaluations hold different images: {key_difference(before, after, 'before', 'after')}. "
            "Evaluate both on the same split."
        )
    moved = [key for key in before if before[key][0] != after[key][0]]
    if moved:
        raise ValueError(
            f"Image {moved[0]} belongs to {before[moved[0]][0]} before and {after[moved[0]][0]} after."
        )
    keys = sorted(before)
    values = [np.array([side[key][1] for key in keys]) for side in (before, after)]
    return [before[key][0] for key in keys], *values


def _by_key(rows: Sequence[Mapping], metric: str, name: str) -> dict[str, tuple[str, float]]:
    """Rows as key -> (patient, value)."""
    found: dict[str, tuple[str, float]] = {}
    for row in rows:
        key = row["key"]
        if key in found:
            raise ValueError(f"Image {key} occurs twice in the {name} rows. Keep one row per image.")
        if metric not in row:
            known = ", ".join(sorted(row))
            raise ValueError(f"Image {key} has no '{metric}' in the {name} rows. Its columns are: {known}.")
        value = math.nan if row[metric] is None else float(row[metric])
        found[key] = (row["patient"], value)
    return found
