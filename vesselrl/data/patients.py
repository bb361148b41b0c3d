"""Whose image it is: reads patient, sequence and frame from file names; an alias file joins spellings.

A patient is a 10-digit ID, or a name without case, spaces and punctuation, which means the ID that occurs
with it elsewhere if there is exactly one; docs/data.md has the forms of names and of the alias file.
"""

import csv
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from vesselrl.data.images import IMAGE_SUFFIXES
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


@dataclass(frozen=True, repr=False)
class Identity:
    """Contents of a file name; never logged or shown (`repr` gives nothing away)."""

    person: str  # "id:…", "name:…", "eyes:…", "pattern:…", "alias:…" or "file:…"
    other_name: str = ""  # "name:…" where the person has an ID as well
    sequence: str = ""  # empty where the file name has none
    frame: str = ""


def parse_name(name: str) -> Identity:
    """Reads patient, sequence and frame from a path below images/, without the ending.

    >>> parse_name("LI_MING(0123456789)_1-2_3_0A1B2C3D_frame_000011").person
    'id:0123456789'
    """
    name = unicodedata.normalize("NFKC", name)
    folder, _, stem = name.rpartition("/")
    stem = stem.strip()
    match = _WITH_ID.fullmatch(stem) or _WITHOUT_ID.fullmatch(stem)
    plain = "" if match is None else _plain(match["name"])
    number = None if match is None else match.groupdict().get("id")
    if not plain and not number:
        if (eye := _EYE.fullmatch(stem)) is None:
            return Identity(f"file:{name}")
        return Identity(f"eyes:{folder}/{eye['case'].casefold()}", sequence=eye["eye"].casefold())
    sequence = re.sub(r"[\s_]+", "_", match["sequence"] or "").strip("_").casefold()
    person, other = (f"id:{number}", f"name:{plain}") if number else (f"name:{plain}", "")
    return Identity(person, other, sequence, match["frame"] or "")


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def parse_by_pattern(names: Iterable[str], patient_pattern: str) -> dict[str, Identity]:
    r"""Reads file names by a regular expression of the user; any without a patient are a DataError.

    It has the group `patient` and perhaps `sequence` and `frame`: `(?P<patient>\d+)(?P<frame>[LR])$`.
    """
    try:
        pattern = re.compile(patient_pattern)
    except re.error as error:
        raise DataError(f"patient_pattern is not a regular expression: {error}. Correct it.") from None
    if "patient" not in pattern.groupindex:
        raise DataError("patient_pattern has no group (?P<patient>...). Put it round the patient's part.")
    names, result = sorted(names), {}
    for name in names:
        match = pattern.search(unicodedata.normalize("NFKC", name))
        found = match.groupdict(default="") if match else {}
        patient, sequence, frame = (found.get(part, "") for part in ("patient", "sequence", "frame"))
        result[name] = Identity(f"pattern:{patient}", "", sequence, frame)
    if wrong := [place for place, name in enumerate(names, 1) if result[name].person == "pattern:"]:
        raise DataError(
            f"patient_pattern finds no patient in {len(wrong)} of {len(names)} file names (first: number "
            f"{wrong[0]} in the order of the names). Widen the pattern, or remove these files."
        )
    return result


def is_impersonal(name: str) -> bool:
    """Whether a file name is a number with an ordinary word (train_001): a message may show it."""
    return _IMPERSONAL.fullmatch(name) is not None


