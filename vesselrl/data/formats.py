"""Readers of the layouts that a data root may have: one function each, and the list READERS at the end.

To add a layout, write `read_NAME(folder, findings)`, which returns a Listing, or None where the folder is of
another layout, and give it a line in READERS. An export with one more name for a COCO file, a label folder
or an ending of file names needs a word in COCO_NAMES here, or in the lists of `vesselrl.data.records`.

All polygons, shapes and annotations of an image are one target, their union, whatever their class. A hole
survives in run lengths, in a LabelMe `mask` shape and in polygons that run to the hole and back as those of
`mask_to_polygons` do. A label file beside outlines goes before them in every layout.
"""

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from vesselrl.data.findings import Findings
from vesselrl.data.images import read_mask
from vesselrl.data.polygons import (
    Outlines,
    RunLengths,
    Size,
    describe,
    mask_to_polygons,
    read_polygon,
    read_run_lengths,
)
from vesselrl.data.records import (
    LABEL_ENDINGS,
    LABEL_FOLDERS,
    SECOND_OBSERVER,
    DataFolder,
    Entry,
    Listing,
    below,
    find_label,
    list_files,
    list_images,
    read_json,
)
from vesselrl.errors import DataError

ANNOTATIONS = "annotations.json"
COCO_NAMES = ["coco", "_annotations.coco", "annotations", "instances", "instances_default"]
COCO_NAMES += [f"instances_{subset}{year}" for subset in ("train", "val", "test") for year in ("", "2017")]
OPEN_SHAPES = ("point", "points", "line", "linestrip")
PAIRS = "image and mask files"

# A polygon, a run-length mask, or None for a part that encloses nothing.
Part = np.ndarray | RunLengths | None


def list_entries(root: Path, findings: Findings) -> Listing:
    """The entries of a data root in the first layout that is there."""
    if not root.is_dir():
        raise DataError(f"The data root {root} is not a folder. Give the folder that holds images/.")
    folder = DataFolder(root)
    for read in READERS:
        listing = read(folder, findings)
        if listing is not None:
            return listing
    raise DataError(
        f"{root} holds no annotations: neither annotations.json nor masks/, and no json/, COCO file or pairs "
        f"of images and labels either. Add one of them (label folders: {', '.join(LABEL_FOLDERS)})."
    )


def _size(content: Mapping, *fields: str) -> tuple | None:
    """Width and height as a record gives them; None without."""
    values = tuple(content.get(name) for name in fields)
    return None if values == (None, None) else values


def _read_parts(parts: list, read: Callable, size: Size, record: str, findings: Findings) -> Outlines:
    """The outlines of an image from (place, content) of its parts; a broken part is a finding."""
    found: list[Part] = []
    for place, content in parts:
        with findings.catching(record):
            found += read(content, size, f"{record}: {place}")
    polygons = tuple(part for part in found if isinstance(part, np.ndarray))
    rle = tuple(part for part in found if isinstance(part, RunLengths))
    return Outlines(polygons, rle, sum(part is None for part in found))


# ---- annotations.json: a list of records


def read_record_list(folder: DataFolder, findings: Findings) -> Listing | None:
    """`annotations.json`, a list of `{image, mask, text, …}`, with the images in `images/`; it may be COCO.

    `mask` holds polygons, flat or one level deeper. `imageWidth` and `imageHeight`, or `width` and `height`,
    say on which size of the image they were drawn.
    """
    if not (folder.path / ANNOTATIONS).is_file():
        return None
    records = read_json(folder.path / ANNOTATIONS, ANNOTATIONS)
    if _is_coco(records):
        return _list_coco(folder, [(ANNOTATIONS, records)], findings)
    if not isinstance(records, list):
        right = '[{"image": ..., "mask": ...}, ...]'
        raise DataError(f"{ANNOTATIONS} holds no list. Write {right}.", "bad_json")
    if not records:
        raise DataError(f"{ANNOTATIONS} is an empty list. Add a record for each image.", "bad_json")
    entries = []
    for index, content in enumerate(records):
        place = f"{ANNOTATIONS} record {index}"
        with findings.catching(place, ANNOTATIONS):
            content = content if isinstance(content, dict) else {}
            located = folder.locate(content.get("image"), place)
            label = partial(_read_mask_field, content["mask"]) if "mask" in content else None
            size = _size(content, "imageWidth", "imageHeight") or _size(content, "width", "height")
            entries.append(Entry(located[0], place, located[1], label, size, content))
    return folder.listing(ANNOTATIONS, entries)


