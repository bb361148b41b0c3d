"""Images in, vessel masks out: arrays with `Predictor`, files with `predict_files`."""

import csv
import hashlib
import json
import os
import re
import struct
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from scipy.special import expit, logit

from vesselrl.data.images import IMAGE_SUFFIXES, read_size
from vesselrl.data.pairing import list_images
from vesselrl.data.patients import is_impersonal
from vesselrl.data.pseudonyms import MAPPING_FILE, pseudonyms
from vesselrl.data.samples import read_image
from vesselrl.data.tiles import Tiling, tile_px_of
from vesselrl.errors import DataError, NotFiniteError
from vesselrl.experiment.options import Masks
from vesselrl.experiment.progress import Progress
from vesselrl.experiment.run_folder import (
    atomic_write,
    check_room,
    check_writable,
    find_run,
    json_hash,
    run_settings,
)
from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.lora import load_adapter
from vesselrl.models.processing import DEFAULT_PROMPT, Sa2VAInputs, Sa2VAProcessor
from vesselrl.models.sa2va import Sa2VA
from vesselrl.scoring.measurements import (
    IN_MM,
    MEASUREMENTS,
    check_pixel_mm,
    measurement_row,
    vessel_measurements,
)
from vesselrl.scoring.overlay import overlay
from vesselrl.scoring.postprocessing import THRESHOLD_ONLY, PostProcessing, post_processing

LIST_FILE = "predictions.csv"
COLUMNS = ("image", "result", "status", "foreground", *MEASUREMENTS, *IN_MM, "reason")
ALL = "0/1"  # the shard that has every image
AHEAD = 2  # images that wait to be predicted, and that wait to be written
KINDS = ("mask", "probability", "overlay")
STAMP = "vesselrl"  # the text in every result that says from which image and by which settings it is
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BROKEN_PNG = (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)


class Prediction(NamedTuple):
    """One image's result in its own pixels, all (H, W)."""

    mask: np.ndarray  # bool, probability > threshold, then post-processed
    probabilities: np.ndarray  # float32 in [0, 1]
    logits: np.ndarray  # float32; probability = 1 / (1 + exp(−logit))

    @classmethod
    def of_logits(cls, logits: np.ndarray, post: PostProcessing = THRESHOLD_ONLY) -> "Prediction":
        """The result of a model's output, float32 (H, W)."""
        # Compared as logits: at 0.5 the official rule is logit > 0, to the last bit.
        cut = np.float32(np.log(post.threshold / (1 - post.threshold)))
        probabilities = expit(logits)
        return cls(post.postprocess_for(probabilities)(logits > cut), probabilities, logits)


@dataclass(eq=False)
class Predictor:
    """Segments vessels with a Sa2VA, with or without an adapter inside."""

    model: Sa2VA
    processor: Sa2VAProcessor  # of the same checkpoint
    prompt: str = DEFAULT_PROMPT
    post: PostProcessing = THRESHOLD_ONLY  # probabilities to a mask
    # In place of the model's own, from inputs and images (H, W, 3) to logits (H, W).
    forward: Callable[[Sa2VAInputs, list[np.ndarray]], list[torch.Tensor]] | None = None
    tile_px: int | None = None  # side of the tiles of large images, see `tiling`

    @classmethod
    def from_pretrained(
        cls,
        base_model: str | Path | None = None,
        lora_weights: str | Path | None = None,
        device: str | None = None,
        use_bf16: bool = False,
        **kwargs: str | int | PostProcessing | None,
    ) -> "Predictor":
        """Loads a base model and, if given, an adapter.

        Without `base_model` it is the embedded miniature; `lora_weights` is an adapter or a run folder, which
        means its best_lora. Without `device` a GPU is taken when there is one. With `use_bf16` vision tower
        and language model are in bfloat16, SAM2 stays in float32. `kwargs` are prompt, post and tile_px.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, processor = load_sa2va(base_model, device, torch.bfloat16 if use_bf16 else torch.float32)
        if lora_weights is not None:
            model = load_adapter(model, adapter_folder(Path(lora_weights))).merge_and_unload()
        return cls(model.eval(), processor, **kwargs)

    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one uint8 RGB image (H, W, 3)."""
        return self.predict_batch([image])[0]

    @torch.inference_mode()
    def predict_batch(self, images: list[np.ndarray]) -> list[Prediction]:
        """Segments several images, whose sizes may differ: those that are not cut in one pass."""
        cut = [self.tiling.cuts(*image.shape[:2]) for image in images]
        whole = [image for image, is_cut in zip(images, cut, strict=True) if not is_cut]
        logits = iter(self._logits(whole) if whole else ())
        found = [
            self._tiled(image) if cuts else next(logits) for image, cuts in zip(images, cut, strict=True)
        ]
        return [Prediction.of_logits(one, self.post) for one in found]

    @property
    def tiling(self) -> Tiling:
        """Tiles of `tile_px` (0: none), or (None) of SAM2's square for images more than twice as large."""
        return Tiling.of_model(self.tile_px, self.processor.config.sam2.image_size)

    def _logits(self, images: list[np.ndarray]) -> list[np.ndarray]:
        inputs = self.processor(images, self.prompt, device=self.model.device)
        outputs = self.model(inputs) if self.forward is None else self.forward(inputs, images)
        results = [output.float().cpu().numpy() for output in outputs]
        for logits in results:
            check_finite(logits)
        return results

    def _tiled(self, image: np.ndarray) -> np.ndarray:
        """Logits of an image from tiles, one after the other, whose probabilities are blended."""
        blended = self.tiling.blend(image, lambda tile: expit(self._logits([tile])[0]))
        limits = np.finfo(np.float32)
        return logit(blended.clip(limits.tiny, 1 - limits.epsneg))

    def fingerprint(self) -> str:
        """Hash of all that a mask depends on beside its image: model, tokenizer, prompt and settings."""
        sums = []
        for name, tensor in self.model.state_dict().items():
            bits = tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
            # Sums are much faster than a hash; the second tells apart what stands in another order.
            totals = [int(part.sum(dtype=torch.int64)) for part in (bits, bits[::13])]
            sums.append((name, str(tensor.dtype), tuple(tensor.shape), totals))
        tokenizer = self.processor.tokenizer.backend_tokenizer.to_str()
        about = (sums, str(self.model.config), tokenizer, self.prompt, self.post, self.tiling)
        return hashlib.sha256(repr(about).encode()).hexdigest()


