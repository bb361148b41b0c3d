"""Whose image it is: file names are read for patient, sequence and frame; an alias file joins spellings.

A patient is a 10-digit ID where the file name has one, however the name beside it is spelled; otherwise the
name without case, spaces and punctuation, which means an ID where it occurs elsewhere with exactly one.
`Image_01L` and `Image_01R`, and other numbers with a side, are the two eyes of one patient. One person under
two spellings without an ID, or under two IDs, is seen only with an alias file, CSV in UTF-8:

    file_name,patient
    zhang_san_frame_000001.jpg,zhang san
    ZHANGSAN2_frame_000001.jpg,zhang san

One row moves all files that were read as the same person; if the rows of one person name different patients,
each of its files needs a row. A patient written as a name or an ID of other files is that person.
"""

import csv
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from vesselrl.errors import DataError

logger = logging.getLogger(__name__)

# NAME(0123456789)_…, NAME^(0123456789)_…, NAME_0123456789__…, NAME__0123456789__…; then the sequence.
_WITH_ID = re.compile(
    r"(?P<name>.*?)[\s_^]*\(?(?<!\d)(?P<id>\d{10})(?!\d)\)?[\s_]*"
    r"(?P<sequence>.*?)(?:[\s_]*frame[\s_]*(?P<frame>\d+))?",
    re.IGNORECASE | re.DOTALL,
)
# NAME_frame_000011 and NAME_S-N_K_HEX8_frame_000011.
_WITHOUT_ID = re.compile(
    r"(?P<name>.+?)(?:[\s_]+(?P<sequence>[^\W_]+-[^\W_]+[\s_]+[^\W_]+[\s_]+[0-9a-f]{8}))?"
    r"[\s_]+frame[\s_]+(?P<frame>\d+)",
    re.IGNORECASE | re.DOTALL,
)
# File names without a person in them, such as train_001, 07L or 21_training: messages may show these.
_WORD = r"(?:train|training|test|val|valid|validation|images?|im|img|frame|case|sample|scan|slice)"
_IMPERSONAL = re.compile(
    rf"(?:{_WORD}[-_ ]?)?\d{{1,6}}(?:[-_ ]?(?:l|r|left|right)|[-_ ](?:training|test))?", re.IGNORECASE
)
# The two eyes of one patient: Image_01L and Image_01R.
_EYE = re.compile(rf"(?P<case>(?:{_WORD}[-_ ]?)?\d{{1,6}})[-_ ]?(?P<eye>l|r)(?:eft|ight)?", re.IGNORECASE)
# The people of the built-in synthetic data are made up.
_MADE_UP = re.compile(r"SYNTH(?:_[A-J]+_frame_|[_^ ]*\(?\d{10}\)?[_ ]).*")

ALIAS_HEADER = ["file_name", "patient"]
_ENDINGS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"}


@dataclass(frozen=True, repr=False)
class Identity:
    """Contents of a file name; never logged or shown (`repr` gives nothing away)."""

    person: str  # what tells it from others: "id:…", "name:…", "eyes:…", "pattern:…", "alias:…" or "file:…"
    other_name: str = ""  # "name:…" where the person has an ID as well
    sequence: str = ""  # empty where the file name has none
    frame: str = ""


@dataclass(frozen=True, repr=False)
class AliasRow:
    """One line of an alias file; `repr` gives nothing away."""

    line: int
    file_name: str
    patient: str


