"""The layout of LabelMe: `json/<stem>.json`, or the JSON files beside the images in `images/`.

All shapes of a file are one target. Outlines are `polygon`, `rectangle` and `mask` shapes; points and lines
enclose nothing and are left out. A polygon of LabelMe has no holes: a hole survives in a `mask` shape, or
in a polygon that runs to the hole and back as those of `mask_to_polygons` do.
"""

import base64
import binascii
from functools import partial
from pathlib import Path

import numpy as np

from vesselrl.data.entries import (
    Entry,
    FileNames,
    Listing,
    MaskFiles,
    Outlines,
    below,
    find_image,
    list_files,
    list_images,
    path_below_images,
    read_json,
    written_size,
)
from vesselrl.data.findings import Findings
from vesselrl.data.images import decode_mask
from vesselrl.data.polygons import OnError, Size, describe, mask_to_polygons, read_outline
from vesselrl.errors import DataError

NAME = "LabelMe"
OPEN_SHAPES = ("point", "points", "line", "linestrip")


def labelme_folder(root: Path) -> Path | None:
    """`json/`, or `images/` where JSON files lie beside the images; None without either."""
    if (root / "json").is_dir():
        return root / "json"
    images = root / "images"
    return images if images.is_dir() and any(path.suffix == ".json" for path in images.iterdir()) else None


def list_labelme(root: Path, folder: Path, findings: Findings) -> Listing:
    """An entry for each JSON file, and for each further image with a mask file.

    Raises:
        DataError: the folder holds no JSON files.
    """
    files = [path for path in list_files(folder) if path.suffix.lower() == ".json"]
    if not files:
        raise DataError(f"{root} holds no annotations: json/ is empty. Add LabelMe files, or remove it.")
    images = list_images(root / "images")
    by_name: dict[str, Path] = {below(path, root / "images"): path for path in reversed(images)}
    shown = FileNames(root)
    masks = MaskFiles(root, by_name)
    entries = []
    for file in files:
        name, place = below(file, folder), shown.shown(file)
        try:
            content = read_json(file, place)
            if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                raise DataError(f"{place} has no list 'shapes', so it is no LabelMe file.", "bad_json")
        except DataError as error:
            findings.caught(error, place, place)
            continue
        image = by_name.get(name) or _image_by_path(root, content.get("imagePath"))
        if image is not None and image.is_relative_to(root / "images"):
            name = below(image, root / "images")
        size = written_size(content, ("imageWidth", "imageHeight"))
        light = {key: value for key, value in content.items() if key != "imageData"}  # the image once more
        label = partial(_read_shapes, light["shapes"])
        entries.append(Entry(name, place, image, masks.find(name), label, size, light))
    used = {entry.image_path for entry in entries}
    for name, path in sorted(by_name.items()):
        if path not in used and masks.find(name) is not None:
            entries.append(Entry(name, shown.shown(path), path, masks.find(name)))
    return Listing(NAME, entries, images, masks.paths)


def mask_to_shapes(mask: np.ndarray, label: str = "vessel") -> list[dict]:
    """A mask as the `shapes` of a LabelMe file, without loss; holes are cuts, see `mask_to_polygons`.

    Args:
        mask: bool (H, W); an empty mask gives no shapes.
        label: class of the shapes.
    """
    return [
        {"label": label, "points": polygon.tolist(), "group_id": None, "shape_type": "polygon", "flags": {}}
        for polygon in mask_to_polygons(mask)
    ]


def _image_by_path(root: Path, path: object) -> Path | None:
    """The image that `imagePath` names, which often holds the folders of another machine."""
    try:
        name = path_below_images(str(path).replace("\\", "/").rsplit("/", 1)[-1], "")
    except DataError:
        return None
    return find_image(root, name)


def _read_shapes(shapes: list, size: Size, record: str, on_error: OnError) -> Outlines:
    polygons, num_skipped = [], 0
    for number, shape in enumerate(shapes):
        try:
            found = _read_shape(shape, size, f"{record}: shape {number}")
        except DataError as error:
            on_error(error)
            continue
        polygons += found
        num_skipped += not found
    return Outlines(tuple(polygons), (), num_skipped)


def _read_shape(shape: object, size: Size, where: str) -> list[np.ndarray]:
    """The polygons of a shape; none where it encloses nothing."""
    if not isinstance(shape, dict):
        raise DataError(f"{where} is {describe(shape)}, not an object. Remove it.", "bad_polygon")
    kind = shape.get("shape_type") or "polygon"
    if kind in OPEN_SHAPES:
        return []
    flat = _flat_points(shape.get("points"), where)
    if kind == "polygon":
        points = read_outline(flat, size, where)
        return [] if points is None else [points]
    if kind not in ("rectangle", "mask"):
        raise DataError(
            f"{where} is no polygon, rectangle or mask. Draw it as a polygon, or remove it.", "bad_polygon"
        )
    if len(flat) != 4:
        raise DataError(f"{where} has {len(flat) // 2} corners where 2 were expected.", "bad_polygon")
    left, top, right, bottom = flat
    corners = read_outline([left, top, right, top, right, bottom, left, bottom], size, where)
    if kind == "rectangle":
        return [corners]
    mask = _decode(shape.get("mask"), where)
    # The first corner is the first pixel of the mask. A wrong corner must not draw outside the image.
    outline = [polygon + corners[0] for polygon in mask_to_polygons(mask)]
    for polygon in outline:
        read_outline(polygon.ravel().tolist(), size, where)
    return outline


def _flat_points(points: object, where: str) -> list:
    """`[[x, y], …]` as `[x, y, …]`."""
    if not isinstance(points, list):
        raise DataError(f"{where} has no list 'points'. Draw it again, or remove it.", "bad_polygon")
    flat = []
    for point in points:
        if not isinstance(point, list):
            raise DataError(f"{where} holds {describe(point)} where a point was expected.", "bad_polygon")
        if len(point) != 2:
            raise DataError(
                f"{where} has a point of {len(point)} coordinates. Write x and y, or remove the shape.",
                "odd_length",
            )
        flat += point
    return flat


def _decode(text: object, where: str) -> np.ndarray:
    """The mask in a `mask` shape: a PNG in base64."""
    if not isinstance(text, str):
        raise DataError(f"{where} is a mask without 'mask'. Draw it again, or remove it.", "bad_polygon")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{where}: its mask is no base64. Draw it again, or remove it.", "bad_rle") from None
    return decode_mask(data, f"{where}: its mask")
