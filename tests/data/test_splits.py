import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.made_samples import make_samples, patients_of, sides, uneven_sizes
from vesselrl.data.annotations import Sample, find_samples
from vesselrl.data.builtin import SMALL, builtin_data
from vesselrl.data.patients import pseudonyms
from vesselrl.data.splits import SIDES, Split, read_split, split_by_patient, take, write_split
from vesselrl.errors import DataError


def test_a_split_by_frame_warns_and_is_marked_wherever_it_goes(tmp_path, caplog):
    samples = make_samples([20] * 10)
    split = split_by_patient(samples, unit="frame")
    assert "LEAKY" in caplog.text
    assert [len(side) for side in sides(split)] == [160, 20, 20]
    assert patients_of(split.train) & patients_of(split.test)
    assert split.is_leaky
    assert split.mark.startswith("LEAKY")
    write_split(tmp_path / "split.json", split)
    content = json.loads((tmp_path / "split.json").read_text())
    assert content["unit"] == "frame"
    assert content["leaky"] is True
    assert content["mark"].startswith("LEAKY")
    assert content["shared_patients"]["train_test"]
    again = read_split(tmp_path / "split.json", samples)
    assert again == split
    assert again.is_leaky


def test_a_split_by_patient_warns_of_nothing(caplog):
    split = split_by_patient(make_samples([2] * 9))
    assert (split.is_leaky, split.mark, caplog.text) == (False, "", "")


def test_unknown_units_are_refused(tmp_path):
    samples = make_samples([2] * 9)
    with pytest.raises(ValueError, match=r"unit is 'eye'. Give one of patient, frame"):
        split_by_patient(samples, unit="eye")
    write_split(tmp_path / "split.json", split_by_patient(samples))
    text = (tmp_path / "split.json").read_text()
    (tmp_path / "split.json").write_text(text.replace('"unit": "patient"', '"unit": "eye"'))
    with pytest.raises(DataError, match="is not a split that this program wrote"):
        read_split(tmp_path / "split.json", samples)


def test_the_sides_do_not_depend_on_the_numbers_of_the_pseudonyms():
    samples = make_samples(uneven_sizes(2))
    numbers = sorted(patients_of(samples))
    shuffled = dict(zip(numbers, random.Random(3).sample(numbers, len(numbers)), strict=True))
    renamed = [replace(s, patient=shuffled[s.patient], key=shuffled[s.patient] + s.key[4:]) for s in samples]
    for fold in (None, (1, 3)):
        one, other = (split_by_patient(some, 5, fold=fold) for some in (samples, renamed))
        assert [[s.image_path for s in side] for side in sides(one)] == [
            [s.image_path for s in side] for side in sides(other)
        ]
    assert [s.image_path for s in take(samples, 20)] == [s.image_path for s in take(renamed, 20)]


@pytest.mark.parametrize("unit", ["patient", "frame"])
def test_nor_where_equal_names_lie_in_a_folder_for_each_patient(unit):
    """p1/001.png and p2/001.png: the name alone says nothing about the patient."""

    def sides_of(order, root):
        samples = []
        for number, patient in enumerate(order, start=1):
            for frame in range(1 + patient % 3):
                label, path = f"P{number:03d}", Path(f"{root}/images/p{patient}/{frame:03d}.png")
                key = f"{label}_S1_F{frame:04d}"
                samples.append(Sample(path, None, (), key, key, label, f"{label}_S1", f"F{frame:04d}"))
        split = split_by_patient(samples, 5, unit=unit)
        chosen = [*map(list, sides(split)), take(samples, 9)]
        return [[s.image_path.relative_to(root) for s in side] for side in chosen]

    order = list(range(20))
    shuffled = random.Random(1).sample(order, 20)
    assert sides_of(order, "/data") == sides_of(shuffled, "/mnt/other/data")


