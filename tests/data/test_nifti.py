"""NIfTI files of one slice: the pixels, names and masks that the same picture has as PNG; faults."""

import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from vesselrl.data.check import check_data
from vesselrl.data.images import read_mask, read_oddities, read_rgb, read_size
from vesselrl.data.repair import repair_data
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.errors import DataError
from vesselrl.inference.files import predict_files
from vesselrl.inference.predictor import Predictor
from vesselrl.models.checkpoint import load_sa2va

RNG = np.random.default_rng(0)


def write_nifti(path: Path, pixels: np.ndarray) -> Path:
    """A picture (H, W) as nnU-Net and SimpleITK write it: x is the first axis, y runs down."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(pixels.T, np.diag([-1, -1, 1, 1])), path)
    return path


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("shape", [(20, 30), (1, 20, 30), (1, 1, 20, 30), (20, 30, 1)])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "float64"])
def test_pixels_are_those_of_a_png(tmp_path: Path, ending: str, shape: tuple, kind: str) -> None:
    pixels = RNG.integers(0, 256 if kind == "uint8" else 4096, (20, 30))
    stored = pixels.astype(np.uint8 if kind == "uint8" else np.uint16)
    Image.fromarray(stored).save(tmp_path / "a.png")
    volume = pixels.astype(kind if kind != "int32" else np.int32).reshape(shape)
    path = write_nifti(tmp_path / f"a{ending}", volume)
    np.testing.assert_array_equal(read_rgb(path, "a"), read_rgb(tmp_path / "a.png", "a"))
    assert read_size(path, "a") == (30, 20)
    assert read_oddities(path, "a").keys() == read_oddities(tmp_path / "a.png", "a").keys()
    mask = write_nifti(tmp_path / f"m{ending}", (pixels > 100).astype(kind).reshape(shape))
    np.testing.assert_array_equal(read_mask(mask, "m"), pixels > 100)


FAULTS = {
    "volume": (np.zeros((3, 20, 30), np.uint8), "30×20×3 values, not one grey picture"),
    "line": (np.zeros(30, np.uint8), "not one grey picture"),
    "colours": (np.zeros((20, 30), [(one, "u1") for one in "RGB"]), "not one grey picture"),
    "fractions": (np.full((20, 30), 0.5), "floating-point"),
    "negative": (np.full((20, 30), -1000, np.int16), "values from -1000"),
    "nan": (np.full((20, 30), np.nan, np.float32), "floating-point"),
    "cut off": (None, "no NIfTI file, or damaged"),
    "no NIfTI": (b"not one", "no NIfTI file, or damaged"),
    "missing": (b"", "the file is missing"),
}


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, ending: str, name: str) -> None:
    path, (content, said) = tmp_path / f"a{ending}", FAULTS[name]
    if content is None:
        whole = write_nifti(path, RNG.integers(0, 255, (64, 64)).astype(np.uint8)).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif isinstance(content, np.ndarray):
        write_nifti(path, content)
    elif content:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_rgb(path, "picture 1")


@pytest.mark.parametrize("ending", [".NII", ".NII.GZ", ".nii.GZ"])
def test_endings_in_capitals_are_those_in_small_letters(tmp_path: Path, ending: str) -> None:
    pixels = RNG.integers(0, 255, (2, 40, 40)).astype(np.uint8)
    for number, picture in enumerate(pixels):
        for folder, values in (("images", picture), ("masks", (picture > 100).astype(np.uint8))):
            write_nifti(tmp_path / folder / f"case{number}{ending if number else ending.lower()}", values)
    samples = sorted(find_samples(tmp_path), key=lambda sample: sample.image_path)
    for sample, picture in zip(samples, pixels, strict=True):
        np.testing.assert_array_equal(load_image(sample)[..., 0], picture)
        np.testing.assert_array_equal(load_mask(sample), picture > 100)


def test_without_nibabel_one_line_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(DataError, match=r"vesselrl\[nifti\]"):
        read_rgb(tmp_path / "a.nii", "picture 1")


def test_a_folder_of_nnunet_is_that_of_the_pngs(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """`case_0000.nii.gz` and the mask `case.nii.gz`: samples, check, repaired copy and predictions."""
    roots = tmp_path / "nifti", tmp_path / "png"
    for number in range(3):
        picture = RNG.integers(0, 255, (64, 48)).astype(np.uint8)
        mask = np.zeros((64, 48), np.uint8)
        mask[20 : 24 + number] = 1
        write_nifti(roots[0] / f"images/{number}_0000.nii.gz", picture)
        write_nifti(roots[0] / f"labels/{number}.nii.gz", mask)
        for folder, name, pixels in (("images", f"{number}_0000", picture), ("labels", number, mask)):
            (roots[1] / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(roots[1] / folder / f"{name}.png")
    samples, expected = map(find_samples, roots)
    assert [one.key for one in samples] == [one.key for one in expected]
    assert len(samples) == 3
    repaired = tmp_path / "repaired"
    repair_data(roots[0], repaired)
    for found in (samples, find_samples(repaired)):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(load_image(one), load_image(other))
            np.testing.assert_array_equal(load_mask(one), load_mask(other))
    reports = [check_data(root) for root in roots]
    assert [one.code for one in reports[0].findings] == [one.code for one in reports[1].findings]
    predictor = Predictor(*load_sa2va(tiny_checkpoint))
    for root in roots:
        rows = [*predict_files(predictor, root / "images", tmp_path / f"out_{root.name}")]
        assert [row["status"] for row in rows] == ["done"] * 3
    masks, others = (sorted(tmp_path.glob(f"out_{root.name}/*_mask.png")) for root in roots)
    assert [path.name for path in masks] == [path.name for path in others]
    for one, other in zip(masks, others, strict=True):
        np.testing.assert_array_equal(read_mask(one, "mask"), read_mask(other, "mask"))
