"""Pixels of images and masks, read from files that `find_samples` has found."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from vesselrl.data import images
from vesselrl.data.annotations import find_samples, load_image, load_mask
from vesselrl.errors import DataError

SIZE = (16, 12)  # width, height
PERSON = "LI_MING(0123456789)_1-2_3_0A1B2C3D_frame_000011"


def write_image(path, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, SIZE, 90).save(path)


def write_mask(path, value=255, size=SIZE):
    """A mask file with 20 pixels in rows 3 to 7, columns 2 to 5."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[3:8, 2:6] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def single(root, image, **options):
    """The one sample of a root with this image; the mask is a file of the same size."""
    path = root / "images" / options.pop("name", "train_001.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    # The tests with an orientation turn the image by a quarter.
    size = image.size[::-1] if "exif" in options else image.size
    write_mask(root / "masks" / "train_001.png", size=size)
    (sample,) = find_samples(root)
    return sample


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("LA", (90, 0), (90, 90, 90)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
        ("P", 90, (90, 90, 90)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),  # 32896 = 128 · 257
        ("I;16", 4095, (16, 16, 16)),  # 12 bits stay dark: 4095 · 255 / 65535 = 15.93
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, colour, expected):
    image = Image.new("L", SIZE, 90).convert("P") if mode == "P" else Image.new(mode, SIZE, colour)
    array = load_image(single(tmp_path, image))
    assert (array.dtype, array.shape) == (np.uint8, (12, 16, 3))
    assert (array == expected).all()


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert (load_image(single(tmp_path, image, transparency=bytes([0, 128]))) == (10, 20, 30)).all()


@pytest.mark.parametrize("name", ["train_001.png", "train_001.jpg", "train_001.tif"])
@pytest.mark.parametrize("orientation", [6, 8])
def test_exif_orientation_is_applied(tmp_path, name, orientation):
    # A landscape file whose left half is white, to be shown as portrait.
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = load_image(single(tmp_path, Image.fromarray(pixels), name=name, exif=exif))
    assert array.shape == (32, 16, 3)
    top_is_white = orientation == 6  # turned clockwise: left becomes top
    assert (array[4:12].mean() > 200) == top_is_white
    assert (array[20:28].mean() > 200) != top_is_white


def test_thirty_two_bits_are_refused(tmp_path):
    sample = single(tmp_path, Image.new("F", SIZE, 0.5), name="train_001.tif")
    with pytest.raises(DataError, match="floating-point"):
        load_image(sample)
    sample = single(tmp_path, Image.new("I", SIZE, 70000), name="train_001.tif")
    with pytest.raises(DataError, match="70000, more than 16 bits"):
        load_image(sample)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_truncated_image(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    write_mask(tmp_path / "masks" / f"{PERSON}.png", size=(64, 64))
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / f"{PERSON}.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError) as raised:
        load_image(find_samples(tmp_path)[0])
    assert str(raised.value).startswith("images/ file 1 in name order (P001_S1_F0011): ")
    assert "the file is damaged" in str(raised.value)
    assert "MING" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_unreadable_and_vanished_image(tmp_path):
    path = tmp_path / "images" / f"{PERSON}.png"
    write_image(path)
    write_mask(tmp_path / "masks" / f"{PERSON}.png")
    (sample,) = find_samples(tmp_path)
    path.write_text("no image")
    with pytest.raises(DataError) as raised:
        find_samples(tmp_path)
    assert "file 1 in name order (P001_S1_F0011): image: the file is not an image" in str(raised.value)
    path.unlink()
    with pytest.raises(DataError, match="the file is missing"):
        load_image(sample)


@pytest.mark.parametrize("value", [1, 255])
def test_mask_levels(tmp_path, value):
    write_image(tmp_path / "images" / "train_001.png")
    write_mask(tmp_path / "masks" / "train_001.png", value)
    (sample,) = find_samples(tmp_path)
    assert load_mask(sample).dtype == bool
    assert load_mask(sample).sum() == 20
    assert load_mask(sample)[3:8, 2:6].all()


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "LA", "P"])
def test_mask_modes(tmp_path, mode):
    write_image(tmp_path / "images" / "train_001.png")
    path = tmp_path / "masks" / "train_001.png"
    write_mask(path)
    with Image.open(path) as mask:
        mask.convert(mode).save(path)
    (sample,) = find_samples(tmp_path)
    assert load_mask(sample).sum() == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 128, 255], "the mask has 3 values (0, 128, 255)"),
        ([0, 254], "the mask has 2 values (0, 254)"),
        ([0, 1, 255], "the mask has 3 values (0, 1, 255)"),
        ([128], "the mask has 1 values (128)"),
        (list(range(100)), "the mask has 100 values (0, 1, 2, 3, ..., 99)"),
    ],
)
def test_mask_that_is_not_binary(tmp_path, values, message):
    write_image(tmp_path / "images" / f"{PERSON}.png")
    path = tmp_path / "masks" / f"{PERSON}.png"
    path.parent.mkdir()
    Image.fromarray(np.resize(np.array(values, np.uint8), SIZE[::-1])).save(path)
    (sample,) = find_samples(tmp_path)
    with pytest.raises(DataError) as raised:
        load_mask(sample)
    assert message in str(raised.value)
    assert "P001_S1_F0011" in str(raised.value)
    assert "MING" not in str(raised.value)


def test_coloured_and_jpeg_masks_are_refused(tmp_path):
    write_image(tmp_path / "images" / "train_001.png")
    write_image(tmp_path / "masks" / "train_001.png", mode="RGB")  # Image.new with 90 is red
    (sample,) = find_samples(tmp_path)
    with pytest.raises(DataError, match=r"images/train_001\.png: the mask is coloured"):
        load_mask(sample)
    sample.mask_path.unlink()
    write_mask(tmp_path / "masks" / "train_001.jpg")
    (sample,) = find_samples(tmp_path)
    with pytest.raises(DataError, match=r"the mask has \d+ values"):
        load_mask(sample)


@pytest.mark.parametrize("read", [images.read_mask, images.threshold_mask])
def test_a_one_bit_mask_is_made_of_ones(tmp_path: Path, read: Callable) -> None:
    """Pillow hands such a picture over as bytes of 255 that claim to be bool, which breaks arithmetic."""
    mask = np.zeros((5, 9), bool)
    mask[2, 3:7] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = read(tmp_path / "mask.png", "record")
    assert found.view(np.uint8).max() == 1
    assert np.array_equal(found, mask)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "ppm"])
def test_eight_bits_are_not_deep_whatever_the_width(tmp_path: Path, mode: str, suffix: str) -> None:
    """Decoders of Pillow have the length of a row and the place in the file among their arguments."""
    for width in (16, 116, 160, 1163):
        image = Image.new("L", (width, 16), 90).convert(mode)
        image = image.convert("RGB") if suffix in ("jpg", "ppm") else image
        image.save(tmp_path / f"a.{suffix}")
        assert not images.read_traits(tmp_path / f"a.{suffix}", "record").deep


def test_sixteen_bits_are_deep(tmp_path: Path) -> None:
    for suffix in ("png", "tif", "pgm"):
        Image.new("I;16", SIZE, 4095).save(tmp_path / f"a.{suffix}")
        assert images.read_traits(tmp_path / f"a.{suffix}", "record").deep
    for suffix in ("png", "tif"):
        cv2.imwrite(str(tmp_path / f"rgb.{suffix}"), np.full((12, 16, 3), 4095, np.uint16))
        assert images.read_traits(tmp_path / f"rgb.{suffix}", "record").deep
