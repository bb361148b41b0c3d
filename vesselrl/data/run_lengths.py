"""Run-length masks of COCO: checked when they are read, decoded when the mask is needed.

Runs go down the columns and alternate between background and vessel, starting with background. They hold
holes and single pixels exactly.
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from vesselrl.data.polygons import Size, describe
from vesselrl.errors import DataError


@dataclass(frozen=True)
class RunLengths:
    """A mask as the compressed runs of COCO."""

    counts: bytes
    # (H, W)
    shape: tuple[int, int]

    def decode(self) -> np.ndarray:
        """The mask as bool (H, W)."""
        coder = _pycocotools()
        return coder.decode({"size": list(self.shape), "counts": self.counts}).astype(bool)


def encode_mask(mask: np.ndarray) -> dict:
    """A mask as COCO's `segmentation`: `{"size": [H, W], "counts": text}`, without loss.

    Args:
        mask: bool (H, W); an empty mask is one run of background.
    """
    rle = _pycocotools().encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def read_run_lengths(value: dict, size: Size, where: str) -> RunLengths:
    """Checks `{"size": [H, W], "counts": …}`, compressed (a text) or plain (a list of numbers).

    pycocotools writes past the end of its memory when the runs are longer than the mask, so nothing
    unchecked may reach it.

    Args:
        value: the object.
        size: (width, height) that it must have.
        where: how the message names it.

    Raises:
        DataError: a field is missing or wrong, the size differs, or the runs do not fill the mask.
    """
    shape, counts = value.get("size"), value.get("counts")
    width, height = size
    if shape != [height, width]:
        shown = shape if isinstance(shape, list) and all(type(n) is int for n in shape[:2]) else None
        shown = "another size" if shown is None else "×".join(str(n) for n in shown[1::-1]) + " px"
        raise DataError(
            f"{where}: the run-length mask has {shown}, its image {width}×{height} px. "
            "Write it again, or remove it.",
            "bad_rle",
        )
    if isinstance(counts, str):
        runs = _uncompressed(counts, where)
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        runs = counts
    else:
        kind = "a list with other things than whole numbers" if isinstance(counts, list) else describe(counts)
        raise DataError(
            f"{where}: 'counts' is {kind}, not a text or a list of run lengths. "
            "Write it again, or remove it.",
            "bad_rle",
        )
    if any(run < 0 for run in runs) or sum(runs) != width * height:
        raise DataError(
            f"{where}: the runs do not fill the mask of {width}×{height} px. Write it again, or remove it.",
            "bad_rle",
        )
    if isinstance(counts, list):
        encoded = _pycocotools().frPyObjects({"size": shape, "counts": counts}, height, width)["counts"]
        return RunLengths(encoded, (height, width))
    return RunLengths(counts.encode("ascii"), (height, width))


def _uncompressed(text: str, where: str) -> list[int]:
    """The run lengths in a text of 6-bit characters: five bits of a number each, the sixth means "goes on".

    From the fourth on, a number is the difference to the one before the last.
    """
    runs: list[int] = []
    number = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 40:
            raise DataError(f"{where}: 'counts' is damaged. Write it again, or remove it.", "bad_rle")
        number |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                number -= 1 << shift
            runs.append(number + runs[-2] if len(runs) > 2 else number)
            number = shift = 0
    if shift:
        raise DataError(f"{where}: 'counts' is cut short. Write it again, or remove it.", "bad_rle")
    return runs


def _pycocotools() -> ModuleType:
    try:
        from pycocotools import mask
    except ImportError:
        raise DataError(
            "Run-length masks need the package pycocotools. Install it: python -m pip install pycocotools."
        ) from None
    return mask