def check_finite(logits: np.ndarray) -> None:
    """Refuses an output that would pass for an empty mask: nan is not above any threshold."""
    if not np.isfinite(logits).all():
        count = f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} pixels"
        advice = "Its weights are damaged or too large: take another checkpoint or adapter, or no --use_bf16"
        raise NotFiniteError(f"The model gives no numbers for {count}, so there is no mask. {advice}.")


def load_predictor(args: Masks, adapter: str | None) -> Predictor:
    """The model as its adapter's run used it, where nothing else is asked for."""
    settings = run_settings(find_run(adapter))
    prompt = args.prompt or settings.get("prompt", DEFAULT_PROMPT)
    post = post_processing(settings, args.threshold, args.min_component_px, args.close_gaps)
    made = {"prompt": prompt, "post": post, "tile_px": tile_px_of(settings, args.tile_px)}
    return Predictor.from_pretrained(args.base_model, adapter, use_bf16=args.use_bf16, **made)


def adapter_folder(path: Path) -> Path:
    """The adapter inside a run folder (`best_lora`), or the folder itself when it is an adapter."""
    inside = path / "best_lora"
    return inside if not (path / "adapter_config.json").exists() and inside.is_dir() else path


def predict_files(
    predictor: Predictor,
    path: Path,
    output_dir: Path,
    progress: Progress | None = None,
    shard: str = ALL,
    pixel_mm: float | None = None,
) -> Iterator[dict]:
    """Segments an image or a folder of images and writes mask, probability and overlay of each.

    Goes on after a file that cannot be used; results of the same image by the same model and settings are
    kept. A pseudonym stands for a name that may be a person's; only `patients.mapping.json` in the output
    folder says which file it is. Yields a row of `COLUMNS` for each image, also listed in `predictions.csv`:
    `status` is done, replaced (there was another result), kept or failed; measurements are those of
    `vessel_measurements`, in mm too with the side of a pixel. `progress` takes (done, in all).

    Shard i/n takes every nth image from the ith on, counted from 0, and lists them in a file of its own; the
    one that ends last joins the files. One thread reads ahead and two write, in the order of the images.
    """
    list_file, (first, step) = list_name(shard), map(int, shard.split("/"))
    check_pixel_mm(pixel_mm)
    files = find_inputs(path, output_dir)
    check_writable(output_dir)
    total = len(range(first, len(files), step))
    with suppress(DataError):  # said when it is its turn
        width, height = read_size(files[0], _place(1, files))
        check_room(output_dir, 4 * total * width * height, f"{total} images of this size")
    output_dir.mkdir(parents=True, exist_ok=True)
    people = [file.stem for file in files if not is_impersonal(file.stem)]
    keys = pseudonyms(people, mapping=output_dir / MAPPING_FILE, keep="all") if people else {}
    made_by, jobs = predictor.fingerprint(), []
    for number, file in enumerate(files, start=1):
        key = keys[file.stem].key if file.stem in keys else None
        name = f"{_place(number, files)} ({key})" if key else file.name
        jobs.append((file, name, output_dir / (key or file.stem)))
    head = {"made_by": made_by, "images": json_hash([name for _, name, _ in jobs]), "shards": step}
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(2) as writers:
        own = (_Job(*job) for job in jobs[first::step])
        read = _in_order(reader, partial(_Job.read, made_by=made_by), own)
        rows = _in_order(writers, _Job.write, (job.predict(predictor) for job in read))
        with _listing(output_dir / list_file, json.dumps(head)) as add:
            for done, row in enumerate(rows, start=1):
                row |= measurement_row(row.pop("measurements", {}), pixel_mm if "foreground" in row else None)
                add(row)
                yield row
                if progress is not None:
                    progress(done, total)
    if shard != ALL:
        _join_shards(output_dir, step, json.dumps(head))


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
    row: dict = field(default_factory=dict)
    origin: dict = field(default_factory=dict)
    image: np.ndarray | None = None  # none: there is nothing to do, or nothing that can be done
    prediction: Prediction | None = None

    def read(self, made_by: str) -> "_Job":
        """Reads the image, unless its results are there."""
        self.row = {"image": self.name, "result": self.result.name}
        try:
            with self.file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            self.origin = {"image": digest, "made_by": made_by}
            if self.origin.items() <= (there := read_stamp(self.result)).items():
                self.row |= {"status": "kept"} | {
                    name: there[name] for name in ("foreground", "measurements")
                }
                return self
            self.row["status"] = "replaced" if there else "done"
            self.image = read_image(self.file, self.name)
        except OSError as error:
            self._fail(f"the file cannot be read ({error.strerror}).")
        except DataError as error:
            self._fail(str(error))
        return self

    def predict(self, predictor: Predictor) -> "_Job":
        """Segments the image."""
        try:
            self.prediction = None if self.image is None else predictor.predict(self.image)
        except NotFiniteError as error:
            self._fail(str(error))
        return self

    def write(self) -> dict:
        """Writes the results; returns the row."""
        if self.prediction is not None:
            self.row |= write_prediction(self.image, self.prediction, self.result, self.origin)
        return self.row

    def _fail(self, reason: str) -> None:
        self.row |= {"status": "failed", "reason": reason.removeprefix(f"{self.name}: ")}


