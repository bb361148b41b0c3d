"""Pixels from files: images as RGB, masks as bool, and every broken file named.

Messages never hold the path of a file, because file names carry patient names: the caller names the file.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from vesselrl.data import dicom
from vesselrl.errors import DataError

# A small file can hold a picture that fills the memory: more is refused before a pixel is decoded.
MAX_PIXELS = 2**25
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".ppm")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
IMAGE_SUFFIXES += dicom.SUFFIXES + NIFTI_SUFFIXES
# What Pillow raises for files that are broken in one way or another.
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, MemoryError)
_BROKEN += (struct.error, zlib.error)
_ORIENTATION_TAG = 0x0112
_TILE_TAGS = (0x0142, 0x0143)
_DEEP = "more than 8 bits"
# Such as I;16 or RGB;16B; BGR;16 of BMP has 16 bits for three channels.
_SIXTEEN_BITS = re.compile(r"(?<!BGR);16")
# Not `ImageOps.exif_transpose`, which writes all EXIF tags anew and fails on odd ones.
_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
_TURNS = {orientation: Image.Transpose[name] for orientation, name in enumerate(_NAMES, start=2)}


def read_oddities(path: Path, record: str) -> dict[str, object]:
    """EXIF orientation, pixel format, frames by the code of their finding, where odd; no pixel is decoded."""
    with _opened(path, record, "unreadable_image") as image:
        is_deep = _is_deep(image)
        turned = image.tag_v2.get(_ORIENTATION_TAG, 1) if image.format == "TIFF" else _orientation(image)
        found = {"rotated_image": turned} if turned != 1 else {}
        if is_deep:
            found["sixteen_bit_image"] = image.mode
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            found["alpha_image"] = image.mode
        # The second picture of a camera's MPO is a preview. Counting moves the file on, so it comes last, and
        # a broken frame behind the first is none.
        with suppress(*_BROKEN):
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                found["several_frames"] = image.n_frames
        return found


def read_size(path: Path, record: str, broken: str = "unreadable_image") -> tuple[int, int]:
    """(width, height) in px of a file as it is shown, from its header alone; `broken`: code of that fault."""
    with _opened(path, record, broken) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def read_rgb(path: Path, record: str) -> np.ndarray:
    """An image file as uint8 (H, W, 3), turned as its EXIF orientation says; of several frames the first.

    Transparency is dropped. Of integers of more than 8 bits the fewest of 8, 10, 12, 14 or 16 bits count that
    hold all values of the image, and of those the highest 8: 12 bits in 16 look as with 8 bits. More bits,
    floating-point values, and colours of 16 bits that use 14 or fewer are refused.
    """
    image = _read(path, record, "unreadable_image")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if image.mode == "F" or low < 0 or high > 65535:
            kind = "floating-point values" if image.mode == "F" else f"values from {low} to {high}"
            advice = "more than 16 bits. Save it with 8 or 16 bits per pixel."
            raise DataError(f"{record}: the image holds {kind}, {advice}", "too_many_bits")
        spare = next(bits for bits in (0, 2, 4, 6, 8) if high >> bits < 256)
        return np.repeat((values >> spare).astype(np.uint8)[:, :, None], 3, axis=2)
    is_deep = image.info.get(_DEEP, False)
    if image.mode == "P":
        image = image.convert("RGBA")  # resolves the palette together with its transparency
    pixels = np.array(image.convert("RGB"))
    if is_deep and pixels.max() < 64:  # Pillow has kept the highest 8 of 16 bits: too few are left
        fault = "colours of 16 bits, of which 14 or fewer are used. Save it with 8 bits per channel."
        raise DataError(f"{record}: the image holds {fault}", "too_many_bits")
    return pixels


def read_mask(
    source: Path | io.BytesIO, record: str, guess: bool = False, broken: str = "unreadable_image"
) -> np.ndarray:
    """A mask of 0 and 1, or 0 and 255 (vessel), as bool (H, W); else refused, or `_guess`ed where sure."""
    image = _read(source, record, broken)
    if image.mode == "1":
        # A 1-bit image comes as bytes of 0 and 255 that call themselves bool: True must be 1.
        return np.array(image).view(np.uint8) > 0
    values, code, is_grey = _mask_values(image)
    # Counting bytes is faster than sorting them.
    bytewise = values.dtype == np.uint8
    levels = np.flatnonzero(np.bincount(values.ravel(), minlength=256)) if bytewise else np.unique(values)
    if is_grey and not code and (set(levels.tolist()) <= {0, 1} or set(levels.tolist()) <= {0, 255}):
        return values > 0
    if not code:
        code = "non_binary_mask" if image.format == "JPEG" else _kind_of_levels(values, levels)
    mask = _guess(values, levels, code) if guess and code != "coloured_mask" else None
    if mask is not None and mask.mean() <= 0.5:
        return mask
    shown = [f"{level:g}" for level in levels]
    shown = ", ".join(shown if len(shown) <= 6 else [*shown[:4], "...", shown[-1]])
    fault = f"has {len(levels)} values ({shown}), not 0 and 1, or 0 and 255" if is_grey else "is coloured"
    fault = _MASK_FAULTS.get(code, "{}").format(fault)
    sure = "What is vessel cannot be told for sure. " if guess else ""
    raise DataError(f"{record}: the mask {fault}. {sure}Save it as grey PNG with 0 and 255 (vessel).", code)


_MASK_FAULTS = {
    "ignore_mask": "{}: beside small numbers 255 means that a pixel is to be ignored",
    "numbered_mask": "{}: it looks like numbers of vessels or classes",
    "palette_mask": "has a palette of colours",
    "alpha_mask": "is drawn in the alpha channel, which its colours do not show",
}


def _mask_values(image: Image.Image) -> tuple[np.ndarray, str, bool]:
    """The value of each pixel of a mask, the code of a fault of its format, and whether they are no colours.

    Where the colours of a palette say nothing, its indices are the values; where all that is not transparent
    has one colour, the transparency; of two colours, black is 0 and the other one is 1.
    """
    code, has_palette = "", image.mode in ("P", "PA")
    pixels = np.asarray(image.convert("RGBA") if has_palette else image)
    channels = pixels.reshape(*pixels.shape[:2], -1)
    if has_palette or image.mode in ("LA", "RGBA"):
        channels, alpha = channels[:, :, :-1], channels[:, :, -1]
        shown = alpha > 0
        if shown.any() and not shown.all():
            opaque = alpha[shown]
            if _is_one_colour(channels, shown):
                if (opaque != opaque[0]).any() or (channels.any(axis=2) != shown).any():
                    return alpha, "alpha_mask", True
            elif (channels.any(axis=2) & ~shown).any():
                channels, code = np.where(shown[:, :, None], channels, 0), "alpha_mask"
    values = channels[:, :, 0] if channels.shape[2] == 1 else channels.max(axis=2)
    if channels.shape[2] == 1 or (channels == channels[:, :, :1]).all():
        return values, code, True
    if image.mode == "P" and image.getpalette("RGB")[:3] == [0, 0, 0]:
        return np.asarray(image), "palette_mask", True
    if (channels.max(axis=2) - channels.min(axis=2)).max() < 32:  # grey that a JPEG has tinted
        return values, "non_binary_mask", True
    if not values.all() and _is_one_colour(channels, values > 0):
        return (values > 0).astype(np.uint8), "non_binary_mask", False
    return values, "coloured_mask", False


def _is_one_colour(channels: np.ndarray, where: np.ndarray) -> bool:
    """Whether all pixels of a mask have one colour; to take them out would need many times their memory."""
    first = channels.reshape(-1, channels.shape[2])[where.argmax()]
    return bool(((channels == first).all(axis=2) | ~where).all())


def _are_numbers(values: np.ndarray, numbers: np.ndarray) -> bool:
    """Whether values are numbers of vessels or classes: in order, and each fills areas as no border does."""
    if len(numbers) == 0 or (numbers[-1] != len(numbers) and numbers[-1] >= 32):
        return False
    inner = np.where(np.isin(values, numbers), values, 0)
    pairs = [(inner[1:], inner[:-1]), (inner[:, 1:], inner[:, :-1])]
    num_inside = sum(np.count_nonzero((a > 0) & (b > 0)) for a, b in pairs)
    num_equal = sum(np.count_nonzero((a > 0) & (a == b)) for a, b in pairs)
    filled = inner[:-1, :-1][(ndimage.maximum_filter(inner, 2) == ndimage.minimum_filter(inner, 2))[1:, 1:]]
    # One number may be a thin vessel; several on thin lines may be its soft border.
    return num_equal >= 0.8 * num_inside and (len(numbers) == 1 or np.isin(numbers, filled).all())


def _kind_of_levels(values: np.ndarray, levels: np.ndarray) -> str:
    """The code of a grey mask with other levels than a mask has."""
    numbers = levels[(levels > 0) & (levels != 255)]
    if levels[0] != 0 or values.dtype.kind == "f" or not _are_numbers(values, numbers):
        return "non_binary_mask"
    if levels[-1] == 255 and numbers[-1] == len(numbers):
        return "ignore_mask"
    return "numbered_mask" if levels[-1] != 255 else "non_binary_mask"


def _guess(values: np.ndarray, levels: np.ndarray, code: str) -> np.ndarray | None:
    """The vessel in a mask of other levels than a mask has, where it is sure; otherwise None.

    All numbers are vessel, without a 255 that stands for what to ignore. Of two levels with 0 among them the
    other one is vessel, else the brighter one if it is bright. Grey borders are cut at one half.
    """
    if code == "palette_mask":
        numbers = levels[(levels > 0) & (levels != 255)]
        return (values > 0) & (values != 255) if _are_numbers(values, numbers) else None
    if code in ("ignore_mask", "numbered_mask"):
        return (values > 0) & (values != 255)
    if len(levels) == 2 and levels[0] == 0:
        return values > 0
    full = 1.0 if values.dtype.kind == "f" else 255.0 if levels[-1] <= 255 else 65535.0
    if len(levels) == 2:
        return values >= full / 2 if 1 < levels[0] < full / 2 <= levels[1] else None
    # Grey borders have levels in between, but no areas of them: those are a second class, or undecided.
    between = (values > full * 0.1) & (values < full * 0.9)
    areas = ndimage.maximum_filter(values, 2) == ndimage.minimum_filter(values, 2)
    is_soft = levels[0] <= full * 0.1 and levels[-1] >= full * 0.9 and levels[-2] > full * 0.125
    return values >= full / 2 if is_soft and not (between & areas).any() else None


def _read(source: Path | io.BytesIO, record: str, broken: str) -> Image.Image:
    """The decoded file, turned upright, with its format and whether its pixels are deep."""
    with _opened(source, record, broken) as image:
        turn, is_deep = _TURNS.get(_orientation(image)), _is_deep(image)
        upright = image.copy() if turn is None else image.transpose(turn)
        upright.format, upright.info[_DEEP] = image.format, is_deep
        return upright


def _is_deep(image: Image.Image) -> bool:
    """Whether the file has more than 8 bits per channel; to be asked before it is decoded."""
    # Pillow reduces colours of 16 bits to 8 and keeps the file's own format in the decoder's arguments.
    args = [
        tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in getattr(image, "tile", ())
    ]
    formats = [image.mode, *(part for parts in args for part in parts if isinstance(part, str))]
    return image.mode in ("I", "F") or any(_SIXTEEN_BITS.search(name) for name in formats)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 without one, and of a TIFF, which Pillow turns itself."""
    # Asking a PNG without EXIF in its header would decode all of it.
    if image.format in ("TIFF", "DICOM") or (image.format == "PNG" and "exif" not in image.info):
        return 1
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    return orientation if orientation in _TURNS else 1