def identify(
    names: Sequence[str], patient_pattern: str | None = None, aliases: Path | str | None = None
) -> tuple[dict[str, Identity], bool]:
    """Identity by file name, and whether no name or alias can be that of a person; see `pseudonyms`."""
    is_usual = patient_pattern is None
    found = {n: parse_name(n) for n in names} if is_usual else parse_by_pattern(names, patient_pattern)
    ids_of: dict[str, set[str]] = defaultdict(set)
    for identity in found.values():
        if identity.other_name:
            ids_of[identity.other_name].add(identity.person)
    only_id = {name: next(iter(ids)) for name, ids in ids_of.items() if len(ids) == 1}
    if num_shared := len(ids_of) - len(only_id):
        logger.info("%d names occur with more than one ID; each ID counts as a patient.", num_shared)
    persons = {name: only_id.get(identity.person, identity.person) for name, identity in found.items()}
    rows = [] if aliases is None else read_aliases(aliases)
    if rows:
        persons = _join_persons(persons, only_id, rows, Path(aliases).name)
    texts = [*names, *(patient for *_, patient in rows)]
    impersonal = all(is_impersonal(text) or _MADE_UP.fullmatch(text) for text in texts)
    return {name: replace(found[name], person=persons[name]) for name in names}, impersonal


def read_aliases(path: Path | str) -> list[tuple[int, str, str]]:
    """Number of line, file name and patient of each row of an alias file; errors name no file or person."""
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
            what = f"{path.name} line {line} has {len(fields)} fields, or an empty one"
            raise DataError(f'{what}. Write file name, comma, patient; put a text with a comma into "...".')
    if len(lines) < 2:
        raise DataError(f"{path.name} names no file. Write {header} and a line for each spelling.")
    return [(line, *fields) for line, fields in lines[1:]]


def _join_persons(
    persons: Mapping[str, str], names: Mapping[str, str], rows: Sequence[tuple[int, str, str]], source: str
) -> dict[str, str]:
    """The person of each file after the rows of an alias file; `names`: other names ("name:…" → "id:…").

    One row moves all files of the person it names, unless rows give each of its files to a patient.
    """
    by_text = defaultdict(set)
    for name in persons:
        plain = unicodedata.normalize("NFKC", name)
        by_text[plain].add(name)
        by_text[plain.rsplit("/", 1)[-1]].add(name)
    lines: dict[str, int] = {}
    wanted: dict[str, dict[str, str]] = defaultdict(dict)
    known = {*persons.values()}
    for line, file_name, patient in rows:
        name = _image_named(file_name, by_text, f"{source} line {line}")
        target = _person_named(patient, known, names)
        if wanted[persons[name]].setdefault(name, target) != target:
            what = f"{source} lines {lines[name]} and {line}"
            raise DataError(f"{what} give one image to two patients. Keep one.")
        lines.setdefault(name, line)
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
        if num_left := sum(other == person for other in persons.values()) - len(targets):
            numbers = ", ".join(str(lines[name]) for name in list(targets)[:5])
            raise DataError(
                f"{source} lines {numbers} give files that look like one person to several patients, and "
                f"leave out {num_left} more of its files. Add a line for each of them."
            )
        single.update(targets)
    return {name: root(single.get(name, person)) for name, person in persons.items()}


def _image_named(file_name: str, by_text: Mapping[str, set[str]], place: str) -> str:
    """The file name that a row means."""
    path = PurePosixPath(file_name.replace("\\", "/"))
    if path.parts[0] == "images" and len(path.parts) > 1:
        path = path.relative_to("images")
    found = by_text.get(str(path), set())
    if not found and path.suffix.lower() in IMAGE_SUFFIXES:
        found = by_text.get(str(path.with_suffix("")), set())
    if len(found) != 1:
        what = f"means {len(found)} images" if found else "names no image of this data root"
        raise DataError(f"{place} {what}. Write the file name as it is in images/, or remove it.")
    return next(iter(found))


def _person_named(patient: str, known: set[str], names: Mapping[str, str]) -> str:
    """The person of other files that a patient's name or ID means, or a person of this name alone."""
    if number := re.search(r"(?<!\d)\d{10}(?!\d)", patient):
        return f"id:{number[0]}"
    name = f"name:{_plain(patient)}"
    candidates = (names.get(name, name), f"pattern:{patient}")
    return next((person for person in candidates if person in known), f"alias:{patient.casefold()}")
