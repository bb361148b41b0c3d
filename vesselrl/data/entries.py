"""What the readers of all layouts hand over: an entry for each picture, its label not yet looked at."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from vesselrl.data.patients import Pseudonym, is_impersonal
from vesselrl.data.polygons import OnError, Size
from vesselrl.data.run_lengths import RunLengths
from vesselrl.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".ppm")
# Folders of raster labels, the first that exists is read; DRIVE's `mask/` is the field of view, not a label.
LABEL_FOLDERS = ("masks", "1st_manual", "manual1", "labels", "ground_truth", "gt")
# What comes after the name of the image in the name of its label, best first.
LABEL_ENDINGS = ("_mask", "", "_1stHO", "_manual1", "_manual", "_gt", "_label")
# Labels of a second observer: never read, never reported as left over.
SECOND_OBSERVER = ("_2ndHO", "_manual2")
# DRIVE: 21_training.tif belongs to 21_manual1.gif.
DRIVE_ENDINGS = ("_training", "_test")
_LIST_PLACE = re.compile(r" (?:record|image) \d+$")
_KNOWN_FOLDERS = ("images", "json", *LABEL_FOLDERS)


@dataclass(frozen=True)
class Outlines:
    """A label as a layout gives it, in px of the image it was drawn on; all parts are one target."""

    # (N, 2) arrays of (x, y).
    polygons: tuple[np.ndarray, ...] = ()
    rle: tuple[RunLengths, ...] = ()
    # Polygons with fewer than three points, which are left out.
    num_skipped: int = 0


# Called with the size of the image the label was drawn on, the record for messages, and what takes faults.
LabelReader = Callable[[Size, str, OnError], Outlines]


@dataclass(frozen=True)
class Entry:
    """One picture of a data root, before anything but names was read."""

    # Path below the image folder, without the ending: the pseudonym is made of it. Never shown.
    name: str = field(repr=False)
    # Where it stands, such as "annotations.json record 17" or "images/train_001.png".
    place: str
    # None: there is no such image.
    image_path: Path | None = field(repr=False)
    mask_path: Path | None = field(repr=False)
    # None: the layout has no polygons for it.
    read_label: LabelReader | None = field(default=None, repr=False)
    # Size of the image that the label was drawn on, as it is written there; None: the size of the image.
    label_size: object = field(default=None, repr=False)
    # The record itself, for checks of its other fields.
    content: Mapping = field(default_factory=dict, repr=False)

    @property
    def file(self) -> str:
        """The file that says so, such as `annotations.json` or `images/train_001.png`."""
        return _LIST_PLACE.sub("", self.place)

    def record(self, alias: Pseudonym) -> str:
        """How messages name it: the place, and the pseudonym unless the place shows the file name."""
        return self.place if is_impersonal(PurePosixPath(self.place).stem) else f"{self.place} ({alias.key})"


@dataclass
class Listing:
    """The content of a data root in one layout."""

    # "annotations.json", "LabelMe", "COCO" or "image and mask files".
    layout: str
    entries: list[Entry]
    # All image files of the image folder, and all label files.
    images: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)

    @property
    def pairs(self) -> bool:
        """Whether images and labels are paired by their names alone."""
        return all(entry.read_label is None and not entry.content for entry in self.entries)

    @property
    def extra_images(self) -> list[Path]:
        """Image files that no entry names."""
        used = {entry.image_path for entry in self.entries} | set(self.masks)
        return [path for path in self.images if path not in used]

    @property
    def extra_masks(self) -> list[Path]:
        """Label files that no entry uses, without those of a second observer."""
        used = {entry.mask_path for entry in self.entries}
        return [path for path in self.masks if path not in used and not path.stem.endswith(SECOND_OBSERVER)]


class MaskFiles:
    """The label files of a data root, found by the name of the image.

    Args:
        root: the data root, with one of LABEL_FOLDERS or none.
        names: of all images; a label in another folder than its image fits only if the stem is unique.
    """

    def __init__(self, root: Path, names: Iterable[str]):
        folder = label_folder(root)
        self.paths = [] if folder is None else list_images(folder)
        by_suffix = sorted(self.paths, key=lambda path: path.suffix.lower() == ".png")  # PNG goes first
        self._by_name = {below(path, folder): path for path in by_suffix}
        self._num_stems = Counter(PurePosixPath(name).name for name in set(names))

    def find(self, name: str) -> Path | None:
        """The label of an image, or None."""
        stem = PurePosixPath(name).name
        stems = [name] if self._num_stems[stem] > 1 else [name, stem]
        for candidate in (*stems, *(without_drive_ending(stem) for stem in stems)):
            for ending in LABEL_ENDINGS:
                path = self._by_name.get(candidate + ending)
                # The bare number of DRIVE is not enough: `21` may be the label of another image.
                if path is not None and (ending or candidate in stems):
                    return path
        return None


class FileNames:
    """Names files of a data root for messages, without the persons in their names."""

    def __init__(self, root: Path):
        self._root = root
        self._numbers: dict[str, dict[Path, int]] = {}

    def shown(self, path: Path) -> str:
        """`images/train_001.png`, or `images/ file 3 in name order` where the name may be a person's."""
        parts = path.relative_to(self._root).parts
        folder = parts[0] if len(parts) > 1 else ""
        place = f"{folder}/" if folder in _KNOWN_FOLDERS else "another folder"
        if len(parts) < 3 and is_impersonal(path.stem) and folder in ("", *_KNOWN_FOLDERS):
            return f"{place}{path.name}" if folder else path.name
        return f"{place if folder else 'data root'} file {self._number(folder, path)} in name order"

    def _number(self, folder: str, path: Path) -> int:
        """The place of a file among the images, or among the JSON files, of a folder, from 1."""
        if folder not in self._numbers:
            files = list_files(self._root / folder, deep=bool(folder))
            images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
            labels = [file for file in files if file.suffix.lower() == ".json"]
            numbers = {file: number for kind in (images, labels) for number, file in enumerate(kind, 1)}
            self._numbers[folder] = numbers
        return self._numbers[folder].get(path, 0)


