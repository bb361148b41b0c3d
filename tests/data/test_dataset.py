import json

import numpy as np
import pytest
from PIL import Image

from vesselrl.data.annotations import find_samples
from vesselrl.data.augment import Augmentation, augment, get_augmentation
from vesselrl.data.dataset import VesselDataset, epoch_order
from vesselrl.errors import DataError

PIXELS = 12 * 16 * (3 + 1)  # bytes of one image and its mask


@pytest.fixture
def samples(tmp_path):
    """Three samples; image i is of one grey, 10 · i."""
    (tmp_path / "images").mkdir()
    records = []
    for number in range(3):
        Image.new("L", (16, 12), 10 * number).save(tmp_path / "images" / f"img_{number}.png")
        records.append({"image": f"img_{number}.png", "mask": [[2, 3, 6, 3, 6, 8, 2, 8]], "text": "vessel"})
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    return find_samples(tmp_path)


def test_items(samples):
    dataset = VesselDataset(samples)
    assert len(dataset) == 3
    for index, (image, mask, sample) in enumerate(dataset):
        assert sample is samples[index]
        assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((12, 16, 3), np.uint8, (12, 16), bool)
        assert (image == 10 * int(sample.image_path.stem[-1])).all()
        assert mask.sum() == 20


@pytest.mark.parametrize(
    ("cache_bytes", "num_kept"), [(10 * PIXELS, 3), (2 * PIXELS, 2), (PIXELS - 1, 0), (0, 0)]
)
def test_cache_keeps_what_fits(samples, cache_bytes, num_kept):
    dataset = VesselDataset(samples, cache_bytes)
    first = list(dataset)
    for sample in samples:
        sample.image_path.unlink()
    kept = 0
    for index, (image, mask, _) in enumerate(first):
        try:
            again = dataset[index]
        except DataError:
            continue
        kept += 1
        assert (again[0] == image).all()
        assert (again[1] == mask).all()
    assert kept == num_kept


def test_nothing_is_read_before_it_is_asked_for(samples):
    samples[2].image_path.unlink()
    dataset = VesselDataset(samples)
    assert dataset[0][2] is samples[0]
    with pytest.raises(
        DataError, match=r"annotations\.json record \d \(P003_S1_F0001\): the file is missing"
    ):
        dataset[2]


def test_items_are_copies(samples):
    dataset = VesselDataset(samples)
    for _ in range(3):
        image, mask, _ = dataset[1]
        assert mask.sum() == 20
        assert image.max() == image.min()
        image[0, 0], mask[:] = 255, True


@pytest.mark.parametrize("cache_bytes", [10 * PIXELS, 0])
def test_augmented_items(samples, cache_bytes):
    """They depend on seed, epoch and index alone; what is kept is the picture of the file."""
    strong = get_augmentation("strong")
    dataset = VesselDataset(samples, cache_bytes, strong, seed=5)
    originals = [dataset[index][:2] for index in range(3)]
    places = [(index, epoch) for epoch in (1, 2) for index in range(3)]
    first = {place: dataset.augmented(*place) for place in places}
    for (index, epoch), (image, mask, sample) in first.items():
        assert sample is samples[index]
        expected = augment(*originals[index], strong, 5, epoch, index)
        assert (image == expected[0]).all()
        assert (mask == expected[1]).all()
    fresh = VesselDataset(samples, cache_bytes, strong, seed=5)
    for place in reversed(places):
        assert all((a == b).all() for a, b in zip(first[place][:2], fresh.augmented(*place)[:2], strict=True))
    for index, (image, mask) in enumerate(originals):
        assert (dataset[index][0] == image).all()
        assert (dataset[index][1] == mask).all()
    other = VesselDataset(samples, cache_bytes, strong, seed=6)
    assert any(first[place][0].tobytes() != other.augmented(*place)[0].tobytes() for place in places), (
        "another seed shows other pictures"
    )


def test_augmented_items_come_from_memory_and_are_copies(samples):
    for plan in (Augmentation(), Augmentation(flips=True)):
        dataset = VesselDataset(samples, augmentation=plan)
        before, _, _ = dataset.augmented(1, epoch=1)
        image, mask, _ = dataset.augmented(1, epoch=1)
        image[:], mask[:] = 255, True
        assert (dataset.augmented(1, epoch=1)[0] == before).all()
        assert dataset[1][1].sum() == 20
    samples[1].image_path.unlink()
    assert (dataset.augmented(1, epoch=1)[0] == before).all()


def test_without_a_plan_nothing_changes(samples):
    dataset = VesselDataset(samples)
    for epoch in (1, 2):
        for index in range(3):
            assert (dataset.augmented(index, epoch)[0] == dataset[index][0]).all()
            assert (dataset.augmented(index, epoch)[1] == dataset[index][1]).all()


def test_epoch_order():
    orders = {(seed, epoch): epoch_order(50, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    assert orders[1, 2] == epoch_order(50, 1, 2)
    assert epoch_order(0, 1, 1) == []
