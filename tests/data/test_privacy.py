"""The mapping file: keys that stay, who may read it, and what happens where it cannot be written."""

import hashlib
import json
import logging
import os
import random
import stat
from fnmatch import fnmatch

import pytest

from vesselrl.data.patients import pseudonyms
from vesselrl.data.privacy import MAPPING_FILE, Numbering
from vesselrl.errors import DataError

NAMES = [
    f"NAME_{chr(ord('A') + patient)}({1234567890 + patient})_1-{sequence}_3_0A1B2C3D_frame_{frame:06d}"
    for patient in range(12)
    for sequence in (1, 2)
    for frame in range(3)
]


@pytest.fixture
def mapping(tmp_path):
    return tmp_path / MAPPING_FILE


def keys(names, **options):
    return {name: alias.key for name, alias in pseudonyms(names, **options).items()}


def test_the_file_is_private_ignored_by_git_and_complete(mapping, repository):
    before = keys(NAMES, mapping=mapping)
    assert stat.S_IMODE(mapping.stat().st_mode) == 0o600
    assert [path.name for path in mapping.parent.iterdir()] == [MAPPING_FILE]
    reading = json.loads(mapping.read_text(encoding="utf-8"))["readings"][""]
    assert {name: key for key, name in reading["files"].items()} == before
    assert sorted(reading["patients"].values()) == [f"id:{1234567890 + patient}" for patient in range(12)]
    patterns = (repository / ".gitignore").read_text().splitlines()
    assert any(fnmatch(MAPPING_FILE, pattern) for pattern in patterns)


def test_added_files_change_no_key(mapping):
    generator = random.Random(0)
    for _ in range(30):
        mapping.unlink(missing_ok=True)
        names = generator.sample(NAMES, generator.randint(1, len(NAMES) - 1))
        before = keys(names, mapping=mapping)
        after = keys(NAMES, mapping=mapping)
        assert {name: after[name] for name in names} == before
        assert len(set(after.values())) == len(NAMES)
        assert len({key.split("_")[0] for key in after.values()}) == 12


def test_new_patients_get_the_next_numbers(mapping):
    before = keys(NAMES[:36], mapping=mapping)
    assert {key[:4] for key in before.values()} == {f"P{i:03d}" for i in range(1, 7)}
    after = keys(NAMES, mapping=mapping)
    assert {after[name][:4] for name in NAMES[36:]} == {f"P{i:03d}" for i in range(7, 13)}


def test_a_removed_file_leaves_its_key_to_itself(mapping):
    before = keys(NAMES, mapping=mapping)
    keys(NAMES[6:], mapping=mapping)
    other = "NAME_Z(9999999999)_1-1_3_0A1B2C3D_frame_000001"
    assert keys([*NAMES[6:], other], mapping=mapping)[other].split("_")[0] == "P013"
    assert keys(NAMES, mapping=mapping) == before


def test_the_same_data_has_the_same_keys_on_every_machine(mapping, tmp_path):
    other = tmp_path / "other.mapping.json"
    assert keys(NAMES, mapping=mapping) == keys(NAMES[::-1], mapping=other) == keys(NAMES)
    assert mapping.read_bytes() == other.read_bytes()


def test_numbers_do_not_follow_the_hashes_that_anyone_can_make(mapping):
    """Who knows all patients, but not all file names, cannot find out the numbers."""
    result = pseudonyms(NAMES, mapping=mapping)
    hashes = {name: hashlib.sha256(f"id:{name[7:17]}".encode()).hexdigest() for name in NAMES}
    assert all(name[7:17].isdigit() for name in NAMES)
    order = sorted({(result[name].patient, hashes[name]) for name in NAMES})
    assert [digest for _, digest in order] != sorted(set(hashes.values()))
    salts = {json.loads(mapping.read_text())["readings"][""]["salt"]}
    pseudonyms(NAMES[1:], mapping=mapping.with_name("b.mapping.json"))
    salts.add(json.loads(mapping.with_name("b.mapping.json").read_text())["readings"][""]["salt"])
    assert len(salts) == 2
    assert all(len(salt) == 64 for salt in salts)


def test_another_pattern_has_numbers_of_its_own(mapping):
    names = [f"{name}_{eye}" for name in ("zhang", "li", "wang", "zhao", "sun", "chen") for eye in "LR"]
    plain = keys(names, mapping=mapping)
    by_name = keys(names, patient_pattern=r"(?P<patient>[a-z]+)_", mapping=mapping)
    assert len({key[:4] for key in plain.values()}) == 12
    assert by_name == keys(names, patient_pattern=r"(?P<patient>[a-z]+)_") != plain
    assert keys(names, mapping=mapping) == plain


def test_an_alias_keeps_the_numbers_of_the_others(mapping, tmp_path):
    before = keys(NAMES, mapping=mapping)
    csv = tmp_path / "aliases.csv"
    csv.write_text(f"file_name,patient\n{NAMES[0]},x\n{NAMES[6]},x\n")  # persons 1 and 2 are one
    after = keys(NAMES, aliases=csv, mapping=mapping)
    assert {name: after[name] for name in NAMES[12:]} == {name: before[name] for name in NAMES[12:]}
    joined = {after[name].split("_")[0] for name in NAMES[:12]}
    assert len(joined) == 1
    assert joined < {before[NAMES[0]].split("_")[0], before[NAMES[6]].split("_")[0]}
    assert len(set(after.values())) == len(NAMES)
    assert keys(NAMES, aliases=csv, mapping=mapping) == after


