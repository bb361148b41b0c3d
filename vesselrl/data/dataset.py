"""Samples as a torch data set: image and mask in the size of the file, loaded when they are asked for."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from vesselrl.data.annotations import Sample, load_image, load_mask
from vesselrl.data.augment import Augmentation, augment

Item = tuple[np.ndarray, np.ndarray, Sample]


class VesselDataset(Dataset):
    """Items (image uint8 (H, W, 3), mask bool (H, W), sample); images may differ in size.

    Images and masks stay in memory up to a limit, so that the second epoch reads no files. Every item is a
    copy: changing it changes nothing here. With worker processes each worker keeps its own memory.

    `dataset[index]` is the picture as it is in the file, and only that is kept; `dataset.augmented` changes a
    copy of it.

    Args:
        samples: what to load, in this order.
        cache_bytes: limit of the memory for pixels; 0 turns it off.
        augmentation: how `augmented` changes pictures; by default not at all.
        seed: decides, with epoch and index, how each picture is changed.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        cache_bytes: int = 2 * 1024**3,
        augmentation: Augmentation = Augmentation(),  # noqa: B008  (frozen)
        seed: int = 0,
    ):
        self.samples = tuple(samples)
        self.augmentation = augmentation
        self.seed = seed
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._bytes_left = cache_bytes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """One item; a broken file is a DataError that names the record."""
        sample = self.samples[index]
        if index in self._cache:
            image, mask = self._cache[index]
            return image.copy(), mask.copy(), sample
        image, mask = load_image(sample), load_mask(sample)
        if image.nbytes + mask.nbytes <= self._bytes_left:
            self._bytes_left -= image.nbytes + mask.nbytes
            self._cache[index] = image.copy(), mask.copy()
        return image, mask, sample

    def augmented(self, index: int, epoch: int) -> Item:
        """One item as this epoch shows it; the same whenever and in whatever order it is asked for.

        Raises:
            DataError: a broken file, as for `dataset[index]`.
        """
        image, mask, sample = self[index]
        return *augment(image, mask, self.augmentation, self.seed, epoch, index), sample


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The indices 0 … n − 1 in a random order that depends on seed and epoch alone.

    >>> sorted(epoch_order(4, seed=42, epoch=0))
    [0, 1, 2, 3]
    """
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()
