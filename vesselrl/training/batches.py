"""Training batches in a fixed, seeded order, the same for every stage and control, and the learning rate."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vesselrl.data.curriculum import open_samples
from vesselrl.data.dataset import VesselDataset, epoch_order
from vesselrl.scoring.topology import Topology, topology


@dataclass(frozen=True)
class TrainBatch:
    """B images with their truth; sizes may differ."""

    keys: list[str]  # pseudonyms, for caches
    images: list[np.ndarray]  # uint8 (H, W, 3)
    truths: list[np.ndarray]  # bool (H, W)
    topologies: list[Topology]  # of the truths


class BatchSource:
    """Batches of a data set, epoch by epoch, each pass over the data in another order.

    Seed and epoch decide order and augmentation. With `difficulties` easy images come first, see
    `open_samples`. The truth's topology is computed once, or anew where augmentation changes the truth.
    """

    def __init__(
        self,
        dataset: VesselDataset,
        batch_size: int,
        seed: int,
        num_epochs: int = 1,
        difficulties: Sequence[float] | None = None,
        num_passes: Callable[[int], int] = lambda epoch: 1,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_epochs = num_epochs
        self.difficulties = difficulties
        self.num_passes = num_passes
        self._topologies: dict[str, Topology] = {}

    def num_batches(self, epoch: int) -> int:
        """Batches of one epoch, counted from 1."""
        return self.num_passes(epoch) * -(-len(self._open(epoch)) // self.batch_size)

    @cached_property
    def num_steps(self) -> int:
        """Batches of all epochs."""
        return sum(self.num_batches(epoch) for epoch in range(1, self.num_epochs + 1))

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[TrainBatch]:
        """Batches of one epoch, counted from 1, without the first `skip` of them.

        The order depends on seed and epoch alone; the first pass is the same whatever the number of passes.
        """
        opened = self._open(epoch)
        per_pass = self.num_batches(epoch) // self.num_passes(epoch)
        for number in range(skip // per_pass, self.num_passes(epoch)):
            # Like no other pass's, this number decides order and augmentation.
            one_pass = epoch + number * self.num_epochs
            order = [opened[k] for k in epoch_order(len(opened), self.seed, one_pass)]
            first = skip % per_pass if number == skip // per_pass else 0
            for start in range(first * self.batch_size, len(order), self.batch_size):
                items = [self.dataset.augmented(k, one_pass) for k in order[start : start + self.batch_size]]
                images, truths, samples = map(list, zip(*items, strict=True))
                keys = [sample.key for sample in samples]
                yield TrainBatch(keys, images, truths, [*map(self._topology, keys, truths)])

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


def warm_cosine(step: int, num_steps: int, warmup_share: float) -> float:
    """Factor on the peak rate for a step from 0: linear warm-up, then a half cosine from 1 down to 0.

    >>> [round(warm_cosine(step, 10, 0.2), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = max(1, round(num_steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


def staged_warm_cosine(step: int, stages: Sequence[tuple[int, float]], warmup_share: float) -> float:
    """Learning rate of a training in stages of (number of steps, peak rate), a warm cosine for each.

    >>> [round(staged_warm_cosine(step, [(10, 1.0), (10, 0.1)], 0.2), 2) for step in (1, 6, 10, 11, 16)]
    [1.0, 0.5, 0.05, 0.1, 0.05]
    """
    for num_steps, _ in stages[:-1]:
        if step < num_steps:
            break
        step, stages = step - num_steps, stages[1:]
    num_steps, peak = stages[0]
    return peak * warm_cosine(step, num_steps, warmup_share)
