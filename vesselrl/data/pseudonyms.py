"""Pseudonyms such as P001_S1_F0011, and the mapping file, which alone knows what each stands for.

It keeps every key that was ever given out. Numbers follow SHA-256(salt + person), so that who knows the
patients cannot tell P007; the salt is a hash of all file names, so that two copies of the data agree. A name
is the person of the ID that occurs with it if there is exactly one; an alias file joins other spellings.
"""

import csv
import hashlib
import json
import logging
import re
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count
from pathlib import Path, PurePosixPath
from string import ascii_lowercase
from types import MappingProxyType
from typing import Literal

from vesselrl.data.images import IMAGE_SUFFIXES
from vesselrl.data.patients import Identity, copy_groups, is_impersonal, parse_names, plain_name
from vesselrl.errors import DataError, WriteError
from vesselrl.experiment.run_folder import read_json, write_text

logger = logging.getLogger(__name__)

MAPPING_FILE = "patients.mapping.json"
FORMAT = 1
ALIAS_HEADER = ["file_name", "patient"]
ABOUT = "Names and IDs of patients. Keep this file with the images; never commit, send or publish it."
# The people of the built-in synthetic data are made up.
_MADE_UP = re.compile(r"SYNTH(?:_[A-J]+_frame_|[_^ ]*\(?\d{10}\)?[_ ]).*")
# The second file of one frame is F0011b, the 27th F0011-27.
LABELS = {
    "patients": re.compile(r"P\d{3,}"),
    "sequences": re.compile(r"P\d{3,}_S\d+"),
    "files": re.compile(r"P\d{3,}_S\d+_F\d+([b-z]|-\d+)?"),
}


@dataclass(frozen=True)
class Pseudonym:
    """The names of one image in every output."""

    patient: str  # P001
    sequence: str  # P001_S1
    frame: str  # F0011, the number in the file name; counted from F0001 where it has none

    @property
    def key(self) -> str:
        """The unique name of the image, such as P001_S1_F0011."""
        return f"{self.sequence}_{self.frame}"


@dataclass(frozen=True, repr=False)
class PseudonymMap:
    """All keys of a data set and what they stand for; `repr` gives nothing away."""

    salt: str = ""  # empty: the file names carry no person
    patients: dict[str, str] = field(default_factory=dict)  # P001 → person
    sequences: dict[str, str] = field(default_factory=dict)  # P001_S1 → sequence as in the file name
    files: dict[str, str] = field(default_factory=dict)  # P001_S1_F0011 → file name; the last one counts


def pseudonyms(
    names: Iterable[str],
    patient_pattern: str | None = None,
    aliases: Path | str | None = None,
    mapping: Path | str | None = None,
    keep: Literal["nothing", "people", "all"] = "people",
    headers: Mapping[str, Identity] = MappingProxyType({}),
) -> dict[str, Pseudonym]:
    """A pseudonym for each file name, a path below images/ without ending; all keys differ.

    Impersonal names (train_001) and the built-in synthetic data have nothing to hide: no salt, and a mapping
    file only where one without a salt is there already, in a repaired copy of a data set. `mapping` is that
    file; `keep` says what is written to it: keys of people, those of impersonal names as well, or nothing.
    `headers`: whom files themselves name, which holds unless there is a pattern.

    >>> sorted(alias.key for alias in pseudonyms(["Image_01L", "Image_01R"]).values())
    ['P001_S1_F0001', 'P001_S2_F0001']
    """
    names = sorted(set(names))
    files, impersonal = identify(names, patient_pattern, aliases, headers)
    known = None if mapping is None else _read_map(Path(mapping), patient_pattern, impersonal)
    start = known or PseudonymMap()
    if not impersonal and not start.salt:
        start = replace(start, salt=hashlib.sha256("\n".join(names).encode()).hexdigest())
    found = _assign_keys(files, start)
    is_kept = keep == "all" or (keep == "people" and not (impersonal and known is None))
    if mapping is not None and is_kept and found != known:
        _write_map(Path(mapping), patient_pattern, found)
    keys = {name: key for key, name in found.files.items()}
    parts = {name: keys[name].split("_") for name in names}
    return {name: Pseudonym(p, f"{p}_{sequence}", frame) for name, (p, sequence, frame) in parts.items()}


def original_names(mapping: Path) -> dict[str, str]:
    """File name by key in a mapping file, of all patterns, but no pseudonyms; empty without the file."""
    pairs = chain.from_iterable(reading["files"].items() for reading in _read_readings(mapping).values())
    return {key: name for key, name in pairs if not LABELS["files"].fullmatch(name)}


