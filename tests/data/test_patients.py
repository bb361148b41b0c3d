import hashlib
import logging
import random
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.data.broken_roots import draw_mask
from vesselrl.data.annotations import find_samples
from vesselrl.data.builtin import FULL, SEED, SMALL
from vesselrl.data.check import check_data
from vesselrl.data.patients import is_impersonal, parse_by_pattern, parse_name, pseudonyms
from vesselrl.data.privacy import MAPPING_FILE
from vesselrl.errors import DataError

TAIL = "1-2_3_0A1B2C3D_frame_000011"


@pytest.mark.parametrize(
    "name",
    [
        f"LI_MING(0123456789)_{TAIL}",
        f"LI MING (0123456789) {TAIL.replace('_', ' ')}",
        f"LI_MING^(0123456789)_{TAIL}",
        f"LI_MING_0123456789__{TAIL}",
        f"LI_MING__0123456789__{TAIL}",
        f"Li Ming  0123456789  {TAIL}",
        f"LI-MING（0123456789）_{TAIL}",  # noqa: RUF001  full-width brackets
        f"李明(0123456789)_{TAIL}",
        f"0123456789_{TAIL}",
        f"deep/folder/李明__0123456789__{TAIL}",
    ],
)
def test_names_with_an_id(name):
    identity = parse_name(name)
    assert identity.person == "id:0123456789"
    assert identity.sequence == "1-2_3_0a1b2c3d"
    assert identity.frame == "000011"


@pytest.mark.parametrize(
    ("name", "person", "sequence"),
    [
        ("zhangsan_frame_000011", "name:zhangsan", ""),
        ("Zhang San frame 000011", "name:zhangsan", ""),
        ("ZHANG__SAN__frame_000011", "name:zhangsan", ""),
        ("张三_frame_000011", "name:张三", ""),
        ("Jürgen_Großmann_frame_000011", "name:jürgengrossmann", ""),
        (f"zhang_san_{TAIL}", "name:zhangsan", "1-2_3_0a1b2c3d"),
    ],
)
def test_names_without_an_id(name, person, sequence):
    identity = parse_name(name)
    assert (identity.person, identity.sequence, identity.frame) == (person, sequence, "000011")


@pytest.mark.parametrize(
    "name", ["train_001", "train_12", "a", "L", "zhang_12L", "___frame_1", "sub/train_001"]
)
def test_any_other_name_is_a_patient_of_its_own(name):
    assert parse_name(name).person == f"file:{name}"


def test_an_id_with_an_unknown_rest_is_still_one_patient():
    names = ["Li(0123456789) export 7", "Li(0123456789)", "Li(0123456789)_x_frame_3 (1)"]
    assert {parse_name(name).person for name in names} == {"id:0123456789"}


def test_eleven_digits_are_no_id():
    assert parse_name("li_01234567890_frame_000001").person == "name:li01234567890"


def names_of_hospital():
    """Three patients, in every way of writing them."""
    return [
        f"LI_MING(0123456789)_{TAIL}",
        "LI MING^(0123456789) 1-2 3 0A1B2C3D frame 000012",
        "Ming Li__0123456789__1-3_3_0A1B2C3E_frame_000001",
        "li_ming_frame_000044",
        "WANG_WEI_1111111111__1-1_1_FFFFFFFF_frame_000001",
        "WANG_WEI_2222222222__1-1_1_FFFFFFFF_frame_000001",
    ]


def test_pseudonyms_of_one_person_and_of_two_with_one_name():
    result = pseudonyms(names_of_hospital())
    patients = [result[name].patient for name in names_of_hospital()]
    assert len(set(patients[:4])) == 1
    assert len(set(patients)) == 3
    sequences = [result[name].sequence for name in names_of_hospital()]
    assert sequences[0] == sequences[1] != sequences[2]
    assert result[names_of_hospital()[0]].frame == "F0011"
    assert result[names_of_hospital()[0]].key == f"{sequences[0]}_F0011"