def parse_name(name: str) -> Identity:
    """Reads patient, sequence and frame from a path below images/, without the ending.

    >>> parse_name("LI_MING(0123456789)_1-2_3_0A1B2C3D_frame_000011").person
    'id:0123456789'
    """
    name = unicodedata.normalize("NFKC", name)
    stem = name.rsplit("/", 1)[-1].strip()
    match = _WITH_ID.fullmatch(stem) or _WITHOUT_ID.fullmatch(stem)
    plain = "" if match is None else _plain(match["name"])
    number = None if match is None else match.groupdict().get("id")
    if not plain and not number:
        eye = _EYE.fullmatch(stem)
        if eye is None:
            return Identity(f"file:{name}")
        folder = name.rpartition("/")[0]
        return Identity(f"eyes:{folder}/{eye['case'].casefold()}", sequence=eye["eye"].casefold())
    sequence = re.sub(r"[\s_]+", "_", match["sequence"] or "").strip("_").casefold()
    person, other = (f"id:{number}", f"name:{plain}") if number else (f"name:{plain}", "")
    return Identity(person, other, sequence, match["frame"] or "")


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def parse_by_pattern(names: Iterable[str], patient_pattern: str) -> dict[str, Identity]:
    r"""Reads file names by a pattern of the user, for data that `parse_name` does not know.

    Args:
        names: paths below images/, without the ending.
        patient_pattern: regular expression searched in each name, with the group `patient` and, if there are
            such parts, `sequence` and `frame`, for example `(?P<patient>\d+)(?P<frame>[LR])$`.

    Raises:
        DataError: the pattern is not valid, has no group `patient`, or finds no patient in a name.
    """
    try:
        pattern = re.compile(patient_pattern)
    except re.error as error:
        raise DataError(f"patient_pattern is not a regular expression: {error}. Correct it.") from None
    if "patient" not in pattern.groupindex:
        raise DataError(
            "patient_pattern has no group (?P<patient>...). Put it around the part for the patient."
        )
    result, wrong = {}, []
    names = sorted(names)
    for number, name in enumerate(names, start=1):
        match = pattern.search(unicodedata.normalize("NFKC", name))
        found = match.groupdict() if match else {}
        if not found.get("patient"):
            wrong.append(number)
        person = f"pattern:{found.get('patient')}"
        result[name] = Identity(person, "", found.get("sequence") or "", found.get("frame") or "")
    if wrong:
        raise DataError(
            f"patient_pattern finds no patient in {len(wrong)} of {len(names)} file names (first: number "
            f"{wrong[0]} in the order of the names). Widen the pattern, or remove these files."
        )
    return result


def is_impersonal(name: str) -> bool:
    """Whether a file name is a number with an ordinary word (train_001): a message may show it."""
    return _IMPERSONAL.fullmatch(name) is not None


def names_a_person(name: str) -> bool:
    """Whether a file name is that of an angiography export, with a person or an ID in it."""
    return parse_name(name).person.startswith(("id:", "name:"))


def identify(
    names: Sequence[str], patient_pattern: str | None = None, aliases: Path | str | None = None
) -> tuple[dict[str, Identity], bool]:
    """Identity by file name, and whether none of the names and aliases can be that of a person.

    The arguments are those of `vesselrl.data.pseudonyms.pseudonyms`, and so are the errors.
    """
    if patient_pattern is None:
        found = {name: parse_name(name) for name in names}
    else:
        found = parse_by_pattern(names, patient_pattern)
    ids_of: dict[str, set[str]] = defaultdict(set)
    for identity in found.values():
        if identity.other_name:
            ids_of[identity.other_name].add(identity.person)
    only_id = {name: next(iter(ids)) for name, ids in ids_of.items() if len(ids) == 1}
    if len(ids_of) > len(only_id):
        num_shared = len(ids_of) - len(only_id)
        logger.info("%d names occur with more than one ID; each ID counts as a patient.", num_shared)
    persons = {name: only_id.get(identity.person, identity.person) for name, identity in found.items()}
    rows = []
    if aliases is not None:
        rows = read_aliases(aliases)
        persons = join_persons(persons, only_id, rows, Path(aliases).name)
    texts = [*names, *(row.patient for row in rows)]
    impersonal = all(is_impersonal(text) or _MADE_UP.fullmatch(text) for text in texts)
    return {name: replace(found[name], person=persons[name]) for name in names}, impersonal


