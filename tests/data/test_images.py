"""Pixels of images and masks, read from files that `find_samples` has found."""

from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.data.test_formats import PERSON, SIZE, failure, record, square, write_image, write_records
from vesselrl.data.images import MAX_PIXELS, read_mask, read_oddities, read_rgb, read_size
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
        ("I;16", 4095, (255, 255, 255)),  # the brightest of 12 bits
        ("I;16", 4096, (64, 64, 64)),  # 13 bits are read as 14: 4096 / 64
        ("I;16", 200, (200, 200, 200)),
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


def test_twelve_bits_in_sixteen_look_as_with_eight_and_dark_colours_are_refused(tmp_path: Path) -> None:
    pixels = np.arange(192, dtype=np.uint16).reshape(12, 16) + 60
    for name, values, mode in (("a.png", pixels * 16, "I;16"), ("b.tif", pixels * 16, "I")):
        Image.fromarray(values.astype({"I": np.int32}.get(mode, np.uint16))).save(tmp_path / name)
        assert (read_rgb(tmp_path / name, "record") == pixels[:, :, None]).all()
    colours = np.stack([pixels, pixels // 2, pixels // 3], axis=2)
    cv2.imwrite(str(tmp_path / "c.png"), colours[:, :, ::-1] * 256)
    assert (read_rgb(tmp_path / "c.png", "record") == colours).all()
    cv2.imwrite(str(tmp_path / "c.png"), colours * 16)
    with pytest.raises(DataError, match="of which 14 or fewer are used") as raised:
        read_rgb(tmp_path / "c.png", "record")
    assert raised.value.code == "too_many_bits"


@pytest.mark.parametrize("size", [(2**13, 2**12 + 1), (2**15, 2**13)])  # Pillow itself refuses the second
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path, size: tuple) -> None:
    assert size[0] * size[1] > MAX_PIXELS
    (tmp_path / "a.pgm").write_text(f"P4 {size[0]} {size[1]}\n")
    Image.new("L", (64, 64)).save(tmp_path / "a.tif", tiffinfo={0x8001: size[0], 0x8002: size[1]})
    content = (tmp_path / "a.tif").read_bytes()  # own tags become the size of a tile
    for own, tag in ((b"\x01\x80", b"\x42\x01"), (b"\x02\x80", b"\x43\x01")):
        assert content.count(own) == 1
        content = content.replace(own, tag)
    (tmp_path / "a.tif").write_bytes(content)
    for read, name in product((read_rgb, read_mask, read_size, read_oddities), ("a.pgm", "a.tif")):
        with pytest.raises(DataError, match=r"more than 33,554,432") as raised:
            read(tmp_path / name, "record")
        assert raised.value.code == "too_large"


def test_a_size_that_exif_explains_is_explained(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_records(tmp_path, record(imageWidth=SIZE[0], imageHeight=SIZE[1]))
    Image.new("L", SIZE).save(tmp_path / "images" / "train_001.png", exif=exif)
    assert "The likely cause is the EXIF orientation 6" in failure(tmp_path)
    Image.new("L", (16, 13)).save(tmp_path / "images" / "train_001.png", exif=exif)
    assert "EXIF" not in failure(tmp_path)


def blocks(*values: int) -> np.ndarray:
    """Rows of 2 px, one for each value, between zeros."""
    pixels = np.zeros((40, 60), np.uint8)
    for number, value in enumerate(values):
        pixels[3 * number + 2 : 3 * number + 4, 5:50] = value
    return pixels


def voc(core: int = 1) -> np.ndarray:
    """A line of one px within a border of 255."""
    pixels = blocks(255, 0, 0)
    pixels[4, 5:50], pixels[5:7, 5:50] = core, 255
    return pixels


def rgba(colour: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([colour, colour, colour, alpha]).astype(np.uint8))


def palette(values: np.ndarray, *colours: int) -> Image.Image:
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette([*colours] + [0] * (768 - len(colours)))
    return image


LINE, NOISE = blocks(255), np.random.default_rng(0).integers(0, 4, (40, 60)).astype(np.uint8)
SOFT = np.array(Image.fromarray(LINE).resize((120, 80), Image.Resampling.BICUBIC))
RED, NONE = LINE // 255 * 128, LINE * 0
# Name -> code, image, and what `--fix` takes for vessel; None: it cannot be told.
MASKS = {
    "thin with a border to be ignored": ("ignore_mask", voc(), voc() == 1),
    "numbers with a border to be ignored": ("ignore_mask", blocks(1, 2, 255, 3), blocks(1, 2, 0, 3) > 0),
    "numbers": ("numbered_mask", blocks(1, 2, 0, 5), blocks(1, 2, 0, 5) > 0),
    "many numbers": ("numbered_mask", blocks(*range(1, 13)), blocks(*range(1, 13)) > 0),
    "number 2 with 255": ("non_binary_mask", voc(2), None),
    "three greys": ("non_binary_mask", blocks(255, 128, 255), None),
    "dim greys": ("non_binary_mask", blocks(50, 100), None),
    "1 and 255 without 0": ("non_binary_mask", np.where(LINE, 255, 1).astype(np.uint8), None),
    "noise of an empty mask": ("non_binary_mask", NOISE, None),
    "soft": ("non_binary_mask", SOFT, SOFT >= 128),
    "mostly vessel": ("numbered_mask", (LINE == 0).astype(np.uint8) * 7, None),
    "red": ("non_binary_mask", np.dstack([RED, NONE, NONE]), LINE > 0),
    "red and green": ("coloured_mask", np.dstack([blocks(128), blocks(0, 128), NONE]), None),
    "alpha, black": ("alpha_mask", rgba(NONE, LINE), LINE > 0),
    "alpha, white": ("alpha_mask", rgba(NONE + 255, LINE), LINE > 0),
    "black on transparent white": ("alpha_mask", rgba(255 - LINE, LINE), LINE > 0),
    "white on black on transparent white": (
        "alpha_mask", rgba(~blocks(0, 255, 0), blocks(255, 255, 255)), blocks(255, 0, 255) > 0),
    "palette of VOC": ("palette_mask", palette(RED // 128, 0, 0, 0, 128, 0, 0), LINE > 0),
    "palette, two": ("palette_mask", palette(blocks(1, 2), 0, 0, 0, 128, 0, 0, 0, 128, 0), blocks(1, 2) > 0),
    "palette, ignored": ("palette_mask", palette(voc(), 0, 0, 0, 128, 0, 0), voc() == 1),
    "palette, black last": ("non_binary_mask", palette(1 - RED // 128, 128, 0, 0), LINE > 0),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_the_vessel_of_a_strange_mask_is_right_or_refused(tmp_path: Path, name: str) -> None:
    code, image, expected = MASKS[name]
    image, file = image if isinstance(image, Image.Image) else Image.fromarray(image), tmp_path / "a.png"
    image.save(file)
    with pytest.raises(DataError) as raised:
        read_mask(file, "record")
    assert raised.value.code == code
    if expected is not None:
        assert (read_mask(file, "record", guess=True) == expected).all()
    else:
        with pytest.raises(DataError, match="cannot be told for sure"):
            read_mask(file, "record", guess=True)


def test_a_white_drawing_on_transparent_black_is_a_mask(tmp_path: Path) -> None:
    rgba(LINE, LINE).save(tmp_path / "a.png")
    assert (read_mask(tmp_path / "a.png", "record") == (LINE > 0)).all()
