"""Findings, the files of a data root, and the entries that the readers of all layouts make of them."""

import os
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Literal

from vesselrl.data import pairing
from vesselrl.data.dicom import identity_of, is_dicom, locate
from vesselrl.data.images import IMAGE_SUFFIXES
from vesselrl.data.pairing import LABEL_ENDINGS, below, fold, folder_key, list_files, list_images
from vesselrl.data.patients import is_impersonal
from vesselrl.data.polygons import Outline, Size
from vesselrl.data.pseudonyms import MAPPING_FILE, Pseudonym, pseudonyms
from vesselrl.errors import DataError
from vesselrl.experiment import run_folder

Severity = Literal["error", "warning", "info"]

_KINDS = tomllib.loads(resources.files("vesselrl.data").joinpath("findings.toml").read_text("utf-8"))
CODES = {code: name for code, (name, *_) in _KINDS.items()}


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
        text = "".join(_KINDS[code]).format(**values)
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


_LIST_PLACE = re.compile(r" (?:record|image) \d+$")
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
    fov_path: Path | None = field(default=None, repr=False)  # outside of which nothing counts; None: all does

    @property
    def file(self) -> str:
        """The file that says so, such as `annotations.json` or `images/train_001.png`."""
        return _LIST_PLACE.sub("", self.place)

    def record(self, alias: Pseudonym) -> str:
        """How messages name it: the place, and the pseudonym unless the place shows the file name."""
        return self.place if is_impersonal(PurePosixPath(self.place).stem) else f"{self.place} ({alias.key})"


