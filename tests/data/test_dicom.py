"""DICOM files: grey values against pydicom, frames and patients, faults; from check to report."""

import contextlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from tests.data.test_formats import failure, write_image, write_mask
from tests.training.runs import no_charts
from vesselrl.cli import main
from vesselrl.data import dicom
from vesselrl.data.check import check_data
from vesselrl.data.images import read_mask, read_oddities, read_rgb, read_size
from vesselrl.data.pairing import list_images
from vesselrl.data.pseudonyms import MAPPING_FILE
from vesselrl.data.repair import repair_data
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.errors import DataError
from vesselrl.experiment.run_folder import PRIVATE_FILE
from vesselrl.inference.files import find_inputs

SECRETS = ("quirinius", "xanthopoulos", "4827163")


def write_dicom(path: Path, pixels: np.ndarray, bits: int | None = None, **tags: object) -> Path:
    """A DICOM file of one picture (H, W) or of several frames (K, H, W), uncompressed."""
    data, syntax = pydicom.Dataset(), tags.pop("syntax", pydicom.uid.ExplicitVRLittleEndian)
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.XRayAngiographicImageStorage, "1.2.3"
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = 8 * pixels.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    data.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    data.update({name: value for name, value in tags.items() if value is not None})
    for name in (name for name, value in tags.items() if value is None):
        del data[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def item(**tags: object) -> pydicom.Sequence:
    part = pydicom.Dataset()
    part.update(tags)
    return pydicom.Sequence([part])


def lut(values: list[int], first: int = 0, bits: int = 16) -> pydicom.Sequence:
    sequence = item(LUTDescriptor=[len(values), first, bits])
    sequence[0].add_new("LUTData", "US", values)
    return sequence


SMALL = np.arange(192, dtype=np.uint8).reshape(12, 16)
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
SHOWN = {
    "window": {"WindowCenter": 1500, "WindowWidth": 900},
    "first of two windows": {"WindowCenter": [1500, 90], "WindowWidth": [900, 9]},
    "exact": {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
    "rescaled": {"WindowCenter": 2, "WindowWidth": 900, "RescaleSlope": 0.5, "RescaleIntercept": -1000},
    "VOI LUT": {"VOILUTSequence": lut([v * v // 16 for v in range(1024)], first=1000)},
    "modality LUT": {"ModalityLUTSequence": lut([65535 - 16 * v for v in range(4096)])},
}


@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.parametrize("inverted", [False, True])
def test_grey_values_are_those_that_pydicom_shows(tmp_path: Path, kind: str, inverted: bool) -> None:
    photometric = "MONOCHROME1" if inverted else "MONOCHROME2"
    file = write_dicom(tmp_path / "a.dcm", RAMP, 12, PhotometricInterpretation=photometric, **SHOWN[kind])
    data = pydicom.dcmread(file)
    shown = pydicom.pixels.apply_voi_lut(pydicom.pixels.apply_modality_lut(RAMP, data), data)
    limits = {"rescaled": (-1000, 1047.5), "VOI LUT": (0, 65535), "modality LUT": (15, 65535)}
    lowest, highest = limits.get(kind, (0, 4095))
    expected = 255 * (shown.astype(float) - lowest) / (highest - lowest)
    expected = 255 - expected if inverted else expected
    found = read_rgb(file, "a")
    assert (found[:, :, :1] == found).all()
    assert np.abs(found[:, :, 0] - expected).max() <= 0.5001
    assert read_oddities(file, "a") == {}


def test_values_that_nothing_says_how_to_show(tmp_path: Path) -> None:
    """As PNG: the fewest bits that hold all values, from the lowest on."""
    deep = write_dicom(tmp_path / "a.dcm", RAMP, 16)
    signed = write_dicom(tmp_path / "b.dcm", RAMP.astype(np.int16) - 2048, 16)
    inverted = write_dicom(tmp_path / "c.dcm", RAMP, 12, PhotometricInterpretation="MONOCHROME1")
    flat = write_dicom(tmp_path / "d.dcm", (RAMP >> 4).astype(np.uint8), RescaleSlope=1, RescaleIntercept=0)
    for file in (deep, signed, flat):
        np.testing.assert_array_equal(read_rgb(file, "a")[:, :, 0], RAMP >> 4)
    np.testing.assert_array_equal(read_rgb(inverted, "c")[:, :, 0], (4095 - RAMP) >> 4)
    assert [bool(read_oddities(file, "a")) for file in (deep, signed, inverted, flat)] == [1, 1, 1, 0]


def test_compressed_frames_are_decoded(tmp_path: Path) -> None:
    file = write_dicom(tmp_path / "a.dcm", np.stack([SMALL, SMALL[::-1]]))
    data = pydicom.dcmread(file)
    data.compress(pydicom.uid.RLELossless)
    data.save_as(file)
    np.testing.assert_array_equal(read_rgb(list_images(tmp_path)[1], "")[:, :, 0], SMALL[::-1])


def test_each_frame_is_a_picture_with_the_window_of_its_own(tmp_path: Path) -> None:
    pixels = np.stack([np.full((12, 16), value, np.uint16) for value in (100, 200, 300)])
    windows = [item(FrameVOILUTSequence=item(WindowCenter=100, WindowWidth=w))[0] for w in (101, 401)]
    groups = {"PerFrameFunctionalGroupsSequence": pydicom.Sequence([*windows, pydicom.Dataset()])}
    shared = item(WindowCenter=500, WindowWidth=801)
    groups["SharedFunctionalGroupsSequence"] = item(FrameVOILUTSequence=shared)
    file = write_dicom(tmp_path / "run.1.DCM", pixels, 12, **groups)
    found = list_images(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        f"run.1/frame_000{k}.DCM" for k in (1, 2, 3)
    ]
    assert found == find_inputs(file, tmp_path / "out")
    # (x − c + 0.5) / (w − 1) + 0.5 of 255: 0.505, 0.75125, 0.250625
    assert [read_rgb(path, "")[0, 0, 0] for path in found] == [129, 192, 64]
    assert read_size(found[0], "") == (16, 12)


def test_masks_of_frames_by_their_names_or_in_a_file_of_frames(tmp_path: Path) -> None:
    root = tmp_path / "data"
    masks = [np.roll(np.eye(12, 16, dtype=bool), k, axis=1) for k in range(6)]
    runs = np.arange(6, dtype=np.uint8)[:, None, None] + np.zeros((12, 16), np.uint8)
    write_dicom(root / "images/a.dcm", runs[:4], PatientID="A")
    write_dicom(root / "images/b.dcm", runs[4:], PatientID="B")
    write_mask(root / "masks/a/frame_0001.png", masks[0])
    write_mask(root / "masks/a_frame_0002.png", masks[1])
    write_mask(root / "masks/a_0004_mask.png", masks[3])
    write_dicom(root / "masks/b.dcm", np.stack(masks[4:]).astype(np.uint8))
    samples = find_samples(root)
    values = sorted(int(load_image(sample)[0, 0, 0]) for sample in samples)
    assert values == [0, 1, 3, 4, 5]  # frame 3 of a has no mask
    for sample in samples:
        np.testing.assert_array_equal(load_mask(sample), masks[load_image(sample)[0, 0, 0]])
    report = check_data(root)
    assert (report.exit_code, report.counts["images"], report.counts["patients"]) == (0, 5, 2)
    (left_out,) = (finding.message for finding in report.findings if finding.code == "missing_label")
    assert left_out.startswith("images/ file 1 in name order, frame 3: ")
    repaired = repair_data(root, tmp_path / "copy")
    assert [finding.code for finding in repaired.of("warning")] == ["missing_label"]
    again = [sample.key for sample in find_samples(tmp_path / "copy")]
    assert again == [sample.key for sample in samples]
    write_dicom(root / "masks/b.dcm", np.stack(masks[3:]).astype(np.uint8))
    assert failure(root).endswith("the mask has 3 frames, its image 2. Give one for each, or PNG files.")


def test_the_patient_is_that_of_the_header(tmp_path: Path) -> None:
    """By ID, else by name; the same as in the names of other files, whatever the DICOM file is called."""
    runs = {"1": "0123456789", "2": "0123456789", "3": "AB 7", "4": "ab7"}
    for name, number in runs.items():
        write_dicom(tmp_path / f"images/{name}.dcm", np.stack([SMALL, SMALL]), PatientID=number)
    write_dicom(tmp_path / "images/5.dcm", SMALL, PatientName="WANG^FANG")
    write_dicom(tmp_path / "images/6.dcm", SMALL)
    for name in ("LI_MING(0123456789)_1-2_3_0A1B2C3D_frame_000011", "wang fang_frame_3"):
        (tmp_path / "images" / f"{name}.png").parent.mkdir(exist_ok=True)
        Image.fromarray(SMALL).save(tmp_path / "images" / f"{name}.png")
    for path in list_images(tmp_path / "images"):
        write_mask(tmp_path / "masks" / path.relative_to(tmp_path / "images").with_suffix(".png"))
    groups: dict[str, set[str]] = {}
    for sample in find_samples(tmp_path):
        folder, stem = sample.image_path.parent.name, sample.image_path.stem
        groups.setdefault(sample.patient, set()).add(folder + stem[:2])
    together = [{"1fr", "2fr", "imagesLI"}, {"3fr", "4fr"}, {"images5", "imageswa"}, {"images6"}]
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, together))
    sequences = {sample.sequence for sample in find_samples(tmp_path)}
    assert len(sequences) == 7  # the runs of one patient are apart


EXPLICIT, UNKNOWN = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"
FAULTS = {
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:-99]), "missing, cut off or damaged"),
    "no pixels": (lambda file: write_dicom(file, SMALL, PixelData=None), "missing, cut off or damaged"),
    "no picture": (lambda file: write_dicom(file, SMALL, Rows=None), "holds no picture"),
    "junk": (lambda file: file.write_bytes(b"junk" * 99), "is no DICOM file, or damaged"),
    "colour": (lambda file: write_dicom(file, SMALL, PhotometricInterpretation="RGB"), "holds colours"),
    "32 bits": (lambda file: write_dicom(file, SMALL.astype(np.uint32)), "does not have 1 to 16 bits"),
    "segmentation": (lambda file: write_dicom(file, SMALL, Modality="SEG"), "is a segmentation object"),
    "unknown syntax": (
        lambda file: file.write_bytes(file.read_bytes().replace(EXPLICIT, UNKNOWN)),
        "does not say a known compression",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_file_that_cannot_be_used_is_named_without_its_person(tmp_path: Path, kind: str) -> None:
    for number in range(3):
        write_dicom(tmp_path / f"images/{number}.dcm", SMALL + number, PatientID=f"{number}")
        write_mask(tmp_path / f"masks/{number}.png")
    spoil, message = FAULTS[kind]
    spoil(tmp_path / "images/1.dcm")
    (fault,) = check_data(tmp_path).of("error")
    assert message in fault.message
    assert re.match(r"images/ file 2 in name order \(P\d{3}_S1_F0001\): image: ", fault.message)
    assert (fault.code, fault.file) == ("unreadable_image", "images/ file 2 in name order")


def test_no_file_is_called_by_its_name_which_may_be_the_id(tmp_path: Path) -> None:
    write_dicom(tmp_path / "images/12345.dcm", SMALL, PatientID="12345")
    write_image(tmp_path / "masks/12345.png", SMALL)
    report = check_data(tmp_path)
    (fault,) = report.of("error")
    assert (fault.code, fault.file) == ("non_binary_mask", "masks/ file 1 in name order")
    assert "12345" not in report.to_json()
    write_mask(tmp_path / "masks/12345.png")
    (sample,) = find_samples(tmp_path)
    assert "12345" not in f"{sample}"
    (known,) = json.loads((tmp_path / MAPPING_FILE).read_text())["readings"].values()
    assert known["salt"]  # without one, hashes of all possible IDs would tell


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_dicom(tmp_path / "images/a.dcm", np.zeros((4, 12, 16), np.uint8))
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"^x: its pixels are missing, cut off or damaged"):
        read_mask(list_images(tmp_path)[3], "x")
    assert not read_mask(list_images(tmp_path)[1], "x").any()  # the others are there
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", False)
    with pytest.raises(DataError, match=r'(Explicit VR Little Endian).*pip install "vesselrl\[dicom\]"'):
        read_rgb(list_images(tmp_path)[3], "x")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    dicom._pydicom.cache_clear()
    with pytest.raises(DataError, match=r'pydicom is missing.*pip install "vesselrl\[dicom\]"'):
        find_samples(tmp_path)


@pytest.mark.slow
@no_charts
def test_from_check_to_report_nothing_of_the_header_gets_out(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Files are called after the ID of their header, as exports are, or by a plain number."""
    root, out, rng = tmp_path / "data", tmp_path / "out", np.random.default_rng(0)
    for number in range(6):
        name = f"4827163{number}" if number % 2 else f"{number}"
        pixels = rng.integers(1200, 1800, (3, 64, 64)).astype(np.uint16)
        pixels[:, 8 + 8 * number : 12 + 8 * number] = 700
        header = {"PatientID": f"4827163{number}", "PatientName": "XANTHOPOULOS^QUIRINIUS"}
        window = {"WindowCenter": 1250, "WindowWidth": 1100, "OtherPatientIDs": "48271639"}
        write_dicom(root / f"images/{name}.dcm", pixels, 12, **header, **window)
        for frame in range(1, 4):
            mask = np.zeros((64, 64), bool)
            mask[8 + 8 * number : 12 + 8 * number] = True
            write_mask(root / f"masks/{name}/frame_{frame:04d}.png", mask)
    broken = root / "images/48271639.dcm"
    broken.write_bytes((root / "images/0.dcm").read_bytes()[:600])

    def call(*arguments: object) -> int:
        file = (out / "printed.txt").open("a", encoding="utf-8")
        with file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            return main([*map(str, arguments)])

    out.mkdir()
    assert call("data", "check", root, "--json") == 0
    model = ["--model_path", tiny_checkpoint, "--output_dir", out]
    assert call("train", "--preset", "debug", "--data_root", root, *model) == 0
    run = next(path for path in out.iterdir() if (path / "best_lora").is_dir())
    predict = ["predict", "--lora_weights", run, "--base_model", tiny_checkpoint]
    assert call(*predict, "--image", root / "images", "--output_dir", out / "predicted") == 3
    assert len([*(out / "predicted").glob("P*_F000?_mask.png")]) == 18
    assert (run / "report.html").is_file()
    files, private = [path for path in out.rglob("*") if path.is_file()], {MAPPING_FILE, PRIVATE_FILE}
    assert private <= {path.name for path in files}
    for path in (path for path in files if path.name not in private):
        text = f"{path.relative_to(out)} {path.read_bytes().decode('utf-8', errors='replace')}".casefold()
        assert [secret for secret in SECRETS if secret in text] == [], path
    assert "xanthopoulos" not in (out / "predicted" / MAPPING_FILE).read_text().casefold()
