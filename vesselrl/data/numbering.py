"""How pseudonyms are numbered: patients by the order of salted hashes, files that have a key keep it."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vesselrl.data.privacy import Numbering


@dataclass(frozen=True)
class FileIdentity:
    """Whose file it is and which sequence and frame its name gives; `repr` shows nothing."""

    person: str = field(repr=False)
    sequence: str = field(default="", repr=False)
    frame: str = field(default="", repr=False)


def number_files(files: Mapping[str, FileIdentity], known: Numbering) -> Numbering:
    """The known keys, and new ones for the files that have none; a key never comes to mean another file.

    New patients get the next numbers, in the order of SHA-256(salt + person), so that a number says nothing
    about the name. New sequences of a patient follow in the order of their names. A frame has the number of
    its file name. A file whose patient or sequence changed, by an alias, gets a new key; its
    earlier one holds again as soon as it belongs there again.

    Args:
        files: identity by file name.
        known: what an earlier call returned, or only a salt.
    """
    patients, sequences, keys = dict(known.patients), dict(known.sequences), dict(known.files)
    key_of = {name: key for key, name in keys.items()}  # the latest key, if a file has had several
    key_in = {(name, _sequence_of(key)): key for key, name in keys.items()}
    frames_of: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        frames_of[_sequence_of(key)].add(key.rpartition("_")[2])
    members: dict[str, list[str]] = defaultdict(list)
    for name in sorted(files):
        members[files[name].person].append(name)
    earlier = {
        person: [key_of[name].split("_")[0] for name in names if name in key_of]
        for person, names in members.items()
    }
    label_of = _label_persons(members, known.salt, patients, earlier)
    for person, names in members.items():
        texts = {files[name].sequence for name in names}
        for text, label in _label_sequences(texts, label_of[person], sequences).items():
            own = [name for name in names if files[name].sequence == text]
            for name in own:
                if key_in.get((name, label), key_of.get(name)) != key_of.get(name):
                    key = key_in[name, label]
                    keys[key] = keys.pop(key)  # an earlier key holds again: the last one counts
            new = [name for name in own if (name, label) not in key_in]
            frames = _number_frames({name: files[name].frame for name in new}, frames_of[label])
            keys |= {f"{label}_{frame}": name for name, frame in frames.items()}
    return Numbering(known.salt, patients, sequences, keys)


def _sequence_of(key: str) -> str:
    """P001_S1 of P001_S1_F0011."""
    return key.rpartition("_")[0]


def _label_persons(
    persons: Iterable[str], salt: str, patients: dict[str, str], earlier: Mapping[str, list[str]]
) -> dict[str, str]:
    """Person → P001; adds the new ones to `patients` (P001 → person)."""
    by_person = {person: label for label, person in patients.items()}
    result = {person: by_person[person] for person in persons if person in by_person}
    taken = set(result.values())
    number = max((int(label[1:]) for label in patients), default=0)
    others = [person for person in persons if person not in result]
    for person in sorted(others, key=lambda person: hashlib.sha256((salt + person).encode()).digest()):
        # Joined or renamed by an alias: its files keep the number that they had.
        free = sorted(set(earlier[person]) - taken)
        if free:
            label = free[0]
        else:
            number += 1
            label = f"P{number:03d}"
        taken.add(label)
        patients[label] = person
        result[person] = label
    return result


def _label_sequences(texts: Iterable[str], patient: str, sequences: dict[str, str]) -> dict[str, str]:
    """Sequence in the file name → P001_S1; adds the new ones to `sequences` (P001_S1 → sequence)."""
    own = {text: label for label, text in sequences.items() if label.startswith(f"{patient}_")}
    number = max((int(label.rpartition("_S")[2]) for label in own.values()), default=0)
    for text in sorted(set(texts) - set(own)):
        number += 1
        own[text] = f"{patient}_S{number}"
        sequences[own[text]] = text
    return {text: own[text] for text in texts}


def _number_frames(frames: Mapping[str, str], taken: set[str]) -> dict[str, str]:
    """File name → F0011 for the files of one sequence: the frame number, or the next free number without one.

    A number of more than six digits may be an ID: it is not used. Two files of one number get F0011, F0011b.
    """
    result: dict[str, str] = {}
    for name, text in frames.items():
        if text.isascii() and text.isdigit() and len(text) <= 6:
            result[name] = _free(f"F{int(text):04d}", taken)
    number = 0
    for name in frames:
        if name not in result:
            number += 1
            while f"F{number:04d}" in taken:
                number += 1
            result[name] = _free(f"F{number:04d}", taken)
    return result


def _free(label: str, taken: set[str]) -> str:
    """The label, with b, c, … or a number where it is taken already; marks it as taken."""
    candidate, number = label, 1
    while candidate in taken:
        number += 1
        candidate = f"{label}{chr(ord('a') + number - 1)}" if number <= 26 else f"{label}-{number}"
    taken.add(candidate)
    return candidate
