"""Patient-level statistics: means over patients, bootstrap intervals, paired differences.

The patient is the unit: means over patients of per-patient means, and a bootstrap of whole patients. Its
percentile interval is too narrow with few patients (of nominal 95 %, 75 % hold the mean of 3), so it is
stretched; then 93 to 96 % hold it (very skewed data: 88 to 91 %).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import ndtri, stdtrit

MIN_PATIENTS = 3
DRAWS = 2000
SIGNIFICANT = 0.05
Rows = Sequence[Mapping]  # with `key`, `patient` and metrics


@dataclass(frozen=True)
class Interval:
    """A mean over patients with its bootstrap interval; `low`, `high` are nan where `reason` forbids one."""

    mean: float
    low: float
    high: float
    n_images: int
    n_patients: int
    n_undefined: int = 0  # images left out because their value is nan (recall without any true vessel)
    reason: str = ""
    resampled: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Difference(Interval):
    """The paired difference after - before of one metric, with its two-sided p value, not adjusted."""

    p: float = math.nan

    @property
    def clear(self) -> bool:
        """True if a usable interval excludes zero: only then may a change be claimed."""
        return not self.reason and (self.low > 0 or self.high < 0)


def patient_means(values: Sequence[float], patients: Sequence[str]) -> dict[str, float]:
    """Mean of each patient's defined values, by sorted names; without any (all nan) a patient is left out.

    >>> patient_means([0.5, 0.7, 0.9], ["P001", "P001", "P002"])
    {'P001': 0.6, 'P002': 0.9}
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (len(patients),):
        lengths = f"{numbers.shape} values and {len(patients)} patients"
        raise ValueError(f"Got {lengths}. Give lists of one length, a patient for every value.")
    if np.isinf(numbers).any():
        raise ValueError(f"Value {np.isinf(numbers).argmax()} is infinite. Use nan for an undefined value.")
    groups: dict[str, list[float]] = {}
    for patient, number in zip(patients, numbers, strict=True):
        if not math.isnan(number):
            groups.setdefault(patient, []).append(float(number))
    return {patient: float(np.mean(groups[patient])) for patient in sorted(groups)}


def patient_mean(values: Sequence[float], patients: Sequence[str]) -> float:
    """Mean over patients of their means; nan without any."""
    means = list(patient_means(values, patients).values())
    return float(np.mean(means)) if means else math.nan