def _assign_keys(files: Mapping[str, Identity], known: PseudonymMap) -> PseudonymMap:
    """The known keys, and new ones for the files that have none; a key never comes to mean another file.

    A file whose patient or sequence an alias changed gets a new key; its earlier one may hold again later.
    """
    patients, sequences, keys = dict(known.patients), dict(known.sequences), dict(known.files)
    key_of = {name: key for key, name in keys.items()}  # the latest key, if a file has had several
    key_in = {(name, key.rpartition("_")[0]): key for key, name in keys.items()}
    taken = {*keys}
    members: dict[str, list[str]] = defaultdict(list)
    for name in sorted(files):
        members[files[name].person].append(name)
    patient_of = {name: key.split("_")[0] for name, key in key_of.items()}
    earlier = {person: {*map(patient_of.get, own)} - {None} for person, own in members.items()}
    label_of = _label_persons(earlier, known.salt, patients)
    for person, names in members.items():
        patient = label_of[person]
        labels = {text: label for label, text in sequences.items() if label.startswith(f"{patient}_")}
        number = max((int(label.rpartition("_S")[2]) for label in labels.values()), default=0)
        for text in sorted({files[name].sequence for name in names}):
            if text not in labels:
                number += 1
                labels[text] = f"{patient}_S{number}"
                sequences[labels[text]] = text
            label = labels[text]
            new = {}
            for name in (name for name in names if files[name].sequence == text):
                if (key := key_in.get((name, label))) is None:
                    new[name] = files[name].frame
                elif key != key_of[name]:
                    keys[key] = keys.pop(key)  # an earlier key holds again: the last one counts
            keys |= _number_frames(label, new, taken)
    return PseudonymMap(known.salt, patients, sequences, keys)


def _label_persons(earlier: Mapping[str, set[str]], salt: str, patients: dict[str, str]) -> dict[str, str]:
    """Person → P001, by salted hashes; adds the new ones to `patients`. `earlier`: labels of the files."""
    result = {person: label for label, person in patients.items() if person in earlier}
    taken = set(result.values())
    number = max((int(label[1:]) for label in patients), default=0)
    others = earlier.keys() - result.keys()
    for person in sorted(others, key=lambda person: hashlib.sha256((salt + person).encode()).digest()):
        # Joined or renamed by an alias: its files keep the number that they had.
        if (label := min(earlier[person] - taken, default=None)) is None:
            number += 1
            label = f"P{number:03d}"
        taken.add(label)
        patients[label] = person
        result[person] = label
    return result


def _number_frames(sequence: str, frames: Mapping[str, str], taken: set[str]) -> Iterator[tuple[str, str]]:
    """Keys of files that are not `taken`: by the number of the frame, or by the next one that is free.

    More than six digits may be an ID. A key that is taken goes on with b, c, … z, -27, -28, …
    """
    numbers = {name: int(text) for name, text in frames.items() if re.fullmatch("[0-9]{1,6}", text)}
    free = (number for number in count(1) if f"{sequence}_F{number:04d}" not in taken)
    for name in (*numbers, *(name for name in frames if name not in numbers)):
        start = f"{sequence}_F{numbers[name] if name in numbers else next(free):04d}"
        endings = chain(["", *ascii_lowercase[1:]], (f"-{number}" for number in count(27)))
        key = next(start + ending for ending in endings if start + ending not in taken)
        taken.add(key)
        yield key, name


def _read_map(path: Path, patient_pattern: str | None, impersonal: bool) -> PseudonymMap | None:
    """The stored map of this pattern; impersonal names have no part in a salted one."""
    try:
        content = _read_readings(path).get(patient_pattern or "")
    except DataError:
        if not impersonal:
            raise
        return None
    return None if content is None or (impersonal and content["salt"]) else PseudonymMap(**content)


def _read_readings(path: Path) -> dict[str, dict]:
    """PseudonymMap fields by patient_pattern; takes away the rights that other users have."""
    advice = "Restore it, or remove it: patients may then get other numbers."
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise DataError(f"{path.name} belongs to another user. Run as its owner, or copy the data.") from None
    except ValueError:
        raise DataError(f"{path.name} is damaged (not valid JSON). {advice}") from None
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        try:
            if path.is_symlink():  # what it leads to is not ours to change
                raise PermissionError
            path.chmod(0o600)
            logger.warning("%s was open to other users (mode %o); it has mode 600 now.", path.name, mode)
        except OSError:
            logger.warning("%s is open to other users (mode %o): set mode 600.", path.name, mode)
    readings = content.get("readings") if isinstance(content, dict) else None
    if not isinstance(readings, dict) or not all(_is_map(reading) for reading in readings.values()):
        raise DataError(f"{path.name} is no mapping file that this program wrote. {advice}")
    return readings


