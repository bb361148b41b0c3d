"""Which files belong together: folders by their usual names, an image and its label by theirs.

Names are compared without case and in one Unicode form. Where two files fit, none is taken.
"""

import operator
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from vesselrl.data.dicom import frames
from vesselrl.data.images import IMAGE_SUFFIXES
from vesselrl.data.pseudonyms import MAPPING_FILE
from vesselrl.errors import DataError

# Usual names of folders without case, spaces and punctuation, best first.
IMAGE_FOLDERS = (
    "images image imgs img original originals originalimages originalimage imagestr jpegimages stareimages "
    "fundusimages pictures frames"
).split()
LABEL_FOLDERS = ["masks", "1stmanual", "manual1", "labels", "groundtruth", "gt"]
# The others are read where nothing but pairs of files is there: beside other annotations they may hold
# something else. `mask` comes last, because it is the field of view in DRIVE and HRF.
PAIR_FOLDERS = [*LABEL_FOLDERS, *"label labelsah labelstr segmented segmentation segmentations".split()]
PAIR_FOLDERS += "segmentationclass manual vessel vessels manualsegmentations vesselsegmentations".split()
PAIR_FOLDERS += ["annotation", "annotations", "mask"]
# Of fields of view; `mask` is one beside a folder of labels.
FOV_FOLDERS = ["fov", "fovs", "fovmask", "fovmasks", "fieldofview"]
# Parts of a data set that lie in folders of their own, in the order in which they are read.
SUBSETS = ("training", "train", "valid", "validation", "val", "test", "testing")
KNOWN_FOLDERS = {"json", *IMAGE_FOLDERS, *PAIR_FOLDERS, *FOV_FOLDERS, *SUBSETS}
_LABEL_WORDS = ("mask", "manual1", "manual", "gt", "label", "labels", "seg", "segmentation", "groundtruth")
# What comes after the name of the image in the name of its label, best first.
LABEL_ENDINGS = ("_mask", "", "_1stHO", ".ah")
LABEL_ENDINGS += tuple(separator + word for word in _LABEL_WORDS for separator in "_-. ")[1:]
# Labels of a second observer: never read, never reported as left over.
SECOND_OBSERVER = ("_2ndHO", "_manual2", ".vk")
# What an image has where its label has the ending: 21_training.tif and 21_manual1.gif (DRIVE).
IMAGE_ENDINGS = ("_training", "_test")
_LABEL_LIKE = re.compile("2nd|manual|mask|label|seg|fov|truth")
_IMAGE_WORD = r"(?:images?|img|im|original|orig|raw|photo|input|frame|slice|scan|sample|training|train|test)"


def fold(name: str) -> str:
    """A name in the form in which names are compared."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def folder_key(name: str) -> str:
    """A folder's name as the lists above have it.

    >>> folder_key("Ground truth"), folder_key("1st_manual")
    ('groundtruth', '1stmanual')
    """
    return re.sub(r"[\W_]+", "", fold(name))


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder in the order of their names, without hidden ones and those of a Mac's zip."""
    if not folder.is_dir():
        return []
    try:
        with os.scandir(folder) as found:  # which asks the disk about links alone
            names = sorted(item.name for item in found if item.is_dir())
    except OSError as error:  # its text holds the path
        fault = f"A folder of the data root cannot be read ({error.strerror})"
        raise DataError(f"{fault}. Give yourself the right to.") from None
    return [folder / name for name in names if not name.startswith((".", "__MACOSX"))]


def find_folder(folder: Path, names: Sequence[str]) -> Path | None:
    """The sub-folder with the first of `names`; one with pictures goes before one without."""
    by_key = defaultdict(list)
    for path in subfolders(folder):
        by_key[folder_key(path.name)].append(path)
    found = [path for name in names for path in by_key[name]]
    chosen = next((path for path in found if holds_images(path)), next(iter(found), None))
    if chosen and len(same := by_key[folder_key(chosen.name)]) > 1:
        shown = " and ".join(f"{path.name}/" for path in same)
        raise DataError(f"{shown} differ in spelling alone. Keep one of them.")
    return chosen


def holds_images(folder: Path) -> bool:
    """Whether any picture lies at or below a folder."""
    return any(path.name.lower().endswith(IMAGE_SUFFIXES) for path in folder.rglob("*"))


def plain_path(written: str) -> str:
    """The path in a path of any system or in a URL, with slashes.

    >>> plain_path("s3://bucket/a%20b.png?key=1"), plain_path("/data/local-files/?d=images/1.png")
    ('bucket/a b.png', 'images/1.png')
    """
    text = written.replace("\\", "/")
    if "?d=" in text:  # files that Label Studio serves
        return unquote(text.partition("?d=")[2])
    return unquote(re.split("[?#]", text.partition("://")[2])[0]) if "://" in text else text


