"""Whose image it is: reads patient, sequence and frame from file names.

What tools add to the name of a picture, in uploads, exports, copies and augmentation, is taken away first. A
patient is then a 10-digit ID, or a name without case, spaces and punctuation; docs/data.md has the forms.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from vesselrl.errors import DataError

_ENDING = "(?:png|jpe?g|tiff?|bmp|gif|pgm|ppm|webp|dcm)"
_CHANGE = (
    "(?:aug(?:mented)?|(?:[hv]|(?:horizontal|vertical)(?:ly)?)?[-_ ]?flip(?:ped|lr|ud)?|mirror(?:ed)?"
    "|rot(?:at(?:ed?|ion))?|crop(?:ped)?|patch|tile|nois[ey]|blur(?:red)?)"
)
_COPY = "(?:copy|kopie|copie|copia|副本|コピー)"
# What tools add to the name of a picture.
_MARKS = {
    # Label Studio: 1b2c3d4e-NAME, and 1b2c3d__NAME where it fetched the picture. A UUID begins alike.
    "upload": "^[0-9a-f]{8}-(?![0-9a-f]{4}-[0-9a-f]{4}-)|^[0-9a-f]{6}(?:[0-9a-f]{2})?__",
    # Roboflow: NAME_png.rf.HASH; every changed copy of a picture has another hash.
    "roboflow": rf"(?:[._-]{_ENDING}){{0,2}}\.rf\.[0-9A-Za-z]{{8,}}$",
    # File managers: NAME - Copy (2), NAME copy 2, NAME (copy), Copy of NAME.
    "copy": rf"(?i:[\s_-]+{_COPY}(?:[\s_-]*\(?\d{{1,3}}\)?)?$|\s*\((?:another |\d+\w\w )?copy\)$"
    rf"|^{_COPY} (?:of|von|de|di) )",
    # NAME_frame_000011 (1), and nnU-Net's channel in NAME_frame_000011_0000.
    "frame": r"(?i:(?P<keep>frame[\s_]+\d+)(?:\s*\(\d{1,3}\)|_000\d)$)",
    # Augmentation: NAME_aug_3, NAME_hflip, NAME_rot90, NAME_tile_3_4, NAME_flip_frame_000011, aug_3_NAME.
    "change": rf"(?i:[\s_-]+{_CHANGE}(?:[-_ ]?(?:\d{{1,4}}(?:[-_]\d{{1,4}})?|lr|ud|[hvxy]))?"
    rf"(?=$|[\s_]+frame[\s_]+\d+$)|^{_CHANGE}[-_]?\d{{0,3}}[\s_-]+)",
    # NAME (1) beside NAME, else Windows has numbered different pictures so; NAME_0000 likewise.
    "number": r"\s*\(\d{1,3}\)$|_000\d$",
    # NAME.dcm.png
    "ending": rf"(?i:\.{_ENDING}$)",
}
_MARKS = {kind: re.compile(pattern) for kind, pattern in _MARKS.items()}
_COPIES = ("roboflow", "copy", "frame", "change", "number")
# Folders of subsets, which say nothing of a picture.
_SUBSET_FOLDERS = re.compile(
    "(?i)train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?|images?|imgs?|frames?|data|default|obj_.*"
)
_SERIES = r"[^\W_]+-[^\W_]+[\s_]+[^\W_]+[\s_]+[0-9a-f]{8}"  # S-N_K_HEX8
# NAME(0123456789)_…, NAME^(0123456789)_…, NAME_0123456789__…, NAME__0123456789__…; then the sequence.
_WITH_ID = re.compile(
    r"(?is)(?P<name>.*?)[\s_^]*\(?(?<!\d)(?P<id>\d{10})(?!\d)\)?[\s_]*"
    r"(?P<sequence>.*?)(?:[\s_]*frame[\s_]*(?P<frame>\d+))?"
)
# NAME_frame_000011 and NAME_S-N_K_HEX8_frame_000011.
_NO_ID = re.compile(rf"(?is)(?P<name>.+?)(?:[\s_]+(?P<sequence>{_SERIES}))?[\s_]+frame[\s_]+(?P<frame>\d+)")
# File names without a person in them, such as train_001, 07L or 21_training: messages may show these.
_WORD = r"(?:train|training|test|val|valid|validation|images?|im|img|frame|case|sample|scan|slice)"
_NUMBER = rf"(?:{_WORD}[-_ ]?)?\d{{1,6}}"
_IMPERSONAL = re.compile(rf"(?i){_NUMBER}(?:[-_ ]?(?:l|r|left|right)|[-_ ](?:training|test))?")
# The two eyes of one patient: Image_01L and Image_01R.
_EYE = re.compile(rf"(?i)(?P<case>{_NUMBER})[-_ ]?(?P<eye>l|r)(?:eft|ight)?")
# CVAT: task_3_NAME_frame_000011, or frame_000011 in the folder of its video; not in one of these folders.
_TASK = re.compile(r"(?i)(?:task|job)[-_ ]\d+[-_ ]+(?=\S.*?[\s_]frame[\s_]+\d)")
_FRAME = re.compile(r"(?i)frame[\s_]*\d+")
# They say nothing of a patient, though ten digits may stand in them: UUIDs, hashes, times in ms, DICOM UIDs.
_UNREAD = re.compile(
    r"(?i)(?<![0-9a-z])(?:[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|1[4-8]\d{11}"
    r"|(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{16,})(?![0-9a-z])"
    r"|(?<![0-9a-z])(?<!\d\.)[0-2](?:\.\d+){5,}"
    r"|(?<![0-9a-z])[12]_(?:2_840|3_12|3_46|3_6_1|16_840)(?:_\d+){3,}"
)
# Words beside a number that name no person, besides _WORD.
_ORDINARY = re.compile(rf"(?i){_WORD}|[a-z]|patient|subject|subj|sub|pat|no|nr|left|right")
_TIMES, _DAY_S = range(1_262_304_000, 2_000_000_000), 86_400  # Unix times from 2010 on


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
    return parse_names([name])[name]


def _read_source(name: str) -> Identity:
    folder, _, stem = name.rpartition("/")
    if _FRAME.fullmatch(stem):
        videos = [part for part in folder.split("/") if part and not _SUBSET_FOLDERS.fullmatch(part)]
        stem = "_".join([*videos[-1:], stem])
    stem = _TASK.sub("", stem)
    hidden = _UNREAD.sub(lambda found: "x" * len(found[0]), stem)
    match = _WITH_ID.fullmatch(hidden) or _NO_ID.fullmatch(hidden)
    part = {key: stem[slice(*match.span(key))] for key in match.groupdict()} if match else {}
    number, written = part.get("id"), part.get("name", "")
    plain = plain_name(_UNREAD.sub(" ", written)) or ("" if number else plain_name(written))
    if not plain and not number:
        if (eye := _EYE.fullmatch(stem)) is None:
            return Identity(f"file:{name}")
        return Identity(f"eyes:{folder}/{eye['case'].casefold()}", sequence=eye["eye"].casefold())
    sequence = re.sub(r"[\s_]+", "_", part.get("sequence", "")).strip("_").casefold()
    if not number:
        return Identity(f"name:{plain}", "", sequence, part["frame"])
    # The forms of hospitals are IDs, whatever their number.
    has_series = re.match(f"(?i){_SERIES}", part["sequence"].lstrip("-_ "))
    is_id = has_series or hidden.startswith((")", "__"), match.end("id"))
    may_be_time = not is_id and int(number) in _TIMES
    return Identity(f"id:{number}", f"name:{plain}", sequence, part["frame"], may_be_time)


def parse_names(names: Iterable[str], patient_pattern: str | None = None) -> dict[str, Identity]:
    """Reads all names of a data set, by a pattern of the user if there is one."""
    if patient_pattern is not None:
        return parse_by_pattern(names, patient_pattern)
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
        if not gaps or gaps[len(gaps) // 2] > _DAY_S or not all(found[name].may_be_time for name in names):
            continue
        if not re.fullmatch(rf"name:{_WORD}?\d*", other):
            result |= {name: replace(found[name], person=other, other_name="") for name in names}
        elif 2 * len(numbers) > len(names):
            for name in names:
                without = _read_source(re.sub(r"(?<!\d)1\d{9}(?!\d)", "", sources[name]))
                result[name] = without if without.person.startswith("name:") else Identity(f"file:{name}")
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
    for name, identity in parse_names(lone).items():
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


def plain_name(name: str) -> str:
    """A person's name without case, spaces and punctuation."""
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
    result = {}
    for name in sorted(names):
        match = pattern.search(unicodedata.normalize("NFKC", name))
        part = match.groupdict(default="") if match else {}
        person = f"pattern:{part.get('patient', '')}"
        result[name] = Identity(person, "", part.get("sequence", ""), part.get("frame", ""))
    if wrong := [place for place, one in enumerate(result.values(), 1) if one.person == "pattern:"]:
        raise DataError(
            f"patient_pattern finds no patient in {len(wrong)} of {len(result)} file names (first: number "
            f"{wrong[0]} in the order of the names). Widen the pattern, or remove these files."
        )
    return result