def read_aliases(path: Path | str) -> list[AliasRow]:
    """The rows of an alias file; empty lines are left out.

    Raises:
        DataError: the file is missing or broken; the message names the line and no file or person.
    """
    path, header = Path(path), ",".join(ALIAS_HEADER)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"There is no alias file {path}. Give a CSV file: {header}.") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path.name} line {line} is not UTF-8. Save the alias file as UTF-8.") from None
    reader = csv.reader(text.splitlines())
    lines = [(reader.line_num, [unicodedata.normalize("NFKC", f).strip() for f in row]) for row in reader]
    lines = [(line, fields) for line, fields in lines if any(fields)]
    if lines and lines[0][1] != ALIAS_HEADER:
        raise DataError(f"{path.name} line {lines[0][0]} is not the header. Begin it with {header}.")
    for line, fields in lines[1:]:
        if len(fields) != 2 or not all(fields):
            raise DataError(
                f"{path.name} line {line} has {len(fields)} fields, or an empty one. Write a file name, a "
                'comma and a patient; put a text with a comma into "...".'
            )
    if len(lines) < 2:
        raise DataError(f"{path.name} names no file. Write {header} and a line for each spelling.")
    return [AliasRow(line, *fields) for line, fields in lines[1:]]


def join_persons(
    persons: Mapping[str, str], names: Mapping[str, str], rows: Sequence[AliasRow], source: str
) -> dict[str, str]:
    """The person of each file after the rows of an alias file.

    Args:
        persons: person by file name.
        names: person by other names of the person ("name:…" → "id:…").
        rows: as `read_aliases` returns them; any that means no image, or contradicts another, is a DataError.
        source: name of the alias file, for messages.
    """
    by_text = defaultdict(set)
    for name in persons:
        plain = unicodedata.normalize("NFKC", name)
        by_text[plain].add(name)
        by_text[plain.rsplit("/", 1)[-1]].add(name)
    lines: dict[str, int] = {}
    wanted: dict[str, dict[str, str]] = defaultdict(dict)
    known = {*persons.values()}
    for row in rows:
        name = _image_named(row, by_text, source)
        target = _person_named(row.patient, known, names)
        if wanted[persons[name]].setdefault(name, target) != target:
            raise DataError(
                f"{source} lines {lines[name]} and {row.line} give one image to two patients. Keep one."
            )
        lines.setdefault(name, row.line)

    parent: dict[str, str] = {}
    single: dict[str, str] = {}

    def root(person: str) -> str:
        while person in parent:
            person = parent[person]
        return person

    for person, targets in wanted.items():
        if len(set(targets.values())) == 1:
            one, other = sorted((root(person), root(next(iter(targets.values())))))
            if one != other:
                parent[other] = one
            continue
        num_left = sum(other == person for other in persons.values()) - len(targets)
        if num_left:
            numbers = ", ".join(str(lines[name]) for name in list(targets)[:5])
            raise DataError(
                f"{source} lines {numbers} give files that look like one person to several patients, and "
                f"leave out {num_left} more of its files. Add a line for each of them."
            )
        single.update(targets)
    return {name: root(single.get(name, person)) for name, person in persons.items()}


def _image_named(row: AliasRow, by_text: Mapping[str, set[str]], source: str) -> str:
    """The file name that a row means."""
    path = PurePosixPath(row.file_name.replace("\\", "/"))
    if path.parts[0] == "images" and len(path.parts) > 1:
        path = path.relative_to("images")
    found = by_text.get(str(path), set())
    if not found and path.suffix.lower() in _ENDINGS:
        found = by_text.get(str(path.with_suffix("")), set())
    if len(found) != 1:
        what = f"means {len(found)} images" if found else "names no image of this data root"
        raise DataError(
            f"{source} line {row.line} {what}. Write the file name as it is in images/, or remove it."
        )
    return next(iter(found))


def _person_named(patient: str, known: set[str], names: Mapping[str, str]) -> str:
    """The person of other files that a patient's name or ID means, or a person of this name alone."""
    number = re.search(r"(?<!\d)\d{10}(?!\d)", patient)
    if number:
        return f"id:{number[0]}"
    name = f"name:{_plain(patient)}"
    candidates = (names.get(name, name), f"pattern:{patient}")
    return next((person for person in candidates if person in known), f"alias:{patient.casefold()}")