@contextmanager
def _opened(source: Path | io.BytesIO, record: str, broken: str) -> Iterator[Image.Image]:
    """An image file, open; Pillow's errors become a DataError without the path."""
    try:
        if isinstance(source, Path) and dicom.is_dicom(source):
            frame = dicom.Frame(source, record, broken)
            check_pixels(frame.size, record)
            yield frame
            return
        if isinstance(source, Path) and is_nifti(source):
            yield _of_nifti(source, record, broken)
            return
        # Given a path, Pillow maps uncompressed TIFF into memory and mixes up the pixels if it turns them.
        with source.open("rb") if isinstance(source, Path) else source as file, Image.open(file) as image:
            check_pixels(image.size, record)
            if image.format == "TIFF":  # its tiles may be larger than itself
                check_pixels(tuple(image.tag_v2.get(tag, 1) for tag in _TILE_TAGS), record)
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError:
        fault = f"its pixels are more than {MAX_PIXELS:,}. Save it smaller, or remove it."
        raise DataError(f"{record}: {fault}", "too_large") from None
    except FileNotFoundError:
        fault = "the file is missing. Restore it, or remove the record."
        raise DataError(f"{record}: {fault}", "missing_file") from None
    except _BROKEN as error:
        is_none = isinstance(error, Image.UnidentifiedImageError)
        what = "not an image" if is_none else f"damaged ({getattr(error, 'strerror', None) or error})"
        raise DataError(f"{record}: the file is {what}. Replace it, or remove the record.", broken) from None


