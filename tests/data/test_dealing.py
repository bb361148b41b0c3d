"""How patients come to the sides of a split and of folds, through `split_by_patient`."""

import random
from collections import Counter

import pytest

from tests.data.made_samples import make_samples, patients_of, sides, uneven_sizes
from vesselrl.data.splits import split_by_patient
from vesselrl.errors import DataError


@pytest.mark.parametrize("stratified", [False, True])
def test_a_patient_on_two_sides_is_impossible(stratified):
    """200 seeds on data of 3 to 40 patients, whole and as every fold of several k."""
    for seed in range(200):
        samples = make_samples(uneven_sizes(seed), num_sequences=2)
        everybody = patients_of(samples)
        generator = random.Random(seed)
        shares = {s.key: generator.random() for s in samples} if stratified and seed % 10 == 0 else None
        if stratified and shares is None:
            continue
        k = generator.randint(2 if len(everybody) > 3 else 3, min(6, len(everybody)))
        splits = [split_by_patient(samples, seed, shares=shares)]
        splits += [split_by_patient(samples, seed, shares=shares, fold=(i, k)) for i in range(1, k + 1)]
        for split in splits:
            patients = [patients_of(side) for side in sides(split)]
            assert all(patients)
            assert sum(map(len, patients)) == len(set.union(*patients)) == len(everybody)
            assert Counter(s.key for side in sides(split) for s in side) == Counter(s.key for s in samples)
            assert not split.is_leaky
        tested = Counter(patient for split in splits[1:] for patient in patients_of(split.test))
        assert tested == Counter(everybody)


def test_folds_have_about_equal_sizes_and_validation_keeps_its_proportion():
    for k in (2, 5, 10):
        splits = [split_by_patient(make_samples([5] * 20), fold=(i, k)) for i in range(1, k + 1)]
        assert {len(split.test) for split in splits} == {100 // k}
        assert all(abs(len(split.val) - (100 - 100 // k) / 9) <= 2.5 for split in splits)
    for seed in range(50):
        sizes = uneven_sizes(seed)
        k = min(5, len(sizes))
        counts = [len(split_by_patient(make_samples(sizes), seed, fold=(i, k)).test) for i in range(1, k + 1)]
        assert max(counts) - min(counts) <= max(sizes)


def test_folds_follow_the_seed():
    samples = make_samples([3] * 20)
    assert split_by_patient(samples, fold=(1, 5)) == split_by_patient(samples[::-1], fold=(1, 5))
    assert len({tuple(split_by_patient(samples, s, fold=(1, 5)).patients("test")) for s in range(9)}) > 5


@pytest.mark.parametrize("fold", [(0, 5), (6, 5), (1, 1), (1,), (2, 0)])
def test_folds_that_mean_nothing(fold):
    with pytest.raises(ValueError, match="Give i/k with k from 2 and i from 1 to k"):
        split_by_patient(make_samples([1] * 9), fold=fold)


def test_too_few_patients_for_the_folds():
    with pytest.raises(DataError, match=r"The data has 4 patients, too few for 5 folds. Ask for 4 folds"):
        split_by_patient(make_samples([9] * 4), fold=(1, 5))
    with pytest.raises(DataError, match="The data has 3 patients, too few for 2 folds"):
        split_by_patient(make_samples([9] * 3), fold=(1, 2))
    assert split_by_patient(make_samples([9] * 3), fold=(3, 3)).val
    for fold in ((1, 2), (2, 2)):  # one huge patient must not be alone with the model
        assert all(sides(split_by_patient(make_samples([99, 1, 1, 1]), fold=fold)))


def foreground_gap(split, shares):
    overall = sum(shares.values()) / len(shares)
    return max(abs(sum(shares[s.key] for s in side) / len(side) - overall) for side in sides(split))


@pytest.mark.parametrize("fold", [None, (2, 4)])
def test_stratified_sides_have_more_equal_foreground(fold):
    """The share is a matter of the patient: thin trees have 2 %, thick ones 12 %."""
    before, after = [], []
    for seed in range(20):
        generator = random.Random(seed)
        samples = make_samples([generator.randint(5, 20) for _ in range(36)])
        of_patient = {patient: generator.uniform(0.02, 0.12) for patient in sorted(patients_of(samples))}
        shares = {s.key: of_patient[s.patient] for s in samples}
        before.append(foreground_gap(split_by_patient(samples, seed, fold=fold), shares))
        split = split_by_patient(samples, seed, shares=shares, fold=fold)
        after.append(foreground_gap(split, shares))
        if fold is None:
            assert abs(len(split.test) / len(samples) - 0.1) < 0.04
        assert max(abs(m - sum(shares.values()) / len(shares)) for m in split.foreground) == pytest.approx(
            after[-1]
        )
    assert max(after) < 0.015
    assert sum(after) < 0.5 * sum(before)


def test_shares_must_be_complete():
    samples = make_samples([2, 2, 2])
    with pytest.raises(ValueError, match=r"shares lacks 1 of 6 samples, such as P003_S1_F0001"):
        split_by_patient(samples, shares={sample.key: 0.1 for sample in samples[:-1]})