def test_a_bare_name_with_two_ids_stays_apart(caplog):
    caplog.set_level(logging.INFO)
    result = pseudonyms([*names_of_hospital(), "wang_wei_frame_000001"])
    assert len({alias.patient for alias in result.values()}) == 4
    assert "1 names occur with more than one ID" in caplog.text
    assert "wang" not in caplog.text.lower()


def test_pseudonyms_do_not_depend_on_the_order():
    names = [f"{word}_frame_{number:06d}" for word in ("a", "b", "c", "d") for number in range(3)]
    shuffled = names.copy()
    random.Random(0).shuffle(shuffled)
    assert pseudonyms(names) == pseudonyms(shuffled)


def test_numbers_do_not_follow_the_alphabet():
    names = [f"{chr(ord('a') + i)}_frame_000001" for i in range(26)]
    patients = [pseudonyms(names)[name].patient for name in names]
    assert sorted(patients) == [f"P{i:03d}" for i in range(1, 27)]
    assert patients != sorted(patients)
    assert patients != sorted(patients, reverse=True)


def test_keys_are_unique_and_hold_no_name_and_no_id():
    names = [
        *names_of_hospital(),
        f"LI_MING__0123456789__{TAIL}",  # the same frame under another spelling
        "zhao_frame_1234567890123",  # too long for a frame number
        *[f"sun(0000000007)_x{i}" for i in range(3)],  # no frame number
    ]
    result = pseudonyms(names)
    keys = [alias.key for alias in result.values()]
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch(r"P\d{3}_S\d+_F\d{4}b?", key) for key in keys), keys
    text = repr(result.values()) + repr([parse_name(name) for name in names])
    for word in ("LI", "MING", "WANG", "zhao", "sun"):
        assert word.lower() not in text.lower()
    assert not re.search(r"\d{10}", text)


def test_frames_without_a_number_are_counted_around_the_numbers():
    pattern = r"(?P<patient>p\d)_(?P<frame>\w+)"
    result = pseudonyms(["p1_a", "p1_1", "p1_b", "p1_0001"], pattern)
    assert sorted(alias.frame for alias in result.values()) == ["F0001", "F0001b", "F0002", "F0003"]


EYES = {
    "chase_db1": [f"Image_{i:02d}{eye}" for i in range(1, 15) for eye in "LR"],
    "numbers": [f"{i:02d}{eye}" for i in range(1, 15) for eye in "LR"],
    "by split": [f"{'train' if i < 11 else 'test'}_{i:02d}{eye}" for i in range(1, 15) for eye in "LR"],
    "words": [f"{i}_{eye}" for i in range(1, 15) for eye in ("left", "Right")],
    "folders": [f"eyes/{i:02d}{eye}" for i in range(1, 15) for eye in "LR"],
}


@pytest.mark.parametrize("names", EYES.values(), ids=EYES)
def test_both_eyes_of_a_child_are_one_patient(names):
    result = pseudonyms(names)
    assert len({alias.patient for alias in result.values()}) == 14
    assert len({alias.key for alias in result.values()}) == 28
    for left, right in zip(names[::2], names[1::2], strict=True):
        assert result[left].patient == result[right].patient
        assert (result[left].sequence[-3:], result[right].sequence[-3:]) == ("_S1", "_S2")


def test_numbers_that_begin_anew_in_each_folder_stay_apart():
    names = ["a/01L", "a/01R", "b/01L", "b/01R", "train_01L", "test_01L"]
    assert len({alias.patient for alias in pseudonyms(names).values()}) == 4


def test_a_pattern_of_the_user_comes_before_the_eyes():
    names = [f"train_{i:02d}{eye}" for i in range(1, 11) for eye in "LR"]
    result = pseudonyms(names, r"_(?P<patient>\d+)(?P<frame>[LR])$")
    assert len({alias.patient for alias in result.values()}) == 10
    assert result["train_04L"].patient == result["train_04R"].patient
    assert result["train_04L"].key != result["train_04R"].key


def test_chase_db1_has_fourteen_patients_with_two_eyes_each(shared_folder):
    samples = find_samples(shared_folder / "data" / "chase_db1")
    assert Counter(Counter(sample.patient for sample in samples).values()) == {2: 14}


