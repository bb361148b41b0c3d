import logging
import time
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from vesselrl.data.annotations import Sample, find_samples, load_image
from vesselrl.data.near_duplicates import (
    MAX_DISTANCE,
    MIN_CORRELATION,
    _near_hashes,
    check_near_duplicates,
    correlation,
    find_near_duplicates,
)
from vesselrl.data.splits import Split, split_by_patient
from vesselrl.data.synthetic import TARGET, draw_sequence
from vesselrl.errors import DataError


def make_sample(patient, frame=1):
    key = f"P{patient:03d}_S1_F{frame:04d}"
    return Sample(Path(f"{key}.png"), None, (), f"record {key}", key, key[:4], key[:7], key[8:])


def frames_of(patient, num_frames=1):
    """Synthetic angiograms of one sequence."""
    return [image for image, _ in draw_sequence(TARGET, patient, 1, num_frames, size=256, seed=11)]


@pytest.fixture(scope="module")
def different():
    """One frame of each of 40 synthetic patients, by key."""
    return {make_sample(patient).key: frames_of(patient)[0] for patient in range(1, 41)}


def test_different_patients_are_not_flagged(different):
    samples = [make_sample(patient) for patient in range(1, 41)]
    assert find_near_duplicates(samples, lambda sample: different[sample.key]) == []


def darker(image):
    return np.uint8(np.clip(image * 0.7, 0, 255))


def jpeg(image):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_COLOR)


def smaller(image):
    return cv2.resize(image, (180, 180), interpolation=cv2.INTER_AREA)


def moved(image):
    return np.roll(image, (5, 4), axis=(0, 1))


def noisy(image):
    noise = np.random.default_rng(0).normal(0, 8, image.shape)
    return np.uint8(np.clip(image + noise, 0, 255))


@pytest.mark.parametrize("change", [np.array, darker, jpeg, smaller, moved, noisy])
def test_one_image_under_two_patients_is_found(different, change):
    """A changed copy of patient 7 has a patient's number of its own."""
    images = different | {"P099_S1_F0001": change(different["P007_S1_F0001"])}
    samples = [make_sample(patient) for patient in (*range(1, 41), 99)]
    pairs = find_near_duplicates(samples, lambda sample: images[sample.key])
    assert [pair[:2] for pair in pairs] == [("P007_S1_F0001", "P099_S1_F0001")]
    assert pairs[0][2] <= MAX_DISTANCE


def test_frames_of_one_run_under_two_patients_are_found_and_those_of_one_patient_are_not():
    frames = frames_of(3, num_frames=6)
    one = {make_sample(1, number).key: (make_sample(1, number), frame) for number, frame in enumerate(frames)}
    assert find_near_duplicates([s for s, _ in one.values()], lambda s: one[s.key][1]) == []
    two = {
        sample.key: (sample, frame)
        for number, frame in enumerate(frames)
        for sample in [make_sample(1 + number % 2, number)]
    }
    pairs = find_near_duplicates([s for s, _ in two.values()], lambda s: two[s.key][1])
    assert len(pairs) >= 7  # of 9
    assert all(first[:4] != second[:4] for first, second, _ in pairs)
    assert [distance for *_, distance in pairs] == sorted(distance for *_, distance in pairs)


def test_the_guard_names_the_pairs_across_sides_and_warns_of_others(different, caplog):
    images = different | {"P099_S1_F0001": darker(different["P007_S1_F0001"])}
    samples = [make_sample(patient) for patient in (*range(1, 41), 99)]

    def load(sample):
        return images[sample.key]

    leaking = Split(tuple(samples[:20]), tuple(samples[20:30]), tuple(samples[30:]), seed=0)
    with pytest.raises(DataError, match=r"1 pairs .* look like frames of one run") as raised:
        check_near_duplicates(leaking, load)
    assert "record P007_S1_F0001 (train) and record P099_S1_F0001 (test)" in str(raised.value)
    assert "alias file" in str(raised.value)
    caplog.set_level(logging.INFO)
    sound = Split((*samples[:20], samples[-1]), tuple(samples[20:30]), tuple(samples[30:-1]), seed=0)
    pairs = check_near_duplicates(sound, load)
    assert [pair[:2] for pair in pairs] == [("P007_S1_F0001", "P099_S1_F0001")]
    assert "one patient under two names? First: P007_S1_F0001 and P099_S1_F0001" in caplog.text
    assert check_near_duplicates(split_by_patient(samples[:-1]), load) == []