def split_fingerprint(split):
    lines = [f"{name}\t{s.key}\t{s.image_path.name}" for name in SIDES for s in getattr(split, name)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("seed", "expected"),
    [(42, "18e4524857b4b764"), (0, "552439615afb000e"), (1, "b43fa6ffb1ce348e"), (7, "e77e2802d791dd72")],
)
def test_splits_of_coronary80_are_those_of_the_earlier_results(shared_folder, seed, expected):
    samples = find_samples(shared_folder / "data" / "coronary80")
    assert split_fingerprint(split_by_patient(samples, seed)) == expected


def test_splits_of_the_small_built_in_data_are_those_of_the_earlier_results(tmp_path):
    samples = find_samples(builtin_data(tmp_path, SMALL))
    expected = {42: "dbe3032fea58a91b", 0: "0452f822f82086bc", 1: "917d42763fd532ae", 7: "c0caa0331b5a71b2"}
    assert {seed: split_fingerprint(split_by_patient(samples, seed)) for seed in expected} == expected
    taken = [s.key for s in take(list(split_by_patient(samples).train), 50, 42)]
    assert hashlib.sha256("\n".join(taken).encode()).hexdigest()[:16] == "7ee73d198a1323f4"


def write_format_1(path, split, keys):
    """A split as it was written before numbers were salted; keys by image path."""
    lines = [
        f"{side}\t{keys[s.image_path]}\t{s.image_path.name}" for side in SIDES for s in getattr(split, side)
    ]
    content = {
        "format": 1,
        "unit": "patient",
        "seed": split.seed,
        "ratios": dict(zip(SIDES, split.ratios, strict=True)),
        "sha256": hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest(),
        "samples": {side: [keys[s.image_path] for s in getattr(split, side)] for side in SIDES},
    }
    path.write_text(json.dumps(content))


def test_old_files_stay_readable_with_salted_keys_too(tmp_path):
    """The files of an old run have the numbers of SHA-256 without a salt."""
    ids = [1234567890 + 7 * i for i in range(9)]
    names = [f"NAME({number})_1-2_3_0A1B2C3D_frame_{frame:06d}" for number in ids for frame in range(2)]
    new = pseudonyms(names)
    samples = [
        Sample(Path(f"/data/{name}.png"), None, (), "", a.key, a.patient, a.sequence, a.frame)
        for name, a in new.items()
    ]
    order = sorted(ids, key=lambda number: hashlib.sha256(f"id:{number}".encode()).hexdigest())
    old = {s.image_path: f"P{order.index(int(s.image_path.name[5:15])) + 1:03d}{s.key[4:]}" for s in samples}
    assert set(old.values()) == {s.key for s in samples}
    assert any(old[s.image_path] != s.key for s in samples)
    split = split_by_patient(samples)
    write_format_1(tmp_path / "split.json", split, old)
    assert read_split(tmp_path / "split.json", samples) == split
    write_format_1(tmp_path / "split.json", split, {s.image_path: s.key for s in samples})
    assert read_split(tmp_path / "split.json", samples) == split


def test_sizes_follow_the_ratios_where_patients_allow_it():
    assert [len(side) for side in sides(split_by_patient(make_samples([10] * 10)))] == [80, 10, 10]
    assert [len(side) for side in sides(split_by_patient(make_samples([1] * 1000)))] == [800, 100, 100]
    half = split_by_patient(make_samples([5] * 20), ratios=(0.5, 0.25, 0.25))
    assert [len(side) for side in sides(half)] == [50, 25, 25]


def test_no_single_patient_would_bring_a_side_nearer_to_its_share():
    for seed in range(100):
        samples = make_samples(uneven_sizes(seed))
        split = split_by_patient(samples, seed)
        share = 0.1 * len(samples)
        train, test = (Counter(sample.patient for sample in side) for side in (split.train, split.test))
        gap = abs(len(split.test) - share)
        for size in train.values():
            assert abs(len(split.test) + size - share) >= gap
        if len(test) > 1:  # the last patient stays, however large
            for size in test.values():
                assert abs(len(split.test) - size - share) >= gap


def test_a_huge_patient_is_for_training():
    for seed in range(20):
        split = split_by_patient(make_samples([10, 100, 10]), seed)
        assert [len(side) for side in sides(split)] == [100, 10, 10]