class DataFolder:
    """The files of a data root, and how messages name them without the persons in their names."""

    def __init__(
        self,
        root: Path,
        image_dir: str | None = None,
        mask_dir: str | None = None,
        mask_suffix: str | None = None,
        prefix: str = "",
    ):
        self.are_given = image_dir is not None or mask_dir is not None
        self.path = path = root if self.are_given else pairing.enter(root)
        self.mapping_file = root / MAPPING_FILE
        self.prefix = prefix  # of places in messages, such as train/
        self.mask_suffix, self.endings = mask_suffix, LABEL_ENDINGS
        if mask_suffix is not None:
            ending = Path(f"_{mask_suffix}").suffix.lower()
            self.endings = (mask_suffix.removesuffix(ending) if ending in IMAGE_SUFFIXES else mask_suffix,)
        images = self._given("image_dir", image_dir) or pairing.find_folder(path, pairing.IMAGE_FOLDERS)
        self.pair_folder = self._given("mask_dir", mask_dir) or pairing.find_labels(path, images)
        self.image_folder = images or pairing.find_images(path, self.pair_folder)
        beside = path if self.image_folder == path else self.image_folder.parent
        places = (pairing.find_fov(folder, self.pair_folder) for folder in (path, beside))
        self.fov_folder = next(filter(None, places), None)
        # Beside JSON a folder counts only if it can hold nothing but labels.
        is_usual = self.pair_folder and folder_key(self.pair_folder.name) in pairing.LABEL_FOLDERS
        self.label_folder = self.pair_folder if mask_dir or is_usual else None
        self.is_label_given = mask_dir is not None
        self._numbers: dict[str, dict[Path, int]] = {}

    def _given(self, option: str, value: str | None) -> Path | None:
        """The folder that an option names, from the data root or from where the user is."""
        if value is None:
            return None
        found = next((path for path in (self.path / value, Path(value)) if path.is_dir()), None)
        if found is None:
            raise DataError(f"--{option} {value} is no folder. Write its path as it is below {self.path}.")
        inside = os.path.relpath(os.path.abspath(found), os.path.abspath(self.path))
        if inside.split(os.sep)[0] == "..":
            advice = "Give the folder that holds images and labels as the data root."
            raise DataError(f"--{option} {value} lies outside the data root {self.path}. {advice}")
        return self.path / inside

    @cached_property
    def images(self) -> list[Path]:
        """All images of the image folder."""
        found, labels = list_images(self.image_folder, deep=self.image_folder != self.path), self.pair_folder
        if labels in (None, self.image_folder) or not labels.is_relative_to(self.image_folder):
            return found
        return [path for path in found if not path.is_relative_to(labels)]

    @cached_property
    def _holds_dicom(self) -> bool:
        return any(map(is_dicom, self.images))

    @cached_property
    def _by_last_part(self) -> dict[str, list[tuple[str, Path]]]:
        """Names and files of all images by the folded last part of their paths."""
        is_there, found = self.image_folder.is_dir(), defaultdict(list)
        no_images = {*pairing.PAIR_FOLDERS, *pairing.FOV_FOLDERS}
        base, files = (self.image_folder, self.images) if is_there else (self.path, list_images(self.path))
        for file in files:
            path = file.relative_to(base)
            if is_there or not {*map(folder_key, path.parts[:-1])} & no_images:
                found[fold(file.name)].append((path.as_posix(), file))
        return found

    def locate(self, written: object, place: str, field_name: str = "image") -> tuple[str, Path | None]:
        """Name and file of the image that a record calls `a.jpg`, `images/a.jpg`, or by any path or URL.

        A path of another machine means an image if one of the two paths is the end of the other.
        """
        if not isinstance(written, str) or not PurePosixPath(written).name.strip():
            fault = f"{place} has no text '{field_name}'. Name the image file there, or remove the record."
            raise DataError(fault, "bad_record")
        path = PurePosixPath(pairing.plain_path(written))
        path = PurePosixPath(*path.parts[1:]) if len(path.parts) > 1 and path.parts[0] == "images" else path
        longest = max((len(part.encode(errors="replace")) for part in path.parts), default=0)
        if longest > 255 or len(str(path)) > 1000 or _NO_FILE_NAME.search(str(path)):
            raise DataError(f"{place}: '{field_name}' is no usable file name. Correct it.", "bad_record")
        leaves = path.is_absolute() or ".." in path.parts or not path.name
        files = () if leaves else (self.image_folder / path, self.path / path)
        if exact := next((file for file in files if file.is_file()), None):
            return str(path.with_suffix("")), exact
        named_so = self._by_last_part.get(fold(path.name), ())
        if len(fits := [item for item in named_so if pairing.is_end(item[0], path.as_posix())]) > 1:
            fault = f"{place}: '{field_name}' fits {len(fits)} images. Write the path of one below images/."
            raise DataError(fault, "missing_image")
        if fits:
            return str(PurePosixPath(fits[0][0]).with_suffix("")), fits[0][1]
        if leaves:
            fault = f"{place}: '{field_name}' points outside the data root. Write the name it has in images/."
            raise DataError(fault, "bad_record")
        return str(path.with_suffix("")), None

    def shown(self, path: Path) -> str:
        """`images/train_001.png`, or `images/ file 3 in name order` where the name may be a person's.

        DICOM files may be called after the ID in their header, and labels after them: no name is shown then.
        """
        file, frame = locate(path)
        parts = file.relative_to(self.path).parts
        folder = parts[0] if len(parts) > 1 else ""
        is_known = folder_key(folder) in pairing.KNOWN_FOLDERS
        is_plain = is_impersonal(file.stem) and not self._holds_dicom
        if len(parts) < 3 and (is_known or not folder) and is_plain:
            return self.prefix + "/".join(parts)
        if folder not in self._numbers:  # counted from 1, images and JSON files each
            place, kinds = self.path / folder, (IMAGE_SUFFIXES, (".json",))
            files = [enumerate(list_files(place, kind, deep=bool(folder)), 1) for kind in kinds]
            self._numbers[folder] = {file: k for kind in files for k, file in kind}
        place = f"{folder}/" if is_known else "another folder" if folder else "data root"
        number = f"file {self._numbers[folder].get(file, 0)} in name order"
        return f"{self.prefix}{place} {number}{f', frame {frame}' if frame else ''}"

    def shown_folder(self, folder: Path) -> str:
        """`masks/`, or words for a folder whose name may be a person's."""
        parts = folder.relative_to(self.path).parts
        if parts and all(folder_key(part) in pairing.KNOWN_FOLDERS for part in parts):
            return f"{self.prefix}{'/'.join(parts)}/"
        return "the folder of labels" if folder == self.pair_folder else "the folder of images"

    def listing(self, layout: str, entries: Sequence[Entry], names: Iterable[str] = ()) -> "Listing":
        """Gives each entry its label file; one that then has no label of any kind and no content is left out.

        A label in another folder fits only if no other of all images, which are `names`, has the same stem.
        """
        all_names = set(names) or {entry.name for entry in entries}
        num_stems = Counter(PurePosixPath(name).name for name in all_names)
        only_pairs = all(entry.read_label is None and not entry.content for entry in entries)
        folder = self.pair_folder if only_pairs else self.label_folder
        masks = [] if folder is None else list_images(folder)
        if self.mask_suffix is not None:  # other files are no labels then
            masks = [path for path in masks if fold(path.stem).endswith(fold(self.endings[0]))]
        png_last = sorted(masks, key=lambda path: path.suffix.lower() == ".png")  # goes before the others
        labels = pairing.Names({below(path, folder): path for path in png_last})
        endings, found = labels.endings_in_use(self.endings), {}
        for entry in entries:
            stem = PurePosixPath(entry.name).name
            own_names = _names_of(entry.name) + [stem] * (num_stems[stem] == 1)
            if path := pairing.find_label(own_names, labels, endings):
                found[entry.name] = path
        if only_pairs and entries and not found and self.mask_suffix is None:
            found = pairing.infer_labels([entry.name for entry in entries], labels)
        pairing.refuse_shared(found)
        complete = [replace(entry, mask_path=found.get(entry.name)) for entry in entries]
        complete = [entry for entry in complete if entry.mask_path or entry.read_label or entry.content]
        return Listing(self, layout, complete, self.images, masks)

    @cached_property
    def _fovs(self) -> pairing.Names:
        return pairing.Names({below(path, self.fov_folder): path for path in list_images(self.fov_folder)})

    def fov_of(self, name: str) -> Path | None:
        """The field of view of an image, or of the whole video that it is a frame of."""
        if self.fov_folder is None:
            return None
        names = [*_names_of(name), str(PurePosixPath(name).parent)]
        return pairing.find_label(names, self._fovs, ("_fov", *LABEL_ENDINGS))


