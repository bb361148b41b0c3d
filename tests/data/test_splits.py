"""Splits: no patient in two subsets, sizes and foreground as asked for, and files that are read back."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vesselrl.data.samples import Sample
from vesselrl.data.splits import read_split, split_by_patient, take, write_split
from vesselrl.errors import DataError


def make_samples(sizes, num_sequences=1):
    """Samples without files: sizes[i] frames of patient i + 1, over its sequences in turn."""
    samples = []
    for patient, size in enumerate(sizes, start=1):
        for frame in range(size):
            sequence = f"P{patient:03d}_S{frame % num_sequences + 1}"
            key = f"{sequence}_F{frame:04d}"
            path = Path(f"/data/images/LI_MING_{patient}_{frame}.png")
            samples.append(Sample(path, None, (), key, key, f"P{patient:03d}", sequence, f"F{frame:04d}"))
    return samples


def sides(split):
    return split.train, split.val, split.test


def patients_of(side):
    return {sample.patient for sample in side}


def uneven_sizes(seed):
    """Numbers of frames of 3 to 40 patients."""
    generator = random.Random(seed)
    return [generator.randint(1, 60) for _ in range(generator.randint(3, 40))]


def sizes_of(split):
    return [len(subset) for subset in sides(split)]


@pytest.mark.parametrize("stratified", [False, True])
def test_a_patient_in_two_subsets_is_impossible(stratified):
    """Data of 3 to 40 patients, whole and as every fold of several k."""
    for seed in range(0, 200, 20):
        samples = make_samples(uneven_sizes(seed), num_sequences=2)
        everybody = patients_of(samples)
        generator = random.Random(seed)
        shares = {s.key: generator.random() for s in samples} if stratified else None
        k = generator.randint(2 if len(everybody) > 3 else 3, min(6, len(everybody)))
        splits = [split_by_patient(samples, seed, shares=shares)]
        splits += [split_by_patient(samples, seed, shares=shares, fold=(i, k)) for i in range(1, k + 1)]
        for split in splits:
            patients = [patients_of(subset) for subset in sides(split)]
            assert all(patients)
            assert sum(map(len, patients)) == len(set.union(*patients)) == len(everybody)
            assert sorted(s.key for subset in sides(split) for s in subset) == sorted(s.key for s in samples)
            assert not split.is_leaky
        tested = Counter(patient for split in splits[1:] for patient in patients_of(split.test))
        assert tested == Counter(everybody)


def test_a_split_by_frame_warns_and_is_written_with_its_mark_alone(tmp_path, caplog):
    samples = make_samples([20] * 10)
    split = split_by_patient(samples, unit="frame")
    assert "LEAKY" in caplog.text
    assert sizes_of(split) == [160, 20, 20]
    assert patients_of(split.train) & patients_of(split.test)
    mixed = replace(split, unit="patient")
    shared = "8 patients are in two subsets of the split, train and val: P001, P002"
    with pytest.raises(DataError, match=shared):
        write_split(tmp_path / "split.json", mixed)
    assert list(tmp_path.iterdir()) == []
    write_split(tmp_path / "split.json", split)
    content = json.loads((tmp_path / "split.json").read_text())
    assert (content["unit"], content["leaky"], content["mark"][:5]) == ("frame", True, "LEAKY")
    assert content["shared_patients"]["train_test"]
    assert read_split(tmp_path / "split.json", samples) == split


def test_sizes_follow_the_ratios_where_patients_allow_it():
    for sizes, ratios, expected in (
        ([10] * 10, (0.8, 0.1, 0.1), [80, 10, 10]),
        ([1] * 1000, (0.8, 0.1, 0.1), [800, 100, 100]),
        ([5] * 20, (0.5, 0.25, 0.25), [50, 25, 25]),
        ([40, 40, 40], (0.8, 0.1, 0.1), [40, 40, 40]),
        ([10, 100, 10], (0.8, 0.1, 0.1), [100, 10, 10]),  # a huge patient is for training
    ):
        for seed in range(5):
            assert sizes_of(split_by_patient(make_samples(sizes), seed, ratios)) == expected
    for k in (2, 5, 10):
        splits = [split_by_patient(make_samples([5] * 20), fold=(i, k)) for i in range(1, k + 1)]
        assert {len(split.test) for split in splits} == {100 // k}
        assert all(abs(len(split.val) - (100 - 100 // k) / 9) <= 2.5 for split in splits)
    for fold in ((1, 2), (2, 2)):  # a huge patient is not alone with the model
        assert all(sides(split_by_patient(make_samples([99, 1, 1, 1]), fold=fold)))


def test_too_few_patients():
    for sizes, options, message in (
        ([4, 5], {}, r"The data has 2 patients \(9 images\)"),
        ([9] * 4, {"fold": (1, 5)}, "The data has 4 patients, too few for 5 folds. Ask for 4 folds"),
        ([9] * 3, {"fold": (1, 2)}, "The data has 3 patients, too few for 2 folds"),
        ([1, 1], {"unit": "frame"}, "The data has 2 images"),
    ):
        with pytest.raises(DataError, match=message):
            split_by_patient(make_samples(sizes), **options)


@pytest.mark.parametrize("fold", [None, (2, 4)])
def test_stratified_subsets_have_more_equal_foreground(fold):
    """The share is a matter of the patient: thin trees have 2 %, thick ones 12 %."""

    def means(split):
        return [np.mean([shares[s.key] for s in subset]) for subset in sides(split)]

    before, after = [], []
    for seed in range(10):
        generator = random.Random(seed)
        samples = make_samples([generator.randint(5, 20) for _ in range(36)])
        of_patient = {patient: generator.uniform(0.02, 0.12) for patient in sorted(patients_of(samples))}
        shares = {s.key: of_patient[s.patient] for s in samples}
        plain, split = (split_by_patient(samples, seed, shares=own, fold=fold) for own in (None, shares))
        overall = np.mean(list(shares.values()))
        before.append(np.abs(means(plain) - overall).max())
        after.append(np.abs(means(split) - overall).max())
        assert split.foreground == pytest.approx(means(split))
        assert fold or abs(len(split.test) / len(samples) - 0.1) < 0.04
    assert max(after) < 0.015
    assert sum(after) < 0.5 * sum(before)


@pytest.mark.parametrize("options", [{}, {"fold": (1, 3)}, {"unit": "frame"}])
@pytest.mark.parametrize("name", ["LI_MING_{}_{}.png", "p{}/{:03d}.png"])
def test_neither_order_nor_folder_nor_numbers_of_pseudonyms_decide(name, options):
    def subsets_of(order, root):
        samples = []
        for sample in make_samples([1 + patient % 3 for patient in order]):
            patient, frame = order[int(sample.patient[1:]) - 1], int(sample.frame[1:])
            samples.append(replace(sample, image_path=Path(root) / name.format(patient, frame)))
        subsets = (*sides(split_by_patient(samples, 5, **options)), take(samples, 9))
        return [[s.image_path.relative_to(root) for s in subset] for subset in subsets]

    order = list(range(20))
    assert subsets_of(order, "/data") == subsets_of(random.Random(1).sample(order, 20), "/mnt/other/data")


@pytest.mark.parametrize("fold", [None, (1, 3)])
def test_the_seed_decides(fold):
    samples = make_samples([3] * 20)
    assert len({tuple(split_by_patient(samples, seed, fold=fold).patients("test")) for seed in range(9)}) > 5


def test_reading_a_split_back(tmp_path):
    path = tmp_path / "split.json"
    samples = make_samples([10] * 10)
    split = split_by_patient(samples, seed=11, ratios=(0.6, 0.2, 0.2), fold=(1, 3))
    split = replace(split, caveats=("NEAR DUPLICATES: two look alike.",))
    write_split(path, split)
    assert "MING" not in path.read_text()
    assert read_split(path, random.Random(0).sample(samples, len(samples))) == split
    # The folder may move, and samples may be added.
    moved = [replace(s, image_path=Path("/elsewhere") / s.image_path.name) for s in samples]
    added = replace(samples[0], key="P099_S1_F0001", patient="P099")
    assert sizes_of(read_split(path, [*moved, added])) == sizes_of(split)
    with pytest.raises(DataError, match=r"lists 10 samples .* have: P003(_\w+, P003){4}_\w+ and 5 more"):
        read_split(path, [s for s in samples if s.patient != "P003"])


def test_read_notices_that_keys_mean_other_images(tmp_path):
    path = tmp_path / "split.json"
    samples = [
        replace(sample, image_path=Path(f"/data/images/p{sample.patient[-1]}/{place % 3}.png"))
        for place, sample in enumerate(make_samples([3] * 5))
    ]
    write_split(path, split_by_patient(samples))
    # A new file took the number of another one; p1/001.png has become p2/001.png.
    renamed = [replace(samples[0], image_path=Path("/data/images/p1/other.png")), *samples[1:]]
    others = [replace(s, image_path=samples[i - 3].image_path) for i, s in enumerate(samples)]
    content = json.loads(path.read_text())
    content["samples"]["train"].append(content["samples"]["test"].pop())
    del content["checksum"]
    text = path.read_text()
    for written, today in ((text, renamed), (text, others), (json.dumps(content), samples)):
        path.write_text(written)
        with pytest.raises(DataError, match="its keys now stand for other images"):
            read_split(path, today)


def test_broken_split_files(tmp_path):
    path, samples = tmp_path / "split.json", make_samples([1, 1, 1])
    with pytest.raises(DataError, match="There is no split"):
        read_split(path, samples)
    write_split(path, split_by_patient(samples))
    another = path.read_text().replace('"unit": "patient"', '"unit": "eye"')
    for text in ("{", "[]", '{"samples": {"train": []}}', another):
        path.write_text(text)
        with pytest.raises(DataError, match="split.json is damaged" if text == "{" else "is not a split"):
            read_split(path, samples)


def test_take_goes_round_the_patients_and_their_sequences_and_grows():
    samples = make_samples([40] * 25, num_sequences=2)
    chosen = take(samples, 50)
    assert Counter(sample.patient for sample in chosen) == {f"P{i:03d}": 2 for i in range(1, 26)}
    assert len({sample.sequence for sample in chosen}) == 50
    assert len({sample.frame for sample in chosen}) > 10  # not only the first frames

    assert take([], None) == []
    with pytest.raises(ValueError, match="n is 0"):
        take(samples, 0)
    samples = make_samples(uneven_sizes(4), num_sequences=3)
    assert take(samples, 30) == take(samples[::-1], 30) == take(samples, 60)[:30]
    assert take(samples, 30) != take(samples, 30, seed=1)
    for n in (None, 1000):
        assert Counter(take(samples, n)) == Counter(samples)
