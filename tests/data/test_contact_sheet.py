"""The contact sheet shows every picture with the outline of its mask, and no name."""

import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from vesselrl.data import contact_sheet as sheet_module
from vesselrl.data.annotations import find_samples
from vesselrl.data.augment import get_augmentation
from vesselrl.data.builtin import SMALL, builtin_data
from vesselrl.data.check import check_data
from vesselrl.data.contact_sheet import OUTLINE, TILE_PX, contact_sheet, outlined, write_contact_sheet
from vesselrl.data.dataset import VesselDataset
from vesselrl.data.patients import pseudonyms
from vesselrl.data.splits import split_by_patient, take

INSIDE = (90, 20, 60)  # of every picture; not a grey of the captions


def item(number=1, shape=(64, 64), filled=True):
    mask = np.zeros(shape, bool)
    if filled:
        mask[shape[0] // 4 : shape[0] // 2, shape[1] // 4 : shape[1] // 2] = True
    return f"P{number:03}_S1_F0001", np.full((*shape, 3), INSIDE, np.uint8), mask


def is_line(sheet):
    return (sheet == OUTLINE).all(axis=2)


def test_the_outline_runs_round_the_mask():
    _, image, mask = item()
    line = is_line(outlined(image, mask))
    assert line.sum() == 4 * 16  # the four sides of the square, without its corners
    assert not (line & mask).any()
    assert (outlined(image, mask)[~line] == INSIDE).all()
    assert (image == INSIDE).all(), "the picture given is left alone"


def test_pictures_of_all_shapes_share_a_sheet():
    """Wide, tall and small ones are brought to one longer side, centred, in rows."""
    items = [item(1, (50, 100)), item(2, (100, 50)), item(3, (1000, 900)), item(4, (30, 30)), item(5)]
    sheet = contact_sheet(items, columns=2)
    assert (sheet.dtype, sheet.shape[2]) == (np.uint8, 3)
    tile_height, tile_width = sheet.shape[0] // 3, sheet.shape[1] // 2
    shown = (sheet == INSIDE).all(axis=2)
    for row, column, height, width in (
        (0, 0, 192, 384),
        (0, 1, 384, 192),
        (1, 0, 384, 346),
        (2, 0, 384, 384),
    ):
        tile = shown[row * tile_height :, column * tile_width :][:tile_height, :tile_width]
        rows, columns = np.flatnonzero(tile.any(axis=1)), np.flatnonzero(tile.any(axis=0))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (height, width)
    assert (sheet[2 * tile_height + 6 :, tile_width + 6 :] == 255).all(), "the place that is left is white"


def test_the_outline_lies_where_the_mask_is():
    """The square of the mask is outlined at the same share of width and height as it has in its image."""
    sheet = contact_sheet([item(shape=(96, 96))], columns=1)
    rows, columns = np.nonzero(is_line(sheet))
    gap = 6
    assert rows.min() - gap == pytest.approx(TILE_PX / 4 - 1, abs=1)
    assert rows.max() - gap == pytest.approx(TILE_PX / 2, abs=1)
    assert columns.min() - gap == pytest.approx(TILE_PX / 4 - 1, abs=1)
    assert columns.max() - gap == pytest.approx(TILE_PX / 2, abs=1)


def test_a_thin_vessel_of_a_large_image_does_not_fall_apart():
    y, x = np.mgrid[:1000, :1000]
    mask = np.abs(y - 0.4 * x - 300) < 1.3
    sheet = contact_sheet([("P001_S1_F0001", np.zeros((1000, 1000, 3), np.uint8), mask)], columns=1)
    num_lines = cv2.connectedComponents(is_line(sheet).astype(np.uint8), connectivity=8)[0] - 1
    assert num_lines == 2  # above and below, each in one piece


def test_captions_and_empty_masks():
    empty, other = (contact_sheet([item(number, filled=False)]) for number in (1, 2))
    assert not is_line(empty).any()
    differing = np.flatnonzero((empty != other).any(axis=(1, 2)))
    assert differing.size > 0
    assert differing.min() > TILE_PX, "pictures are equal, captions are not"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "ZHANG_SAN(1234567890)",
            "1234567890",
            "P001_S1_F0001 ZHANG",
            "P001_S1_FZHANG",
            "P001_S1_F0001ZHANG",
        ),
        "train_001",
    ],
)
def test_a_name_is_refused_and_not_repeated(name):
    items = [item(), (name, *item()[1:])]
    with pytest.raises(ValueError, match="caption of picture 2 is no pseudonym") as caught:
        contact_sheet(items)
    assert name not in str(caught.value)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="got 0 pictures"):
        contact_sheet([])
    with pytest.raises(ValueError, match="columns is 0"):
        contact_sheet([item()], columns=0)
    key, image, mask = item()
    with pytest.raises(ValueError, match=r"P001_S1_F0001: a uint8 image of shape \(63, 64, 3\)"):
        contact_sheet([(key, image, mask[1:])])


