"""Findings, the files of a data root, and the entries that the readers of all layouts make of them."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

from vesselrl.data.images import IMAGE_SUFFIXES
from vesselrl.data.patients import is_impersonal
from vesselrl.data.polygons import Outline, Size
from vesselrl.data.pseudonyms import MAPPING_FILE, Pseudonym
from vesselrl.errors import DataError

Severity = Literal["error", "warning", "info"]

# Every kind of finding: its name in the summary, and after a bar how its sentence about a record goes on.
_KINDS = {
    "unusable": "unusable data root",
    "bad_json": "broken JSON file",
    "bad_record": "record or shape of the wrong form",
    "missing_image": "missing image| of this label. Add the image, or remove the label.",
    "missing_label": "image without mask or polygons|, which is left out. Label it, or remove it.",
    "missing_file": "vanished file",
    "extra_image": "image that no record names|, which is left out. Add a record, or remove the image.",
    "extra_mask": "mask file of no image|. Remove it, if another label goes before it.",
    "unreadable_image": "unreadable or truncated image",
    "unreadable_mask": "unreadable or truncated mask",
    "too_large": "image or mask with too many pixels",
    "too_many_bits": "image whose bits do not fit into 8",
    "sixteen_bit_image": "16-bit image|, which becomes 8-bit by the range of the bits it uses; its brightest "
    "value is then {brightest} of 255. Save it with 8 bits in the window you label in.",
    "several_frames": "file with several frames|: {value}. The first one is used. Save the frame that you "
    "mean as a file of its own.",
    "alpha_image": "image with an alpha channel| ({value}), which is dropped. Save it without.",
    "rotated_image": "image turned by its EXIF orientation| {value}. Its label must be drawn on that image.",
    "few_points": "polygon of fewer than 3 points or without area, left out|: {count}.",
    "thin_polygon": "polygon thinner than a pixel|: the masks of {count} of {polygons} are empty or fall "
    "apart. Draw them wider, or give a mask file.",
    "traced_twice": "polygon that lies on itself|: {count} of {polygons}. What is traced twice counts as "
    "outside (even-odd rule), which takes more than half of the area. Trace it once.",
    "shares": "coordinates that look like shares of the image",
    "odd_length": "polygon with an odd number of coordinates",
    "outside_image": "polygon with coordinates outside the image",
    "bad_polygon": "polygon that is no list of finite numbers",
    "bad_rle": "broken run-length mask",
    "label_size": "label and image of different proportions",
    "scaled_label": "label of another size than its image, scaled|: {sizes}.",
    "text_length": "number of texts differs from the number of objects|: {texts} and {objects}. Training "
    "joins all objects; other programs may see the first only.",
    "text_string": "text as one string|, not a list; it stands for all polygons.",
    "bad_text": "text that is no list of texts|. Training ignores it; other programs may not.",
    "nested_mask": "polygons nested one level deeper|, by object.",
    "several_labels": "shapes of several classes, all taken for vessel|: {count}. Remove the others.",
    "empty_mask": "empty mask|. Keep it only if the image shows no vessel.",
    "all_foreground": "mask without background|. Label it again, or remove the record.",
    "mostly_foreground": "mask with more vessel than background|: {share:.0%}. Inverted, or a field of view?",
    "non_binary_mask": "mask that is not binary",
    "ignore_mask": "mask in which 255 is to be ignored and smaller numbers are vessel",
    "numbered_mask": "mask of numbers of vessels or classes, all of them vessel",
    "coloured_mask": "mask of several colours",
    "palette_mask": "mask with a palette, whose indices other than 0 and 255 are vessel",
    "alpha_mask": "mask drawn in the alpha channel",
    "disagreement": "mask file and polygons disagree|: Dice {dice:.3f} only. The mask file is used; make "
    "sure that it is the right one.",
    "mean_disagreement": "mask files and polygons disagree on the mean|: Dice {mean:.3f} over {images} "
    "images. Find out which of them are right; the mask files are used.",
    "duplicate_record": "second record of one image",
    "duplicate_image": "second copy of one image|: same pixels as {other}. Remove one, or the "
    "split may put the same image into two subsets.",
    "patients": "patients cannot be told apart|. Each of {images} images counts as a patient of its own, but "
    "{shared} of them share {folders} sub-folders. If a folder is a patient, give --patient_pattern "
    "'^(?P<patient>[^/]+)/', or the split may put that patient into two subsets.",
    "repaired": "repaired|: {what}.",
    "left_out": "left out of the repaired copy|: {why}",
}
CODES = {code: text.partition("|")[0] for code, text in _KINDS.items()}


@dataclass(frozen=True)
class Finding:
    """One fault, or one thing worth knowing; holds pseudonyms and places, never a file name with a person."""

    # error: training would stop or be wrong; warning: it works, look at it; info: it was understood.
    severity: Severity
    code: str  # a key of CODES
    file: str  # such as images/train_001.png, or "images/ file 3 in name order"; empty: no file's fault
    record: str  # such as annotations.json record 17 (P003_S1_F0011); empty: of the whole data root
    message: str  # what is wrong, what was found, what to do
    count: int = 1  # how many polygons, files, … it stands for


class Findings(list[Finding]):
    """A list of findings, with `file` in those that name none; a strict one raises its first error."""

    def __init__(self, strict: bool = False, file: str = ""):
        super().__init__()
        self._strict, self._file = strict, file

    def add(
        self, code: str, record: str = "", file: str = "", severity: Severity = "warning", **values: object
    ) -> None:
        """Adds a finding with the sentence of its code, filled with `values`; `count` is 1 without."""
        text = _KINDS[code].replace("|", "").format(**values)
        message = f"{record}: {text}" if record else text[0].upper() + text[1:]
        self.append(Finding(severity, code, file or self._file, record, message, values.get("count", 1)))

    def error(self, code: str, message: str, record: str = "", file: str = "") -> None:
        """Adds an error, or raises it where the list is strict."""
        if self._strict:
            raise DataError(message, code) from None
        self.append(Finding("error", code, file or self._file, record, message))

    @contextmanager
    def catching(self, record: str = "", file: str = "", code: str = "") -> Iterator[None]:
        """Adds a DataError that ends the block; `code` replaces its own."""
        try:
            yield
        except DataError as error:
            self.error(code or error.code, str(error), record, file)

    def of(self, kind: str) -> list[Finding]:
        """The findings of one severity or code."""
        return [item for item in self if kind in (item.severity, item.code)]


# Folders of label files, the first that exists is read; DRIVE's `mask/` is the field of view, not a label.
LABEL_FOLDERS = ("masks", "1st_manual", "manual1", "labels", "ground_truth", "gt")
# What comes after the name of the image in the name of its label, best first.
LABEL_ENDINGS = ("_mask", "", "_1stHO", "_manual1", "_manual", "_gt", "_label")
# Labels of a second observer: never read, never reported as left over.
SECOND_OBSERVER = ("_2ndHO", "_manual2")
# What an image has where its label has the ending: 21_training.tif and 21_manual1.gif (DRIVE).
IMAGE_ENDINGS = ("_training", "_test")
_LIST_PLACE = re.compile(r" (?:record|image) \d+$")
_KNOWN_FOLDERS = ("images", "json", *LABEL_FOLDERS)
_NO_FILE_NAME = re.compile("[\0\ud800-\udfff]")  # zero, and one half of a surrogate pair

# Called with the size of the image the label was drawn on, the record for messages, and what takes faults.
LabelReader = Callable[[Size, str, Findings], list[Outline]]


@dataclass(frozen=True)
class Entry:
    """One image of a data root, before anything but names was read."""

    # Path below the image folder, without the ending: the pseudonym is made of it. Never shown.
    name: str = field(repr=False)
    place: str  # where it stands, such as "annotations.json record 17" or "images/train_001.png"
    image_path: Path | None = field(repr=False)  # None: there is no such image
    read_label: LabelReader | None = field(default=None, repr=False)  # None: no outlines in this layout
    label_size: tuple | None = field(default=None, repr=False)  # width and height as written beside it
    content: Mapping = field(default_factory=dict, repr=False)  # the record itself, with its other fields
    mask_path: Path | None = field(default=None, repr=False)  # a label file, which goes before outlines

    @property
    def file(self) -> str:
        """The file that says so, such as `annotations.json` or `images/train_001.png`."""
        return _LIST_PLACE.sub("", self.place)

    def record(self, alias: Pseudonym) -> str:
        """How messages name it: the place, and the pseudonym unless the place shows the file name."""
        return self.place if is_impersonal(PurePosixPath(self.place).stem) else f"{self.place} ({alias.key})"


class DataFolder:
    """The files of a data root, and how messages name them without the persons in their names."""

    def __init__(self, path: Path):
        self.path = path
        self.image_folder = path / "images"
        self.label_folder = next((path / name for name in LABEL_FOLDERS if (path / name).is_dir()), None)
        self.mapping_file = path / MAPPING_FILE
        self._numbers: dict[str, dict[Path, int]] = {}

    @cached_property
    def images(self) -> list[Path]:
        """All files in `images/`."""
        return list_images(self.image_folder)

    def locate(self, written: object, place: str, field_name: str = "image") -> tuple[str, Path | None]:
        """Name and file of the image that a record calls `a.jpg` or `images/a.jpg`, with either slash."""
        if not isinstance(written, str) or not PurePosixPath(written).name.strip():
            fault = f"{place} has no text '{field_name}'. Name the image file there, or remove the record."
            raise DataError(fault, "bad_record")
        path = PurePosixPath(written.replace("\\", "/"))
        path = PurePosixPath(*path.parts[1:]) if len(path.parts) > 1 and path.parts[0] == "images" else path
        if path.is_absolute() or ".." in path.parts or not path.name:
            fault = f"{place}: '{field_name}' points outside the data root. Write the name it has in images/."
            raise DataError(fault, "bad_record")
        longest = max(len(part.encode(errors="replace")) for part in path.parts)
        if longest > 255 or len(written) > 1000 or _NO_FILE_NAME.search(written):
            raise DataError(f"{place}: '{field_name}' is no usable file name. Correct it.", "bad_record")
        files = (self.image_folder / path, self.path / path)
        return str(path.with_suffix("")), next((file for file in files if file.is_file()), None)

    def shown(self, path: Path) -> str:
        """`images/train_001.png`, or `images/ file 3 in name order` where the name may be a person's."""
        parts = path.relative_to(self.path).parts
        folder = parts[0] if len(parts) > 1 else ""
        if len(parts) < 3 and is_impersonal(path.stem) and folder in ("", *_KNOWN_FOLDERS):
            return "/".join(parts)
        if folder not in self._numbers:  # counted from 1, images and JSON files each
            files = list_files(self.path / folder, deep=bool(folder))
            kinds = [[f for f in files if f.suffix.lower() in kind] for kind in (IMAGE_SUFFIXES, (".json",))]
            self._numbers[folder] = {file: k for kind in kinds for k, file in enumerate(kind, 1)}
        place = f"{folder}/" if folder in _KNOWN_FOLDERS else "another folder" if folder else "data root"
        return f"{place} file {self._numbers[folder].get(path, 0)} in name order"

    def listing(self, layout: str, entries: Sequence[Entry], names: Iterable[str] = ()) -> "Listing":
        """Gives each entry its label file; one that then has no label of any kind and no content is left out.

        A label in another folder fits only if no other of all images, which are `names`, has the same stem.
        """
        masks = [] if self.label_folder is None else list_images(self.label_folder)
        png_last = sorted(masks, key=lambda path: path.suffix.lower() == ".png")  # goes before the others
        labels = {below(path, self.label_folder): path for path in png_last}
        all_names = set(names) or {entry.name for entry in entries}
        num_stems = Counter(PurePosixPath(name).name for name in all_names)
        complete = []
        for entry in entries:
            stem = PurePosixPath(entry.name).name
            own_names = [entry.name] if num_stems[stem] > 1 else [entry.name, stem]
            mask_path = find_label(own_names, labels, LABEL_ENDINGS)
            if mask_path or entry.read_label or entry.content:
                complete.append(replace(entry, mask_path=mask_path))
        return Listing(self, layout, complete, self.images, masks)


