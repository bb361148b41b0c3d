"""Pixels of images and masks, read from files that `find_samples` has found."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.data.test_formats import PERSON, SIZE, square, write_image
from vesselrl.data.images import read_mask, read_oddities
from vesselrl.data.samples import Sample, find_samples, load_image, load_mask
from vesselrl.errors import DataError


def single(root: Path, image: Image.Image, name: str = "train_001.png", **options: object) -> Sample:
    """The one sample of a root with this image; the mask is a file of the same size."""
    (root / "images").mkdir(exist_ok=True)
    image.save(root / "images" / name, **options)
    # The tests with an orientation turn the image by a quarter.
    size = image.size[::-1] if "exif" in options else image.size
    return masked(root, Image.new("1", size, 1), f"{Path(name).stem}.png")


def masked(root: Path, mask: Image.Image, name: str = "train_001.png") -> Sample:
    """The one sample of a root with this mask file, whose image may be there already."""
    if not (root / "images").exists():
        write_image(root / "images" / name)
    (root / "masks").mkdir(exist_ok=True)
    mask.save(root / "masks" / name)
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
        ("P", 1, (10, 20, 30)),
        ("I;16", 32896, (128, 128, 128)),  # 32896 = 128 · 257
        ("I;16", 4095, (16, 16, 16)),  # 12 bits stay dark: 4095 · 255 / 65535 = 15.93
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str, colour: object, expected: tuple) -> None:
    image, options = Image.new(mode, SIZE, colour), {}
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 20, 30])
        options = {"transparency": bytes([0, 128])}
    array = load_image(single(tmp_path, image, **options))
    assert (array.dtype, array.shape) == (np.uint8, (12, 16, 3))
    assert (array == expected).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str) -> None:
    # A landscape file whose left half is white, to be shown as portrait.
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, :16] = 255
    for orientation, white, black in ((6, slice(4, 12), slice(20, 28)), (8, slice(20, 28), slice(4, 12))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        array = load_image(single(tmp_path, Image.fromarray(pixels), f"train_001.{suffix}", exif=exif))
        assert array.shape == (32, 16, 3)
        assert array[white].mean() > 200 > array[black].mean()


def test_thirty_two_bits_are_refused(tmp_path: Path) -> None:
    for mode, value, message in (("F", 0.5, "floating-point"), ("I", 70000, "70000, more than 16 bits")):
        with pytest.raises(DataError, match=message):
            load_image(single(tmp_path, Image.new(mode, SIZE, value), name="train_001.tif"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_broken_image_is_named_without_its_person(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    sample = single(tmp_path, Image.fromarray(noise), name=f"{PERSON}.{suffix}")
    whole = sample.image_path.read_bytes()
    sample.image_path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="the file is damaged") as raised:
        load_image(sample)
    assert str(raised.value).startswith("images/ file 1 in name order (P001_S1_F0011): ")
    assert "MING" not in str(raised.value)
    assert (raised.value.__cause__, raised.value.__suppress_context__) == (None, True)
    sample.image_path.write_text("no image")
    with pytest.raises(DataError, match=r"F0011\): image: the file is not an image"):
        find_samples(tmp_path)
    sample.image_path.unlink()
    with pytest.raises(DataError, match="the file is missing"):
        load_image(sample)


@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "LA", "P"])
def test_masks_of_all_modes(tmp_path: Path, mode: str, value: int) -> None:
    image = Image.fromarray(square().astype(np.uint8) * (255 if mode == "1" else value))
    sample = masked(tmp_path, image.convert(mode))
    for mask in (load_mask(sample), read_mask(sample.mask_path, "record", guess=True)):
        assert mask.dtype == bool
        assert mask.view(np.uint8).max() == 1  # not 255, as Pillow hands 1-bit masks over
        assert (mask == square()).all()


def grey(*values: int) -> Image.Image:
    return Image.fromarray(np.resize(np.array(values, np.uint8), SIZE[::-1]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (grey(0, 128, 255), r"has 3 values \(0, 128, 255\)"),
        (grey(0, 254), r"has 2 values \(0, 254\)"),
        (grey(0, 1, 255), r"has 3 values \(0, 1, 255\)"),
        (grey(128), r"has 1 values \(128\)"),
        (grey(*range(100)), r"has 100 values \(0, 1, 2, 3, ..., 99\)"),
        (Image.new("RGB", SIZE, "red"), "is coloured"),
    ],
)
def test_masks_of_other_values_are_refused(tmp_path: Path, image: Image.Image, message: str) -> None:
    with pytest.raises(DataError, match=rf"\(P001_S1_F0011\): the mask {message}") as raised:
        load_mask(masked(tmp_path, image, f"{PERSON}.png"))
    assert "MING" not in str(raised.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "ppm"])
def test_sixteen_bits_are_deep_and_eight_are_not_whatever_the_width(tmp_path: Path, suffix: str) -> None:
    """Decoders of Pillow have the length of a row and the place in the file among their arguments."""
    file = tmp_path / f"a.{suffix}"
    for mode in ("L", "RGB", "P", "1"):
        for width in (16, 116, 160, 1163):
            image = Image.new("L", (width, 16), 90).convert(mode)
            (image.convert("RGB") if suffix in ("jpg", "ppm") else image).save(file)
            assert read_oddities(file, "record") == {}
    if suffix in ("png", "tif", "ppm"):
        Image.new("I;16", SIZE, 4095).save(file)
        assert list(read_oddities(file, "record")) == ["sixteen_bit_image"]
    if suffix in ("png", "tif"):
        cv2.imwrite(str(file), np.full((12, 16, 3), 4095, np.uint16))
        assert list(read_oddities(file, "record")) == ["sixteen_bit_image"]
