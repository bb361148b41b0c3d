"""Names of pictures as tools change them: marks of uploads, exports, copies and augmentation.

The name of the source picture tells the patient (`vesselrl.data.patients`), and which files are copies of it.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator

# What tools add to the name of a picture.
_ENDING = "(?:png|jpe?g|tiff?|bmp|gif|pgm|ppm|webp|dcm)"
_CHANGE = (
    "(?:aug(?:mented)?|(?:[hv]|(?:horizontal|vertical)(?:ly)?)?[-_ ]?flip(?:ped|lr|ud)?|mirror(?:ed)?"
    "|rot(?:at(?:ed?|ion))?|crop(?:ped)?|patch|tile|nois[ey]|blur(?:red)?)"
)
_COPY = "(?:copy|kopie|copie|copia|副本|コピー)"
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
SUBSET_FOLDERS = re.compile(
    "train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?|images?|imgs?|frames?|data|default|obj_.*", re.IGNORECASE
)


def source_names(names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """The name of the source picture of each file, and whether the file is marked as a copy of it.

    It takes all names to know the prefixes of Label Studio, which have letters and are different for each
    picture, and numbers of copies from those of pictures.
    """
    split = {name: unicodedata.normalize("NFKC", name).rpartition("/") for name in names}
    stems = {name: stem.strip() for name, (*_, stem) in split.items()}
    first = {name: _strip(stem, set()) for name, stem in stems.items()}
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
    return _without_uploads({name: upload.sub("", stem) or stem for name, stem in stems.items()})


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
        place = (*(folder for folder in folders if not SUBSET_FOLDERS.fullmatch(folder)), stem)
        groups[place].append((name, is_copy))
    for group in groups.values():
        if len(group) > 1 and any(is_copy for _, is_copy in group):
            yield [name for name, _ in group]
