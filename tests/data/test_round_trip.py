"""A mask that is exported to any layout and read back is the same mask, holes and 4-px vessels included."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from skimage.draw import polygon2mask

from vesselrl.data.annotations import find_samples, load_mask
from vesselrl.data.labelme import mask_to_shapes
from vesselrl.data.polygons import mask_to_polygons, rasterise, resize_mask, scale_polygons
from vesselrl.data.run_lengths import encode_mask

SIDE = 96
FORMATS = ("flat", "nested", "labelme", "coco polygons", "coco rle", "mask file")
point = st.tuples(st.integers(4, SIDE - 5), st.integers(4, SIDE - 5))
# Vessels of 4 px along random lines; lines that cross enclose holes.
lines = st.lists(st.lists(point, min_size=2, max_size=5), min_size=1, max_size=4)


def draw_vessels(polylines: list[list[tuple[int, int]]], width_px: float = 4, side: int = SIDE) -> np.ndarray:
    """The pixels less than half a width away from lines, by the distance transform: no rasteriser of ours."""
    centre = np.ones((side, side), bool)
    for polyline in polylines:
        for start, end in pairwise(polyline):
            for share in np.linspace(0, 1, 2 * SIDE):
                row, column = np.round((1 - share) * np.array(start) + share * np.array(end)).astype(int)
                centre[row, column] = False
    return ndimage.distance_transform_edt(centre) < width_px / 2


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def export(root: Path, layout: str, mask: np.ndarray) -> None:
    """Writes a black image and its mask in a layout."""
    height, width = mask.shape
    (root / "images").mkdir(parents=True, exist_ok=True)
    Image.new("L", (width, height)).save(root / "images" / "001.png")
    flat = [polygon.ravel().tolist() for polygon in mask_to_polygons(mask)]
    if layout in ("flat", "nested"):
        value = [[polygon] for polygon in flat] if layout == "nested" else flat
        (root / "annotations.json").write_text(json.dumps([{"image": "001.png", "mask": value}]))
    elif layout == "labelme":
        content = {"shapes": mask_to_shapes(mask), "imageWidth": width, "imageHeight": height}
        (root / "json").mkdir(exist_ok=True)
        (root / "json" / "001.json").write_text(json.dumps(content))
    elif layout.startswith("coco"):
        segmentations = [encode_mask(mask)] if layout == "coco rle" else [[polygon] for polygon in flat]
        content = {
            "images": [{"id": 1, "file_name": "001.png", "width": width, "height": height}],
            "annotations": [{"image_id": 1, "segmentation": value} for value in segmentations],
        }
        (root / "coco.json").write_text(json.dumps(content))
    else:
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / "001_mask.png")


@pytest.mark.parametrize("layout", FORMATS)
@settings(max_examples=25)
@given(polylines=lines)
def test_vessels_of_four_px(tmp_path_factory: pytest.TempPathFactory, layout: str, polylines: list) -> None:
    mask = draw_vessels(polylines)
    root = tmp_path_factory.mktemp("export")
    export(root, layout, mask)
    (sample,) = find_samples(root)
    assert dice(load_mask(sample), mask) >= 0.99
    assert (load_mask(sample) == mask).all()


@pytest.mark.parametrize("layout", FORMATS)
def test_holes_survive(tmp_path: Path, layout: str) -> None:
    mask = draw_vessels([[(10, 10), (10, 80), (80, 80), (80, 10), (10, 10)], [(45, 10), (45, 80)]])
    assert ndimage.label(~mask)[1] == 3  # two holes and the outside
    export(tmp_path, layout, mask)
    (sample,) = find_samples(tmp_path)
    assert (load_mask(sample) == mask).all()


@pytest.mark.parametrize("layout", ["flat", "labelme", "coco polygons", "coco rle", "mask file"])
def test_a_label_of_800_px_keeps_its_vessels_at_512_px(tmp_path: Path, layout: str) -> None:
    """Widths of 4 px at 512: the label is drawn on 800 px, the truth at 512 by another rasteriser."""
    t = np.linspace(0, 1, 300)
    line = np.stack([60 + 400 * t, 256 + 120 * np.sin(5 * t)], axis=1)
    along = np.gradient(line, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
    outline = np.concatenate([line + 2 * across, (line - 2 * across)[::-1]])
    truth = polygon2mask((512, 512), outline[:, ::-1] - 0.5)
    export(tmp_path, layout, polygon2mask((800, 800), (outline * 800 / 512)[:, ::-1] - 0.5))
    if layout == "flat":
        (record,) = json.loads((tmp_path / "annotations.json").read_text())
        record |= {"imageWidth": 800, "imageHeight": 800}
        (tmp_path / "annotations.json").write_text(json.dumps([record]))
    Image.new("L", (512, 512)).save(tmp_path / "images" / "001.png")
    (sample,) = find_samples(tmp_path)
    mask = load_mask(sample)
    assert mask.shape == (512, 512)
    assert dice(mask, truth) > 0.93  # two rounds of whole pixels
    assert mask.sum() == pytest.approx(truth.sum(), rel=0.02)  # neither thicker nor thinner
    assert ndimage.label(mask, np.ones((3, 3)))[1] == 1  # and in one piece


def test_outlines_are_scaled_without_loss() -> None:
    polygon = np.random.default_rng(0).random((9, 2)) * 512
    (large,) = scale_polygons([polygon], (512, 512), (800, 800))
    (back,) = scale_polygons([large], (800, 800), (512, 512))
    assert np.allclose(back, polygon)
    assert (rasterise([back], (512, 512)) == rasterise([polygon], (512, 512))).mean() > 0.9999
    (wide,) = scale_polygons([polygon], (512, 512), (1024, 256))
    assert np.allclose(wide, polygon * [2, 0.5])


def test_masks_are_resized_to_the_same_shape() -> None:
    mask = draw_vessels([[(10, 10), (80, 70)]])
    assert resize_mask(mask, mask.shape) is mask
    doubled = mask.repeat(2, 0).repeat(2, 1)
    assert (resize_mask(doubled, mask.shape) == mask).all()
    assert dice(resize_mask(mask, doubled.shape), doubled) > 0.95
    assert not resize_mask(np.zeros((4, 4), bool), (8, 8)).any()
