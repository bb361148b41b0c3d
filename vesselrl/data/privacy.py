"""The mapping file: the only place that knows which file a pseudonym such as P001_S1_F0011 stands for.

It lies beside the images, as `patients.mapping.json` in the data root: there the names are anyway, it travels
with the data, and nobody shares it with a run folder. It is readable by its owner only (mode 600), and
`*.mapping.json` is in this project's .gitignore. It keeps the salt and every key that was ever given out, so
that files that are added later change no key. Where it cannot be written, a line in the log says so.

The salt. Numbers follow SHA-256(salt + person). Without a salt, whoever knows the patients of a study could
hash them and read off who P007 is. A random salt would give two copies of the same data different keys:
splits could not be exchanged, and results of two machines would be compared image by image although their
keys mean different images. So the salt of a new data set is the SHA-256 of all its file names: equal on every
machine, and unknown to anyone who does not hold the complete list of file names. The price: it does not
protect against a person who has that list, but who has it needs no pseudonyms.

What is reproducible without the mapping file: the keys of an unchanged data set, and the sides of a split
always (`vesselrl.data.splits` does not use the numbers). After files were added, two machines agree on the
keys only if the mapping file was copied with the data.
"""

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vesselrl.errors import DataError

logger = logging.getLogger(__name__)

MAPPING_FILE = "patients.mapping.json"
FORMAT = 1
# What `vesselrl.data.numbering` gives; the second file of one frame is F0011b, the 27th F0011-27.
LABELS = {
    "patients": re.compile(r"P\d{3,}"),
    "sequences": re.compile(r"P\d{3,}_S\d+"),
    "files": re.compile(r"P\d{3,}_S\d+_F\d+([b-z]|-\d+)?"),
}
ABOUT = "Names and IDs of patients. Keep this file with the images; never commit, send or publish it."


@dataclass(frozen=True)
class Numbering:
    """All keys of a data set and what they stand for; `repr` shows nothing."""

    # Empty: the order of the patients needs no salt, because the file names carry no person.
    salt: str = field(default="", repr=False)
    # P001 → person, P001_S1 → sequence as in the file name, P001_S1_F0011 → file name; the last one counts.
    patients: dict[str, str] = field(default_factory=dict, repr=False)
    sequences: dict[str, str] = field(default_factory=dict, repr=False)
    files: dict[str, str] = field(default_factory=dict, repr=False)


def derive_salt(names: Sequence[str]) -> str:
    """The salt of a new data set: SHA-256 of its sorted file names."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def read_numbering(path: Path | str, patient_pattern: str | None) -> Numbering | None:
    """The numbering that a mapping file holds for this way to read file names; None: there is none yet.

    Raises:
        DataError: the file is damaged, or this user may not read it.
    """
    content = _read_readings(Path(path)).get(patient_pattern or "")
    return None if content is None else Numbering(**content)


def write_numbering(path: Path | str, patient_pattern: str | None, numbering: Numbering) -> None:
    """Writes a numbering beside those of other patient patterns, at once, to a file of mode 600.

    A folder that cannot be written to is no error: the log says that keys hold for this set of files only.
    """
    path = Path(path)
    readings = _read_readings(path) | {patient_pattern or "": asdict(numbering)}
    text = json.dumps({"about": ABOUT, "format": FORMAT, "readings": readings}, ensure_ascii=False, indent=1)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(partial, path)
    except OSError as error:
        logger.info(
            "%s cannot be written (%s): pseudonyms hold for this set of files, added files may change them.",
            path.name,
            error.strerror,
        )
        if partial.exists():
            partial.unlink()


def _read_readings(path: Path) -> dict[str, dict]:
    """patient_pattern → fields of a Numbering."""
    advice = "Restore it, or remove it: patients may then get other numbers."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise DataError(f"{path.name} belongs to another user. Run as its owner, or copy the data.") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DataError(f"{path.name} is damaged (not valid JSON). {advice}") from None
    _make_private(path)
    readings = content.get("readings") if isinstance(content, dict) else None
    if not isinstance(readings, dict) or not all(_is_numbering(reading) for reading in readings.values()):
        raise DataError(f"{path.name} is no mapping file that this program wrote. {advice}")
    return readings


def _is_numbering(reading: object) -> bool:
    """Whether these are the fields of a Numbering, with the labels that `number_files` gives."""
    return (
        isinstance(reading, dict)
        and set(reading) == {"salt", *LABELS}
        and isinstance(reading["salt"], str)
        and all(isinstance(reading[name], dict) for name in LABELS)
        and all(LABELS[name].fullmatch(label) for name in LABELS for label in reading[name])
        and all(isinstance(text, str) for name in LABELS for text in reading[name].values())
    )


def _make_private(path: Path) -> None:
    """Takes other users' rights away where somebody gave them, and says so."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        try:
            path.chmod(0o600)
            logger.warning("%s was open to other users (mode %o); it has mode 600 now.", path.name, mode)
        except OSError:
            logger.warning("%s is open to other users (mode %o): set mode 600.", path.name, mode)
