"""Pseudonyms such as P001_S1_F0011, and the mapping file, which alone knows what each stands for.

It keeps every key that was ever given out. Numbers follow SHA-256(salt + person), so that who knows the
patients cannot tell P007; the salt is a hash of all file names, so that two copies of the data agree.
"""

import hashlib
import json
import logging
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from string import ascii_lowercase
from typing import Literal

from vesselrl.data.patients import Identity, identify
from vesselrl.errors import DataError, WriteError
from vesselrl.experiment.run_folder import read_json, write_text

logger = logging.getLogger(__name__)

MAPPING_FILE = "patients.mapping.json"
FORMAT = 1
ABOUT = "Names and IDs of patients. Keep this file with the images; never commit, send or publish it."
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
) -> dict[str, Pseudonym]:
    """A pseudonym for each file name, a path below images/ without ending; all keys differ.

    Impersonal names (train_001) and the built-in synthetic data have nothing to hide: no salt, and a mapping
    file only where one without a salt is there already, in a repaired copy of a data set. `mapping` is that
    file; `keep` says what is written to it: keys of people, those of impersonal names as well, or nothing.

    >>> sorted(alias.key for alias in pseudonyms(["Image_01L", "Image_01R"]).values())
    ['P001_S1_F0001', 'P001_S2_F0001']
    """
    names = sorted(set(names))
    files, impersonal = identify(names, patient_pattern, aliases)
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


def _assign_keys(files: Mapping[str, Identity], known: PseudonymMap) -> PseudonymMap:
    """The known keys, and new ones for the files that have none; a key never comes to mean another file.

    A file whose patient or sequence changed, by an alias, gets a new key; its earlier one holds again as soon
    as it belongs there again.
    """
    patients, sequences, keys = dict(known.patients), dict(known.sequences), dict(known.files)
    key_of = {name: key for key, name in keys.items()}  # the latest key, if a file has had several
    key_in = {(name, key.rpartition("_")[0]): key for key, name in keys.items()}
    frames_of: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        sequence, _, frame = key.rpartition("_")
        frames_of[sequence].add(frame)
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
            own = [name for name in names if files[name].sequence == text]
            for name in own:
                key = key_in.get((name, label))
                if key is not None and key != key_of[name]:
                    keys[key] = keys.pop(key)  # an earlier key holds again: the last one counts
            new = {name: files[name].frame for name in own if (name, label) not in key_in}
            keys |= {f"{label}_{frame}": name for name, frame in _number_frames(new, frames_of[label])}
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


def _number_frames(frames: Mapping[str, str], taken: set[str]) -> Iterator[tuple[str, str]]:
    """File name, F0011: the number in it, unless more than six digits may be an ID, or the next free one."""
    numbers = {name: int(text) for name, text in frames.items() if re.fullmatch("[0-9]{1,6}", text)}
    for name, number in numbers.items():
        yield name, _free(f"F{number:04d}", taken)
    free = (label for label in map("F{:04d}".format, count(1)) if label not in taken)
    for name in frames:
        if name not in numbers:
            yield name, _free(next(free), taken)


def _free(label: str, taken: set[str]) -> str:
    """The label, with b, c, … z, -27, -28, … where it is taken; takes it."""
    endings = chain(["", *ascii_lowercase[1:]], (f"-{number}" for number in count(27)))
    found = next(label + ending for ending in endings if label + ending not in taken)
    taken.add(found)
    return found


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
    tables = [(reading[name], label) for name, label in LABELS.items()]
    return isinstance(reading["salt"], str) and all(
        isinstance(table, dict) and all(label.fullmatch(k) and isinstance(v, str) for k, v in table.items())
        for table, label in tables
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