def is_impersonal(name: str) -> bool:
    """Whether a file name is a number with an ordinary word (train_001): a message may show it."""
    return _IMPERSONAL.fullmatch(name) is not None


def source_names(names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """The name of the source picture of each file, and whether the file is marked as a copy of it.

    It takes all names to know the prefixes of Label Studio, which have letters and are different for each
    picture, and numbers of copies from those of pictures.
    """
    split = {name: unicodedata.normalize("NFKC", name).rpartition("/") for name in names}
    first = {name: _strip(stem.strip(), set()) for name, (*_, stem) in split.items()}
    rests = _without_uploads({name: stem for name, (stem, _) in first.items()})
    others = {*rests.values()}
    others |= _without_channels(others)
    found = {}
    for name, (folder, slash, _) in split.items():
        source, is_copy = _strip(rests[name], others)
        found[name] = f"{folder}{slash}{source}", is_copy or first[name][1]
    return found


def _without_uploads(stems: dict[str, str]) -> dict[str, str]:
    """Stems without prefixes of Label Studio; a picture that was exported and uploaded again has two."""
    upload, prefixes = _MARKS["upload"], defaultdict(set)
    for stem in stems.values():
        if match := upload.match(stem):
            prefixes[match[0]].add(stem[match.end() :])
    is_code = any(len({_strip(one, own)[0] for one in own}) > 1 for own in prefixes.values())  # of a patient
    if is_code or not any(re.search("[a-f]", prefix) for prefix in prefixes):
        return stems
    rests = {name: upload.sub("", stem) or stem for name, stem in stems.items()}
    return stems if rests == stems else _without_uploads(rests)


def _without_channels(stems: set[str]) -> set[str]:
    """The names of the cases of nnU-Net: every file is a channel, 0000 and perhaps more, of a case."""
    cases = {stem[:-5] for stem in stems if re.search(r"_000\d$", stem)}
    complete = len(cases) > 1 and all(stem[:-5] in cases and f"{stem[:-5]}_0000" in stems for stem in stems)
    # The tenth of frames that are counted from 0 look alike: anna_0000, anna_0001.
    is_sure = len(cases) == len(stems) or all(re.search(r"\d", case) for case in cases)
    return cases if complete and is_sure else set()


def _strip(stem: str, others: set[str]) -> tuple[str, bool]:
    """A name without the marks of tools, but for a prefix of an upload, and whether it is that of a copy."""
    for kind, pattern in _MARKS.items():
        if kind == "upload" or (match := pattern.search(stem)) is None:
            continue
        rest = stem[: match.start()] + match.groupdict().get("keep", "") + stem[match.end() :]
        # aug_3 is the number of a copy where the rest has a number of its own, or is the name of a file.
        is_sure = kind == "roboflow" or rest in others or not re.search(r"\d", match[0])
        is_sure = is_sure or kind in ("copy", "frame") or (kind == "change" and re.search(r"\d", rest))
        if is_sure and re.search(r"[^\W_]", rest):
            source, is_copy = _strip(rest.strip(), others)
            return source, is_copy or kind in _COPIES
    return stem, False


def copy_groups(names: Iterable[str]) -> Iterator[list[str]]:
    """Files that are copies of one source picture, in whichever subset's folder they lie."""
    groups: dict[tuple[str, ...], list[tuple[str, bool]]] = defaultdict(list)
    for name, (source, is_copy) in source_names(names).items():
        *folders, stem = source.casefold().split("/")
        place = (*(folder for folder in folders if not _SUBSET_FOLDERS.fullmatch(folder)), stem)
        groups[place].append((name, is_copy))
    for group in groups.values():
        if len(group) > 1 and any(is_copy for _, is_copy in group):
            yield [name for name, _ in group]