def is_nifti(path: Path) -> bool:
    """Whether a path is that of a NIfTI file."""
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def _of_nifti(path: Path, record: str, broken: str) -> Image.Image:
    """A NIfTI file of one slice, its pixels in the order in which they are stored, x before y.

    That is the order of the picture that a converter has made it of; the header's orientation is for space.
    """
    try:
        import nibabel
    except ImportError:
        fault = "NIfTI files cannot be read: nibabel is missing."
        raise DataError(f'{fault} Install the extra "nifti": pip install "vesselrl[nifti]".') from None
    file = dicom.locate(path)[0]
    file.open("rb").close()  # a missing file has a message of its own
    try:
        found = nibabel.load(file)
        sides = [side for side in found.shape if side != 1]
        sides = sides if len(sides) >= 2 else found.shape[:2]
        if len(sides) != 2 or found.get_data_dtype().names:
            fault = f"the NIfTI file holds {'×'.join(map(str, found.shape))} values, not one grey picture"
            raise DataError(f"{record}: {fault}. Save one slice, without colours.", broken)
        check_pixels(sides, record)
        values = np.asanyarray(found.dataobj).reshape(sides).T
    except DataError:
        raise
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError, *_BROKEN):
        fault = "the file is no NIfTI file, or damaged. Export it again."
        raise DataError(f"{record}: {fault}", broken) from None
    is_whole = bool((np.mod(values, 1) == 0).all()) and np.abs(values).max() < 2**31
    is_small = is_whole and values.min() >= 0 and values.max() < 256
    kind = np.uint8 if is_small else np.int32 if is_whole else np.float32
    return Image.fromarray(np.ascontiguousarray(values, kind))


def check_pixels(size: tuple[int, int], record: str) -> None:
    """Refuses a picture or mask of more than MAX_PIXELS."""
    if size[0] * size[1] > MAX_PIXELS:
        fault = f"its {size[0]}×{size[1]} pixels are more than {MAX_PIXELS:,}. Save it smaller, or remove it."
        raise DataError(f"{record}: {fault}", "too_large")