def test_many_pairs_are_counted():
    frames = frames_of(3, num_frames=8)
    samples = [make_sample(1, number) for number in range(8)], [make_sample(2, number) for number in range(8)]
    split = Split(tuple(samples[0]), (make_sample(3),), tuple(samples[1]), seed=0)
    with pytest.raises(DataError, match=r"and \d+ more pairs") as raised:
        check_near_duplicates(
            split, lambda s: frames[int(s.frame[1:])] if s.patient != "P003" else frames_of(9)[0]
        )
    assert str(raised.value).count("(train)") == 10


def test_distances_are_those_of_scipy():
    rng = np.random.default_rng(1)
    hashes, patients = rng.random((60, 256)) < 0.5, rng.integers(0, 20, 60)
    expected = cdist(hashes, hashes, "hamming") * 256
    found = {(i, j): distance for i, j, distance in _near_hashes(hashes, patients, 120)}
    for i, j in product(range(60), repeat=2):
        wanted = i < j and patients[i] != patients[j] and round(expected[i, j]) <= 120
        assert ((i, j) in found) == wanted
        if wanted:
            assert found[i, j] == round(expected[i, j])


def test_correlation_of_shifted_even_and_unlike_maps():
    rng = np.random.default_rng(2)
    large = cv2.GaussianBlur(rng.random((90, 90)).astype(np.float32), (0, 0), 2)
    one, near, far = large[10:74, 10:74], large[15:79, 6:70], large[26:90, 10:74]
    assert correlation(one, one) == pytest.approx(1)
    assert correlation(one, near) == pytest.approx(1)
    assert correlation(one, far) < MIN_CORRELATION
    assert correlation(one, np.zeros_like(one)) == 0


def test_even_images_and_too_few_images():
    samples = [make_sample(patient) for patient in (1, 2)]
    assert find_near_duplicates(samples, lambda _: np.zeros((50, 40, 3), np.uint8)) == []
    assert find_near_duplicates(samples[:1], lambda _: 1 / 0) == []
    with pytest.raises(ValueError, match="threshold is 300"):
        find_near_duplicates(samples, load_image, 300)


def test_hundreds_of_images_take_seconds():
    image = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    samples = [make_sample(patient) for patient in range(1, 151)]
    start = time.process_time()
    find_near_duplicates(samples, lambda _: image, threshold=0)
    assert time.process_time() - start < 150 * 0.1


# ---- Real images


def names_of_pairs(samples, pairs):
    name = {sample.key: sample.image_path.stem for sample in samples}
    return {frozenset((name[one], name[other])) for one, other, _ in pairs}


def test_coronary80_has_frames_of_one_run_on_both_published_sides(shared_folder):
    """Both pairs were looked at. test_010 and train_017 (one tree, subtracted and not) differ by 114 bits."""
    samples = find_samples(shared_folder / "data" / "coronary80")
    pairs = find_near_duplicates(samples, load_image)
    assert names_of_pairs(samples, pairs) == {
        frozenset(("test_006", "train_030")),
        frozenset(("test_028", "test_032")),
    }
    published = {
        side: tuple(s for s in samples if s.image_path.stem.startswith(side)) for side in ("train", "test")
    }
    split = Split(published["train"][1:], published["train"][:1], published["test"], seed=0)
    with pytest.raises(DataError, match=r"1 pairs") as raised:
        check_near_duplicates(split, load_image)
    assert "test_006" in str(raised.value)
    assert "train_030" in str(raised.value)


def test_chase_db1_has_no_near_duplicates(shared_folder):
    samples = find_samples(shared_folder / "data" / "chase_db1")
    assert find_near_duplicates(samples, load_image) == []
