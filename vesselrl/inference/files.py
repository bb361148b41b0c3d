"""Files of images in, files of masks out."""

import csv
import json
import logging
import os
import re
import struct
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from vesselrl.data.dicom import flat_name, frames, locate
from vesselrl.data.formats import coco, labelme
from vesselrl.data.images import IMAGE_SUFFIXES, read_mask, read_size
from vesselrl.data.pairing import list_images
from vesselrl.data.patients import is_impersonal
from vesselrl.data.pseudonyms import MAPPING_FILE, pseudonyms
from vesselrl.data.samples import read_image
from vesselrl.errors import DataError, NotFiniteError
from vesselrl.experiment import run_folder
from vesselrl.experiment.progress import Progress
from vesselrl.experiment.run_folder import atomic_write, check_room, check_writable, json_hash, write_text
from vesselrl.inference.predictor import KINDS, STAMP, Prediction, Predictor, picture_path
from vesselrl.scoring.measurements import IN_MM, MEASUREMENTS, check_pixel_mm, measurement_row

logger = logging.getLogger(__name__)

LIST_FILE = "predictions.csv"
COLUMNS = ("image", "result", "status", "uncertainty", "foreground", *MEASUREMENTS, *IN_MM, "reason")
LABELS = {"labelme": "labelme", "coco": "coco/images"}  # formats to correct masks in, with their images
ALL = "0/1"  # the shard that has every image
AHEAD = 2  # images that wait to be predicted, and that wait to be written
_BROKEN_PNG = (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)


def predict_files(
    predictor: Predictor,
    path: Path,
    output_dir: Path,
    progress: Progress | None = None,
    shard: str = ALL,
    pixel_mm: float | None = None,
    formats: Collection[str] = (),
) -> Iterator[dict]:
    """Segments an image or a folder of images and writes mask, probability and overlay of each, as PNG.

    Goes on after a file that cannot be used; results of the same image by the same model and settings are
    kept. A pseudonym stands for a name that may be a person's; only `patients.mapping.json` in the output
    folder says which file it is. Yields a row of `COLUMNS` for each image; `predictions.csv` lists them, the
    most uncertain first. `status` is done, replaced (there was another result), kept or failed; measurements
    are those of `vessel_measurements`, in mm too with the side of a pixel. `progress` takes (done, in all).
    `formats`: labelme and coco, each a data folder with the images, to be corrected.

    Shard i/n takes every nth image from the ith on, counted from 0, and lists them in a file of its own; the
    one that ends last joins the files. One thread reads ahead and two write, in the order of the images.
    """
    list_name(shard)
    check_pixel_mm(pixel_mm)
    first, step = map(int, shard.split("/"))
    files = find_inputs(path, output_dir)
    check_writable(output_dir)
    total = len(range(first, len(files), step))
    with suppress(DataError):  # said when it is its turn
        width, height = read_size(files[0], _place(1, files))
        check_room(output_dir, 4 * total * width * height, f"{total} images of this size")
    output_dir.mkdir(parents=True, exist_ok=True)
    if "labelme" in formats and (there := len([*(output_dir / "labelme").glob("*.json")])):
        logger.warning("%d LabelMe files are there already and stay: they may have been corrected.", there)
    people = [name for name in map(flat_name, files) if not is_impersonal(name)]
    keys = pseudonyms(people, mapping=output_dir / MAPPING_FILE, keep="all") if people else {}
    made_by, jobs = predictor.fingerprint(), []
    for number, file in enumerate(files, start=1):
        key = keys[flat_name(file)].key if flat_name(file) in keys else None
        name = f"{_place(number, files)} ({key})" if key else file.name
        jobs.append((file, name, output_dir / (key or file.stem)))
    head = {"made_by": made_by, "images": json_hash([name for _, name, _ in jobs]), "shards": step}
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(2) as writers:
        own = (_Job(*job, formats) for job in jobs[first::step])
        read = _in_order(reader, partial(_Job.read, made_by=made_by), own)
        rows = _in_order(writers, _Job.write, (job.predict(predictor) for job in read))
        listed = []
        for done, row in enumerate(rows, start=1):
            row |= measurement_row(row.pop("measurements", {}), pixel_mm if "foreground" in row else None)
            listed.append(row)
            yield row
            if progress is not None:
                progress(done, total)
    _write_lists(output_dir, shard, listed, json.dumps(head), formats)


def list_name(shard: str) -> str:
    """The file that lists the images of a shard; a ValueError where that is no i/n."""
    numbers = re.fullmatch(r"(0|[1-9]\d*)/([1-9]\d*)", shard)
    if numbers is None or int(numbers[1]) >= int(numbers[2]):
        raise ValueError(f"--shard is {shard!r}; give i/n with i from 0 to n - 1, such as 0/4.")
    return LIST_FILE if shard == ALL else f"predictions.{numbers[1]}-of-{numbers[2]}.jsonl"