def test_the_key_of_a_file_that_moved_is_never_given_out_again(mapping, tmp_path):
    names = ["li_ming_frame_000001", "li_ming_frame_000002"]
    before = keys(names, mapping=mapping)
    csv = tmp_path / "aliases.csv"
    csv.write_text(f"file_name,patient\n{names[0]},a\n{names[1]},b\n")  # two people of one name
    apart = keys(names, aliases=csv, mapping=mapping)
    moved = next(name for name in names if apart[name] != before[name])
    stayed = next(name for name in names if name != moved)
    assert apart[stayed] == before[stayed]
    added = f"LI__MING_frame_{moved[-6:]}"
    with csv.open("a") as file:
        file.write(f"{added},{'a' if stayed == names[0] else 'b'}\n")
    later = keys([*names, added], aliases=csv, mapping=mapping)
    assert later[added] == f"{before[moved]}b"
    assert {name: later[name] for name in names} == apart


def test_keys_are_the_same_with_without_and_again_with_an_alias_file(mapping, tmp_path):
    names = ["li_ming_frame_000001", "ming_li_frame_000001", "wang_fang_frame_000001"]
    csv = tmp_path / "aliases.csv"
    csv.write_text(f"file_name,patient\n{names[0]},x\n{names[1]},x\n")
    joined = keys(names, aliases=csv, mapping=mapping)
    apart = keys(names, mapping=mapping)
    assert [len({key[:4] for key in found.values()}) for found in (joined, apart)] == [2, 3]
    for _ in range(2):
        assert keys(names, aliases=csv, mapping=mapping) == joined
        assert keys(names, mapping=mapping) == apart
    known = json.loads(mapping.read_text())["readings"][""]["files"]
    assert known.keys() == {*joined.values(), *apart.values()}


def test_keys_can_be_read_without_writing_any(mapping):
    assert keys(NAMES, mapping=mapping, keep="nothing") == keys(NAMES)
    assert not mapping.exists()
    before = keys(NAMES[:9], mapping=mapping)
    text = mapping.read_bytes()
    found = keys(NAMES, mapping=mapping, keep="nothing")
    assert mapping.read_bytes() == text
    assert found.items() >= before.items()
    assert keys(NAMES, mapping=mapping) == found


def test_impersonal_names_keep_their_keys_only_where_that_was_asked_for(mapping, tmp_path):
    names = [f"train_{i:03d}" for i in range(9)]
    csv = tmp_path / "aliases.csv"
    csv.write_text("file_name,patient\ntrain_000,LI MING\n")
    salted = mapping.with_name("salted.mapping.json")
    keys(names, aliases=csv, mapping=salted)
    assert keys(names[1:], mapping=salted) == keys(names[1:]), "a salted numbering is none of theirs"
    before = keys(names, mapping=mapping, keep="all")
    assert before == keys(names)
    after = keys(names[1:], mapping=mapping)
    assert after.items() <= before.items()
    assert after != keys(names[1:])
    # People that join them are not numbered by hashes that anyone can make.
    keys([*names, *NAMES], mapping=mapping)
    assert len(json.loads(mapping.read_text())["readings"][""]["salt"]) == 64


def test_impersonal_names_need_no_file(mapping):
    result = keys([f"train_{i:03d}" for i in range(9)], mapping=mapping)
    assert result == keys([f"train_{i:03d}" for i in range(9)])
    assert not mapping.exists()


def test_a_folder_that_cannot_be_written_is_no_error(mapping, monkeypatch, caplog):
    caplog.set_level(logging.INFO)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        result = keys(NAMES, mapping=mapping)
    assert result == keys(NAMES)
    assert not mapping.exists()
    assert "patients.mapping.json cannot be written (Read-only file system)" in caplog.text
    assert "NAME" not in caplog.text


def test_nothing_is_written_when_nothing_is_new(mapping):
    keys(NAMES, mapping=mapping)
    before = mapping.stat().st_mtime_ns, mapping.stat().st_ino
    keys(NAMES[3:], mapping=mapping)
    assert (mapping.stat().st_mtime_ns, mapping.stat().st_ino) == before


def test_an_open_file_is_closed(mapping, caplog):
    keys(NAMES, mapping=mapping)
    mapping.chmod(0o644)
    keys(NAMES, mapping=mapping)
    assert stat.S_IMODE(mapping.stat().st_mode) == 0o600
    assert "was open to other users (mode 644)" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is no mapping file"),
        ('{"readings": {"": {}}}', "is no mapping file"),
        (
            '{"readings": {"": {"salt": "", "patients": {"x": ""}, "sequences": {}, "files": {}}}}',
            "is no map",
        ),
        (
            '{"readings": {"": {"salt": "", "patients": {}, "sequences": {}, "files": {"P001_S1_F1": 1}}}}',
            "is no",
        ),
        (
            '{"readings": {"": {"salt": 1, "patients": {}, "sequences": {}, "files": {}}}}',
            "is no mapping file",
        ),
    ],
)
def test_damaged_files(mapping, content, message):
    mapping.write_text(content)
    with pytest.raises(DataError, match=message):
        keys(NAMES, mapping=mapping)
    assert mapping.read_text() == content


def test_repr_shows_nothing(mapping):
    keys(NAMES, mapping=mapping)
    reading = json.loads(mapping.read_text())["readings"][""]
    assert repr(Numbering(**reading)) == "Numbering()"