def _read_mask_field(mask: object, size: Size, record: str, findings: Findings) -> Outlines:
    """The polygons of a `mask` field of either nesting."""
    right = "Write [[x1, y1, x2, y2, ...], ...]"
    if not isinstance(mask, list):
        message = f"{record}: 'mask' is {describe(mask)}, not a list of polygons. {right}"
        raise DataError(f"{message}, or put the mask as a PNG file into masks/.", "bad_record")
    flat = []
    for item in mask:
        is_list = [isinstance(part, list) for part in item] if isinstance(item, list) else []
        if not isinstance(item, list):
            fault = f"holds {describe(item)} where a polygon was expected"
        elif any(is_list) and not all(is_list):
            fault = "mixes numbers and lists in one polygon"
        elif any(is_list) and len(item) > 2 and all(len(part) == 2 for part in item):
            fault = "holds points as [x, y] pairs"
        else:
            flat += item if any(is_list) else [item]
            continue
        raise DataError(f"{record}: 'mask' {fault}. {right}, each polygon flat.", "bad_polygon")
    parts = [(f"polygon {number}", polygon) for number, polygon in enumerate(flat)]
    return _read_parts(parts, lambda *args: [read_polygon(*args)], size, record, findings)


# ---- COCO


def read_coco(folder: DataFolder, findings: Findings) -> Listing | None:
    """COCO files under their usual names, in the data root, in `images/` and in `annotations/`.

    An object with `images` and `annotations`, polygons or run lengths. An image without annotations has an
    empty mask.
    """
    folders = (folder.path, folder.image_folder, folder.path / "annotations")
    files = [place / f"{name}.json" for place in folders for name in COCO_NAMES]
    contents = []
    for file in (file for file in files if file.is_file()):
        contents.append((file.name, read_json(file, file.name)))
        if not _is_coco(contents[-1][1]):
            message = f"{file.name} has no 'images' and 'annotations', so it is no COCO file."
            raise DataError(message, "bad_json")
    return _list_coco(folder, contents, findings) if contents else None


def _is_coco(content: object) -> bool:
    return isinstance(content, dict) and "images" in content and "annotations" in content


def _list_coco(folder: DataFolder, contents: list[tuple[str, dict]], findings: Findings) -> Listing:
    """An entry for each image of some COCO objects, given with the names of their files."""
    entries = []
    for file, content in contents:
        if not isinstance(content["images"], list) or not isinstance(content["annotations"], list):
            raise DataError(f"{file}: 'images' and 'annotations' must be lists.", "bad_json")
        annotations = _annotations_by_image(file, content, findings)
        first: dict[object, int] = {}
        for index, image in enumerate(content["images"]):
            place = f"{file} image {index}"
            with findings.catching(place, file):
                if not _has_id(image, "id"):
                    raise DataError(f"{place} has no 'id'. Add it, or remove it.", "bad_record")
                if first.setdefault(image["id"], index) != index:
                    message = f"{place} has the same 'id' as image {first[image['id']]}."
                    raise DataError(f"{message} Give each image its own.", "duplicate_record")
                name, path = folder.locate(image.get("file_name"), place, "file_name")
                parts = annotations[image["id"]]
                label = partial(_read_parts, parts, _read_annotation)
                size = _size(image, "width", "height")
                entries.append(Entry(name, place, path, label, size, {"annotations": [a for _, a in parts]}))
    if not entries:
        raise DataError(f"{contents[0][0]} names no images. Add an object for each image.", "bad_json")
    return folder.listing("COCO", entries)