def _in_order(pool: Executor, work: Callable, items: Iterable) -> Iterator:
    """Results in the order of the items, of which no more than `AHEAD` are held: memory stays flat."""
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@dataclass(eq=False)
class _Job:
    """One image on its way: read and written in threads, predicted between. `row` is what is known of it."""

    file: Path
    name: str  # in messages
    result: Path  # how the names of its results begin
    formats: Collection[str]
    row: dict = field(default_factory=dict)
    origin: dict = field(default_factory=dict)
    image: np.ndarray | None = None  # none: there is nothing to do, or nothing that can be done
    prediction: Prediction | None = None

    def read(self, made_by: str) -> "_Job":
        """Reads the image, unless its results are there."""
        self.row = {"image": self.name, "result": self.result.name}
        try:
            self.origin = {"image": run_folder.file_hash(locate(self.file)[0]), "made_by": made_by}
            if self.origin.items() <= (there := read_stamp(self.result)).items():
                found = ("foreground", "uncertainty", "measurements")
                self.row |= {"status": "kept"} | {name: there[name] for name in found}
            else:
                self.row["status"] = "replaced" if there else "done"
            if self.row["status"] != "kept" or LABELS.keys() & self.formats:
                self.image = read_image(self.file, self.name)
        except OSError as error:
            self._fail(f"the file cannot be read ({error.strerror}).")
        except DataError as error:
            self._fail(str(error))
        return self

    def predict(self, predictor: Predictor) -> "_Job":
        """Segments the image."""
        try:
            if self.image is not None and self.row["status"] != "kept":
                self.prediction = predictor.predict(self.image)
        except NotFiniteError as error:
            self._fail(str(error))
        return self

    def write(self) -> dict:
        """Writes the results; returns the row."""
        if self.prediction is not None:
            self.row |= self.prediction.save(self.result, self.origin)
        if self.row["status"] != "failed" and LABELS.keys() & self.formats:
            stored = partial(read_mask, picture_path(self.result, "mask"), self.name)
            mask = self.prediction.mask if self.prediction else stored()
            _write_labels(self.image, mask, self.result, self.formats)
        return self.row

    def _fail(self, reason: str) -> None:
        self.row |= {"status": "failed", "reason": reason.removeprefix(f"{self.name}: ")}


def find_inputs(path: Path, output_dir: Path) -> list[Path]:
    """The images to predict, in name order; a DataError, without the path, where that cannot be done."""
    if not os.path.exists(path):  # unlike Path's it is false where a folder above cannot be entered
        raise DataError("The path of --image does not exist; give an image file or a folder of images.")
    if not (files := list_images(path, deep=False) if path.is_dir() else frames(path)):
        raise DataError(f"The folder --image holds no image; known endings are {', '.join(IMAGE_SUFFIXES)}.")
    stems = [*map(flat_name, files)]
    if twice := [stem for stem, count in Counter(stems).items() if count > 1]:
        first = stems.index(twice[0])
        shown = files[first].name if is_impersonal(twice[0]) else _place(first + 1, files)
        fault = f"{len(twice)} file names differ only by their ending: {shown}"
        raise DataError(f"{fault} and the next; rename one of each.")
    if path.is_dir() and path.resolve() == output_dir.resolve():
        advice = "A second call would take masks for images: give another --output_dir."
        raise DataError(f"The images lie in the output folder. {advice}")
    return files


def _place(number: int, files: list[Path]) -> str:
    """How messages call a file whose name may be a person's."""
    return f"image {number} of {len(files)} in name order"


def _write_lists(folder: Path, shard: str, rows: list[dict], head: str, formats: Collection[str]) -> None:
    """Writes the list of a shard; where all are there, of these images by this model, the table of all."""
    if shard != ALL:
        write_text(folder / list_name(shard), "".join(f"{line}\n" for line in (head, *map(json.dumps, rows))))
        count = int(shard.partition("/")[2])
        try:
            names = [list_name(f"{number}/{count}") for number in range(count)]
            tables = [(folder / name).read_text(encoding="utf-8").splitlines() for name in names]
        except FileNotFoundError:
            return  # the shard that ends last will do it
        if {table[0] for table in tables} != {head}:
            return
        turns = zip_longest(*(table[1:] for table in tables))
        rows = [json.loads(line) for turn in turns for line in turn if line]
    rows = sorted(rows, key=lambda row: -row.get("uncertainty", -1.0))  # failed ones last
    with atomic_write(folder / LIST_FILE) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if "coco" in formats:
        results = [row["result"] for row in rows if row["status"] != "failed"]
        masks = ((f"{name}.png", read_mask(picture_path(folder / name, "mask"), name)) for name in results)
        write_text(folder / "coco" / "instances.json", json.dumps(coco(masks)))


def _write_labels(image: np.ndarray, mask: np.ndarray, result: Path, formats: Collection[str]) -> None:
    """Writes an image for each format, and a LabelMe file; one that is there stays: it may be corrected."""
    for kind in LABELS.keys() & formats:
        with atomic_write(result.parent / LABELS[kind] / f"{result.name}.png") as partial:
            Image.fromarray(image).save(partial, format="PNG")
    file = result.parent / "labelme" / f"{result.name}.json"
    if "labelme" in formats and not file.exists():
        write_text(file, json.dumps(labelme(f"{result.name}.png", mask)))


def read_stamp(result: Path) -> dict:
    """The origin that all three results of an image name; empty where one is missing, damaged or a link."""
    texts = set()
    try:
        for kind in KINDS:
            path = picture_path(result, kind)
            with Image.open(path, formats=["PNG"]) as picture:
                texts.add("" if path.is_symlink() else picture.info.get(STAMP, ""))
                picture.verify()  # checksums
        stamp = json.loads(texts.pop()) if len(texts) == 1 else None
    except _BROKEN_PNG:
        return {}
    return stamp if isinstance(stamp, dict) and "uncertainty" in stamp else {}
