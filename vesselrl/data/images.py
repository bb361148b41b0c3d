"""Pixels from files: images as RGB, masks as bool, and every broken file named.

Messages never hold the path of a file, because file names carry patient names: the caller names the file.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from vesselrl.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".ppm")
# What Pillow raises for files that are broken in one way or another.
_BROKEN = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
_ORIENTATION_TAG = 0x0112
# Such as I;16 or RGB;16B; BGR;16 of BMP has 16 bits for three channels.
_SIXTEEN_BITS = re.compile(r"(?<!BGR);16")
# Not `ImageOps.exif_transpose`, which writes all EXIF tags anew and fails on odd ones.
_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
_TURNS = {orientation: Image.Transpose[name] for orientation, name in enumerate(_NAMES, start=2)}


def read_oddities(path: Path, record: str) -> dict[str, object]:
    """EXIF orientation or pixel format by the code of their finding, where they are odd; from the header."""
    with _opened(path, record, "unreadable_image") as image:
        # Pillow reduces colours of 16 bits to 8 and keeps the file's own format in the decoder's arguments.
        args = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in image.tile]
        formats = [image.mode, *(part for parts in args for part in parts if isinstance(part, str))]
        deep = image.mode in ("I", "F") or any(_SIXTEEN_BITS.search(name) for name in formats)
        # Pillow turns a TIFF itself.
        turned = image.tag_v2.get(_ORIENTATION_TAG, 1) if image.format == "TIFF" else _orientation(image)
        found = {"rotated_image": turned} if turned != 1 else {}
        if deep:
            found["sixteen_bit_image"] = image.mode
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            found["alpha_image"] = image.mode
        return found


def read_size(path: Path, record: str, broken: str = "unreadable_image") -> tuple[int, int]:
    """(width, height) in px of a file as it is shown, from its header alone; `broken`: code of that fault."""
    with _opened(path, record, broken) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def read_rgb(path: Path, record: str) -> np.ndarray:
    """An image file as uint8 (H, W, 3), turned the way its EXIF orientation says.

    Transparency is dropped. Grey of 16 bits is divided by its full range, whatever values it uses; more bits,
    and floating-point values, are refused.
    """
    image = _read(path, record, "unreadable_image")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if image.mode == "F" or low < 0 or high > 65535:
            kind = "floating-point values" if image.mode == "F" else f"values from {low} to {high}"
            advice = "more than 16 bits. Save it with 8 or 16 bits per pixel."
            raise DataError(f"{record}: the image holds {kind}, {advice}", "too_many_bits")
        grey = ((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P":
        image = image.convert("RGBA")  # resolves the palette together with its transparency
    return np.array(image.convert("RGB"))


def read_mask(
    source: Path | io.BytesIO, record: str, guess: bool = False, broken: str = "unreadable_image"
) -> np.ndarray:
    """A mask file as bool (H, W): 0 is background; 1, or 255, is vessel.

    Other values are refused, or taken with `guess`: of two with 0 among them the other is vessel, otherwise
    what is at least half as bright as the format can hold, in any colour channel.
    """
    image = _read(source, record, broken)
    pixels = np.array(image.convert("RGBA") if image.mode == "P" else image)
    channels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if image.mode in ("LA", "RGBA", "P"):
        channels = channels[:, :, :-1]
    values = channels[:, :, 0] if channels.shape[2] == 1 else channels.max(axis=2)
    if values.dtype == bool:
        # A 1-bit image comes as bytes of 0 and 255 that call themselves bool: True must be 1.
        return values.view(np.uint8) > 0
    # Counting bytes is faster than sorting them.
    bytewise = values.dtype == np.uint8
    levels = np.flatnonzero(np.bincount(values.ravel(), minlength=256)) if bytewise else np.unique(values)
    is_grey = (channels == channels[:, :, :1]).all()
    if is_grey and (set(levels.tolist()) <= {0, 1} or set(levels.tolist()) <= {0, 255}):
        return values > 0
    if guess:
        full = 1.0 if values.dtype.kind == "f" else 255.0 if levels[-1] <= 255 else 65535.0
        return values > 0 if len(levels) == 2 and levels[0] == 0 else values >= full / 2
    shown = [f"{level:g}" for level in levels]
    shown = ", ".join(shown if len(shown) <= 6 else [*shown[:4], "...", shown[-1]])
    fault = f"has {len(levels)} values ({shown}), not 0 and 1, or 0 and 255" if is_grey else "is coloured"
    advice = "Threshold it and save it as grey PNG with the values 0 and 255."
    raise DataError(f"{record}: the mask {fault}. {advice}", "non_binary_mask")


def _read(source: Path | io.BytesIO, record: str, broken: str) -> Image.Image:
    """The decoded file, turned upright."""
    with _opened(source, record, broken) as image:
        turn = _TURNS.get(_orientation(image))
        return image.copy() if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 without one, and where Pillow applies it itself (TIFF)."""
    # Asking a PNG without EXIF in its header would decode all of it.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    return orientation if orientation in _TURNS else 1


@contextmanager
def _opened(source: Path | io.BytesIO, record: str, broken: str) -> Iterator[Image.Image]:
    """An image file, open; Pillow's errors become a DataError without the path."""
    try:
        # Given a path, Pillow maps uncompressed TIFF into memory and mixes up the pixels if it turns them.
        with source.open("rb") if isinstance(source, Path) else source as file, Image.open(file) as image:
            yield image
    except FileNotFoundError:
        code, fault = "missing_file", "missing. Restore it, or remove the record."
    except Image.UnidentifiedImageError:
        code, fault = broken, "not an image. Replace it, or remove the record."
    except _BROKEN as error:
        what = getattr(error, "strerror", None) or error
        code, fault = broken, f"damaged ({what}). Replace it, or remove the record."
    else:
        return
    raise DataError(f"{record}: the file is {fault}", code) from None