def find_inputs(path: Path, output_dir: Path) -> list[Path]:
    """The images to predict, in name order; a DataError, without the path, where that cannot be done."""
    if not os.path.exists(path):  # unlike Path's it is false where a folder above cannot be entered
        raise DataError("The path of --image does not exist; give an image file or a folder of images.")
    if not (files := list_images(path, deep=False) if path.is_dir() else [path]):
        raise DataError(f"The folder --image holds no image; known endings are {', '.join(IMAGE_SUFFIXES)}.")
    stems = [file.stem for file in files]
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


@contextmanager
def _listing(path: Path, head: str = "") -> Iterator[Callable[[dict], object]]:
    """Writes rows to a CSV file, or after a line `head` to JSON lines; it appears when all are in it."""
    with atomic_write(path) as partial_file, partial_file.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.write(f"{head}\n")
            yield lambda row: file.write(f"{json.dumps(row)}\n")
            return
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        yield writer.writerow


def _join_shards(folder: Path, num_shards: int, head: str) -> None:
    """Writes predictions.csv where the lists of all shards are there, of these images by this model."""
    try:
        names = [list_name(f"{shard}/{num_shards}") for shard in range(num_shards)]
        tables = [(folder / name).read_text(encoding="utf-8").splitlines() for name in names]
    except FileNotFoundError:
        return  # the shard that ends last will do it
    if {table[0] for table in tables} == {head}:
        with _listing(folder / LIST_FILE) as add:
            for lines in zip_longest(*(table[1:] for table in tables)):
                for line in filter(None, lines):
                    add(json.loads(line))


def write_prediction(image: np.ndarray, prediction: Prediction, result: Path, origin: dict) -> dict:
    """Writes `<result>_mask.png` (0/255), `_probability.png` (16 bit), `_overlay.png`.

    Returns the foreground, in [0, 1], and the measurements. A link in their place is replaced, not followed;
    nothing but pixels, these and `origin` is in them.
    """
    pixels = (
        prediction.mask.astype(np.uint8) * 255,
        np.round(prediction.probabilities * 65535).astype(np.uint16),
        overlay(image, prediction.mask),
    )
    measured, stamp = measurement_row(vessel_measurements(prediction.mask)), PngImagePlugin.PngInfo()
    found = {"foreground": float(prediction.mask.mean()), "measurements": measured}
    stamp.add_text(STAMP, json.dumps(origin | found))
    for kind, values in zip(KINDS, pixels, strict=True):
        with atomic_write(_picture(result, kind)) as partial:
            Image.fromarray(values).save(partial, format="PNG", pnginfo=stamp)
    return found


def read_stamp(result: Path) -> dict:
    """The origin that all three results of an image name; empty where one is missing, damaged or a link."""
    texts = set()
    try:
        for kind in KINDS:
            path = _picture(result, kind)
            with Image.open(path, formats=["PNG"]) as picture:
                texts.add("" if path.is_symlink() else picture.info.get(STAMP, ""))
                picture.verify()  # checksums
        stamp = json.loads(texts.pop()) if len(texts) == 1 else None
    except _BROKEN_PNG:
        return {}
    return stamp if isinstance(stamp, dict) and "measurements" in stamp else {}


def _picture(result: Path, kind: str) -> Path:
    return result.with_name(f"{result.name}_{kind}.png")
