"""The alias file: which differently named files show one person.

It is a CSV file in UTF-8 with the header `file_name,patient`. A file name is that of an image, with or
without its ending; the patient is any text, the same for all spellings of one person:

    file_name,patient
    zhang_san_frame_000001.jpg,zhang san
    ZHANGSAN2_frame_000001.jpg,zhang san

One row per spelling is enough: it moves all files that were read as the same person. If the rows of one
person name different patients (two people of one name), each of that person's files needs a row. A patient
that is written as a name or a 10-digit ID of other files is that person.
"""

import csv
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vesselrl.errors import DataError

HEADER = ["file_name", "patient"]
_ENDINGS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"}
_ID = re.compile(r"(?<!\d)\d{10}(?!\d)")


@dataclass(frozen=True)
class AliasRow:
    """One line of an alias file; `repr` shows no name."""

    line: int
    file_name: str = field(repr=False)
    patient: str = field(repr=False)


def read_aliases(path: Path | str) -> list[AliasRow]:
    """The rows of an alias file; empty lines are left out.

    Raises:
        DataError: there is no such file, it is not UTF-8, its header is another one, or a line has not
            exactly two filled fields; the message names the line and no file or person.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"There is no alias file {path}. Give a CSV file: {','.join(HEADER)}.") from None
    except IsADirectoryError:
        raise DataError(f"The alias file {path} is a folder. Give a CSV file: {','.join(HEADER)}.") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path.name} line {line} is not UTF-8. Save the alias file as UTF-8.") from None
    reader = csv.reader(text.splitlines())
    rows: list[AliasRow] = []
    header = None
    for fields in reader:
        fields = [unicodedata.normalize("NFKC", field).strip() for field in fields]
        if not any(fields):
            continue
        if header is None:
            header = fields
            if header != HEADER:
                raise DataError(
                    f"{path.name} line {reader.line_num} is not the header. Begin it with {','.join(HEADER)}."
                )
        elif len(fields) != 2 or not all(fields):
            raise DataError(
                f"{path.name} line {reader.line_num} has {len(fields)} fields, or an empty one. Write a file "
                'name, a comma and a patient; put a text with a comma into "...".'
            )
        else:
            rows.append(AliasRow(reader.line_num, *fields))
    if not rows:
        raise DataError(f"{path.name} names no file. Write {','.join(HEADER)} and a line for each spelling.")
    return rows


def join_persons(
    persons: Mapping[str, str], names: Mapping[str, str], rows: Sequence[AliasRow], source: str
) -> dict[str, str]:
    """The person of each file after the rows of an alias file.

    Args:
        persons: person by file name (path below images/, without the ending).
        names: person by other names of the person ("name:…" → "id:…").
        rows: what `read_aliases` gave.
        source: name of the alias file, for messages.

    Raises:
        DataError: a row names no image or two of them, two rows give one image to two patients, or the rows
            of one person name several patients and leave out some of its files.

    >>> rows = [AliasRow(2, "zhang3.png", "Zhang San")]
    >>> persons = {"zhang3": "file:zhang3", "zs_frame_1": "name:zhangsan"}
    >>> len(set(join_persons(persons, {}, rows, "aliases.csv").values()))
    1
    """
    lines: dict[str, AliasRow] = {}
    wanted: dict[str, dict[str, str]] = defaultdict(dict)
    known = {*persons.values()}
    find_name = _name_finder(persons)
    for row in rows:
        name = find_name(row, source)
        target = _person_named(row.patient, known, names)
        if wanted[persons[name]].setdefault(name, target) != target:
            raise DataError(
                f"{source} lines {lines[name].line} and {row.line} give one image to two patients. Keep one."
            )
        lines.setdefault(name, row)

    parent: dict[str, str] = {}
    single: dict[str, str] = {}
    for person, targets in wanted.items():
        if len(set(targets.values())) == 1:
            one, other = sorted((_root(parent, person), _root(parent, next(iter(targets.values())))))
            if one != other:
                parent[other] = one
            continue
        num_left = sum(other == person for other in persons.values()) - len(targets)
        if num_left:
            numbers = ", ".join(str(lines[name].line) for name in list(targets)[:5])
            raise DataError(
                f"{source} lines {numbers} give files that look like one person to several patients, and "
                f"leave out {num_left} more of its files. Add a line for each of them."
            )
        single.update(targets)
    return {name: _root(parent, single.get(name, person)) for name, person in persons.items()}


def _name_finder(persons: Mapping[str, str]) -> Callable[[AliasRow, str], str]:
    """A function from a row to the file name that it means."""
    by_text = defaultdict(set)
    for name in persons:
        plain = unicodedata.normalize("NFKC", name)
        by_text[plain].add(name)
        by_text[plain.rsplit("/", 1)[-1]].add(name)

    def find(row: AliasRow, source: str) -> str:
        path = PurePosixPath(row.file_name.replace("\\", "/"))
        if path.parts[0] == "images" and len(path.parts) > 1:
            path = path.relative_to("images")
        found = by_text.get(str(path), set())
        if not found and path.suffix.lower() in _ENDINGS:
            found = by_text.get(str(path.with_suffix("")), set())
        if len(found) != 1:
            what = "names no image of this data root" if not found else f"means {len(found)} images"
            raise DataError(
                f"{source} line {row.line} {what}. Write the file name as it is in images/, or remove it."
            )
        return next(iter(found))

    return find


def _person_named(patient: str, known: set[str], names: Mapping[str, str]) -> str:
    """The person of other files that a patient's name or ID means, or a person of this name alone."""
    number = _ID.search(patient)
    if number:
        return f"id:{number[0]}"
    name = "name:" + re.sub(r"[\W_]+", "", patient).casefold()
    name = names.get(name, name)
    for person in (name, f"pattern:{patient}"):
        if person in known:
            return person
    return f"alias:{patient.casefold()}"


def _root(parent: Mapping[str, str], person: str) -> str:
    """The person that a chain of joined persons leads to."""
    while person in parent:
        person = parent[person]
    return person