def _annotations_by_image(file: str, content: dict, findings: Findings) -> dict[object, list]:
    """Annotations with their places in the list, by the id of the image."""
    known = {image["id"] for image in content["images"] if _has_id(image, "id")}
    result = defaultdict(list)
    for index, annotation in enumerate(content["annotations"]):
        place = f"{file} annotation {index}"
        if not _has_id(annotation, "image_id"):
            findings.error("bad_record", f"{place} has no 'image_id'. Add it, or remove it.", place, file)
        elif annotation["image_id"] not in known:
            message = f"{place} belongs to no image of the file. Add the image, or remove the annotation."
            findings.error("missing_image", message, place, file)
        else:
            result[annotation["image_id"]].append((f"annotation {index}", annotation))
    return result


def _has_id(value: object, name: str) -> bool:
    return isinstance(value, dict) and type(value.get(name)) in (int, str)


def _read_annotation(annotation: dict, size: Size, where: str) -> list[Part]:
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return [read_run_lengths(segmentation, size, where)]
    if isinstance(segmentation, list):
        parts = [read_polygon(part, size, f"{where}, part {n}") for n, part in enumerate(segmentation)]
        return parts or [None]
    message = f"{where}: 'segmentation' is {describe(segmentation)}, not polygons or run lengths. Remove it."
    raise DataError(message, "bad_polygon")


# ---- LabelMe


def read_labelme(folder: DataFolder, findings: Findings) -> Listing | None:
    """`json/<stem>.json`, or the JSON files beside the images in `images/`.

    Outlines are `polygon`, `rectangle` and `mask` shapes; points and lines enclose nothing and are left out.
    Images without a JSON file are entries if they have a label file.
    """
    json_folder = folder.path / "json"
    if not json_folder.is_dir():
        json_folder = folder.image_folder
        if not (json_folder.is_dir() and any(json_folder.glob("*.json"))):
            return None
    files = [path for path in list_files(json_folder) if path.suffix.lower() == ".json"]
    if not files:
        message = f"{folder.path} holds no annotations: json/ is empty. Add LabelMe files, or remove it."
        raise DataError(message)
    by_name = {below(path, folder.image_folder): path for path in reversed(folder.images)}
    entries = []
    for file in files:
        name, place = below(file, json_folder), folder.shown(file)
        with findings.catching(place, place):
            content = read_json(file, place)
            if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                raise DataError(f"{place} has no list 'shapes', so it is no LabelMe file.", "bad_json")
            image = by_name.get(name) or _image_by_path(folder, content.get("imagePath"))
            if image is not None and image.is_relative_to(folder.image_folder):
                name = below(image, folder.image_folder)
            parts = [(f"shape {number}", shape) for number, shape in enumerate(content["shapes"])]
            label = partial(_read_parts, parts, _read_shape)
            size = _size(content, "imageWidth", "imageHeight")
            content.pop("imageData", None)  # the image once more
            entries.append(Entry(name, place, image, label, size, content))
    used = {entry.image_path for entry in entries}
    others = ((name, path) for name, path in sorted(by_name.items()) if path not in used)
    entries += [Entry(name, folder.shown(path), path) for name, path in others]
    return folder.listing("LabelMe", entries, by_name)


def _image_by_path(folder: DataFolder, path: object) -> Path | None:
    """The image that `imagePath` names, which often holds the folders of another machine."""
    try:
        return folder.locate(str(path).replace("\\", "/").rsplit("/", 1)[-1], "")[1]
    except DataError:
        return None


