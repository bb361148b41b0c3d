"""File names: whose they are, which may be shown, and how an alias file joins spellings of one person."""

import re

import numpy as np
import pytest

from tests.data.test_formats import write_image
from tests.golden.broken_input import bars
from vesselrl.data.check import check_data
from vesselrl.data.patients import (
    identify,
    is_impersonal,
    names_a_person,
    parse_by_pattern,
    parse_name,
    read_aliases,
)
from vesselrl.data.pseudonyms import pseudonyms
from vesselrl.errors import DataError

TAIL = "1-2_3_0A1B2C3D_frame_000011"
WITH_ID = [
    f"LI_MING(0123456789)_{TAIL}",
    f"LI MING (0123456789) {TAIL.replace('_', ' ')}",
    f"LI_MING^(0123456789)_{TAIL}",
    f"LI_MING_0123456789__{TAIL}",
    f"LI-MING（0123456789）_{TAIL}",  # noqa: RUF001  full-width brackets
    f"0123456789_{TAIL}",
    f"deep/folder/李明__0123456789__{TAIL}",
]
WITHOUT_ID = {
    "Zhang San frame 000011": "name:zhangsan",
    "ZHANG__SAN__frame_000011": "name:zhangsan",
    "张三_frame_000011": "name:张三",
    "Jürgen_Großmann_frame_000011": "name:jürgengrossmann",
    f"zhang_san_{TAIL}": "name:zhangsan",
    "li_01234567890_frame_000011": "name:li01234567890",  # eleven digits are no ID
}
OTHERS = ["train_001", "train_12", "a", "L", "zhang_12L", "___frame_1", "sub/train_001"]
READ = dict.fromkeys(WITH_ID, "id:0123456789") | WITHOUT_ID | {name: f"file:{name}" for name in OTHERS}


@pytest.mark.parametrize(("name", "person"), READ.items())
def test_what_is_read_from_a_name(name, person):
    identity = parse_name(name)
    assert identity.person == person
    assert names_a_person(name) == (name not in OTHERS)
    assert identity.sequence == ("1-2_3_0a1b2c3d" if name in WITH_ID or TAIL in name else "")
    assert identity.frame == ("" if name in OTHERS else "000011")


def test_both_eyes_of_a_child_are_one_patient():
    numbers = [f"{i:02d}{eye}" for i in range(1, 15) for eye in "LR"]
    for names in (
        [f"Image_{number}" for number in numbers],  # CHASE_DB1
        [f"{'train' if number < '11' else 'test'}_{number}" for number in numbers],
        [f"{i}_{eye}" for i in range(1, 15) for eye in ("left", "Right")],
        [f"eyes/{number}" for number in numbers],
    ):
        result = pseudonyms(names)
        assert len({alias.patient for alias in result.values()}) == 14
        assert len({alias.key for alias in result.values()}) == 28
        for left, right in zip(names[::2], names[1::2], strict=True):
            assert result[left].patient == result[right].patient
            assert (result[left].sequence[-3:], result[right].sequence[-3:]) == ("_S1", "_S2")
    apart = ["a/01L", "a/01R", "b/01L", "b/01R", "train_01L", "test_01L"]  # numbers that begin anew
    assert len({alias.patient for alias in pseudonyms(apart).values()}) == 4


def test_bad_patterns():
    for pattern, message in {
        "(": "patient_pattern is not a regular expression",
        r"(\d+)": "patient_pattern has no group (?P<patient>...)",
        r"(?P<patient>\d+)": "finds no patient in 1 of 2 file names (first: number 1 in the order",
        r"(?P<patient>\d*)": "finds no patient in 2 of 2 file names",
    }.items():
        with pytest.raises(DataError, match=re.escape(message)) as raised:
            parse_by_pattern(["x1", "li ming"], pattern)
        assert "ming" not in str(raised.value)


def test_which_names_may_be_shown():
    shown = ["train_001", "007", "07L", "img-12", "test_11R", "Frame 3", "21_training"]
    hidden = ["zhang_001", "0123456789", "li ming", "train_zhang", "zhang_frame_000001", "L"]
    assert [name for name in (*shown, *hidden) if is_impersonal(name)] == shown
    assert "ming" not in repr(parse_name("LI MING_frame_1")).lower()


ZHANG = [f"{name}_frame_{i:06d}" for name in ("zhang_san", "ZHANGSAN2") for i in range(3)]
WANG = [f"WANG_WEI({digit * 10})_1-2_3_0A1B2C3D_frame_00000{digit}" for digit in "12"]
NAMES = [*ZHANG, *WANG, "slide x"]


