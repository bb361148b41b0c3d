"""Who is in a picture: file names are read for patient, sequence and frame, and replaced by pseudonyms.

Names and 10-digit IDs do not leave this module: everything else knows a picture as `P001_S1_F0011`. The
numbers follow the order of hashes, so they say nothing about the alphabet. They hold for one set of files:
a file added to the data root may change them.

A patient is a 10-digit ID where the file name has one, however the name beside it is spelled. Otherwise it is
the name, compared without case, spaces and punctuation; a name that occurs elsewhere with exactly one ID is
that patient. One person under two spellings without an ID, or under two IDs, cannot be seen here.
"""

import hashlib
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vesselrl.data.errors import DataError

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
# File names without a person in them, such as train_001 or 07L: messages may show these.
_IMPERSONAL = re.compile(
    r"(?:(?:train|training|test|val|valid|validation|images?|img|frame|case|sample|scan|slice)[-_ ]?)?"
    r"\d{1,6}[-_ ]?(?:l|r|left|right)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Identity:
    """What a file name says; never logged or shown (`repr` gives nothing away)."""

    # What tells this person from others: "id:…", "name:…", "pattern:…" or "file:…".
    person: str = field(repr=False)
    # "name:…" where the person has an ID as well.
    alias: str = field(default="", repr=False)
    # Empty where the name has none.
    sequence: str = field(default="", repr=False)
    frame: str = field(default="", repr=False)


@dataclass(frozen=True)
class Pseudonym:
    """The names of one picture in every output."""

    patient: str  # P001
    sequence: str  # P001_S1
    frame: str  # F0011, the number in the file name; counted from F0001 where it has none

    @property
    def key(self) -> str:
        """The unique name of the picture, such as P001_S1_F0011."""
        return f"{self.sequence}_{self.frame}"


def parse_name(name: str) -> Identity:
    """Reads patient, sequence and frame from a file name.

    It knows `NAME(<10 digits>)_S-N_K_HEX8_frame_000011`, `NAME^(<10 digits>)_…`, `NAME_<10 digits>__…`,
    `NAME__<10 digits>__…` and `NAME_frame_000011`, with spaces or underscores and names in any script. Any
    other name is a patient of its own.

    Args:
        name: path below images/, without the ending.

    >>> parse_name("LI_MING(0123456789)_1-2_3_0A1B2C3D_frame_000011").person
    'id:0123456789'
    """
    name = unicodedata.normalize("NFKC", name)
    stem = name.rsplit("/", 1)[-1].strip()
    match = _WITH_ID.fullmatch(stem) or _WITHOUT_ID.fullmatch(stem)
    plain = "" if match is None else re.sub(r"[\W_]+", "", match["name"]).casefold()
    number = None if match is None else match.groupdict().get("id")
    if not plain and not number:
        return Identity(f"file:{name}")
    sequence = re.sub(r"[\s_]+", "_", match["sequence"] or "").strip("_").casefold()
    frame = match["frame"] or ""
    if number:
        return Identity(f"id:{number}", f"name:{plain}", sequence, frame)
    return Identity(f"name:{plain}", "", sequence, frame)


def parse_by_pattern(names: Iterable[str], patient_pattern: str) -> dict[str, Identity]:
    r"""Reads file names by a pattern of the user, for data that `parse_name` does not know.

    Args:
        names: paths below images/, without the ending.
        patient_pattern: regular expression searched in each name, with the group `patient` and, if there are
            such parts, `sequence` and `frame`, for example `(?P<patient>\d+)(?P<frame>[LR])$`.

    Raises:
        DataError: the pattern is not valid, has no group `patient`, or finds no patient in a name.

    >>> parse_by_pattern(["train_01L"], r"(?P<patient>\d+)(?P<frame>[LR])$")["train_01L"].person
    'pattern:01'
    """
    try:
        pattern = re.compile(patient_pattern)
    except re.error as error:
        raise DataError(f"patient_pattern is not a regular expression: {error}. Correct it.") from None
    if "patient" not in pattern.groupindex:
        raise DataError(
            "patient_pattern has no group (?P<patient>...). Put it around the part for the patient."
        )
    names = sorted(names)
    matches = {name: pattern.search(unicodedata.normalize("NFKC", name)) for name in names}
    wrong = [
        number for number, name in enumerate(names, 1) if not matches[name] or not matches[name]["patient"]
    ]
    if wrong:
        raise DataError(
            f"patient_pattern finds no patient in {len(wrong)} of {len(names)} file names (first: number "
            f"{wrong[0]} in the order of the names). Widen the pattern, or remove these files."
        )
    result = {}
    for name, match in matches.items():
        found = match.groupdict()
        person = f"pattern:{found['patient']}"
        result[name] = Identity(person, "", found.get("sequence") or "", found.get("frame") or "")
    return result


def is_impersonal(name: str) -> bool:
    """Whether a file name is only a number with an ordinary word, so that a message may show it.

    >>> is_impersonal("train_001"), is_impersonal("zhang san_frame_000011")
    (True, False)
    """
    return _IMPERSONAL.fullmatch(name) is not None


def pseudonyms(names: Iterable[str], patient_pattern: str | None = None) -> dict[str, Pseudonym]:
    """A pseudonym for each file name; all keys differ, and the order of the names does not matter.

    Args:
        names: paths below images/, without the ending.
        patient_pattern: how to read the names, see `parse_by_pattern`; None for `parse_name`.

    Raises:
        DataError: the pattern is not valid or does not match; see `parse_by_pattern`.
    """
    if patient_pattern is None:
        identities = {name: parse_name(name) for name in names}
    else:
        identities = parse_by_pattern(names, patient_pattern)
    persons = _merge_names(identities)
    members = defaultdict(lambda: defaultdict(list))
    for name in sorted(identities):
        digest = hashlib.sha256(persons[name].encode()).hexdigest()
        members[digest][identities[name].sequence].append(name)

    result = {}
    for patient_number, digest in enumerate(sorted(members), start=1):
        patient = f"P{patient_number:03d}"
        for sequence_number, sequence in enumerate(sorted(members[digest]), start=1):
            names = members[digest][sequence]
            frames = _number_frames({name: identities[name].frame for name in names})
            for name, frame in frames.items():
                result[name] = Pseudonym(patient, f"{patient}_S{sequence_number}", frame)
    return result


def _merge_names(identities: Mapping[str, Identity]) -> dict[str, str]:
    """File name → person, where a name without an ID becomes the one ID that occurs with it."""
    ids_of = defaultdict(set)
    for identity in identities.values():
        if identity.alias:
            ids_of[identity.alias].add(identity.person)
    num_shared = sum(len(ids) > 1 for ids in ids_of.values())
    if num_shared:
        logger.info("%d names occur with more than one ID; each ID counts as a patient.", num_shared)
    only_id = {alias: next(iter(ids)) for alias, ids in ids_of.items() if len(ids) == 1}
    return {name: only_id.get(identity.person, identity.person) for name, identity in identities.items()}


def _number_frames(frames: Mapping[str, str]) -> dict[str, str]:
    """File name → F0011 for the files of one sequence: the frame number, or the next free number without one.

    A number of more than six digits may be an ID: it is not used. Two files of one number get F0011, F0011b.
    """
    result: dict[str, str] = {}
    taken: set[str] = set()
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
