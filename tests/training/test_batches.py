"""Batches: the same order for every stage, augmented truth with its own topology, easy images first."""

from pathlib import Path

import numpy as np
import pytest

from vesselrl.data.augment import get_augmentation
from vesselrl.data.dataset import VesselDataset
from vesselrl.data.samples import find_samples
from vesselrl.scoring.topology import topology
from vesselrl.training.batches import BatchSource


@pytest.fixture
def dataset(angiograms: Path) -> VesselDataset:
    return VesselDataset(find_samples(angiograms)[:10])


def keys(source: BatchSource, epoch: int) -> list[str]:
    return [key for batch in source.epoch(epoch) for key in batch.keys]


def test_every_image_once_an_epoch_in_an_order_of_its_own(dataset: VesselDataset) -> None:
    source = BatchSource(dataset, 3, seed=1, num_epochs=2)
    first, second = keys(source, 1), keys(source, 2)
    assert sorted(first) == sorted(second) == sorted(sample.key for sample in dataset.samples)
    assert first != second
    assert first == keys(BatchSource(dataset, 3, seed=1), 1)
    assert [len(batch.keys) for batch in source.epoch(1)] == [3, 3, 3, 1]
    assert source.num_steps == 8


def test_sweeps_go_through_an_epoch_again_in_another_order(dataset: VesselDataset) -> None:
    source = BatchSource(dataset, 3, seed=1, num_epochs=2, sweeps=lambda epoch: 3 if epoch == 1 else 1)
    first, second = keys(source, 1), keys(source, 2)
    assert source.num_steps == 3 * 4 + 4
    assert (source.num_batches(1), source.num_batches(2)) == (12, 4)
    orders = [tuple(first[:10]), tuple(first[10:20]), tuple(first[20:]), tuple(second)]
    assert len(set(orders)) == 4
    assert {frozenset(order) for order in orders} == {frozenset(sample.key for sample in dataset.samples)}
    once = BatchSource(dataset, 3, seed=1, num_epochs=2)
    assert (tuple(keys(once, 1)), tuple(keys(once, 2))) == (orders[0], orders[3])


def test_every_sweep_is_augmented_anew(angiograms: Path) -> None:
    dataset = VesselDataset(find_samples(angiograms)[:4], augmentation=get_augmentation("strong"), seed=3)
    one, other = BatchSource(dataset, 4, seed=3, sweeps=lambda epoch: 2).epoch(1)
    later = dict(zip(other.keys, other.truths, strict=True))
    assert any(not np.array_equal(truth, later[key]) for key, truth in zip(one.keys, one.truths, strict=True))


def test_easy_images_come_first_and_all_are_open_in_the_second_half(dataset: VesselDataset) -> None:
    difficulties = [index / 9 for index in range(10)]
    source = BatchSource(dataset, 2, seed=1, num_epochs=4, difficulties=difficulties)
    seen = [set(keys(source, epoch)) for epoch in (1, 2, 3, 4)]
    order = [sample.key for sample in dataset.samples]
    assert seen[0] == set(order[: len(seen[0])])  # the easiest ones, and only they
    assert 0 < len(seen[0]) < len(seen[1]) < 10
    assert len(seen[2]) == len(seen[3]) == 10
    assert source.num_steps == sum(len(list(source.epoch(epoch))) for epoch in (1, 2, 3, 4))


def test_augmentation_changes_picture_truth_and_topology_together(angiograms: Path) -> None:
    samples = find_samples(angiograms)[:4]
    source = BatchSource(VesselDataset(samples, augmentation=get_augmentation("strong"), seed=3), 4, seed=3)
    (one,), (other,) = list(source.epoch(1)), list(source.epoch(2))
    for batch in (one, other):
        for truth, shape in zip(batch.truths, batch.topologies, strict=True):
            assert np.array_equal(shape.skeleton, topology(truth).skeleton)
    later = dict(zip(other.keys, other.truths, strict=True))
    assert any(not np.array_equal(truth, later[key]) for key, truth in zip(one.keys, one.truths, strict=True))
    (again,) = list(source.epoch(1))
    assert all(np.array_equal(a, b) for a, b in zip(one.images, again.images, strict=True))