def is_end(one: str, other: str) -> bool:
    """Whether the shorter of two paths is the end of the longer."""
    parts = [fold(path).split("/") for path in (one, other)]
    length = min(map(len, parts))
    return parts[0][-length:] == parts[1][-length:]


def find_labels(folder: Path, images: Path | None) -> Path | None:
    """The folder of labels beside the folder `images`, as far as its name tells."""
    found = find_folder(folder, PAIR_FOLDERS)
    if found and folder_key(found.name) not in LABEL_FOLDERS and not holds_images(found):
        return None  # `annotations` may hold JSON
    may_be_drive = found and images and folder_key(found.name) == "mask"  # there it is the field of view
    is_drive = may_be_drive and any(path.stem.endswith(IMAGE_ENDINGS) for path in list_images(images))
    return None if is_drive else found


def find_fov(folder: Path, labels: Path | None) -> Path | None:
    """The folder of fields of view beside the folder `labels`."""
    found = find_folder(folder, [*FOV_FOLDERS, "mask"])
    return None if found and folder_key(found.name) == "mask" and labels in (None, found) else found


def refuse_rivals(folder: Path, labels: Path) -> None:
    """Refuses two folders of labels whose names say the same, such as masks/ and 1st_manual/."""
    places = [path for path in subfolders(folder) if folder_key(path.name) in LABEL_FOLDERS]
    if rivals := [path for path in places if path != labels and holds_images(path)]:
        shown = " and ".join(f"{path.name}/" for path in (labels, *rivals))
        raise DataError(f"There are labels in {shown}. Say which are to be read: --mask_dir NAME.")


def find_images(folder: Path, labels: Path | None) -> Path:
    """A folder of images of no usual name: the data root, or the only other one beside the labels."""
    if list_images(folder, deep=False):
        return folder
    apart = (labels, find_fov(folder, labels))
    others = [path for path in subfolders(folder) if labels and path not in apart and holds_images(path)]
    is_sure = len(others) == 1 and not _LABEL_LIKE.search(folder_key(others[0].name))
    return others[0] if is_sure else folder / "images"


def enter(root: Path) -> Path:
    """The folder that holds the data, below `root` where nothing else lies in it, as in an archive."""
    for _ in range(8):  # a link may lead back
        folders = subfolders(root)
        if len(folders) != 1 or folder_key(folders[0].name) in {"json", *IMAGE_FOLDERS, *PAIR_FOLDERS}:
            return root
        if list_files(root, (*IMAGE_SUFFIXES, ".json"), deep=False):
            return root
        root = folders[0]
    return root


def inventory(folder: Path) -> str:
    """What a data root holds, by folder and ending, for messages: no name that could be a person's."""
    endings, found, others = (*IMAGE_SUFFIXES, ".json"), [], Counter()
    for place in (folder, *subfolders(folder)):
        files = list_files(place, endings, deep=place != folder)
        kinds = (ending for file in files for ending in endings if file.name.lower().endswith(ending))
        counts = Counter(sorted(kinds, key=endings.index))
        if place == folder:
            found += [_listed(counts)] if counts else []
        elif folder_key(place.name) in KNOWN_FOLDERS:
            found.append(f"{place.name}/ ({_listed(counts)})")
        else:
            others += counts
    found += [f"folders of other names ({_listed(others)})"] if others else []
    return ", ".join(found) or "no pictures"


def _listed(counts: Counter) -> str:
    return ", ".join(f"{number} {ending}" for ending, number in counts.items()) or "nothing to read"


