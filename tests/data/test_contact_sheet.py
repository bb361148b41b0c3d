"""The contact sheet shows every picture with the outline of its mask, and no name."""

import cv2
import numpy as np
import pytest

from vesselrl.data.contact_sheet import OUTLINE, TILE_PX, contact_sheet, outlined

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


@pytest.mark.parametrize("name", ["ZHANG_SAN(1234567890)", "1234567890", "P001_S1_F0001 ZHANG", "train_001"])
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