def persons(names, path, pattern=None):
    found, _ = identify(sorted(names), pattern, path)
    return [found[name].person for name in names]


@pytest.mark.parametrize(
    ("rows", "groups"),
    [
        ([f"{ZHANG[1]}.jpg,Patient A", f"images/{ZHANG[5]}.png,patient a"], "aaaaaabcd"),
        (["ZHANGSAN2_frame_000000,Zhang San"], "aaaaaabcd"),  # the name of other files
        (["slide x.png,zhang_san"], "aaabbbcda"),
        (["slide x,1111111111"], "aaabbbcdc"),  # the ID of other files
        (['"slide x","Wang, Wei (2222222222)"'], "aaabbbcdd"),
        ([f"{WANG[0]},W", f"{WANG[1]},W", "slide x,zhangsan2", f"{ZHANG[3]},zhang san"], "aaaaaabba"),
        ([f"{ZHANG[0]},a", f"{ZHANG[1]},b", f"{ZHANG[2]},b"], "abbcccdef"),  # two people of one name
    ],
)
def test_who_is_whom_after_the_rows(aliases, rows, groups):
    found = persons(NAMES, aliases(*rows))
    first = {person: letter for person, letter in zip(found, groups, strict=True)}
    assert "".join(first[person] for person in found) == groups
    assert len(first) == len(set(groups))
    assert len({alias.key for alias in pseudonyms(NAMES, aliases=aliases(*rows)).values()}) == len(NAMES)


def test_a_name_whose_files_have_an_id_and_a_pattern(aliases):
    names = ["LI_MING(0123456789) export 7", "lm_frame_000002"]
    assert len(set(persons(names, None))) == 2
    assert len(set(persons(names, aliases("lm_frame_000002,Li Ming")))) == 1
    one, two, three = persons(["p1_a", "p2_b", "p3_c"], aliases("p3_c,p1"), r"(?P<patient>p\d)_")
    assert one == three != two


HEADER = "file_name,patient\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,person\na,b", "line 1 is not the header"),
        (HEADER, "names no file"),
        (f"{HEADER}slide x,a\nonly one field", "line 3 has 1 fields"),
        (f"{HEADER}\nslide x,", "line 3 has 2 fields, or an empty one"),
        (f"{HEADER}slide x,a\nLI MING.jpg,a", "line 3 names no image"),
        (f"{HEADER}slide x,a\nslide x.png,b", "lines 2 and 3 give one image to two"),
        (f"{HEADER}{ZHANG[0]},a\n{ZHANG[1]},b", "lines 2, 3 give .* leave out 1 more of its files"),
        (f"{HEADER}slide x,y\nx,李", "line 3 is not UTF-8"),
    ],
)
def test_faults_name_the_line_and_nobody(tmp_path, text, message):
    path = tmp_path / "a.csv"
    with pytest.raises(DataError, match="There is no alias file"):
        read_aliases(path)
    path.write_text("\ufefffile_name,patient\r\nx.png, LI MING \r\n", encoding="utf-8")
    assert read_aliases(path) == [(2, "x.png", "LI MING")]
    path.write_bytes(text.encode("gbk"))
    with pytest.raises(DataError, match=rf"a\.csv {message}") as raised:
        identify(NAMES, aliases=path)
    assert not re.search("slide|ming|zhang", str(raised.value), re.IGNORECASE)


def test_a_folder_for_each_patient_is_not_overlooked(tmp_path):
    for files, warned in {
        "p1/001 p1/002 p2/001 p2/002": True,
        "p1/001 p2/001 p3/001": False,  # one image for each folder
        "001 002 003": False,
        "p1/001L p1/001R p2/001L": False,  # two eyes are told apart from patients
    }.items():
        root = tmp_path / files.replace("/", "").replace(" ", "")
        for number, name in enumerate(files.split()):
            write_image(root / "images" / f"{name}.png", np.full((64, 64), number, np.uint8))
            write_image(root / "masks" / f"{name}.png", bars(number))
        found = [finding for finding in check_data(root).findings if finding.code == "patients"]
        assert bool(found) == warned
        if warned:
            assert "Each of 4 images counts as a patient of its own, but 4 of them" in found[0].message
            report = check_data(root, patient_pattern=found[0].message.split("'")[1])
            assert (report.counts["patients"], report.findings) == (2, ())