def test_every_key_that_is_given_out_is_a_caption():
    """30 files of one frame: F0011, F0011b … F0011z, F0011-27 …"""
    names = [f"LI{'_' * number}MING_frame_000011" for number in range(1, 31)]
    keys = sorted(alias.key for alias in pseudonyms(names).values())
    assert {"P001_S1_F0011", "P001_S1_F0011b", "P001_S1_F0011z", "P001_S1_F0011-27"} < set(keys)
    image, mask = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), bool)
    assert contact_sheet([(key, image, mask) for key in keys]).any()


# ---- The sheet of a data set


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn on sheets from now on."""
    items = []

    def draw(shown):
        items[:] = shown
        return contact_sheet(items)

    monkeypatch.setattr(sheet_module, "contact_sheet", draw)
    return items


@pytest.mark.parametrize("augment", ["none", "strong"])
def test_the_sheet_shows_training_images_as_the_first_epoch_does(tmp_path, angiograms, drawn, augment):
    root = shutil.copytree(angiograms, tmp_path / "root")
    path = write_contact_sheet(str(root), str(tmp_path / "new" / "sheet.png"), 6, augment, 9, split_seed=3)
    with Image.open(path) as image:
        assert image.size[0] > TILE_PX
    samples = find_samples(root)
    split = split_by_patient(samples, 3, shares=check_data(root).foreground)
    # All training images, as a training without --max_train_samples has them.
    dataset = VesselDataset(take(split.train, None, 3), augmentation=get_augmentation(augment), seed=9)
    for index, (key, image, mask) in enumerate(drawn):
        expected_image, expected_mask, sample = dataset.augmented(index, epoch=1)
        assert key == sample.key
        assert (image == expected_image).all()
        assert (mask == expected_mask).all()
    assert len(drawn) == 6


def test_a_test_patient_is_never_shown(tmp_path, angiograms, drawn):
    root = shutil.copytree(angiograms, tmp_path / "root")
    write_contact_sheet(str(root), str(tmp_path / "sheet.png"), 100)
    split = split_by_patient(find_samples(root), shares=check_data(root).foreground)
    assert {key for key, _, _ in drawn} == {sample.key for sample in split.train}


def test_two_patients_are_shown_without_a_split(tmp_path, drawn):
    for folder, value in (("images", 90), ("masks", 255)):
        (tmp_path / folder).mkdir()
        for number in (1, 2):
            Image.fromarray(np.full((8, 8), value, np.uint8) * (np.arange(8) > number)).save(
                tmp_path / folder / f"train_{number:03}.png"
            )
    write_contact_sheet(str(tmp_path), str(tmp_path / "sheet.png"))
    assert len(drawn) == 2


def test_the_built_in_data_is_drawn_where_training_draws_it(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sheet_module, "builtin_data", lambda folder: builtin_data(folder, SMALL))
    write_contact_sheet(None, "elsewhere/sheet.png", num_images=3)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["sheet.png"]
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["data"]
