"""Who is in a picture: file names are read for patient, sequence and frame, and replaced by pseudonyms.

Names and 10-digit IDs do not leave this module and the local mapping file (`vesselrl.data.privacy`):
everything else knows a picture as `P001_S1_F0011`. How the numbers are given out: `vesselrl.data.numbering`.

A patient is a 10-digit ID where the file name has one, however the name beside it is spelled. Otherwise it is
the name, compared without case, spaces and punctuation; a name that occurs elsewhere with exactly one ID is
that patient. `Image_01L` and `Image_01R`, and other numbers with a side, are the two eyes of one patient. One
person under two spellings without an ID, or under two IDs, cannot be seen here: an alias file says so.
"""

import hashlib
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vesselrl.data.aliases import join_persons, read_aliases
from vesselrl.data.numbering import FileIdentity, number_files
from vesselrl.data.privacy import Numbering, derive_salt, read_numbering, write_numbering
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
# The people of the built-in synthetic data (`vesselrl.data.synthetic`) are made up.
_MADE_UP = re.compile(r"SYNTH(?:_[A-J]+_frame_|[_^ ]*\(?\d{10}\)?[_ ]).*")


@dataclass(frozen=True)
class Identity:
    """What a file name says; never logged or shown (`repr` gives nothing away)."""

    # What tells this person from others: "id:…", "name:…", "eyes:…", "pattern:…" or "file:…".
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
    `NAME__<10 digits>__…` and `NAME_frame_000011`, with spaces or underscores and names in any script; and
    `Image_01L` with `Image_01R`, or any number with a side, as two sequences of one patient. Any other name
    is a patient of its own.

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
        eye = _EYE.fullmatch(stem)
        if eye is None:
            return Identity(f"file:{name}")
        folder = name.rpartition("/")[0]
        return Identity(f"eyes:{folder}/{eye['case'].casefold()}", sequence=eye["eye"].casefold())
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


def person_of(stem: str) -> str:
    """SHA-256 of the person that a file name alone gives: an order of people that no salt can change."""
    return hashlib.sha256(parse_name(stem).person.encode()).hexdigest()


def names_a_person(name: str) -> bool:
    """Whether a file name is that of an angiography export, with a person or an ID in it.

    >>> names_a_person("LI_MING(0123456789)_1-2_3_0A1B2C3D_frame_000011"), names_a_person("picture")
    (True, False)
    """
    return parse_name(name).person.startswith(("id:", "name:"))


def pseudonyms(
    names: Iterable[str],
    patient_pattern: str | None = None,
    aliases: Path | str | None = None,
    mapping: Path | str | None = None,
    keep: Literal["nothing", "people", "all"] = "people",
) -> dict[str, Pseudonym]:
    """A pseudonym for each file name; all keys differ, and the order of the names does not matter.

    Where file names may carry people, the order of the patients is salted, and the mapping file, if there is
    one, keeps the salt and every key: files that are added later change no pseudonym. Impersonal names
    (train_001) and the built-in synthetic data have nothing to hide: no salt, and a mapping file only where
    one without a salt is there already, in a copy that `vesselrl.data.repair` wrote.

    Args:
        names: paths below images/, without the ending.
        patient_pattern: how to read the names, see `parse_by_pattern`; None for `parse_name`.
        aliases: CSV file that joins several spellings of one person, see `vesselrl.data.aliases`.
        mapping: mapping file, read and written; see `vesselrl.data.privacy`. None: nothing is kept.
        keep: what is written to it: the keys of people, those of impersonal names as well, or nothing.

    Raises:
        DataError: the pattern is not valid or does not match, see `parse_by_pattern`; the alias file or the
            mapping file cannot be used.

    >>> sorted(alias.key for alias in pseudonyms(["Image_01L", "Image_01R"]).values())
    ['P001_S1_F0001', 'P001_S2_F0001']
    """
    names = sorted(set(names))
    if patient_pattern is None:
        identities = {name: parse_name(name) for name in names}
    else:
        identities = parse_by_pattern(names, patient_pattern)
    only_id = _only_ids(identities)
    persons = {name: only_id.get(identity.person, identity.person) for name, identity in identities.items()}
    rows = [] if aliases is None else read_aliases(aliases)
    if aliases is not None:
        persons = join_persons(persons, only_id, rows, Path(aliases).name)
    files = {name: FileIdentity(persons[name], i.sequence, i.frame) for name, i in identities.items()}

    impersonal = _is_impersonal_set([*names, *(row.patient for row in rows)])
    known = None if mapping is None else _known_numbering(mapping, patient_pattern, impersonal)
    start = known or Numbering()
    if not impersonal and not start.salt:
        start = replace(start, salt=derive_salt(names))
    numbering = number_files(files, start)
    is_kept = keep == "all" or (keep == "people" and not (impersonal and known is None))
    if mapping is not None and is_kept and numbering != known:
        write_numbering(mapping, patient_pattern, numbering)
    keys = {name: key for key, name in numbering.files.items()}
    result = {}
    for name in names:
        patient, sequence, frame = keys[name].split("_")
        result[name] = Pseudonym(patient, f"{patient}_{sequence}", frame)
    return result


def _known_numbering(mapping: Path | str, patient_pattern: str | None, impersonal: bool) -> Numbering | None:
    """What the mapping file holds for these names; impersonal ones have no part in a salted numbering."""
    try:
        known = read_numbering(mapping, patient_pattern)
    except DataError:
        if not impersonal:
            raise
        return None
    return None if impersonal and known is not None and known.salt else known


def _is_impersonal_set(texts: Iterable[str]) -> bool:
    """Whether none of these file names and aliases can be that of a person."""
    return all(is_impersonal(text) or _MADE_UP.fullmatch(text) for text in texts)


def _only_ids(identities: Mapping[str, Identity]) -> dict[str, str]:
    """Name → ID, for the names that occur with exactly one ID."""
    ids_of = defaultdict(set)
    for identity in identities.values():
        if identity.alias:
            ids_of[identity.alias].add(identity.person)
    num_shared = sum(len(ids) > 1 for ids in ids_of.values())
    if num_shared:
        logger.info("%d names occur with more than one ID; each ID counts as a patient.", num_shared)
    return {alias: next(iter(ids)) for alias, ids in ids_of.items() if len(ids) == 1}