def test_keys_of_the_data_of_earlier_results_are_as_they_were(tmp_path):
    """SHA-256 over key and file name, taken before numbers were salted."""
    for size, expected in (
        (FULL, "6fef84859d0cae46700ab7430841b74335698fe47f3d3054c8e5285ed8a022e2"),
        (SMALL, "228e9acec8a43560cd9c0f0fea1ef475e0b1921b392d92969c9bf37cc406bb35"),
    ):
        stems = [
            stem
            for patient in range(1, size.num_patients + 1)
            for sequence in range(1, size.num_sequences + 1)
            for stem in stems_of_sequence(patient, sequence, size.num_frames)
        ]
        result = pseudonyms(stems, mapping=tmp_path / MAPPING_FILE)
        assert fingerprint((alias.key, f"{stem}.jpg") for stem, alias in result.items()) == expected
    assert list(tmp_path.iterdir()) == []  # made-up people need no mapping file


def test_keys_of_coronary80_are_as_they_were(shared_folder):
    samples = find_samples(shared_folder / "data" / "coronary80")
    expected = "ce5b5a956c8cdca80c6233af9e448fda539066326af0343bfc986f6668e5fbd0"
    assert fingerprint((sample.key, sample.image_path.name) for sample in samples) == expected


def stems_of_sequence(patient, sequence, num_frames):
    """The file names that the built-in data set gives to a sequence, without drawing it."""
    rng = np.random.default_rng([SEED, patient, sequence])
    code, number = f"{int(rng.integers(2**32)):08X}", int(rng.integers(3, 14))
    for _ in range(num_frames):
        yield f"SYNTH({patient:010d})_S-{sequence}_1_{code}_frame_{number:06d}"
        number += int(rng.integers(1, 4))


def fingerprint(rows):
    return hashlib.sha256("\n".join(f"{key}\t{name}" for key, name in sorted(rows)).encode()).hexdigest()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "patient_pattern is not a regular expression"),
        (r"(\d+)", "patient_pattern has no group (?P<patient>...)"),
        (r"(?P<patient>\d+)", "finds no patient in 1 of 2 file names (first: number 1 in the order"),
        (r"(?P<patient>\d*)", "finds no patient in 2 of 2 file names"),
    ],
)
def test_bad_patterns(pattern, message):
    with pytest.raises(DataError) as raised:
        parse_by_pattern(["x1", "li ming"], pattern)
    assert message in str(raised.value)
    assert "ming" not in str(raised.value)


@pytest.mark.parametrize("name", ["train_001", "007", "07L", "img-12", "test_11R", "Frame 3", "21_training"])
def test_impersonal_names_may_be_shown(name):
    assert is_impersonal(name)


@pytest.mark.parametrize(
    "name", ["zhang_001", "0123456789", "li ming", "train_zhang", "zhang_frame_000001", "L"]
)
def test_personal_names_may_not(name):
    assert not is_impersonal(name)


@pytest.mark.parametrize(
    ("files", "warned"),
    [
        (["p1/001", "p1/002", "p2/001", "p2/002"], True),
        (["p1/001", "p2/001", "p3/001"], False),  # one image for each folder
        (["001", "002", "003"], False),
        (["p1/001L", "p1/001R", "p2/001L"], False),  # two eyes are told apart from patients
    ],
)
def test_a_folder_for_each_patient_is_not_overlooked(tmp_path, files, warned):
    for number, name in enumerate(files):
        for folder, pixels in (
            ("images", np.full((64, 64), number, np.uint8)),
            ("masks", draw_mask(number % 4)),
        ):
            path = tmp_path / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    found = [finding for finding in check_data(tmp_path).findings if finding.code == "patients"]
    assert bool(found) == warned
    if warned:
        assert found[0].severity == "warning"
        assert "Each of 4 images counts as a patient of its own, but 4 of them share 2" in found[0].message
        pattern = found[0].message.split("'")[1]
        report = check_data(tmp_path, patient_pattern=pattern)
        assert (report.counts["patients"], report.findings) == (2, ())
