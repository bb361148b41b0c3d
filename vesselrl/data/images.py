"""Pixels from files: images as RGB, masks as bool, and every broken file named.

Messages never hold the path of a file, because file names carry patient names: the caller names the file.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from vesselrl.data.errors import DataError

# What Pillow raises for files that are broken in one way or another.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_size(path: Path, record: str) -> tuple[int, int]:
    """(width, height) in px of a file as it is shown, from its header alone.

    Raises:
        DataError: the file cannot be read as an image; the message begins with `record`.
    """
    with _opened(path, record) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def read_rgb(path: Path, record: str) -> np.ndarray:
    """An image file as uint8 (H, W, 3), turned the way its EXIF orientation says.

    Grey is copied to the three channels; palettes are resolved; transparency is dropped. Grey of 16 bits is
    divided by its full range: 0 … 65535 becomes 0 … 255, whatever values the image uses.

    Raises:
        DataError: the file cannot be decoded to its end, or holds 32-bit or floating-point values.
    """
    image = _read(path, record)
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"{record}: the image holds values from {values.min()} to {values.max()}, more than 16 bits. "
                "Save it with 8 or 16 bits per pixel."
            )
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise DataError(
            f"{record}: the image holds floating-point values. Save it with 8 or 16 bits per pixel."
        )
    if image.mode == "P":
        image = image.convert("RGBA")  # resolves the palette together with its transparency
    return np.array(image.convert("RGB"))


def read_mask(path: Path, record: str) -> np.ndarray:
    """A mask file as bool (H, W): 0 is background; 1, or 255, is vessel.

    Colours must be grey, transparency is dropped. A mask with the value 0 only is empty, not an error.

    Raises:
        DataError: the file cannot be decoded, or holds other values than 0 and 1, or 0 and 255; the message
            names the values found (a JPEG has many).
    """
    image = _read(path, record)
    if image.mode == "1":
        return np.array(image)
    if image.mode == "P":
        image = image.convert("RGBA")
    values = np.asarray(image)
    if values.ndim == 3:
        colours = values[:, :, :-1] if image.mode in ("LA", "RGBA") else values
        if (colours != colours[:, :, :1]).any():
            raise DataError(f"{record}: the mask is coloured. Save it as grey with the values 0 and 255.")
        values = colours[:, :, 0]
    levels = np.unique(values)
    if set(levels.tolist()) <= {0, 1} or set(levels.tolist()) <= {0, 255}:
        return values > 0
    shown = [f"{level:g}" for level in levels]
    if len(shown) > 6:
        shown = [*shown[:4], "...", shown[-1]]
    raise DataError(
        f"{record}: the mask has {len(levels)} values ({', '.join(shown)}), not 0 and 1, or 0 and 255. "
        "Threshold it and save it as PNG."
    )


def _read(path: Path, record: str) -> Image.Image:
    """The decoded file, turned upright."""
    with _opened(path, record) as image:
        orientation = _orientation(image)
        return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image.copy()


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a file, 1 to 8; 1 without one, and where Pillow applies it itself (TIFF)."""
    # Asking a PNG without EXIF in its header would decode all of it.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    return orientation if orientation in _TURNS else 1


@contextmanager
def _opened(path: Path, record: str) -> Iterator[Image.Image]:
    """An image file, open; Pillow's errors become a DataError without the path."""
    try:
        # Given a path, Pillow maps uncompressed TIFF into memory and mixes up the pixels if it turns them.
        with path.open("rb") as file, Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise DataError(f"{record}: the file is missing. Restore it, or remove the record.") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{record}: the file is not an image. Replace it, or remove the record.") from None
    except _BROKEN as error:
        what = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise DataError(
            f"{record}: the file is damaged ({what}). Replace it, or remove the record."
        ) from None