def list_files(folder: Path, suffixes: tuple[str, ...], deep: bool = True) -> list[Path]:
    """The files of a folder by name, and of those in it if `deep`, but hidden ones and the mapping file."""
    paths = (folder.rglob("*") if deep else folder.glob("*")) if folder.is_dir() else ()
    found = [path for path in paths if path.name.lower().endswith(suffixes) and path.name[0] != "."]
    files = [path for path in found if path.name != MAPPING_FILE and path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def list_images(folder: Path, deep: bool = True) -> list[Path]:
    """The images of a folder in the order of their names, frames of DICOM files as `frames` calls them."""
    return [frame for file in list_files(folder, IMAGE_SUFFIXES, deep) for frame in frames(file)]


def below(path: Path, folder: Path) -> str:
    """The name of a file: its path below the folder without the ending."""
    return path.relative_to(folder).with_suffix("").as_posix()


class Names:
    """Files by their names; one is found in another case or Unicode form if no other fits as well."""

    def __init__(self, files: Mapping[str, Path]):
        self.files = dict(files)
        self.folded: dict[str, list[Path]] = defaultdict(list)
        for name, path in self.files.items():
            self.folded[fold(name)].append(path)

    def get(self, name: str) -> Path | None:
        """The file of a name."""
        same = [self.files[name]] if name in self.files else self.folded.get(fold(name), ())
        return same[0] if len(same) == 1 else None

    def endings_in_use(self, endings: Iterable[str]) -> list[str]:
        """Those of some endings that any name has."""
        return [ending for ending in endings if any(name.endswith(fold(ending)) for name in self.folded)]


def find_label(own_names: Sequence[str], labels: Names, endings: Sequence[str]) -> Path | None:
    """The label file of an image that goes by one of `own_names`; two that fit are an error."""
    drive = [name.removesuffix(ending) for name in own_names for ending in IMAGE_ENDINGS]
    for name in dict.fromkeys((*own_names, *drive)):
        # The bare number of DRIVE is not enough: `21` may be the label of another image.
        tried = [ending for ending in endings if ending or name in own_names]
        found = {ending: path for ending in tried if (path := labels.get(name + ending)) is not None}
        if "_mask" in found:
            found.pop("", None)
        if len(set(found.values())) > 1:
            shown = " and ".join(f"<image>{ending}" for ending in found)
            advice = "Say which is the label with --mask_suffix, or move the others away."
            raise DataError(f"Several files fit one image as its label: {shown}. {advice}")
        if found:
            return next(iter(found.values()))
    return None


def refuse_shared(labels: Mapping[str, Path]) -> None:
    """Refuses labels, by the names of their images, of which two images have the same."""
    if shared := len(labels) - len(set(labels.values())):
        advice = "Name each label after one image, or say what follows the image's name: --mask_suffix."
        raise DataError(f"{shared} of {len(labels)} images have the label of another image too. {advice}")


def infer_labels(names: Sequence[str], labels: Names) -> dict[str, Path]:
    """The labels of all images by name, if one prefix or suffix, of either side, makes pairs of all.

    A word for pictures that all images have (img_001 and mask_001) may come off as well. No such affix: an
    empty result; two that lead to different pairs are an error.
    """
    second, found = tuple(map(fold, SECOND_OBSERVER)), set()
    usable = {k: same[0] for k, same in labels.folded.items() if len(same) == 1 and not k.endswith(second)}
    for cores in _without_image_words([fold(name) for name in names]):
        for prefix, suffix, is_of_label in _affixes(cores[0], usable):
            if is_of_label:
                pairs = tuple(usable.get(_with_affix(core, prefix, suffix)) for core in cores)
            else:
                longer = {_with_affix(name, prefix, suffix): path for name, path in usable.items()}
                pairs = tuple(longer.get(core) for core in cores)
            if None not in pairs and len(set(pairs)) == len(cores):
                found.add(pairs)
    if len(found) > 1:
        raise DataError(
            f"The labels fit the {len(names)} images in {len(found)} ways, by different affixes. "
            "Say which with --mask_suffix, or move the other files away."
        )
    return dict(zip(names, found.pop(), strict=True)) if found else {}


def _without_image_words(names: Sequence[str]) -> Iterator[list[str]]:
    """The names as they are, and without a word for pictures at the beginning or end of all of them."""
    yield list(names)
    parts = [name.rpartition("/") for name in names]
    at_start, at_end = r"^{}(?:[-_. ]+|(?=\d))(?=.)", r"(?<=.)(?:[-_. ]+|(?<=\d)){}$"
    for pattern, remove in ((at_start, str.removeprefix), (at_end, str.removesuffix)):
        if match := re.search(pattern.format(_IMAGE_WORD), parts[0][2]):
            rest = [folder + slash + remove(stem, match[0]) for folder, slash, stem in parts]
            if all(map(operator.ne, rest, names)):
                yield rest


def _affixes(core: str, labels: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """Prefix and suffix that an image and any label differ by, and whether it is the label that has them."""
    folder, _, stem = core.rpartition("/")
    for label in labels:
        place, _, other = label.rpartition("/")
        is_of_label = len(other) >= len(stem)
        short, long = sorted((stem, other), key=len)
        suffix, prefix = long[len(short) :], long[: len(long) - len(short)]
        if place == folder and long.startswith(short) and _is_border(short, suffix):
            yield "", suffix, is_of_label
        if place == folder and prefix and long.endswith(short) and _is_border(prefix, short):
            yield prefix, "", is_of_label


def _is_border(left: str, right: str) -> bool:
    """Whether a name may be cut here: not within a number (1 and 12 are two images) or a word."""
    ends = left[-1:] + right[:1]
    return not (len(ends) == 2 and (ends.isdigit() or ends.isalpha()))


def _with_affix(name: str, prefix: str, suffix: str) -> str:
    folder, slash, stem = name.rpartition("/")
    return folder + slash + prefix + stem + suffix
