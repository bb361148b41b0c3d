"""Whose image it is: reads patient, sequence and frame from file names; an alias file joins spellings.

What tools add to a name is taken away first. A patient is a 10-digit ID, or a name without case, spaces and
punctuation, which means the ID that occurs with it elsewhere if there is exactly one; docs/data.md has the
forms of names and of the alias file.
"""

import csv
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath

from vesselrl.data.file_names import SUBSET_FOLDERS, copy_groups, source_names
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

# CVAT: task_3_NAME_frame_000011, or frame_000011 in the folder of its video; not in one of these folders.
_TASK = re.compile(r"(?:task|job)[-_ ]\d+[-_ ]+(?=\S.*?[\s_]frame[\s_]+\d)", re.IGNORECASE)
_FRAME = re.compile(r"frame[\s_]*\d+", re.IGNORECASE)
# They say nothing of a patient, though ten digits may stand in them: UUIDs, hashes, times in ms, DICOM UIDs.
_UNREAD = re.compile(
    r"(?<![0-9a-z])(?:[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|1[4-8]\d{11}"
    r"|(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{16,})(?![0-9a-z])"
    r"|(?<![0-9a-z])(?<!\d\.)[0-2](?:\.\d+){5,}"
    r"|(?<![0-9a-z])[12]_(?:2_840|3_12|3_46|3_6_1|16_840)(?:_\d+){3,}",
    re.IGNORECASE,
)
_SERIES = re.compile(r"[^\W_]+-[^\W_]+[\s_]+[^\W_]+[\s_]+[0-9a-f]{8}", re.IGNORECASE)  # S-N_K_HEX8
# Words beside a number that name no person, besides _WORD.
_ORDINARY = re.compile(rf"{_WORD}|[a-z]|patient|subject|subj|sub|pat|no|nr|left|right", re.IGNORECASE)

FIRST_TIME, DAY_S = 1_262_304_000, 86_400  # Unix times: 2010 and later

ALIAS_HEADER = ["file_name", "patient"]


@dataclass(frozen=True, repr=False)
class Identity:
    """Contents of a file name; never logged or shown (`repr` gives nothing away)."""

    person: str  # "id:…", "name:…", "eyes:…", "pattern:…", "alias:…" or "file:…"
    other_name: str = ""  # "name:…" where the person has an ID as well
    sequence: str = ""  # empty where the file name has none
    frame: str = ""
    may_be_time: bool = False  # the ID may be a Unix time: see `_without_times`


def parse_name(name: str) -> Identity:
    """Reads patient, sequence and frame from a path below images/, without the ending.

    >>> parse_name("LI_MING(0123456789)_1-2_3_0A1B2C3D_frame_000011").person
    'id:0123456789'
    """
    return _read_source(source_names([name])[name][0])


def _read_source(name: str) -> Identity:
    """Reads the name of a source picture."""
    folder, _, stem = name.rpartition("/")
    if _FRAME.fullmatch(stem):
        videos = [part for part in folder.split("/") if part and not SUBSET_FOLDERS.fullmatch(part)]
        stem = "_".join([*videos[-1:], stem])
    stem = _TASK.sub("", stem)
    hidden = _UNREAD.sub(lambda found: "x" * len(found[0]), stem)
    match = _WITH_ID.fullmatch(hidden) or _WITHOUT_ID.fullmatch(hidden)
    part = {key: stem[slice(*match.span(key))] for key in match.groupdict()} if match else {}
    number, written = part.get("id"), part.get("name", "")
    plain = _plain(_UNREAD.sub(" ", written)) or ("" if number else _plain(written))
    if not plain and not number:
        if (eye := _EYE.fullmatch(stem)) is None:
            return Identity(f"file:{name}")
        return Identity(f"eyes:{folder}/{eye['case'].casefold()}", sequence=eye["eye"].casefold())
    sequence = re.sub(r"[\s_]+", "_", part.get("sequence", "")).strip("_").casefold()
    if not number:
        return Identity(f"name:{plain}", "", sequence, part["frame"])
    # The forms of hospitals are IDs, whatever their number.
    is_id = match.string[match.end("id") :].startswith((")", "__")) or _SERIES.match(
        part["sequence"].lstrip("-_ ")
    )
    may_be_time = not is_id and FIRST_TIME <= int(number) < 2_000_000_000
    return Identity(f"id:{number}", f"name:{plain}", sequence, part["frame"], may_be_time)


