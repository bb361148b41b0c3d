"""File names and alias files: whose an image is; pseudonyms that stay, and who may read the mapping file."""

import hashlib
import json
import logging
import os
import random
import re
import stat
from fnmatch import fnmatch

import numpy as np
import pytest

from tests.data.test_formats import write_image
from tests.golden.broken_input import bars
from vesselrl.data.check import check_data
from vesselrl.data.patients import is_impersonal, parse_by_pattern, parse_name
from vesselrl.data.pseudonyms import MAPPING_FILE, PseudonymMap, identify, pseudonyms, read_aliases
from vesselrl.errors import DataError

TAIL = "1-2_3_0A1B2C3D_frame_000011"
WITH_ID = [
    f"LI_MING(0123456789)_{TAIL}",
    f"LI_MING^(0123456789)_{TAIL}",
    f"LI_MING_0123456789__{TAIL}",
    f"LI-MING（0123456789）_{TAIL}",  # noqa: RUF001  full-width brackets
    f"0123456789_{TAIL}",
    f"deep/folder/李明__0123456789__{TAIL}",
]
WITHOUT_ID = {
    "Zhang San frame 000011": "name:zhangsan",
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


@pytest.fixture
def aliases(tmp_path):
    """A function that writes an alias file from its lines, `file name,patient`."""

    def write(*lines):
        path = tmp_path / "aliases.csv"
        path.write_text("\n".join(["file_name,patient", *lines]) + "\n", encoding="utf-8")
        return path

    return write


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


FRAMES = [
    f"NAME_{chr(ord('A') + patient)}({1234567890 + patient})_1-{sequence}_3_0A1B2C3D_frame_{frame:06d}"
    for patient in range(12)
    for sequence in (1, 2)
    for frame in range(3)
]
# Three patients, in every way of writing them.
HOSPITAL = [
    "LI_MING(0123456789)_1-2_3_0A1B2C3D_frame_000011",
    "LI MING^(0123456789) 1-2 3 0A1B2C3D frame 000012",
    "Ming Li__0123456789__1-3_3_0A1B2C3E_frame_000001",
    "li_ming_frame_000044",
    "WANG_WEI_1111111111__1-1_1_FFFFFFFF_frame_000001",
    "WANG_WEI_2222222222__1-1_1_FFFFFFFF_frame_000001",
]


@pytest.fixture
def mapping(tmp_path):
    return tmp_path / MAPPING_FILE


def keys(names, **options):
    return {name: alias.key for name, alias in pseudonyms(names, **options).items()}


def patient_of(key):
    return key.split("_")[0]


def reading(mapping):
    return json.loads(mapping.read_text(encoding="utf-8"))["readings"][""]


def test_one_person_in_all_spellings_and_two_with_one_name(caplog):
    caplog.set_level(logging.INFO)
    result = pseudonyms(HOSPITAL)
    patients = [result[name].patient for name in HOSPITAL]
    assert (len(set(patients[:4])), len(set(patients))) == (1, 3)
    first, second, third, *_ = (result[name].sequence for name in HOSPITAL)
    assert first == second != third
    # A bare name with two IDs stays apart.
    assert len({alias.patient for alias in pseudonyms([*HOSPITAL, "wang_wei_frame_1"]).values()}) == 4
    assert "1 names occur with more than one ID" in caplog.text
    assert "wang" not in caplog.text.lower()


def test_keys_are_unique_and_hold_no_name_and_no_id():
    names = [
        *HOSPITAL,
        "LI_MING__0123456789__1-2_3_0A1B2C3D_frame_000011",  # the same frame under another spelling
        "zhao_frame_1234567890123",  # too long for a frame number
        *[f"sun(0000000007)_x{i}" for i in range(3)],  # no frame number
    ]
    result = pseudonyms(names)
    found = [alias.key for alias in result.values()]
    assert len(set(found)) == len(names)
    assert all(re.fullmatch(r"P\d{3}_S\d+_F\d{4}b?", key) for key in found), found
    assert not re.search(r"li|ming|wang|zhao|sun|\d{10}", repr(result.values()), re.IGNORECASE)
    # Frames without a number are counted around the numbers.
    counted = pseudonyms(["p1_a", "p1_1", "p1_b", "p1_0001"], r"(?P<patient>p\d)_(?P<frame>\w+)").values()
    assert sorted(alias.frame for alias in counted) == ["F0001", "F0001b", "F0002", "F0003"]


def test_the_file_is_private_ignored_by_git_and_complete(mapping, repository):
    before = keys(FRAMES, mapping=mapping)
    assert before == keys(FRAMES[::-1])  # the same on every machine
    assert stat.S_IMODE(mapping.stat().st_mode) == 0o600
    assert [path.name for path in mapping.parent.iterdir()] == [MAPPING_FILE]
    assert {name: key for key, name in reading(mapping)["files"].items()} == before
    assert sorted(reading(mapping)["patients"].values()) == [f"id:{1234567890 + i}" for i in range(12)]
    patterns = (repository / ".gitignore").read_text().splitlines()
    assert any(fnmatch(MAPPING_FILE, pattern) for pattern in patterns)
    assert not re.search("NAME|1234567", repr(PseudonymMap(**reading(mapping))))


def test_added_and_removed_files_change_no_key(mapping):
    generator = random.Random(0)
    for _ in range(15):
        mapping.unlink(missing_ok=True)
        names = generator.sample(FRAMES, generator.randint(1, len(FRAMES) - 1))
        before = keys(names, mapping=mapping)
        after = keys(FRAMES, mapping=mapping)
        assert after.items() >= before.items()
        assert len(set(after.values())) == len(FRAMES)
        assert len(set(map(patient_of, after.values()))) == 12
    keys(FRAMES[6:], mapping=mapping)
    other = "NAME_Z(9999999999)_1-1_3_0A1B2C3D_frame_000001"
    assert patient_of(keys([*FRAMES[6:], other], mapping=mapping)[other]) == "P013"
    assert keys(FRAMES, mapping=mapping) == after


def test_numbers_do_not_follow_the_hashes_that_anyone_can_make(mapping):
    """Who knows all patients, but not all file names, cannot find out the numbers."""
    found, other = keys(FRAMES[::6], mapping=mapping), mapping.with_name("b.mapping.json")
    people = [name[7:17] for name in sorted(found, key=found.get)]
    assert people != sorted(people)
    assert people != sorted(people, key=lambda person: hashlib.sha256(f"id:{person}".encode()).hexdigest())
    keys(FRAMES[1:], mapping=other)
    assert [len(salt) for salt in {reading(mapping)["salt"], reading(other)["salt"]}] == [64, 64]


def test_an_alias_keeps_the_numbers_of_the_others(mapping, aliases):
    before = keys(FRAMES, mapping=mapping)
    csv = aliases(f"{FRAMES[0]},x", f"{FRAMES[6]},x")  # persons 1 and 2 are one
    after = keys(FRAMES, aliases=csv, mapping=mapping)
    assert [after[name] for name in FRAMES[12:]] == [before[name] for name in FRAMES[12:]]
    (joined,) = {patient_of(after[name]) for name in FRAMES[:12]}
    assert joined in {patient_of(before[FRAMES[0]]), patient_of(before[FRAMES[6]])}
    assert len(set(after.values())) == len(FRAMES)
    # The same with, without, and again with the alias file.
    for _ in range(2):
        assert keys(FRAMES, mapping=mapping) == before
        assert keys(FRAMES, aliases=csv, mapping=mapping) == after
    assert reading(mapping)["files"].keys() == {*before.values(), *after.values()}


def test_the_key_of_a_file_that_moved_is_never_given_out_again(mapping, aliases):
    names = ["li_ming_frame_000001", "li_ming_frame_000002"]
    before = keys(names, mapping=mapping)
    rows = [f"{names[0]},a", f"{names[1]},b"]  # two people of one name
    apart = keys(names, aliases=aliases(*rows), mapping=mapping)
    ((moved, _),) = apart.items() - before.items()
    ((stayed, letter),) = (row.split(",") for row in rows if not row.startswith(moved))
    assert apart[stayed] == before[stayed]
    added = f"LI__MING_frame_{moved[-6:]}"
    later = keys([*names, added], aliases=aliases(*rows, f"{added},{letter}"), mapping=mapping)
    assert later == apart | {added: f"{before[moved]}b"}


def test_keys_can_be_read_without_writing_any_and_an_open_file_is_closed(mapping, caplog):
    assert keys(FRAMES, mapping=mapping, keep="nothing") == keys(FRAMES)
    assert not mapping.exists()
    before = keys(FRAMES[:9], mapping=mapping)
    text, state = mapping.read_bytes(), mapping.stat()
    found = keys(FRAMES, mapping=mapping, keep="nothing")
    keys(FRAMES[3:9], mapping=mapping)  # nothing is new
    assert (mapping.read_bytes(), mapping.stat().st_ino) == (text, state.st_ino)
    assert found.items() >= before.items()
    mapping.chmod(0o644)
    assert keys(FRAMES, mapping=mapping) == found
    assert stat.S_IMODE(mapping.stat().st_mode) == 0o600
    assert "was open to other users (mode 644)" in caplog.text


def test_impersonal_names_keep_their_keys_only_where_that_was_asked_for(mapping, aliases):
    names = [f"train_{i:03d}" for i in range(9)]
    assert keys(names, mapping=mapping) == keys(names)
    assert not mapping.exists()
    salted = mapping.with_name("salted.mapping.json")
    keys(names, aliases=aliases(f"{names[0]},LI MING"), mapping=salted)
    assert keys(names[1:], mapping=salted) == keys(names[1:]), "a salted map is none of theirs"
    before = keys(names, mapping=mapping, keep="all")
    assert before == keys(names)
    after = keys(names[1:], mapping=mapping)
    assert after.items() <= before.items()
    assert after != keys(names[1:])
    # People that join them are not numbered by hashes that anyone can make.
    keys([*names, *FRAMES], mapping=mapping)
    assert len(reading(mapping)["salt"]) == 64


def test_a_folder_that_cannot_be_written_is_no_error(mapping, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    expected, create = keys(FRAMES), os.open
    monkeypatch.setattr(os, "open", lambda *_: create(mapping, os.O_RDONLY))  # there is no such file
    assert keys(FRAMES, mapping=mapping) == expected
    assert list(mapping.parent.iterdir()) == []
    assert "patients.mapping.json cannot be written (No such file or directory)" in caplog.text
    assert "NAME" not in caplog.text


EMPTY = {"salt": "", "patients": {}, "sequences": {}, "files": {}}
WRONG = [{}, EMPTY | {"patients": {"x": ""}}, EMPTY | {"files": {"P001_S1_F1": 1}}, EMPTY | {"salt": 1}]


@pytest.mark.parametrize("content", ["{", "[]", *(json.dumps({"readings": {"": wrong}}) for wrong in WRONG)])
def test_damaged_files(mapping, content):
    mapping.write_text(content)
    with pytest.raises(DataError, match="is damaged" if content == "{" else "is no mapping file"):
        keys(FRAMES, mapping=mapping)
    assert mapping.read_text() == content
