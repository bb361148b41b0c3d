"""Grey frames of DICOM files, and whose they are by their header; pydicom is in the extra `dicom`.

A file of one frame is a picture. Each frame of a `run.dcm` with several has a path as if it were a file of
its own, `run/frame_0003.dcm`, counted from 1 as in DICOM; names of masks and results follow from that. So
does that of a compressed NIfTI file: `case.nii.gz` has the path `case.nii`.
Messages hold nothing of the header, and none of pydicom's.
"""

import logging
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vesselrl.data.patients import Identity, plain_name
from vesselrl.errors import DataError

SUFFIXES = (".dcm", ".dicom")
MAX_FRAMES = 100_000  # more is a damaged header
INSTALL = 'Install the extra "dicom": pip install "vesselrl[dicom]".'
# What says how stored values are shown.
_WINDOWS = ("ModalityLUTSequence", "VOILUTSequence", "WindowWidth")
_DISPLAY = (*_WINDOWS, "WindowCenter", "VOILUTFunction", "RescaleSlope", "RescaleIntercept")


def is_dicom(path: Path) -> bool:
    """Whether a path is that of a DICOM file, or of a frame of one."""
    return path.suffix.lower() in SUFFIXES


def locate(path: Path) -> tuple[Path, int]:
    """The file that holds a picture, and the number of its frame; 0 for a file of one picture."""
    if path.suffix.lower() == ".nii" and not path.is_file():
        packed = [path.with_name(path.name + ending) for ending in (".gz", ".GZ")]
        return next(filter(Path.is_file, packed), packed[0]), 0
    number = re.fullmatch(r"frame_(\d{4,})", path.stem) if is_dicom(path) and not path.is_file() else None
    return (path.parent.with_name(path.parent.name + path.suffix), int(number[1])) if number else (path, 0)


def frames(file: Path) -> list[Path]:
    """The paths of the frames of a DICOM file; its own where it has one frame, or where it is damaged."""
    if file.name.lower().endswith(".nii.gz"):
        return [file.with_suffix("")]
    header = _read_header(file) if is_dicom(file) else None
    count = header.get("NumberOfFrames") if header else None
    if not isinstance(count, int) or not 1 < count < MAX_FRAMES:
        return [file]
    return [file.with_suffix("") / f"frame_{k:04d}{file.suffix}" for k in range(1, count + 1)]


def flat_name(path: Path) -> str:
    """What results of a picture are called after: its stem, of DICOM `run_frame_0003.dcm`, never shown."""
    file, number = locate(path)
    return f"{file.stem}_{path.name}" if number else path.name if is_dicom(path) else path.stem


def identity_of(path: Path | None, name: str) -> Identity | None:
    """The patient of the header, by ID or else by name; None without both. `name`: of the picture."""
    if path is None or not is_dicom(path):
        return None
    file, frame = locate(path)
    if (header := _read_header(file)) is None:
        return None
    series = name.rpartition("/")[0] or str(header.get("SeriesInstanceUID") or "")
    number = "".join(str(header.get("PatientID") or "").split()).casefold()
    person = plain_name(str(header.get("PatientName") or ""))
    people = [f"id:{number}"] * bool(number) + [f"name:{person}"] * bool(person)
    # No other digits of the name are a frame's: they may be the ID.
    return Identity(*people, sequence=series, frame=str(frame or "")) if people else None