def test_three_patients_are_enough_and_two_are_not():
    assert [len(side) for side in sides(split_by_patient(make_samples([40, 40, 40])))] == [40, 40, 40]
    with pytest.raises(DataError, match=r"The data has 2 patients \(9 images\)"):
        split_by_patient(make_samples([4, 5]))


def test_seed_decides_and_order_does_not():
    samples = make_samples(uneven_sizes(1))
    shuffled = random.Random(5).sample(samples, len(samples))
    assert split_by_patient(samples, 42) == split_by_patient(shuffled, 42)
    tests = {tuple(split_by_patient(samples, seed).patients("test")) for seed in range(20)}
    assert len(tests) > 5


@pytest.mark.parametrize("ratios", [(0.8, 0.2, 0), (0.8, 0.1), (0.8, 0.1, 0.2), (1.2, -0.1, -0.1)])
def test_ratios_must_be_three_shares(ratios):
    with pytest.raises(ValueError, match="Give three numbers above 0 with the sum 1"):
        split_by_patient(make_samples([1, 1, 1]), ratios=ratios)


def test_written_file(tmp_path):
    split = split_by_patient(make_samples([10] * 10), seed=7)
    write_split(tmp_path / "data_split.json", split)
    content = json.loads((tmp_path / "data_split.json").read_text())
    assert content["unit"] == "patient"
    assert content["seed"] == 7
    assert content["ratios"] == {"train": 0.8, "val": 0.1, "test": 0.1}
    assert content["total_samples"] == 100
    assert content["counts"] == {"train": 80, "val": 10, "test": 10}
    assert content["patient_counts"] == {"train": 8, "val": 1, "test": 1}
    assert content["shared_patients"] == {"train_val": [], "train_test": [], "val_test": []}
    listed = [patient for side in content["patients"].values() for patient in side]
    assert sorted(listed) == [f"P{i:03d}" for i in range(1, 11)]
    assert content["samples"]["test"] == [sample.key for sample in split.test]
    lines = sorted(
        f"{side}\t{sample.key}\t{sample.image_path.name}"
        for side in ("train", "val", "test")
        for sample in getattr(split, side)
    )
    assert content["sha256"] == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert "MING" not in json.dumps(content)
    assert [path.name for path in tmp_path.iterdir()] == ["data_split.json"]


def test_a_leaking_split_is_not_written(tmp_path):
    one, two, three = make_samples([2, 1, 1])[0:1], make_samples([2])[1:], make_samples([1, 1, 1])[2:]
    with pytest.raises(DataError, match="1 patients are on two sides of the split, train and val: P001"):
        write_split(tmp_path / "split.json", Split(tuple(one), tuple(two), tuple(three), seed=1))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "split.json"
    split = split_by_patient(make_samples([3] * 4))
    write_split(path, split)
    before = path.read_bytes()
    monkeypatch.setattr(json, "dumps", lambda *_, **__: "half a f\udcff")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        write_split(path, replace(split, seed=9))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["split.json"]


def test_read_gives_the_same_samples_back(tmp_path):
    samples = make_samples(uneven_sizes(3))
    split = split_by_patient(samples, seed=11, ratios=(0.6, 0.2, 0.2))
    write_split(tmp_path / "split.json", split)
    shuffled = random.Random(0).sample(samples, len(samples))
    assert read_split(tmp_path / "split.json", shuffled) == split


def test_read_names_what_is_missing(tmp_path):
    samples = make_samples([10] * 10)
    write_split(tmp_path / "split.json", split_by_patient(samples))
    gone = {sample.key for sample in samples if sample.patient == "P003"}
    with pytest.raises(DataError, match="lists 10 samples that the data root does not have") as raised:
        read_split(tmp_path / "split.json", [s for s in samples if s.key not in gone])
    named = set(re.findall(r"P\d+_S\d+_F\d+", str(raised.value)))
    assert len(named) == 5
    assert named < gone
    assert "and 5 more" in str(raised.value)


