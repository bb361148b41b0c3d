"""Pseudonyms and the mapping file: keys that stay, hold no name, and whoever may read them."""

import hashlib
import json
import logging
import os
import random
import re
import stat
from fnmatch import fnmatch

import pytest

from vesselrl.data.pseudonyms import MAPPING_FILE, PseudonymMap, pseudonyms
from vesselrl.errors import DataError

NAMES = [
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
    assert result[HOSPITAL[0]].key == f"{first}_F0011"
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
    before = keys(NAMES, mapping=mapping)
    assert before == keys(NAMES[::-1])  # the same on every machine
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
        names = generator.sample(NAMES, generator.randint(1, len(NAMES) - 1))
        before = keys(names, mapping=mapping)
        after = keys(NAMES, mapping=mapping)
        assert after.items() >= before.items()
        assert len(set(after.values())) == len(NAMES)
        assert len(set(map(patient_of, after.values()))) == 12
    keys(NAMES[6:], mapping=mapping)
    other = "NAME_Z(9999999999)_1-1_3_0A1B2C3D_frame_000001"
    assert patient_of(keys([*NAMES[6:], other], mapping=mapping)[other]) == "P013"
    assert keys(NAMES, mapping=mapping) == after


def test_numbers_do_not_follow_the_hashes_that_anyone_can_make(mapping):
    """Who knows all patients, but not all file names, cannot find out the numbers."""
    found, other = keys(NAMES[::6], mapping=mapping), mapping.with_name("b.mapping.json")
    people = [name[7:17] for name in sorted(found, key=found.get)]
    assert people != sorted(people)
    assert people != sorted(people, key=lambda person: hashlib.sha256(f"id:{person}".encode()).hexdigest())
    keys(NAMES[1:], mapping=other)
    assert [len(salt) for salt in {reading(mapping)["salt"], reading(other)["salt"]}] == [64, 64]


def test_an_alias_keeps_the_numbers_of_the_others(mapping, aliases):
    before = keys(NAMES, mapping=mapping)
    csv = aliases(f"{NAMES[0]},x", f"{NAMES[6]},x")  # persons 1 and 2 are one
    after = keys(NAMES, aliases=csv, mapping=mapping)
    assert [after[name] for name in NAMES[12:]] == [before[name] for name in NAMES[12:]]
    (joined,) = {patient_of(after[name]) for name in NAMES[:12]}
    assert joined in {patient_of(before[NAMES[0]]), patient_of(before[NAMES[6]])}
    assert len(set(after.values())) == len(NAMES)
    # The same with, without, and again with the alias file.
    for _ in range(2):
        assert keys(NAMES, mapping=mapping) == before
        assert keys(NAMES, aliases=csv, mapping=mapping) == after
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
    assert keys(NAMES, mapping=mapping, keep="nothing") == keys(NAMES)
    assert not mapping.exists()
    before = keys(NAMES[:9], mapping=mapping)
    text, state = mapping.read_bytes(), mapping.stat()
    found = keys(NAMES, mapping=mapping, keep="nothing")
    keys(NAMES[3:9], mapping=mapping)  # nothing is new
    assert (mapping.read_bytes(), mapping.stat().st_ino) == (text, state.st_ino)
    assert found.items() >= before.items()
    mapping.chmod(0o644)
    assert keys(NAMES, mapping=mapping) == found
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
    keys([*names, *NAMES], mapping=mapping)
    assert len(reading(mapping)["salt"]) == 64


def test_a_folder_that_cannot_be_written_is_no_error(mapping, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    expected, create = keys(NAMES), os.open
    monkeypatch.setattr(os, "open", lambda *_: create(mapping, os.O_RDONLY))  # there is no such file
    assert keys(NAMES, mapping=mapping) == expected
    assert list(mapping.parent.iterdir()) == []
    assert "patients.mapping.json cannot be written (No such file or directory)" in caplog.text
    assert "NAME" not in caplog.text


EMPTY = {"salt": "", "patients": {}, "sequences": {}, "files": {}}
WRONG = [{}, EMPTY | {"patients": {"x": ""}}, EMPTY | {"files": {"P001_S1_F1": 1}}, EMPTY | {"salt": 1}]


@pytest.mark.parametrize("content", ["{", "[]", *(json.dumps({"readings": {"": wrong}}) for wrong in WRONG)])
def test_damaged_files(mapping, content):
    mapping.write_text(content)
    with pytest.raises(DataError, match="is damaged" if content == "{" else "is no mapping file"):
        keys(NAMES, mapping=mapping)
    assert mapping.read_text() == content