class Frame:
    """One frame, as an image that Pillow has opened: its size from the header, its pixels by `copy`."""

    format, tile = "DICOM", ()

    def __init__(self, path: Path, record: str, broken: str):
        (file, number), fault = locate(path), ""
        file.open("rb").close()  # a missing file has a message of its own
        header = _read_header(file)
        if header is None:
            fault = "the file is no DICOM file, or damaged"
        elif header.get("Modality") == "SEG":
            fault = "the DICOM file is a segmentation object, which is not read"
        elif not (header.get("Rows") and header.get("Columns")):
            fault = "the DICOM file holds no picture"
        elif header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
            fault = "the DICOM file holds colours, not grey"
        elif not 0 < (header.get("BitsStored") or 0) <= 16:
            fault = "the DICOM file does not have 1 to 16 bits per pixel"
        if fault:
            raise DataError(f"{record}: {fault}. Export it as PNG, or remove it.", broken)
        self._file, self._index, self._header = file, max(number - 1, 0), header
        self._display, self._place = _display_settings(header, self._index), (record, broken)
        self.size, self.info = (header.Columns, header.Rows), {}
        is_told = any(name in self._display for name in _WINDOWS)
        self.mode = "L" if is_told or header.BitsStored <= 8 else "I;16"

    def copy(self) -> Image.Image:
        """The pixels in 8 bits, as a viewer first shows them; else the values above the frame's lowest."""
        from pydicom.pixels import pixel_array

        header, (record, broken) = self._header, self._place
        is_inverted = header.PhotometricInterpretation == "MONOCHROME1"
        low = -(2 ** (header.BitsStored - 1)) if header.get("PixelRepresentation") else 0
        try:
            values = pixel_array(self._file, index=self._index).astype(np.int64)
            if self.mode == "I;16":
                values = -values if is_inverted else values
                return Image.fromarray((values - values.min()).astype(np.uint16))
            shares = _shares(np.arange(low, low + 2**header.BitsStored), self._display)
            levels = np.round(255 * (1 - shares if is_inverted else shares)).astype(np.uint8)
            return Image.fromarray(levels[values - low])
        except Exception:  # of any kind, and its text may hold values of the header
            raise DataError(f"{record}: {_why_undecoded(header)}", broken) from None


def _shares(stored: np.ndarray, display: Any) -> np.ndarray:
    """The brightness in [0, 1] of each stored value: Modality LUT or rescale, then VOI LUT or window."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(stored, display)
    if display.get("VOILUTSequence"):
        bits = display.VOILUTSequence[0].LUTDescriptor[2]
        return apply_voi(np.round(values).astype(np.int64), display) / (2**bits - 1)
    if not display.get("WindowWidth"):
        return (values - values.min()) / max(np.ptp(values), 1)
    # Of several windows the first; PS3.3 C.11.2.1.2.
    centre, width = (np.ravel(display[name].value)[0] for name in ("WindowCenter", "WindowWidth"))
    function = display.get("VOILUTFunction") or "LINEAR"
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - float(centre)) / float(width)))
    shift = 0.5 if function == "LINEAR" else 0
    return ((values - float(centre) + shift) / max(float(width) - 2 * shift, 1e-6) + 0.5).clip(0, 1)


def _display_settings(header: Any, index: int) -> Any:
    """How a frame is shown: by its own functional groups, those that all frames share, or the file."""
    from pydicom import Dataset

    own = header.get("PerFrameFunctionalGroupsSequence") or ()
    groups = [*(header.get("SharedFunctionalGroupsSequence") or ()), *own[index : index + 1]]
    kinds = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
    items = [item for group in groups for kind in kinds for item in group.get(kind) or ()]
    display = Dataset()
    for source in (header, *items):
        for name in (name for name in _DISPLAY if source.get(name) not in (None, "")):
            display.add(source[name])
    return display


def _why_undecoded(header: Any) -> str:
    """What keeps pixels from being decoded: their compression, or damage."""
    from pydicom.pixels import get_decoder

    try:
        syntax = header.file_meta.TransferSyntaxUID
        if get_decoder(syntax).is_available:
            return "its pixels are missing, cut off or damaged. Export the DICOM file again, or remove it."
    except (AttributeError, NotImplementedError):
        return "the DICOM file does not say a known compression of its pixels. Export it again, uncompressed."
    return f"nothing here decodes the compression of the DICOM file ({syntax.name}). {INSTALL}"


def _read_header(file: Path) -> Any:
    """What a file holds but for its pixels, as a pydicom Dataset; None where it is no DICOM file."""
    pydicom = _pydicom()
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)
        return header if [*header.iterall()] else None  # which converts all values, while errors are caught
    except Exception:  # of any kind, as above
        return None


@cache
def _pydicom() -> Any:
    """The package, silenced: its notes on odd values quote them."""
    try:
        import pydicom
    except ImportError:
        raise DataError(f"DICOM files cannot be read: pydicom is missing. {INSTALL}") from None
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"pydicom\.")
    return pydicom
