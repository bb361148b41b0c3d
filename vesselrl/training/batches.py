"""Training batches in a fixed, seeded order; the same for every stage, so that controls see the same data."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vesselrl.data.curriculum import open_samples
from vesselrl.data.dataset import VesselDataset, epoch_order
from vesselrl.scoring.topology import Topology, topology


@dataclass(frozen=True)
class TrainBatch:
    """B images with their truth.

    Attributes:
        keys: pseudonyms, for caches.
        images: uint8 (H, W, 3); sizes may differ.
        truths: bool (H, W).
        topologies: of the truths.
    """

    keys: list[str]
    images: list[np.ndarray]
    truths: list[np.ndarray]
    topologies: list[Topology]


class BatchSource:
    """Batches of a data set, epoch by epoch.

    The truth's topology is computed once per image, or anew where augmentation changes the truth.

    Args:
        dataset: of the training images.
        batch_size: images per batch; the last one of an epoch may be smaller.
        seed: decides, with the epoch, the order and the augmentation.
        num_epochs: of the whole training.
        difficulties: of the images, in the order of the data set: easy ones first, see `open_samples`; None
            shows every image in every epoch.
        sweeps: how often an epoch, counted from 1, goes through its images, each time in another order.
    """

    def __init__(
        self,
        dataset: VesselDataset,
        batch_size: int,
        seed: int,
        num_epochs: int = 1,
        difficulties: Sequence[float] | None = None,
        sweeps: Callable[[int], int] = lambda epoch: 1,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_epochs = num_epochs
        self.difficulties = difficulties
        self.sweeps = sweeps
        self._topologies: dict[str, Topology] = {}

    def num_batches(self, epoch: int) -> int:
        """Batches of one epoch, counted from 1."""
        return self.sweeps(epoch) * -(-len(self._open(epoch)) // self.batch_size)

    @cached_property
    def num_steps(self) -> int:
        """Batches of all epochs."""
        return sum(self.num_batches(epoch) for epoch in range(1, self.num_epochs + 1))

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[TrainBatch]:
        """The batches of one epoch, in an order that depends on the seed and the epoch alone.

        The first sweep is the same whatever the number of sweeps.

        Args:
            epoch: counted from 1.
            skip: batches at its beginning that are left out.
        """
        per_sweep = self.num_batches(epoch) // self.sweeps(epoch)
        for sweep in range(skip // per_sweep, self.sweeps(epoch)):
            yield from self._sweep(epoch, epoch + sweep * self.num_epochs, skip % per_sweep)
            skip = 0

    def _sweep(self, epoch: int, number: int, skip: int) -> Iterator[TrainBatch]:
        """One sweep; its number, like no other's, decides order and augmentation."""
        opened = self._open(epoch)
        order = [opened[k] for k in epoch_order(len(opened), self.seed, number)]
        for start in range(skip * self.batch_size, len(order), self.batch_size):
            items = [self.dataset.augmented(k, number) for k in order[start : start + self.batch_size]]
            yield TrainBatch(
                keys=[sample.key for _, _, sample in items],
                images=[image for image, _, _ in items],
                truths=[mask for _, mask, _ in items],
                topologies=[self._topology(sample.key, mask) for _, mask, sample in items],
            )

    def _open(self, epoch: int) -> Sequence[int]:
        """The images that an epoch shows."""
        if self.difficulties is None:
            return range(len(self.dataset))
        return open_samples(self.difficulties, epoch, self.num_epochs)

    def _topology(self, key: str, mask: np.ndarray) -> Topology:
        if not self.dataset.augmentation.is_none:
            return topology(mask)
        if key not in self._topologies:
            self._topologies[key] = topology(mask)
        return self._topologies[key]
