"""Patients that tools hide: what uploads, exports, copies and augmentation add to the names of pictures."""

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.test_formats import write_image
from tests.golden.broken_input import draw_mask
from vesselrl.data.check import check_data
from vesselrl.data.patients import copy_groups, is_impersonal, lone_frames, source_names
from vesselrl.data.pseudonyms import identify
from vesselrl.data.samples import find_samples
from vesselrl.data.splits import split_by_patient
from vesselrl.synthetic.dataset import TARGET, draw_sequence

PEOPLE = ("anna", "boris", "chen", "dora")
PLACES = [(patient, frame) for patient in PEOPLE for frame in range(1, 5)]
FRAMES = [f"{patient}_frame_{frame:06d}" for patient, frame in PLACES]
NUMBERED = [f"{patient}_{frame:03d}" for patient, frame in PLACES]
UID = "1.2.840.113619.2.55.3.1234567890.123.1600000000"


def code(text, digits):
    return hashlib.sha256(str(text).encode()).hexdigest()[:digits]


def hash_with_ten_digits(text):
    return f"a{code(text, 9)}b1234567890c{code(text, 10)}"


def uuid(text):
    return "-".join(code(f"{text}{part}", size) for part, size in enumerate((8, 4, 4, 4, 12)))


def timed(form, first=1_612_345_678):
    """Names with a Unix time in seconds, another one for each file."""
    return [
        form.format(patient=patient, frame=frame, time=first + 100_000 * (number // 4) + 40 * frame)
        for number, (patient, frame) in enumerate(PLACES)
    ]


def num_persons(names, pattern=None):
    return len({identity.person for identity in identify(sorted(names), pattern)[0].values()})


def test_the_prefix_of_label_studio_hides_no_patient():
    uploads = [f"{code(name, 8)}-{name}" for name in FRAMES]
    for names in (
        uploads,
        [*uploads, "12345678-anna_frame_000009"],
        [f"{code(name, 9)[:8]}-{name}" for name in uploads],  # exported and uploaded again
        [f"{code(name, 6)}__{name}" for name in uploads],  # fetched for an export
        [f"{uuid(name)}-{name}" for name in FRAMES],
        [f"{code(name, 32)}_{name}" for name in FRAMES],
    ):
        assert num_persons(names) == 4, names
    # A code that several files share is the patient's own; a date is no hexadecimal number.
    assert num_persons(f"{code(patient, 8)}-{frame}_frame_{frame}" for patient, frame in PLACES) == 16
    assert num_persons(f"20210{month}01-{name}" for month in range(1, 5) for name in FRAMES) == 16
    assert num_persons(["1b2c3d4e-", "12ab34__"]) == 2  # nothing but a prefix


COPIES = [
    *("{} (1)", "{} - Copy", "{} - Copy (2)", "{}_copy", "{} copy 2", "Copy of {}", "{} (copy)"),
    *("{}_flip", "{}_hflip", "{}_aug", "{}_aug_3", "aug_3_{}", "{}_rot90", "{}_aug_3_hflip", "{}_0000"),
    *("{}_png.rf." + "0f1e" * 8, "{}_jpg.rf.Zx8kQ1wPm4LtR7sVb2Yc", "{}.dcm"),
]


@pytest.mark.parametrize("form", COPIES)
def test_a_copy_is_of_the_patient_of_its_source(form):
    copies = [form.format(name) for name in FRAMES]
    assert num_persons([*FRAMES, *copies]) == num_persons(copies) == 4
    numbered = [form.format(name) for name in NUMBERED]
    assert num_persons([*NUMBERED, *numbered]) == 16
    first, second = identify([NUMBERED[0], numbered[0]])[0].values()
    assert first.person == second.person


def test_what_only_looks_like_a_copy_stays_apart():
    for names in (
        [f"benign ({number})" for number in range(1, 30)],  # as Windows numbers different pictures
        [f"train_aug_{number:03d}" for number in range(1, 30)],
        [f"retina_patch_{number:03d}" for number in range(1, 30)],
        [f"case_{number:03d}_0000" for number in range(30)],  # nnU-Net
        [f"anna_{number:04d}" for number in range(12)],
        [f"p{number}/001 (1)" for number in range(9)],
    ):
        assert num_persons(names) == len(names)
        assert not list(copy_groups(names))
    channels = [f"case_{number:03d}_000{channel}" for number in range(9) for channel in range(2)]
    assert num_persons(channels) == 9


def test_frames_of_a_cvat_video_are_one_patient():
    assert num_persons(f"task_{10 * number}_{name}" for number, name in enumerate(FRAMES)) == 4
    assert num_persons(f"{patient}/frame_{frame:06d}" for patient, frame in PLACES) == 4
    assert num_persons(f"task_3/data/frame_{frame:06d}" for frame in range(9)) == 1
    (person,) = {one.person for one in identify(["LI_MING(0123456789)_1-2/frame_000001"])[0].values()}
    assert person == "id:0123456789"
    assert num_persons(f"default/frame_{frame:06d}" for frame in range(9)) == 9  # a folder of CVAT's own


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (timed("{patient}_{time}"), 4),
        (timed("{patient}_{time}_frame_{frame:06d}"), 4),
        (timed("{time}_{patient}_frame_{frame:06d}"), 4),
        (timed("{patient}_{time}000_frame_{frame:06d}"), 4),  # in ms
        (timed("{time}"), 16),
        (timed("LI_MING({time})_1-2_3_0A1B2C3D_frame_{frame:06d}"), 16),  # the forms of hospitals hold IDs
        (timed("LI_MING_{time}_1-2_3_0A1B2C3D_frame_{frame:06d}"), 16),
        (timed("LI_MING_{time}__{frame}"), 16),
        (timed("ANON_{time}_frame_{frame:06d}", first=1_000_000_000), 16),  # before 2010
        ([f"{UID}.{number}" for number in range(9)], 9),
        ([f"{UID}.{patient}_frame_{frame}" for patient in range(4) for frame in range(4)], 4),
        ([f"{patient}_{UID}.{frame}_frame_{frame}" for patient, frame in PLACES], 4),
        ([hash_with_ten_digits(number) for number in range(9)], 9),
        ([f"{patient}_{hash_with_ten_digits(frame)}_frame_{frame}" for patient, frame in PLACES], 4),
    ],
)
def test_ten_digits_in_a_time_a_uid_or_a_hash_are_no_patient(names, expected):
    assert num_persons(names) == expected
    assert not any(map(is_impersonal, names))  # whoever has the files of the hospital can find the patient