def test_read_notices_that_keys_mean_other_images(tmp_path):
    samples = make_samples([3] * 5)
    write_split(tmp_path / "split.json", split_by_patient(samples))
    # A new file took the number of another one: the keys are all there, the images are not the same.
    renamed = [replace(samples[0], image_path=Path("/data/images/other.png")), *samples[1:]]
    with pytest.raises(DataError, match="its keys now stand for other images"):
        read_split(tmp_path / "split.json", renamed)
    # The folder may move, and samples may be added.
    moved = [replace(s, image_path=Path("/elsewhere") / s.image_path.name) for s in samples]
    added = replace(samples[0], key="P099_S1_F0001", patient="P099")
    assert len(read_split(tmp_path / "split.json", [*moved, added]).train) > 0


def test_read_notices_that_equal_names_lie_in_other_folders(tmp_path):
    """p1/001.png has become p2/001.png, because the patients were numbered anew."""
    samples = [
        replace(sample, image_path=Path(f"/data/images/p{sample.patient[-1]}/{place % 3}.png"))
        for place, sample in enumerate(make_samples([3] * 5))
    ]
    write_split(tmp_path / "split.json", split_by_patient(samples))
    moved = [replace(s, image_path=Path("/mnt") / s.image_path.relative_to("/data")) for s in samples]
    assert len(read_split(tmp_path / "split.json", moved).train) > 0
    paths = [sample.image_path for sample in samples]
    other = [replace(s, image_path=p) for s, p in zip(samples, paths[3:] + paths[:3], strict=True)]
    with pytest.raises(DataError, match="its keys now stand for other images"):
        read_split(tmp_path / "split.json", other)


def test_doubts_are_read_back(tmp_path):
    samples = make_samples([3] * 5)
    split = replace(split_by_patient(samples), doubts=("NEAR DUPLICATES: two look alike.",))
    write_split(tmp_path / "split.json", split)
    assert read_split(tmp_path / "split.json", samples).doubts == split.doubts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no split"),
        ("{", "split.json is damaged"),
        ("[]", "split.json is not a split"),
        ('{"samples": {"train": []}}', "split.json is not a split"),
        ('{"samples": 3}', "split.json is not a split"),
    ],
)
def test_broken_split_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "split.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_split(tmp_path / "split.json", make_samples([1, 1, 1]))


def test_an_edited_split_is_refused(tmp_path):
    path = tmp_path / "split.json"
    samples = make_samples([10] * 10)
    write_split(path, split_by_patient(samples))
    content = json.loads(path.read_text())
    content["samples"]["train"].append(content["samples"]["test"].pop())
    path.write_text(json.dumps(content))
    with pytest.raises(DataError):
        read_split(path, samples)


def test_take_goes_round_the_patients_and_their_sequences():
    samples = make_samples([40] * 25, num_sequences=2)
    chosen = take(samples, 50)
    assert Counter(sample.patient for sample in chosen) == {f"P{i:03d}": 2 for i in range(1, 26)}
    assert len({sample.sequence for sample in chosen}) == 50
    assert len({sample.patient for sample in take(samples, 20)}) == 20
    assert len({sample.frame for sample in chosen}) > 10  # not only the first frames


def test_take_is_deterministic_and_grows():
    samples = make_samples(uneven_sizes(4), num_sequences=3)
    shuffled = random.Random(1).sample(samples, len(samples))
    assert take(samples, 30) == take(shuffled, 30)
    assert take(samples, 30) == take(samples, 60)[:30]
    assert take(samples, 30) != take(samples, 30, seed=1)


def test_take_all():
    samples = make_samples([1, 5, 2])
    for n in (None, 8, 1000):
        assert sorted(take(samples, n), key=lambda s: s.key) == samples
    assert take([], None) == []
    with pytest.raises(ValueError, match="n is 0"):
        take(samples, 0)


def test_both_eyes_stay_together(shared_folder):
    samples = find_samples(shared_folder / "data" / "chase_db1")
    for seed in range(20):
        for side in sides(split_by_patient(samples, seed)):
            children = Counter(re.search(r"\d+", sample.image_path.stem)[0] for sample in side)
            assert set(children.values()) == {2}