def _is_map(reading: object) -> bool:
    if not isinstance(reading, dict) or set(reading) != {"salt", *LABELS}:
        return False
    return isinstance(reading["salt"], str) and all(
        isinstance(table, dict) and all(label.fullmatch(k) and isinstance(v, str) for k, v in table.items())
        for table, label in ((reading[name], label) for name, label in LABELS.items())
    )


def _write_map(path: Path, patient_pattern: str | None, found: PseudonymMap) -> None:
    """Writes a map beside those of other patterns; where the folder is read-only, the log says so."""
    readings = _read_readings(path) | {patient_pattern or "": asdict(found)}
    text = json.dumps({"about": ABOUT, "format": FORMAT, "readings": readings}, ensure_ascii=False, indent=1)
    try:
        write_text(path, text + "\n", mode=0o600)
    except WriteError as error:
        note = "%s cannot be written (%s): files that are added may change pseudonyms."
        logger.info(note, path.name, error.reason)


def identify(
    names: Sequence[str],
    patient_pattern: str | None = None,
    aliases: Path | str | None = None,
    headers: Mapping[str, Identity] = MappingProxyType({}),
) -> tuple[dict[str, Identity], bool]:
    """Identity by file name, and whether no name or alias can be that of a person; see `pseudonyms`."""
    found = parse_names(names, patient_pattern) | ({} if patient_pattern else headers)
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
    # Copies of a source picture are of one person, whatever a pattern or an alias file says.
    copies = [[persons[name] for name in group] for group in copy_groups(names)]
    joined = _join(persons, copies, first=lambda person: (person.startswith("file:"), person))
    if num_joined := len({*persons.values()}) - len({*joined.values()}):
        logger.info("Copies of one source picture joined %d patients to others.", num_joined)
    texts = [*names, *(patient for *_, patient in rows)]
    impersonal = not headers and all(is_impersonal(text) or _MADE_UP.fullmatch(text) for text in texts)
    return {name: replace(found[name], person=joined[name]) for name in names}, impersonal


def read_aliases(path: Path | str) -> list[tuple[int, str, str]]:
    """Number of line, file name and patient of each row of an alias file; errors name no file or person."""
    path, header = Path(path), ",".join(ALIAS_HEADER)
    missing = f"There is no alias file in that place. Give a CSV file: {header}."
    reader = csv.reader(read_text(path, missing).splitlines())
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


def read_text(path: Path, missing: str) -> str:
    """The text of a file that the user wrote; `missing` is the error where there is no such file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(missing) from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path.name} line {line} is not UTF-8. Save the file as UTF-8.") from None


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
    pairs, single = [], {}
    for person, targets in wanted.items():
        if len({*targets.values()}) == 1:
            pairs.append((person, *{*targets.values()}))
            continue
        if num_left := sum(other == person for other in persons.values()) - len(targets):
            numbers = ", ".join(str(lines[name]) for name in list(targets)[:5])
            raise DataError(
                f"{source} lines {numbers} give files that look like one person to several patients, and "
                f"leave out {num_left} more of its files. Add a line for each of them."
            )
        single |= targets
    return _join({**persons, **single}, pairs)


def _join(
    persons: Mapping[str, str], groups: Iterable[Iterable[str]], first: Callable[[str], object] | None = None
) -> dict[str, str]:
    """The person of each file after those of each group became one, the first in the order `first`."""
    parent: dict[str, str] = {}

    def root(person: str) -> str:
        while person in parent:
            person = parent[person]
        return person

    for group in groups:
        one, *others = sorted({*map(root, group)}, key=first)
        parent |= dict.fromkeys(others, one)
    return {name: root(person) for name, person in persons.items()}


def _image_named(file_name: str, by_text: Mapping[str, set[str]], place: str) -> str:
    """The file name that a row means."""
    path = PurePosixPath(re.sub(r"\.gz$", "", file_name.replace("\\", "/"), flags=re.IGNORECASE))
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
    name = f"name:{plain_name(patient)}"
    candidates = (names.get(name, name), f"pattern:{patient}")
    return next((person for person in candidates if person in known), f"alias:{patient.casefold()}")