@dataclass
class Listing:
    """The content of a data root in one layout."""

    folder: DataFolder
    layout: str  # "annotations.json", "LabelMe", "COCO" or "image and mask files"
    entries: list[Entry]
    images: list[Path]  # all image files of the image folder
    masks: list[Path]  # all label files

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


def find_label(own_names: Sequence[str], labels: Mapping[str, Path], endings: Sequence[str]) -> Path | None:
    """The label file of an image that goes by one of `own_names`; `labels` are the files by name."""
    drive = [name.removesuffix(ending) for name in own_names for ending in IMAGE_ENDINGS]
    for name in (*own_names, *drive):
        for ending in endings:
            # The bare number of DRIVE is not enough: `21` may be the label of another image.
            if name + ending in labels and (ending or name in own_names):
                return labels[name + ending]
    return None


def list_files(folder: Path, deep: bool = True) -> list[Path]:
    """The files of a folder in the order of their names, without hidden ones; sub-folders too if `deep`."""
    paths = folder.rglob("*") if deep else folder.glob("*")
    files = [path for path in paths if not path.name.startswith(".") and path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def list_images(folder: Path, deep: bool = True) -> list[Path]:
    """The image files of a folder in the order of their names; none where there is no folder."""
    files = list_files(folder, deep) if folder.is_dir() else []
    return [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]


def below(path: Path, folder: Path) -> str:
    """The name of a file: its path below the folder without the ending."""
    return path.relative_to(folder).with_suffix("").as_posix()


def read_json(path: Path, shown: str) -> object:
    """The content of a JSON file; `shown` is how messages name it."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:  # its text holds the path
        fault = f"cannot be read ({error.strerror}). Restore it, or give yourself the right to."
    except (ValueError, RecursionError) as error:
        fault = f"is not valid JSON: {error}. Correct it, or write it again as UTF-8."
    raise DataError(f"{shown} {fault}", "bad_json")