def _names_of(image: str) -> list[str]:
    """What a label of an image may be called after; `run/frame_0003` is of a video or a DICOM file."""
    return [*dict.fromkeys(image.replace("/frame_", between) for between in ("/frame_", "_frame_", "_"))]


@dataclass
class Listing:
    """The content of a data root in one layout."""

    folder: DataFolder
    layout: str  # "annotations.json", "LabelMe", "COCO" or "image and mask files"
    entries: list[Entry]
    images: list[Path]  # all image files of the image folder
    masks: list[Path]  # all label files

    def __post_init__(self) -> None:
        fovs = (entry.fov_path or self.folder.fov_of(entry.name) for entry in self.entries)
        self.entries = [replace(entry, fov_path=fov) for entry, fov in zip(self.entries, fovs, strict=True)]

    @property
    def pairs(self) -> bool:
        """Whether images and labels are paired by their names alone."""
        return all(entry.read_label is None and not entry.content for entry in self.entries)

    def pseudonyms(
        self, *whose: str | Path | None, mapping: Path | None = None, keep: str = "people"
    ) -> dict[str, Pseudonym]:
        """The pseudonyms of the images; `whose`: pattern and alias file."""
        headers = {entry.name: identity_of(entry.image_path, entry.name) for entry in self.entries}
        known = {name: identity for name, identity in headers.items() if identity is not None}
        return pseudonyms(headers, *whose, mapping or self.folder.mapping_file, keep, known)

    @property
    def extra_images(self) -> list[Path]:
        """Image files that no entry names."""
        used = {entry.image_path for entry in self.entries} | set(self.masks)
        return [path for path in self.images if path not in used]

    @property
    def extra_masks(self) -> list[Path]:
        """Label files that no entry uses, without those of a second observer."""
        used = {entry.mask_path for entry in self.entries}
        second = pairing.SECOND_OBSERVER
        return [path for path in self.masks if path not in used and not path.stem.endswith(second)]


def read_json(path: Path, shown: str) -> object:
    """The content of a JSON file; `shown` is how messages name it."""
    try:
        return run_folder.read_json(path)
    except OSError as error:  # its text holds the path
        fault = f"cannot be read ({error.strerror}). Restore it, or give yourself the right to."
    except ValueError as error:
        fault = f"is not valid JSON: {error}. Correct it, or write it again as UTF-8."
    raise DataError(f"{shown} {fault}", "bad_json")
