"""File names: whose they are, which may be shown, and how an alias file joins spellings of one person."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.data.broken_roots import draw_mask
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
    found = (identity.person, identity.sequence, identity.frame)
    assert found == ("id:0123456789", "1-2_3_0a1b2c3d", "000011")
    assert names_a_person(name)


@pytest.mark.parametrize(
    ("name", "person", "sequence"),
    [
        ("zhangsan_frame_000011", "name:zhangsan", ""),
        ("Zhang San frame 000011", "name:zhangsan", ""),
        ("ZHANG__SAN__frame_000011", "name:zhangsan", ""),
        ("张三_frame_000011", "name:张三", ""),
        ("Jürgen_Großmann_frame_000011", "name:jürgengrossmann", ""),
        (f"zhang_san_{TAIL}", "name:zhangsan", "1-2_3_0a1b2c3d"),
        ("li_01234567890_frame_000011", "name:li01234567890", ""),  # eleven digits are no ID
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
    assert not names_a_person(name)


@pytest.mark.parametrize(
    "names",
    [
        [f"Image_{i:02d}{eye}" for i in range(1, 15) for eye in "LR"],  # CHASE_DB1
        [f"{i:02d}{eye}" for i in range(1, 15) for eye in "LR"],
        [f"{'train' if i < 11 else 'test'}_{i:02d}{eye}" for i in range(1, 15) for eye in "LR"],
        [f"{i}_{eye}" for i in range(1, 15) for eye in ("left", "Right")],
        [f"eyes/{i:02d}{eye}" for i in range(1, 15) for eye in "LR"],
    ],
)
def test_both_eyes_of_a_child_are_one_patient(names):
    result = pseudonyms(names)
    assert len({alias.patient for alias in result.values()}) == 14
    assert len({alias.key for alias in result.values()}) == 28
    for left, right in zip(names[::2], names[1::2], strict=True):
        assert result[left].patient == result[right].patient
        assert (result[left].sequence[-3:], result[right].sequence[-3:]) == ("_S1", "_S2")
    apart = ["a/01L", "a/01R", "b/01L", "b/01R", "train_01L", "test_01L"]  # numbers that begin anew
    assert len({alias.patient for alias in pseudonyms(apart).values()}) == 4


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


def test_which_names_may_be_shown():
    shown = ["train_001", "007", "07L", "img-12", "test_11R", "Frame 3", "21_training"]
    hidden = ["zhang_001", "0123456789", "li ming", "train_zhang", "zhang_frame_000001", "L"]
    assert [name for name in (*shown, *hidden) if is_impersonal(name)] == shown


# ---- The alias file

NAMES = [
    *[f"zhang_san_frame_{i:06d}" for i in range(3)],
    *[f"ZHANGSAN2_frame_{i:06d}" for i in range(3)],
    "WANG_WEI(1111111111)_1-2_3_0A1B2C3D_frame_000001",
    "WANG_WEI(2222222222)_1-2_3_0A1B2C3D_frame_000002",
    "slide x",
]


@pytest.fixture
def aliases(tmp_path):
    """A function that writes an alias file from its lines."""

    def write(*lines, header="file_name,patient"):
        path = tmp_path / "aliases.csv"
        path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        return path

    return write


def persons(names, path, pattern=None):
    found, _ = identify(sorted(names), pattern, path)
    return [found[name].person for name in names]


def test_one_row_for_each_spelling_joins_all_files_of_it(aliases):
    path = aliases("zhang_san_frame_000001.jpg,Patient A", "images/ZHANGSAN2_frame_000002.png,patient a")
    found = persons(NAMES, path)
    assert len(set(found[:6])) == 1
    assert len(set(found)) == 4
    assert len({alias.key for alias in pseudonyms(NAMES, aliases=path).values()}) == len(NAMES)


@pytest.mark.parametrize(
    ("row", "index"),
    [
        ("ZHANGSAN2_frame_000000,Zhang San", 0),  # the name of other files
        ("slide x.png,zhang_san", 0),
        ("slide x,1111111111", 6),  # the ID of other files
        ('"slide x","Wang, Wei (2222222222)"', 7),
    ],
)
def test_a_patient_may_be_the_name_or_the_id_of_other_files(aliases, row, index):
    found = persons(NAMES, aliases(row))
    assert found[NAMES.index("slide x") if "slide" in row else 3] == found[index]
    assert len(set(found)) == 4


def test_a_name_whose_files_have_an_id_and_a_pattern(aliases):
    names = ["LI_MING(0123456789) export 7", "lm_frame_000002"]
    assert len(set(persons(names, None))) == 2
    assert len(set(persons(names, aliases("lm_frame_000002,Li Ming")))) == 1
    one, two, three = persons(["p1_a", "p2_b", "p3_c"], aliases("p3_c,p1"), r"(?P<patient>p\d)_")
    assert one == three != two


def test_one_person_with_two_ids_and_chains(aliases):
    rows = [f"{NAMES[6]},W", f"{NAMES[7]},W", "slide x,zhangsan2", f"{NAMES[3]},zhang san"]
    found = persons(NAMES, aliases(*rows))
    assert found[6] == found[7]
    assert len({*found[:6], found[8]}) == 1
    assert len(set(found)) == 2


def test_two_people_of_one_name_need_a_row_for_each_file(aliases):
    rows = [f"{NAMES[0]},a", f"{NAMES[1]},b", f"{NAMES[2]},b"]
    found = persons(NAMES, aliases(*rows))
    assert found[0] != found[1] == found[2]
    with pytest.raises(DataError, match=r"aliases.csv lines 2, 3 give .* leave out 1 more of its files"):
        persons(NAMES, aliases(*rows[:2]))


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        ([], "file_name,patient", "aliases.csv names no file"),
        (["a,b"], "file,person", "aliases.csv line 1 is not the header"),
        (["slide x,a", "only one field"], "file_name,patient", "aliases.csv line 3 has 1 fields"),
        (["", "slide x,"], "file_name,patient", "aliases.csv line 3 has 2 fields, or an empty one"),
        (["slide x,a", "LI MING.jpg,a"], "file_name,patient", "aliases.csv line 3 names no image"),
        (["slide x,a", "slide x.png,b"], "file_name,patient", "lines 2 and 3 give one image to two"),
    ],
)
def test_faults_name_the_line_and_nobody(aliases, lines, header, message):
    with pytest.raises(DataError) as raised:
        identify(NAMES, aliases=aliases(*lines, header=header))
    assert message in str(raised.value)
    assert not re.search("slide|ming", str(raised.value), re.IGNORECASE)


def test_reading_an_alias_file(tmp_path):
    for path in (tmp_path / "gone.csv", tmp_path):
        with pytest.raises(DataError, match="There is no alias file"):
            read_aliases(path)
    path = tmp_path / "a.csv"
    path.write_bytes("file_name,patient\nx,y\nx,李\n".encode("gbk"))
    with pytest.raises(DataError, match=r"a\.csv line 3 is not UTF-8"):
        read_aliases(path)
    path.write_text("\ufefffile_name,patient\r\nx.png, LI MING \r\n", encoding="utf-8")
    rows = read_aliases(path)
    assert [(row.line, row.file_name, row.patient) for row in rows] == [(2, "x.png", "LI MING")]
    assert "MING" not in repr(rows) + repr(parse_name("LI MING_frame_1"))


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
        grey = np.full((64, 64), number, np.uint8)
        for folder, pixels in (("images", grey), ("masks", draw_mask(number % 4))):
            path = tmp_path / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    found = [finding for finding in check_data(tmp_path).findings if finding.code == "patients"]
    assert bool(found) == warned
    if warned:
        assert "Each of 4 images counts as a patient of its own, but 4 of them share 2" in found[0].message
        report = check_data(tmp_path, patient_pattern=found[0].message.split("'")[1])
        assert (report.counts["patients"], report.findings) == (2, ())
