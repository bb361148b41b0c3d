"""Findings, the files of a data root, and the entries that the readers of all layouts make of them."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

from vesselrl.data import pairing
from vesselrl.data.images import IMAGE_SUFFIXES
from vesselrl.data.pairing import LABEL_ENDINGS, below, fold, folder_key, list_files, list_images
from vesselrl.data.patients import is_impersonal
from vesselrl.data.polygons import Outline, Size
from vesselrl.data.pseudonyms import MAPPING_FILE, Pseudonym
from vesselrl.errors import DataError
from vesselrl.experiment import run_folder

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
    "label_size": "label and image of different proportions or far different sizes",
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
    "near_duplicate": "image that looks like one of another patient|, {other}: frames of one run? Give both "
    "the same patient in an alias file (file_name,patient), or remove one of the two.",
    "lone_frames": "frames that count as a patient each|: {count} of {patients} patients have one image, and "
    "the names of these differ in a number or a hash only, in {groups} groups. If a group is a patient, "
    "frames of one patient may be in training and test: give --patient_pattern, such as "
    r"'^(?P<patient>.+?)[-_ ]*\d+$', or --patient_aliases.",
    "one_patient": "images that all count as one patient|: {count}. A training needs three patients: give "
    "--patient_pattern for the part of the file name that tells them apart, or --patient_aliases.",
    "patients": "patients cannot be told apart|. Each of {images} images counts as a patient of its own, but "
    "{shared} of them share {folders} sub-folders. If a folder is a patient, give --patient_pattern "
    "'^(?P<patient>[^/]+)/', or the split may put that patient into two subsets.",
    "other_subsets": "labelled images beside the training images, not read|: {what}. To read them, "
    "give their folder as the data root.",
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
    def _by_last_part(self) -> dict[str, list[tuple[str, Path]]]:
        """Names and files of all images by the folded last part of their paths."""
        is_there, found = self.image_folder.is_dir(), defaultdict(list)
        base, files = (self.image_folder, self.images) if is_there else (self.path, list_images(self.path))
        for file in files:
            path = file.relative_to(base)
            if is_there or not {*map(folder_key, path.parts[:-1])} & {*pairing.PAIR_FOLDERS}:
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
        """`images/train_001.png`, or `images/ file 3 in name order` where the name may be a person's."""
        parts = path.relative_to(self.path).parts
        folder = parts[0] if len(parts) > 1 else ""
        is_known = folder_key(folder) in pairing.KNOWN_FOLDERS
        if len(parts) < 3 and (is_known or not folder) and is_impersonal(path.stem):
            return self.prefix + "/".join(parts)
        if folder not in self._numbers:  # counted from 1, images and JSON files each
            place, kinds = self.path / folder, (IMAGE_SUFFIXES, (".json",))
            files = [enumerate(list_files(place, kind, deep=bool(folder)), 1) for kind in kinds]
            self._numbers[folder] = {file: k for kind in files for k, file in kind}
        place = f"{folder}/" if is_known else "another folder" if folder else "data root"
        return f"{self.prefix}{place} file {self._numbers[folder].get(path, 0)} in name order"

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
            own_names = [entry.name] if num_stems[stem] > 1 else [entry.name, stem]
            if path := pairing.find_label(own_names, labels, endings):
                found[entry.name] = path
        if only_pairs and entries and not found and self.mask_suffix is None:
            found = pairing.infer_labels([entry.name for entry in entries], labels)
        pairing.refuse_shared(found)
        complete = [replace(entry, mask_path=found.get(entry.name)) for entry in entries]
        complete = [entry for entry in complete if entry.mask_path or entry.read_label or entry.content]
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
