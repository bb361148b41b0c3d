"""Patient-level statistics: means over patients, bootstrap intervals, paired differences.

The patient is the unit: means over patients of per-patient means, and a bootstrap of whole patients. Its
percentile interval is too narrow with few patients (of nominal 95 %, 75 % hold the mean of 3), so it is
stretched; then 93 to 96 % hold it (very skewed data: 88 to 91 %).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import ndtri, stdtrit

MIN_PATIENTS = 3
DRAWS = 2000
SIGNIFICANT = 0.05
LEVEL = 1 - SIGNIFICANT


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
    p: float = math.nan  # two-sided and not adjusted, of a difference
    resampled: np.ndarray | None = field(default=None, repr=False, compare=False)

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
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Mean over patients of per-patient means, with its stretched patient-cluster bootstrap interval.

    One value and one patient per image; nan is left out and counted. The interval is cut to `bounds`.
    """
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
    limits = _stretched_limits(resampled, mean, num_patients)
    low, high = (float(limit) for limit in np.clip(limits, *bounds))
    return Interval(mean, low, high, *counted, resampled=resampled)


def _stretched_limits(
    resampled: np.ndarray, mean: float, num_patients: int, level: float = LEVEL
) -> tuple[float, float]:
    stretch = small_sample_stretch(num_patients, level)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return mean + stretch * (low - mean), mean + stretch * (high - mean)


def small_sample_stretch(num_patients: int, level: float = LEVEL) -> float:
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
    before: np.ndarray, after: np.ndarray, patients: Sequence[str], n: int = DRAWS, seed: int = 0
) -> Interval:
    """Mean over patients of after - before on the same images, with its interval and p value.

    An image whose value is undefined in either is left out and counted.
    """
    found = bootstrap_interval(after - before, patients, n, seed)
    if found.resampled is None:
        return found
    return replace(found, p=_p_value(found.resampled, found.mean, found.n_patients))


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


def check_unique(keys: Sequence[str]) -> None:
    """Raises ValueError, naming the key, if an image occurs more than once."""
    for key, number in Counter(keys).items():
        if number > 1:
            raise ValueError(f"Image {key} occurs twice among {len(keys)} images. Evaluate each image once.")