def patients_alone(names):
    return {name: identity.person for name, identity in identify(names)[0].items()}


def test_frames_that_are_a_patient_each_are_seen_and_single_images_are_not():
    for names, groups in (
        (NUMBERED, 4),
        ([form.format(name) for name in NUMBERED for form in ("{}", "{}_flip")], 4),
        ([f"{code(name, 8)}-{name}" for name in NUMBERED], 4),
        ([f"{number:08d}-{name}" for number, name in enumerate(FRAMES)], 4),  # an unknown prefix
        ([f"frame_{number:06d}" for number in range(9)], 1),
        ([f"{UID}.{number}" for number in range(9)], 1),
        (timed("{time}"), 1),
        (timed("IMG_{time}"), 1),
    ):
        assert len(lone_frames(patients_alone(names))) == groups, names
    for names in (
        [f"train_{number:03d}" for number in range(9)],
        [f"{number:02d}_{'test' if number < 21 else 'training'}" for number in range(1, 41)],
        [f"im{number:04d}" for number in range(1, 9)],  # STARE
        [f"Image_{number:02d}{eye}" for number in range(1, 9) for eye in "LR"],
        [f"{number:02d}_{kind}" for number in range(1, 9) for kind in ("dr", "g", "h")],  # HRF
        [f"{number}_{kind}" for number in range(1, 9) for kind in "ADGN"],  # FIVES
        [str(number) for number in range(10001, 10010)],
        [f"patient_{number:02d}" for number in range(9)],
        [f"ANON({number:010d})_1-2_3_0A1B2C3D_frame_000011" for number in range(9)],
        FRAMES,
    ):
        assert lone_frames(patients_alone(names)) == [], names


def write_root(root, names, picture=None):
    for number, name in enumerate(names):
        mask = draw_mask(number % 4)
        image = np.where(mask, 70, 160) + np.random.default_rng(number).integers(-20, 20, mask.shape)
        image = image.astype(np.uint8) if picture is None else picture(number)
        write_image(root / "images" / f"{name}.png", image)
        write_image(root / "masks" / f"{name}.png", mask)
    return root


