"""Samples: pseudonyms alone, a fixed order, sizes that fit, and masks that survive any layout."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from skimage.draw import polygon2mask

from tests.data.broken_roots import encode_mask, flat_polygons
from tests.data.test_formats import (
    PERSON,
    failure,
    record,
    write_image,
    write_json,
    write_mask,
    write_records,
)
from tests.data.test_polygons import curved_vessel
from tests.golden.broken_input import shape
from vesselrl.data.samples import find_samples, load_image, load_mask

SIDE = 96
FORMATS = ("flat", "nested", "labelme", "coco polygons", "coco rle", "mask file")
point = st.tuples(st.integers(4, SIDE - 5), st.integers(4, SIDE - 5))
# Vessels of 4 px along random lines; lines that cross enclose holes.
lines = st.lists(st.lists(point, min_size=2, max_size=5), min_size=1, max_size=4)


def test_samples_know_pseudonyms_only(tmp_path: Path) -> None:
    (sample,) = find_samples(write_records(tmp_path, record(f"{PERSON}.jpg")))
    assert (sample.key, sample.patient) == ("P001_S1_F0011", "P001")
    assert (sample.sequence, sample.frame) == ("P001_S1", "F0011")
    assert sample.record == "annotations.json record 0 (P001_S1_F0011)"
    assert "MING" not in repr(sample)


def test_order_of_records_does_not_matter(tmp_path: Path) -> None:
    names = [f"{name}_frame_{i:06d}.png" for name in ("anna", "ben", "carla") for i in range(3)]
    forwards = find_samples(write_records(tmp_path, *map(record, names)))
    backwards = find_samples(write_records(tmp_path, *map(record, names[::-1])))
    assert [(s.key, s.image_path) for s in forwards] == [(s.key, s.image_path) for s in backwards]
    assert [s.key for s in forwards] == sorted(s.key for s in forwards)


@pytest.mark.parametrize(
    ("stem", "named"),
    [("train_001", "images/train_001.png"), (PERSON, "images/ file 1 in name order (P001_S1_F0011)")],
)
def test_mask_of_other_proportions_names_both_sizes(tmp_path: Path, stem: str, named: str) -> None:
    write_image(tmp_path / "images" / f"{stem}.png")
    write_mask(tmp_path / "masks" / f"{stem}.png", np.ones((12, 8), bool))
    assert failure(tmp_path).startswith(f"{named}: the mask has 8×12 px, its image 16×12 px.")


def draw_vessels(polylines: list[list[tuple[int, int]]]) -> np.ndarray:
    """The pixels less than 2 px away from lines, by the distance transform: no rasteriser of ours."""
    centre = np.ones((SIDE, SIDE), bool)
    for polyline in polylines:
        for start, end in pairwise(polyline):
            for share in np.linspace(0, 1, 2 * SIDE):
                row, column = np.round((1 - share) * np.array(start) + share * np.array(end)).astype(int)
                centre[row, column] = False
    return ndimage.distance_transform_edt(centre) < 2


def export(root: Path, layout: str, mask: np.ndarray) -> None:
    """Writes a black image and its mask in a layout."""
    write_image(root / "images" / "001.png", np.zeros(mask.shape, np.uint8))
    size = dict(zip(("imageHeight", "imageWidth"), mask.shape, strict=True))
    flat = flat_polygons(mask)
    nested = [[polygon] for polygon in flat]
    if layout in ("flat", "nested"):
        value = nested if layout == "nested" else flat
        write_json(root / "annotations.json", [{"image": "001.png", "mask": value, **size}])
    elif layout == "labelme":
        write_json(root / "json" / "001.json", {"shapes": [*map(shape, flat)], **size})
    elif layout.startswith("coco"):
        image = {"id": 1, "file_name": "001.png", "width": mask.shape[1], "height": mask.shape[0]}
        values = [encode_mask(mask)] if layout == "coco rle" else nested
        annotations = [{"image_id": 1, "segmentation": value} for value in values]
        write_json(root / "coco.json", {"images": [image], "annotations": annotations})
    else:
        write_mask(root / "masks" / "001_mask.png", mask)


@pytest.mark.parametrize("layout", FORMATS)
@settings(max_examples=15)
@given(polylines=lines)
@example(polylines=[[(10, 10), (10, 80), (80, 80), (80, 10), (10, 10)], [(45, 10), (45, 80)]])  # two holes
def test_vessels_of_four_px(tmp_path_factory: pytest.TempPathFactory, layout: str, polylines: list) -> None:
    """A mask that is written in any layout and read back is the same mask, holes included."""
    mask = draw_vessels(polylines)
    root = tmp_path_factory.mktemp("export")
    export(root, layout, mask)
    (sample,) = find_samples(root)
    assert (load_mask(sample) == mask).all()


@pytest.mark.parametrize("layout", ["flat", "labelme", "coco polygons", "coco rle", "mask file"])
def test_a_label_of_800_px_keeps_its_vessels_at_512_px(tmp_path: Path, layout: str) -> None:
    """Widths of 4 px at 512: the label is drawn on 800 px, the truth at 512 by another rasteriser."""
    outline = curved_vessel(4, 512)
    truth = polygon2mask((512, 512), outline[:, ::-1] - 0.5)
    export(tmp_path, layout, polygon2mask((800, 800), (outline * 800 / 512)[:, ::-1] - 0.5))
    Image.new("L", (512, 512)).save(tmp_path / "images" / "001.png")
    (sample,) = find_samples(tmp_path)
    mask = load_mask(sample)
    assert mask.shape == (512, 512)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.93  # two rounds of whole pixels
    assert mask.sum() == pytest.approx(truth.sum(), rel=0.02)  # neither thicker nor thinner
    assert ndimage.label(mask, np.ones((3, 3)))[1] == 1  # and in one component


@pytest.mark.parametrize(
    ("folder", "pattern", "num_images", "num_patients", "shape", "foreground"),
    [
        ("coronary80", None, 80, 80, (300, 300, 3), 0.056),
        ("chase_db1", None, 28, 14, (960, 999, 3), 0.069),
        ("chase_db1", r"_(?P<patient>\d+)(?P<frame>[LR])$", 28, 14, (960, 999, 3), 0.069),
    ],
)
def test_real_images(
    shared_folder: Path, folder: str, pattern: str | None, num_images: int, num_patients: int,
    shape: tuple, foreground: float,
) -> None:  # fmt: skip
    samples = find_samples(shared_folder / "data" / folder, pattern)
    assert (len(samples), len({s.patient for s in samples})) == (num_images, num_patients)
    assert load_image(samples[0]).shape == shape
    shares = [load_mask(sample).mean() for sample in samples]
    assert np.mean(shares) == pytest.approx(foreground, abs=0.001)
    assert all(shares)
