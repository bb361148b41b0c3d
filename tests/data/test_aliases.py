import re

import pytest

from vesselrl.data.aliases import read_aliases
from vesselrl.data.patients import pseudonyms
from vesselrl.errors import DataError

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


def patients(names, path):
    result = pseudonyms(names, aliases=path)
    return [result[name].patient for name in names]


def test_one_row_for_each_spelling_joins_all_files_of_it(aliases):
    path = aliases("zhang_san_frame_000001.jpg,Patient A", "images/ZHANGSAN2_frame_000002.png,patient a")
    found = patients(NAMES, path)
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
    found = patients(NAMES, aliases(row))
    changed = NAMES.index("slide x") if "slide" in row else 3
    assert found[changed] == found[index]
    assert len(set(found)) == 4


def test_a_name_whose_files_have_an_id(aliases):
    names = ["LI_MING(0123456789)_1-2_3_0A1B2C3D_frame_000001", "lm_frame_000002"]
    assert len(set(patients(names, None))) == 2
    assert len(set(patients(names, aliases("lm_frame_000002,Li Ming")))) == 1


def test_one_person_with_two_ids_and_chains(aliases):
    found = patients(
        NAMES, aliases(f"{NAMES[6]},W", f"{NAMES[7]},W", "slide x,zhangsan2", f"{NAMES[3]},zhang san")
    )
    assert found[6] == found[7]
    assert len({*found[:6], found[8]}) == 1
    assert len(set(found)) == 2


def test_two_people_of_one_name_need_a_row_for_each_file(aliases):
    rows = [f"{NAMES[0]},a", f"{NAMES[1]},b", f"{NAMES[2]},b"]
    found = patients(NAMES, aliases(*rows))
    assert found[0] != found[1] == found[2]
    with pytest.raises(DataError, match=r"aliases.csv lines 2, 3 give .* leave out 1 more of its files"):
        patients(NAMES, aliases(*rows[:2]))


def test_alias_with_a_pattern(aliases):
    pattern = r"(?P<patient>p\d)_"
    names = ["p1_a", "p2_b", "p3_c"]
    result = pseudonyms(names, pattern, aliases("p3_c,p1"))
    assert result["p1_a"].patient == result["p3_c"].patient != result["p2_b"].patient


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        ([], "file_name,patient", "aliases.csv names no file"),
        (["a,b"], "file,person", "aliases.csv line 1 is not the header"),
        (["slide x,a", "only one field"], "file_name,patient", "aliases.csv line 3 has 1 fields"),
        (["slide x,a,b"], "file_name,patient", "aliases.csv line 2 has 3 fields"),
        (["", "slide x,"], "file_name,patient", "aliases.csv line 3 has 2 fields, or an empty one"),
        (["slide x,a", "LI MING.jpg,a"], "file_name,patient", "aliases.csv line 3 names no image"),
        (
            ["slide x,a", "slide x.png,b"],
            "file_name,patient",
            "aliases.csv lines 2 and 3 give one image to two",
        ),
    ],
)
def test_faults_name_the_line_and_nobody(aliases, lines, header, message):
    with pytest.raises(DataError) as raised:
        pseudonyms(NAMES, aliases=aliases(*lines, header=header))
    assert message in str(raised.value)
    assert not re.search("slide|ming", str(raised.value), re.IGNORECASE)


def test_files_that_are_no_alias_file(tmp_path):
    with pytest.raises(DataError, match="There is no alias file"):
        read_aliases(tmp_path / "gone.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_aliases(tmp_path)
    (tmp_path / "a.csv").write_bytes("file_name,patient\nx,y\nx,李\n".encode("gbk"))
    with pytest.raises(DataError, match=r"a\.csv line 3 is not UTF-8"):
        read_aliases(tmp_path / "a.csv")


def test_byte_order_mark_and_repr(tmp_path):
    (tmp_path / "a.csv").write_text("\ufefffile_name,patient\r\nx.png, LI MING \r\n", encoding="utf-8")
    rows = read_aliases(tmp_path / "a.csv")
    assert [(row.line, row.file_name, row.patient) for row in rows] == [(2, "x.png", "LI MING")]
    assert "MING" not in repr(rows)
