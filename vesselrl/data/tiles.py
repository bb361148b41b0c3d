"""Images much larger than the model's square, piece by piece in their own pixels.

Resized to the square as a whole, such an image loses its vessels of a few pixels. It is predicted in tiles
that overlap, and trained on crops of the size of a tile.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from vesselrl.data.images import read_size
from vesselrl.data.samples import Sample
from vesselrl.experiment.config import TrainConfig

LARGE = 2  # an image is large whose longer side is more than so many sides of the square
_STREAM = 0xC20  # keeps these random numbers apart from others of the same seed


@dataclass(frozen=True)
class Tiling:
    """Which images are cut, and into what: sides in px of the image."""

    tile_px: int = 0  # longest side of a tile; 0: no image is cut
    largest_px: int = 0  # longest side of an image that is left whole

    @classmethod
    def of_model(cls, tile_px: int | None, square_px: int) -> "Tiling":
        """Tiles of a size (0: none), or (None) of the model's square, for large images alone."""
        return cls(square_px, LARGE * square_px) if tile_px is None else cls(tile_px, tile_px)

    def cuts(self, height: int, width: int) -> bool:
        """Whether an image of this size is cut."""
        return self.tile_px > 0 and max(height, width) > self.largest_px

    def cuts_any(self, samples: Iterable[Sample]) -> bool:
        """Whether the image of any sample is cut; reads their headers."""
        sizes = (read_size(sample.image_path, sample.record) for sample in samples if self.tile_px > 0)
        return any(self.cuts(*size) for size in sizes)

    def pieces(self, image: np.ndarray) -> Iterator[np.ndarray]:
        """The tiles of an image (H, W, 3)."""
        for (row, _), (column, _) in product(*map(self.places, image.shape[:2])):
            yield image[row, column]

    def blend(self, image: np.ndarray, predict: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Probabilities (H, W) of an image from those that `predict` gives of its tiles; no edge is seen.

        A tile counts less towards its edges, where the model sees little around a pixel: sin² over a quarter.
        """
        blended, sides = np.zeros(image.shape[:2], np.float32), map(self.places, image.shape[:2])
        for (row, down), (column, across) in product(*sides):
            blended[row, column] += down[:, None] * across * predict(image[row, column])
        return np.minimum(blended, 1, out=blended)  # weights add up to 1, but for rounding

    def crop(self, height: int, width: int, seed: int, epoch: int, index: int) -> tuple[slice, ...]:
        """A random tile; the same for the same seed, epoch and index, as in `augment`."""
        rng = np.random.default_rng([_STREAM, seed, epoch, index])
        sides = [(side, min(self.tile_px, side)) for side in (height, width)]
        starts = [int(rng.integers(side - length + 1)) for side, length in sides]
        return tuple(slice(start, start + n) for start, (_, n) in zip(starts, sides, strict=True))

    def places(self, side: int) -> list[tuple[slice, np.ndarray]]:
        """Tiles along one side, of which neighbours share a quarter or more, and weights that add up to 1."""
        length = min(self.tile_px, side)
        ramp = max(1, length // 4)
        count = math.ceil((side - length) / (length - ramp)) + 1 if side > length else 1
        starts = [round(k * (side - length) / max(1, count - 1)) for k in range(count)]
        edge = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5  # distance to the nearer end
        weight = np.sin(np.minimum(edge / ramp, 1) * math.pi / 2) ** 2
        total = np.zeros(side)
        for start in starts:
            total[start : start + length] += weight
        tiles = [slice(start, start + length) for start in starts]
        return [(tile, (weight / total[tile]).astype(np.float32)) for tile in tiles]


WHOLE = Tiling()  # no image is cut


def tile_px_of(settings: Mapping[str, Any], asked: int | None = None) -> int | None:
    """The size asked for, or (None) that of the run with these settings; earlier runs had no tiles."""
    kept = settings.get("tile_px", 0) if settings else None
    return kept if asked is None else TrainConfig().with_(tile_px=asked).data.tile_px  # checks it