def _read_shape(shape: object, size: Size, where: str) -> list[Part]:
    if not isinstance(shape, dict):
        raise DataError(f"{where} is {describe(shape)}, not an object. Remove it.", "bad_polygon")
    kind = shape.get("shape_type") or "polygon"
    if kind in OPEN_SHAPES:
        return [None]
    flat = _flat_points(shape.get("points"), where)
    if kind == "polygon":
        return [read_polygon(flat, size, where)]
    if kind not in ("rectangle", "mask"):
        message = f"{where} is no polygon, rectangle or mask. Draw it as a polygon, or remove it."
        raise DataError(message, "bad_polygon")
    if len(flat) != 4:
        raise DataError(f"{where} has {len(flat) // 2} corners where 2 were expected.", "bad_polygon")
    left, top, right, bottom = flat
    corners = read_polygon([left, top, right, top, right, bottom, left, bottom], size, where)
    if kind == "rectangle":
        return [corners]
    # The first corner is the first pixel of the mask. A wrong corner must not draw outside the image.
    polygons = [polygon + corners[0] for polygon in mask_to_polygons(_decode(shape.get("mask"), where))]
    return [read_polygon(polygon.ravel().tolist(), size, where) for polygon in polygons] or [None]


def _flat_points(points: object, where: str) -> list:
    """`[[x, y], …]` as `[x, y, …]`."""
    if not isinstance(points, list):
        raise DataError(f"{where} has no list 'points'. Draw it again, or remove it.", "bad_polygon")
    for point in points:
        if not isinstance(point, list):
            raise DataError(f"{where} holds {describe(point)} where a point was expected.", "bad_polygon")
        if len(point) != 2:
            found = f"a point of {len(point)} coordinates"
            raise DataError(f"{where} has {found}. Write x and y, or remove the shape.", "odd_length")
    return [value for point in points for value in point]


def _decode(text: object, where: str) -> np.ndarray:
    """The mask in a `mask` shape: a PNG in base64."""
    if not isinstance(text, str):
        raise DataError(f"{where} is a mask without 'mask'. Draw it again, or remove it.", "bad_polygon")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise DataError(f"{where}: its mask is no base64. Draw it again, or remove it.", "bad_rle") from None
    return read_mask(io.BytesIO(data), f"{where}: its mask")


# ---- Images and label files that belong together by their names


def read_folder_pairs(folder: DataFolder, _: Findings) -> Listing | None:
    """`images/` and a folder of labels, with the endings in LABEL_ENDINGS.

    images/a.jpg            and  masks/a_mask.png  or  masks/a.png
    images/21_training.tif  and  1st_manual/21_manual1.gif      (DRIVE)
    images/Image_01L.jpg    and  labels/Image_01L_1stHO.png     (CHASE_DB1)
    """
    if folder.label_folder is None:
        return None
    labels, path = f"{folder.label_folder.name}/", folder.path
    if not folder.image_folder.is_dir():
        raise DataError(f"{path} has {labels} but no images/. Put the images into images/.")
    images = folder.images
    entries = [Entry(below(image, folder.image_folder), folder.shown(image), image) for image in images]
    listing = folder.listing(PAIRS, entries)
    if not listing.entries:
        raise DataError(
            f"{path} holds no annotations: none of {len(images)} images in images/ has a mask of the same "
            f"name in {labels}. Name the masks <image>_mask.png or <image>.png."
        )
    return listing


def read_flat_pairs(folder: DataFolder, _: Findings) -> Listing | None:
    """Images with their labels beside them, in `images/` or in the data root itself.

    Image_01L.jpg  and  Image_01L_1stHO.png
    1.pgm          and  1_gt.pgm                (DCA1)
    """
    place = folder.image_folder if folder.image_folder.is_dir() else folder.path
    endings = tuple(ending for ending in LABEL_ENDINGS if ending)
    kinds: dict[bool, list[Path]] = {True: [], False: []}
    for file in list_images(place, deep=False):
        kinds[file.stem.endswith((*SECOND_OBSERVER, *endings))].append(file)
    labels = {path.stem: path for path in reversed(kinds[True])}
    pairs = [(path, find_label([path.stem], labels, endings)) for path in kinds[False]]
    entries = [Entry(path.stem, folder.shown(path), path, mask_path=mask) for path, mask in pairs if mask]
    return Listing(folder, PAIRS, entries, kinds[False], kinds[True]) if entries else None


# The first that knows the folder is used.
READERS = (read_record_list, read_coco, read_labelme, read_folder_pairs, read_flat_pairs)
