"""The data set loads once and augments reproducibly; the contact sheet shows every mask, and no name."""

import json

import numpy as np
import pytest
from PIL import Image

from vesselrl.data import dataset as module
from vesselrl.data.augment import augment, get_augmentation
from vesselrl.data.check import foreground_shares
from vesselrl.data.dataset import TILE_PX, VesselDataset, contact_sheet, write_contact_sheet
from vesselrl.data.pseudonyms import pseudonyms
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.data.splits import split_by_patient, take
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


@pytest.mark.parametrize(("cache_bytes", "num_kept"), [(9 * PIXELS, 3), (2 * PIXELS, 2), (PIXELS - 1, 0)])
def test_items_are_copies_and_the_cache_keeps_what_fits(samples, monkeypatch, cache_bytes, num_kept):
    monkeypatch.setattr(module, "CACHE_BYTES", cache_bytes)
    dataset = VesselDataset(samples)
    for _ in range(2):
        for index, (image, mask, sample) in enumerate(dataset):
            assert sample is samples[index]
            assert (image.shape, image.dtype) == ((12, 16, 3), np.uint8)
            assert (mask.shape, mask.dtype, mask.sum()) == ((12, 16), bool, 20)
            assert (image == 10 * int(sample.image_path.stem[-1])).all()
            image[:], mask[:] = 255, True
    for sample in samples:
        sample.image_path.unlink()
    for index in range(num_kept):
        assert dataset[index][1].sum() == 20
    for index in range(num_kept, len(dataset)):
        with pytest.raises(DataError, match=r"annotations\.json record \d .*: the file is missing"):
            dataset[index]


def item(number=1, side=64):
    mask = np.zeros((side, side), bool)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    return f"P{number:03}_S1_F0001", np.full((side, side, 3), 90, np.uint8), mask


def test_captions_are_keys_and_nothing_else():
    """30 files of one frame: F0011, F0011b … F0011z, F0011-27 …; all are captions."""
    one, other = (contact_sheet([item(number)]) for number in (1, 2))
    assert np.flatnonzero((one != other).any(axis=(1, 2))).min() > TILE_PX, "the captions alone differ"
    keys = {a.key for a in pseudonyms([f"LI{'_' * n}MING_frame_000011" for n in range(1, 31)]).values()}
    assert {"P001_S1_F0011", "P001_S1_F0011b", "P001_S1_F0011z", "P001_S1_F0011-27"} < keys
    assert contact_sheet([(key, *item(side=4)[1:]) for key in keys]).any()
    for name in ("ZHANG_SAN(1234567890)", "P001_S1_F0001 ZHANG", "P001_S1_FZHANG", "train_001"):
        with pytest.raises(ValueError, match="caption of image 2 is no pseudonym") as caught:
            contact_sheet([item(), (name, *item()[1:])])
        assert name not in str(caught.value)


@pytest.mark.parametrize("augmentation", ["none", "strong"])
def test_the_sheet_shows_what_the_first_epoch_does(tmp_path, angiograms, monkeypatch, augmentation):
    drawn, path = [], tmp_path / "new" / "a.png"
    monkeypatch.setattr(module, "contact_sheet", lambda shown: drawn.extend(shown) or contact_sheet(shown))
    write_contact_sheet(str(angiograms), path, 100, augmentation, 9, split_seed=3)
    with Image.open(path) as image:
        assert image.size[0] > TILE_PX
    split = split_by_patient(find_samples(angiograms), 3, shares=foreground_shares(angiograms))
    samples, plan = take(split.train, None, 3), get_augmentation(augmentation)
    assert len(drawn) == len(split.train)  # a patient of validation or test is never shown
    for index, (sample, (key, image, mask)) in enumerate(zip(samples, drawn, strict=True)):
        expected = augment(load_image(sample), load_mask(sample), plan, seed=9, epoch=1, index=index)
        assert key == sample.key
        assert (image == expected[0]).all()
        assert (mask == expected[1]).all()


def test_two_patients_are_shown_without_a_split(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for number in (1, 2):
            Image.new("L", (8, 8 + number), 255).save(tmp_path / folder / f"train_{number:03}.png")
    with Image.open(write_contact_sheet(tmp_path, tmp_path / "sheet.png", stratified=False)) as image:
        assert 2 * TILE_PX < image.size[0] < 3 * TILE_PX
