"""Features of the frozen image encoder, computed once per image: kept in memory first, then in files.

A file is named after the model and the pixels, so a changed model or image can never meet an old value, and
runs side by side share the folder: a file appears complete or not at all.
"""

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vesselrl.experiment.run_folder import atomic_write
from vesselrl.models.sa2va import ImageFeatures

logger = logging.getLogger(__name__)

GIB = 1024**3


class FeatureStore:
    """Features by image, on the CPU.

    Args:
        folder: for the files; None keeps memory only.
        model_hash: of the weights that make the features, see `weights_hash`.
        memory_bytes: limit of the memory.
        disk_bytes: limit of the folder, files of other models included.
    """

    def __init__(
        self,
        folder: Path | None = None,
        model_hash: str = "",
        memory_bytes: int = 2 * GIB,
        disk_bytes: int = 20 * GIB,
    ) -> None:
        self.folder = None if folder is None else folder / model_hash
        self._memory: dict[str, ImageFeatures] = {}
        self._memory_left = memory_bytes
        self._disk_left = disk_bytes
        for path in folder.rglob("*") if folder else ():
            with suppress(FileNotFoundError):  # other runs may remove files meanwhile
                self._disk_left -= path.stat().st_size if path.is_file() else 0

    def fetch(self, key: str, pixels: Tensor, compute: Callable[[], ImageFeatures]) -> ImageFeatures:
        """Features of one image, from memory, from a file, or computed and kept.

        Args:
            key: names the image within this run; it must always stand for the same pixels.
            pixels: input of the encoder, (1, 3, S, S).
            compute: makes the features, each (1, C, h, w).
        """
        if key in self._memory:
            return self._memory[key]
        file = self.folder / f"{tensor_hash(pixels)}.safetensors" if self.folder else None
        features = self._read(file) if file and file.exists() else None
        if features is None:
            features = ImageFeatures(*(level.detach().cpu() for level in compute()))
            if file:
                self._write(file, features)
        size = sum(level.nbytes for level in features)
        if size <= self._memory_left:
            self._memory_left -= size
            self._memory[key] = features
        return features

    def _read(self, file: Path) -> ImageFeatures | None:
        try:
            return ImageFeatures(**load_file(file))
        except (SafetensorError, TypeError, OSError) as error:
            logger.warning("%s cannot be read (%s): computed again", file, error)
            return None

    def _write(self, file: Path, features: ImageFeatures) -> None:
        size = sum(level.nbytes for level in features)
        if size > self._disk_left:
            if self._disk_left > 0:
                logger.warning(
                    "%s has reached its limit: the features of further images stay in memory only. "
                    "Raise --cache_gb, or delete the folder.",
                    self.folder.parent,
                )
            self._disk_left = 0
            return
        try:
            with atomic_write(file) as partial:
                save_file({name: level.contiguous() for name, level in features._asdict().items()}, partial)
            self._disk_left -= size
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be written (%s): features are kept in memory only", file, error)
            self._disk_left = 0


def tensor_hash(values: Tensor) -> str:
    """First 32 hex digits of the sha256 of a tensor's shape, type and bytes."""
    values = values.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    digest.update(values.view(-1).numpy().tobytes())
    return digest.hexdigest()[:32]


def weights_hash(module: nn.Module) -> str:
    """First 16 hex digits of the sha256 over a module's names and values, its device and torch's version.

    The same weights give other last bits on another device or with another torch.
    """
    lines = [f"{name} {tensor_hash(value)}" for name, value in sorted(module.state_dict().items())]
    lines.append(f"{next(module.parameters()).device.type} {torch.__version__}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