def bootstrap_interval(
    values: Sequence[float],
    patients: Sequence[str],
    n: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Mean over patients of per-patient means, with its stretched patient-cluster bootstrap interval.

    One value and one patient per image; nan is left out and counted. The interval is cut to `bounds`.
    """
    if n < 100 or not 0 < level < 1:
        raise ValueError(f"Bootstrap needs n >= 100 and 0 < level < 1: got n={n}, level={level}.")
    means = np.array(list(patient_means(values, patients).values()))
    num_patients = len(means)
    num_undefined = int(np.isnan(np.asarray(values, dtype=np.float64)).sum())
    counted = (len(patients) - num_undefined, num_patients, num_undefined)
    mean = float(means.mean()) if num_patients else math.nan
    if num_patients < MIN_PATIENTS:
        found = f"only {num_patients} patient{'' if num_patients == 1 else 's'}"
        reason = f"{found}: an interval needs at least {MIN_PATIENTS}"
        return Interval(mean, math.nan, math.nan, *counted, reason)
    if np.ptp(means) == 0:
        reason = "every patient has the same value: no spread to judge by"
        return Interval(mean, mean, mean, *counted, reason)
    chosen = np.random.default_rng(seed).integers(0, num_patients, (n, num_patients))
    resampled = means[chosen].mean(axis=1)
    limits = _stretched_limits(resampled, mean, num_patients, level)
    low, high = (float(limit) for limit in np.clip(limits, *bounds))
    return Interval(mean, low, high, *counted, resampled=resampled)


def _stretched_limits(resampled: np.ndarray, mean: float, num_patients: int, level: float) -> tuple:
    stretch = small_sample_stretch(num_patients, level)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return mean + stretch * (low - mean), mean + stretch * (high - mean)


def small_sample_stretch(num_patients: int, level: float = 0.95) -> float:
    """Factor that widens a percentile bootstrap of m patients, t(m-1) / z * sqrt(m / (m-1)); tends to 1.

    t and z are the Student and normal quantiles. Unlike the bootstrap-t, 3 patients give a finite interval.

    >>> round(small_sample_stretch(20), 3)
    1.096
    """
    student = stdtrit(num_patients - 1, (1 + level) / 2)
    return float(student / ndtri((1 + level) / 2) * math.sqrt(num_patients / (num_patients - 1)))


def _p_value(resampled: np.ndarray, mean: float, num_patients: int) -> float:
    """The smallest alpha, to 1e-6, whose interval of level 1 - alpha excludes zero; >= 1 / (n + 1)."""
    ordered = np.sort(resampled)

    def excludes_zero(alpha: float) -> bool:
        low, high = _stretched_limits(ordered, mean, num_patients, 1 - alpha)
        return low > 0 or high < 0

    inside, outside = 1 / (len(ordered) + 1), 1.0
    if excludes_zero(inside):
        return inside
    while outside - inside > 1e-6:
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if excludes_zero(middle) else (middle, outside)
    return outside


def paired_difference(
    before_rows: Rows, after_rows: Rows, metric: str, n: int = DRAWS, seed: int = 0, level: float = 0.95
) -> Difference:
    """Mean over patients of after - before on the same images, with its patient-cluster bootstrap interval.

    Rows of the same images are paired by `key`; one undefined in either is left out and counted.
    """
    patients, before, after = _paired(before_rows, after_rows, metric)
    interval = bootstrap_interval(after - before, patients, n, seed, level)
    usable = interval.resampled is not None
    p = _p_value(interval.resampled, interval.mean, interval.n_patients) if usable else math.nan
    return Difference(**vars(interval), p=p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: rejecting those below 0.05 errs at all in at most 5 % of the families.

    The k-th smallest of m is multiplied by m - k + 1, raised to the one before it where it is lower, and cut
    to 1. nan (no test) stays nan and is not counted in m.
    """
    adjusted = np.array(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(adjusted))
    order = tested[np.argsort(adjusted[tested], kind="stable")]
    steps = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def key_difference(first: Mapping, second: Mapping, first_name: str, second_name: str) -> str:
    """Says which keys only one of two sets has; names at most 5 of each."""
    parts = []
    for name, only in ((first_name, first.keys() - second), (second_name, second.keys() - first)):
        if only:
            listed = ", ".join(sorted(only)[:5]) + (", ..." if len(only) > 5 else "")
            parts.append(f"{len(only)} only in {name} ({listed})")
    return " and ".join(parts)


def check_unique(keys: Sequence[str]) -> None:
    """Raises ValueError, naming the key, if an image occurs more than once."""
    for key, number in Counter(keys).items():
        if number > 1:
            raise ValueError(f"Image {key} occurs twice among {len(keys)} images. Evaluate each image once.")


def _paired(before_rows: Rows, after_rows: Rows, metric: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Patient, value before and value after of every image, in the order of the keys."""
    for rows in (before_rows, after_rows):
        check_unique([row["key"] for row in rows])
        if missing := [row["key"] for row in rows if metric not in row]:
            raise ValueError(f"Image {missing[0]} has no '{metric}'. Evaluate both with one version.")
    before, after = ({row["key"]: row for row in rows} for rows in (before_rows, after_rows))
    if before.keys() != after.keys():
        found = key_difference(before, after, "before", "after")
        raise ValueError(f"The evaluations hold different images: {found}. Evaluate both on one split.")
    patients = {key: (row["patient"], after[key]["patient"]) for key, row in sorted(before.items())}
    for key, (first, last) in patients.items():
        if first != last:
            raise ValueError(f"Image {key} belongs to {first} before and {last} after.")
    values = [np.array([table[key][metric] for key in patients], np.float64) for table in (before, after)]
    return [first for first, _ in patients.values()], *values
