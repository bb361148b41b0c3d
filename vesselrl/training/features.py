"""Outputs of the frozen parts of a model, kept in memory and in files that all runs of a folder share."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vesselrl.experiment.config import RunSettings
from vesselrl.experiment.run_folder import atomic_write, json_hash, write_text
from vesselrl.models.checkpoint import read_shard, shard_files
from vesselrl.models.sa2va import ImageFeatures
from vesselrl.training.checkpoint import DAMAGED, tensor_hash, tensors_hash

logger = logging.getLogger(__name__)

GIB = 1024**3
# Official names of what no [SEG] state depends on: what makes the mask, and the head of each family.
_UNREAD = ("grounding_encoder.", "text_hidden_fcs.", "language_model.lm_head.", "language_model.output.",
           "lm_head.")  # fmt: skip


class FeatureStore:
    """Outputs of a frozen part by image, on the CPU: in memory first, then in files that runs share.

    A file is named after the model and the pixels. Read back they are the computed ones to the last bit, in
    the same memory layout, which decides how later layers round. `disk_bytes` limits the folder.
    """

    def __init__(
        self,
        folder: Path | None = None,
        model_hash: str = "",
        memory_bytes: int = 2 * GIB,
        disk_bytes: int = 20 * GIB,
    ) -> None:
        self.folder = None if folder is None else folder / model_hash
        self._memory: dict[str | None, ImageFeatures] = {}
        self._memory_left = memory_bytes
        self._names: dict[str, str] = {}  # of files, by key
        self._coming: dict[str, Future] = {}
        self._reader = ThreadPoolExecutor(1)
        self._disk_left = disk_bytes
        for path in folder.rglob("*") if folder else ():
            with suppress(FileNotFoundError):  # other runs may remove files meanwhile
                self._disk_left -= path.stat().st_size if path.is_file() else 0

    def fetch(self, key: str | None, pixels: Tensor, compute: Callable[[], ImageFeatures]) -> ImageFeatures:
        """Features of one image (1, 3, S, S), computed or kept by its key; without one in a file alone."""
        if key in self._memory:
            return self._memory[key]
        coming = self._coming.pop(key, None)
        name = tensor_hash(pixels) if self.folder and key not in self._names else self._names.get(key, "")
        if (kept := coming.result() if coming else self.read(name)) is None:
            kept = {level: tensor.detach().cpu() for level, tensor in compute()._asdict().items()}
            self.write(name, kept)
        features = ImageFeatures(**kept)
        size = sum(level.nbytes for level in features)
        if key is not None and size <= self._memory_left:
            self._memory_left -= size
            if pixels.is_cuda:  # copied to the GPU without waiting
                features = ImageFeatures(*(level.pin_memory() for level in features))
            self._memory[key] = features
        if key is not None:
            self._names[key] = name
        return features

    def fetch_ahead(self, keys: Iterable[str]) -> None:
        """Begins to read the files of images that will be asked for next."""
        for key in keys if self.folder else ():
            if key not in self._memory and key not in self._coming and key in self._names:
                self._coming[key] = self._reader.submit(self.read, self._names[key])

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a file; None where there is none, or it is damaged, as the log says then."""
        if self.folder is None or not (file := self.folder / f"{name}.safetensors").exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
            if header["sha256"] != tensors_hash(tensors, header["strides"]):
                raise ValueError("its checksum is wrong")
            strides = json.loads(header["strides"])
            return {n: torch.empty_strided(v.shape, strides[n]).copy_(v) for n, v in tensors.items()}
        except DAMAGED as error:
            logger.warning("%s cannot be read (%s): computed again", file, error)
            return None

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a file while there is room."""
        if self.folder is None:
            return
        file = self.folder / f"{name}.safetensors"
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self._disk_left:
            if self._disk_left > 0:
                advice = "further features stay in memory only. Raise --cache_gb, or delete the folder."
                logger.warning("%s has reached its limit: %s", self.folder.parent, advice)
            self._disk_left = 0
            return
        packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
        strides = json.dumps({name: tensor.stride() for name, tensor in tensors.items()})
        header = {"strides": strides, "sha256": tensors_hash(packed, strides)}
        try:
            with atomic_write(file) as partial:
                save_file(packed, partial, header)
            self._disk_left -= size
        except OSError as error:
            logger.warning("%s Features are kept in memory only.", error)
            self._disk_left = 0


def language_hash(
    model_folder: Path, notes: Path | None = None, check: Callable[[], object] = lambda: None
) -> str:
    """The sha256 over the tensors of vision tower and language model, as they stand in the files.

    By `notes`, unchanged files are not read again; `check` raises what is wrong before a first note.
    """
    stats = [(file.name, file.stat()) for file in shard_files(model_folder)]
    name = json_hash({n: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for n, s in stats})
    note = notes / f"{name[:32]}.txt" if notes else None
    if note and note.exists() and re.fullmatch("[0-9a-f]{64}", known := note.read_text(encoding="utf-8")):
        return known
    files = (read_shard(model_folder / n, lambda name: not name.startswith(_UNREAD)) for n, _ in stats)
    found = tensors_hash(dict(chain.from_iterable(files)))
    if note:
        check()
        write_text(note, found)
    return found


def image_key(image: np.ndarray) -> str:
    """Name of an image by its content, uint8 (H, W, 3)."""
    return tensor_hash(torch.from_numpy(np.ascontiguousarray(image)))


def feature_store(run: RunSettings, encoder: nn.Module | None, kind: str = "") -> FeatureStore | None:
    """Keeps the features of a frozen image encoder; None, with the reason logged, where it is trained."""
    if encoder is None:
        logger.info("image features are not kept: the image encoder is trained")
        return None
    if run.cache_gb == 0:
        return FeatureStore()
    folder = Path(run.output_dir) / "cache" / "features"
    logger.info("image features are kept in memory and, up to %g GB, in %s", run.cache_gb, folder)
    # The device and torch's version decide about rounding.
    about = f"{next(encoder.parameters()).device.type} {torch.__version__}"
    name = tensors_hash(encoder.state_dict(), about)[:16] + kind
    return FeatureStore(folder, name, disk_bytes=round(run.cache_gb * GIB))