def label_folder(root: Path) -> Path | None:
    """The folder of raster labels, if there is one."""
    return next((root / name for name in LABEL_FOLDERS if (root / name).is_dir()), None)


def without_drive_ending(stem: str) -> str:
    """`21` for `21_training`; other names stay."""
    ending = next((ending for ending in DRIVE_ENDINGS if stem.endswith(ending)), "")
    return stem.removesuffix(ending)


def list_files(folder: Path, deep: bool = True) -> list[Path]:
    """The files of a folder in the order of their names, without hidden ones; sub-folders too if `deep`."""
    paths = folder.rglob("*") if deep else folder.glob("*")
    return sorted(
        (path for path in paths if not path.name.startswith(".") and path.is_file()),
        key=lambda path: path.relative_to(folder).as_posix(),
    )


def list_images(folder: Path, deep: bool = True) -> list[Path]:
    """The image files of a folder in the order of their names; hidden files are not images."""
    if not folder.is_dir():
        return []
    return [path for path in list_files(folder, deep) if path.suffix.lower() in IMAGE_SUFFIXES]


def below(path: Path, folder: Path) -> str:
    """The name of a file: its path below the folder without the ending."""
    return path.relative_to(folder).with_suffix("").as_posix()


def written_size(content: dict, *fields: tuple[str, str]) -> object:
    """Width and height as a record gives them, of the first pair of fields with a value; None without."""
    for width, height in fields:
        if content.get(width) is not None or content.get(height) is not None:
            return content.get(width), content.get(height)
    return None


def read_json(path: Path, shown: str) -> object:
    """The content of a JSON file.

    Args:
        path: the file.
        shown: how messages name it.

    Raises:
        DataError: it cannot be read, is no JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:  # its text holds the path
        message = f"{shown} cannot be read ({error.strerror}). Restore it, or give yourself the right to."
        raise DataError(message, "bad_json") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{shown} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}. "
            "Correct it, or write it again.",
            "bad_json",
        ) from None
    except UnicodeDecodeError as error:
        message = f"{shown} is not UTF-8 (byte {error.start}). Save it as UTF-8."
        raise DataError(message, "bad_json") from None
    except RecursionError:
        raise DataError(f"{shown} is nested too deeply. Write it again.", "bad_json") from None
    except ValueError:  # an integer of thousands of digits
        message = f"{shown} holds a number that is too long. Correct it."
        raise DataError(message, "bad_json") from None


def path_below_images(name: object, record: str, field_name: str = "image") -> PurePosixPath:
    """`a.jpg` for `a.jpg` and for `images/a.jpg`, with either kind of slash.

    Raises:
        DataError: it is no text, no usable file name, or points outside the data root.
    """
    if not isinstance(name, str) or not PurePosixPath(name).name.strip():
        raise DataError(
            f"{record} has no text '{field_name}'. Name the image file there, or remove the record.",
            "bad_record",
        )
    path = PurePosixPath(name.replace("\\", "/"))
    path = PurePosixPath(*path.parts[1:]) if len(path.parts) > 1 and path.parts[0] == "images" else path
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise DataError(
            f"{record}: '{field_name}' points outside the data root. "
            "Write the file name as it is in images/.",
            "bad_record",
        )
    try:
        longest = max(len(part.encode()) for part in path.parts)
    except UnicodeEncodeError:  # half of a surrogate pair
        longest = 0
    if not 0 < longest < 256 or len(name) > 1000 or "\0" in name:
        raise DataError(f"{record}: '{field_name}' is no usable file name. Correct it.", "bad_record")
    return path


def find_image(root: Path, path: PurePosixPath) -> Path | None:
    """The image file below images/ or below the data root, or None."""
    return next((p for p in (root / "images" / path, root / path) if p.is_file()), None)