@pytest.mark.parametrize("unit", ["patient", "frame"])
@pytest.mark.parametrize("pattern", [None, r"(?P<patient>[^/]+)$"])  # every file a patient
def test_copies_of_one_picture_never_lie_on_two_sides(tmp_path: Path, pattern: str | None, unit: str) -> None:
    generator, source_of = random.Random(0), {}
    for name in [f"{number:02d}_test" for number in range(1, 13)]:
        for form in generator.sample(["{}", "{}_flip", "{} - Copy", "{}_png.rf." + code(name, 32)], 3):
            source_of[form.format(name)] = name
    samples = find_samples(write_root(tmp_path, source_of), pattern)
    for seed in range(20):
        split = split_by_patient(samples, seed, unit=unit)
        subsets = (split.train, split.val, split.test)
        sides = [{source_of[s.image_path.stem] for s in subset} for subset in subsets]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 12


def test_an_alias_file_does_not_part_copies_of_one_picture(tmp_path: Path) -> None:
    aliases = tmp_path / "aliases.csv"
    aliases.write_text("file_name,patient\n7,a\n7_flip,b\n8,c\n")
    found, _ = identify(["7", "7_flip", "8"], aliases=aliases)
    assert found["7"].person == found["7_flip"].person != found["8"].person


def codes(root, **options):
    return Counter(finding.code for finding in check_data(root, **options).findings)


def test_the_check_warns_of_patients_that_are_not_kept_apart(tmp_path: Path) -> None:
    root = write_root(tmp_path / "numbered", NUMBERED)
    (finding,) = [one for one in check_data(root).findings if one.code == "lone_frames"]
    assert (finding.severity, finding.count) == ("warning", 16)
    assert "16 of 16 patients have one image" in finding.message
    assert "in 4 groups" in finding.message
    assert "anna" not in finding.message
    advice = finding.message.split("'")[1]
    assert check_data(root, advice).counts["patients"] == 4
    assert "lone_frames" not in codes(root, patient_pattern=advice)
    assert codes(root, patient_pattern=r"(?P<patient>.+)")["lone_frames"] == 1
    one = write_root(tmp_path / "one", [f"anna_frame_{number}" for number in range(4)])
    (finding,) = [one for one in check_data(one).findings if one.code == "one_patient"]
    assert "images that all count as one patient: 4." in finding.message.lower()
    assert not codes(write_root(tmp_path / "sound", FRAMES[:8])) & Counter(["lone_frames", "one_patient"])


def test_the_check_compares_images_of_different_patients(tmp_path: Path) -> None:
    pictures = [draw_sequence(TARGET, patient, 1, 1, size=256, seed=11)[0][0] for patient in range(1, 6)]
    pictures.append(np.uint8(pictures[1] * 0.7))  # the second once more, of another patient
    names = [f"{name}_frame_000001" for name in (*PEOPLE, "emil", "fritz")]
    for number, name in enumerate(names):
        write_image(tmp_path / "images" / f"{name}.png", pictures[number])
        write_image(tmp_path / "masks" / f"{name}.png", np.eye(256, dtype=bool))
    report = check_data(tmp_path)
    key_of = {sample.image_path.stem: sample.key for sample in find_samples(tmp_path)}
    assert [{*pair[:2]} for pair in report.near_duplicates] == [{key_of[names[1]], key_of[names[5]]}]
    (finding,) = [one for one in report.findings if one.code == "near_duplicate"]
    assert finding.severity == "warning"
    assert all(key_of[name] in finding.message for name in (names[1], names[5]))
    assert not [name for name in ("boris", "fritz") if name in report.to_json()]
    Image.fromarray(pictures[1]).save(tmp_path / "images" / f"{names[5]}.png")  # the same pixels: said once
    assert codes(tmp_path) == {"duplicate_image": 1}


def test_the_name_of_the_source_keeps_its_folder_and_forms():
    names = ["p1/001", "p1/001 (1)", "p2/001 (1)", "train/a_png.rf.0123abcd", "valid/a_png.rf.4567abcd"]
    sources = [source for source, _ in source_names(names).values()]
    assert sources == ["p1/001", "p1/001", "p2/001", "train/a", "valid/a"]
    assert list(copy_groups(names)) == [names[:2], names[3:]]