def _read_names(names: Iterable[str]) -> dict[str, Identity]:
    """Reads all names of a data set."""
    sources = {name: source for name, (source, _) in source_names(names).items()}
    return _without_times({name: _read_source(source) for name, source in sources.items()}, sources)


def _without_times(found: Mapping[str, Identity], sources: Mapping[str, str]) -> dict[str, Identity]:
    """Takes several IDs of one name for Unix times where all may be and most lie within a day of the next.

    Without a name they do so only where most files have another one; then the name behind them counts.
    """
    result, files_of = dict(found), defaultdict(list)
    for name, identity in found.items():
        if identity.other_name:
            files_of[identity.other_name].append(name)
    for other, names in files_of.items():
        numbers = sorted({int(found[name].person[3:]) for name in names})
        gaps = sorted(later - one for one, later in pairwise(numbers))
        if not gaps or gaps[len(gaps) // 2] > DAY_S or not all(found[name].may_be_time for name in names):
            continue
        if not re.fullmatch(rf"name:{_WORD}?\d*", other):
            result |= {name: replace(found[name], person=other, other_name="") for name in names}
        elif 2 * len(numbers) > len(names):
            without = {
                name: _read_source(re.sub(r"(?<!\d)1\d{9}(?!\d)", "", sources[name])) for name in names
            }
            nobody = {name: Identity(f"file:{name}") for name in names}
            result |= nobody | {name: one for name, one in without.items() if one.person.startswith("name:")}
    return result


def lone_frames(patients: Mapping[str, str]) -> list[list[str]]:
    """Groups of files whose names differ in numbers or hashes only, as those of frames do.

    `patients`: by file name; only those with one file, or copies of one, count. Not meant are numbers with
    an ordinary word (train_001, 07L, 21_training), and names with an ID.
    """
    groups, files_of = defaultdict(list), defaultdict(dict)
    for name, (source, _) in source_names(patients).items():
        files_of[patients[name]][source] = name
    lone = [name for files in files_of.values() if len(files) == 1 for name in files.values()]
    for name, identity in _read_names(lone).items():
        stem = source_names([name])[name][0].rpartition("/")[2]
        text = _UNREAD.sub(" 0 ", stem)
        words = re.findall(r"[^\W\d_]+", text.casefold())
        named = tuple(word for word in words if not _ORDINARY.fullmatch(word))
        says_frame = {"frame", "slice"} & {*words} or text != stem or re.search(r"\d{10}", stem)
        is_nobody = identity.person.startswith("file:") or identity.may_be_time
        is_id = identity.other_name and not identity.may_be_time
        if not is_id and re.search(r"\d\W*$", text) and (named or (is_nobody and says_frame)):
            groups[named].append(name)
    found = [group for group in groups.values() if len(group) > 1]
    return found if sum(map(len, found)) > 2 else []


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
    found = _read_names(names) if is_usual else parse_by_pattern(names, patient_pattern)
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
    persons = _join_copies(persons)
    texts = [*names, *(patient for *_, patient in rows)]
    impersonal = all(is_impersonal(text) or _MADE_UP.fullmatch(text) for text in texts)
    return {name: replace(found[name], person=persons[name]) for name in names}, impersonal


def read_aliases(path: Path | str) -> list[tuple[int, str, str]]:
    """Number of line, file name and patient of each row of an alias file; errors name no file or person."""
    path, header = Path(path), ",".join(ALIAS_HEADER)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"There is no alias file in that place. Give a CSV file: {header}.") from None
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
    for person, targets in wanted.items():
        if len(set(targets.values())) == 1:
            one, other = sorted((_root(parent, person), _root(parent, next(iter(targets.values())))))
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
    return {name: _root(parent, single.get(name, person)) for name, person in persons.items()}


def _root(parent: Mapping[str, str], person: str) -> str:
    """The person that another one was joined to in the end."""
    while person in parent:
        person = parent[person]
    return person


def _join_copies(persons: Mapping[str, str]) -> dict[str, str]:
    """One person for all copies of a source picture, whatever a pattern or an alias file says."""
    parent: dict[str, str] = {}
    for group in copy_groups(persons):
        found = {_root(parent, persons[name]) for name in group}
        first, *others = sorted(found, key=lambda person: (person.startswith("file:"), person))
        parent |= dict.fromkeys(others, first)
    if parent:
        logger.info("Copies of one source picture joined %d patients to others.", len(parent))
    return {name: _root(parent, person) for name, person in persons.items()}


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
