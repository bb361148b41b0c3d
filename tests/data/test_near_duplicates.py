"""Near duplicates across the subsets of a split, and the images that the base model was trained on."""

import logging
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from vesselrl.data import near_duplicates
from vesselrl.data.near_duplicates import check_near_duplicates, pretraining_overlap
from vesselrl.data.samples import Sample, find_samples, load_image
from vesselrl.data.splits import Split
from vesselrl.errors import DataError
from vesselrl.synthetic.dataset import TARGET, draw_sequence


def make_sample(patient, frame=1):
    key = f"P{patient:03d}_S1_F{frame:04d}"
    return Sample(Path(f"{key}.png"), None, (), f"record {key}", key, key[:4], key[:7], key[8:])


SAMPLES = [make_sample(patient) for patient in (*range(1, 21), 99)]
PAIR = ("P007_S1_F0001", "P099_S1_F0001")


@pytest.fixture(scope="module")
def different():
    """One frame of each of 20 synthetic patients, by key."""
    frames = [draw_sequence(TARGET, patient, 1, 1, size=256, seed=11)[0][0] for patient in range(1, 21)]
    return {sample.key: frame for sample, frame in zip(SAMPLES, frames, strict=False)}


NOISE = np.random.default_rng(0).normal(0, 8, (256, 256, 3))
CHANGES = {
    "none": None,
    "copied": np.array,
    "darker": lambda image: np.uint8(image * 0.7),
    "jpeg": lambda image: cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], 1),
    "smaller": lambda image: cv2.resize(image, (180, 180), interpolation=cv2.INTER_AREA),
    "moved": lambda image: np.roll(image, (5, 4), axis=(0, 1)),
    "noisy": lambda image: cv2.add(image, NOISE, dtype=cv2.CV_8U),
}


def find(samples, load):
    looks = [near_duplicates.look_of(load(sample)) for sample in samples]
    return near_duplicates.find_near_duplicates(samples, looks)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_one_image_under_two_patients_is_found_and_nothing_else(different, change):
    """A changed copy of patient 7 has a patient's number of its own."""
    images = different | ({} if change is None else {PAIR[1]: change(different[PAIR[0]])})
    pairs = find(SAMPLES[: len(images)], lambda sample: images[sample.key])
    assert [pair[:2] for pair in pairs] == ([] if change is None else [PAIR])


def test_the_guard_names_the_pairs_across_subsets_and_warns_of_others(different, caplog):
    images = different | {PAIR[1]: CHANGES["darker"](different[PAIR[0]])}
    pairs = find(SAMPLES, lambda sample: images[sample.key])
    pairs.append(("P001_S1_F0001", "P100_S1_F0001", 9))  # added after the split was made
    named = r"1 pairs .* record P007_S1_F0001 \(train\) and record P099_S1_F0001 \(test\)\. .* alias file"
    with pytest.raises(DataError, match=named):
        check_near_duplicates(Split(SAMPLES[:10], SAMPLES[10:15], SAMPLES[15:], seed=0), pairs)
    sound = Split([*SAMPLES[:10], SAMPLES[20]], SAMPLES[10:15], SAMPLES[15:20], seed=0)
    assert [pair[:2] for pair in check_near_duplicates(sound, pairs)] == [PAIR]
    assert "one patient under two names? First: P007_S1_F0001 and P099_S1_F0001" in caplog.text


def test_real_images(shared_folder):
    """Both pairs were looked at. test_010 and train_017 (one tree, subtracted and not) differ by 114 bits."""
    samples = find_samples(shared_folder / "data" / "chase_db1")
    assert (len(samples), len({sample.patient for sample in samples})) == (28, 14)
    assert find(samples, load_image) == []
    samples = find_samples(shared_folder / "data" / "coronary80")
    name = {sample.key: sample.image_path.stem for sample in samples}
    pairs = [{name[one], name[other]} for one, other, _ in find(samples, load_image)]
    assert sorted(pairs, key=min) == [{"test_006", "train_030"}, {"test_028", "test_032"}]


@pytest.fixture
def samples():
    """Three patients with two frames each; the names are of nobody."""
    result = [make_sample(patient, frame) for patient in (1, 2, 3) for frame in (1, 2)]
    return [replace(s, image_path=Path(f"/data/images/LI_{s.key[3]}_frame_{s.key[-1]}.jpg")) for s in result]


@pytest.mark.parametrize(
    "line", ["LI_2_frame_1", "images/LI_2_frame_1.jpg", "C:\\LI_2_frame_1.jpg", "P002_S1_F0001"]
)
def test_one_listed_image_counts_for_its_whole_patient(samples, tmp_path, line, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "trained.txt"
    path.write_text(f"\ufeff# base model\n\nelsewhere_7.jpg\n  {line} \n", encoding="utf-8")
    assert pretraining_overlap(str(path), samples) == {"P002_S1_F0001", "P002_S1_F0002"}
    assert "1 of 3 patients: 2 of 6 images" in caplog.text
    assert "LI" not in caplog.text
    assert pretraining_overlap("none", samples) == set()
    assert pretraining_overlap("all", samples) == {sample.key for sample in samples}


def test_files_that_tell_nothing_or_too_little(samples, tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(DataError, match=r"is no file\. Give none, all or a text file"):
        pretraining_overlap(path, samples)
    for text, message in (("LI_9_frame_1\n", "None of 1 lines of a.txt is an image"), ("李", "is not UTF-8")):
        path.write_bytes(text.encode("gbk"))
        with pytest.raises(DataError, match=message) as raised:
            pretraining_overlap(path, samples)
        assert "LI_" not in str(raised.value)
    # p1/1.jpg is of another patient than p2/1.jpg: the folder must be there, and decides.
    samples = [replace(s, image_path=Path(f"/data/images/p{s.key[3]}/{s.key[-1]}.jpg")) for s in samples]
    path.write_text("images/p2/1.jpg\n")
    assert pretraining_overlap(path, samples) == {"P002_S1_F0001", "P002_S1_F0002"}
    for line in ("1.jpg", "images/elsewhere/1.jpg"):
        path.write_text(f"# seen\n{line}\n")
        with pytest.raises(DataError, match=r"Line 2 of a\.txt may mean images of 3 patients"):
            pretraining_overlap(path, samples)
