"""Training batches in a fixed, seeded order; the same for every stage, so that controls see the same data."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

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
    """Batches of a data set, epoch by epoch; the truth's topology is computed once per image."""

    def __init__(self, dataset: VesselDataset, batch_size: int, seed: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self._topologies: dict[str, Topology] = {}

    @property
    def num_batches(self) -> int:
        """Batches per epoch; the last one may be smaller."""
        return -(-len(self.dataset) // self.batch_size)

    def epoch(self, number: int) -> Iterator[TrainBatch]:
        """The batches of one epoch, in an order that depends on the seed and the epoch alone."""
        order = epoch_order(len(self.dataset), self.seed, number)
        for start in range(0, len(order), self.batch_size):
            items = [self.dataset[index] for index in order[start : start + self.batch_size]]
            yield TrainBatch(
                keys=[sample.key for _, _, sample in items],
                images=[image for image, _, _ in items],
                truths=[mask for _, mask, _ in items],
                topologies=[self._topology(sample.key, mask) for _, mask, sample in items],
            )

    def _topology(self, key: str, mask: np.ndarray) -> Topology:
        if key not in self._topologies:
            self._topologies[key] = topology(mask)
        return self._topologies[key]
