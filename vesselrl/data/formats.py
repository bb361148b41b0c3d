"""Readers of the layouts that a data root may have: one function each, and the list READERS at the end.

All polygons, shapes and annotations of an image are one target; a label file goes before them.
"""

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from vesselrl.data import polygons, records
from vesselrl.data.images import read_mask
from vesselrl.data.polygons import Outline, Size, describe, mask_to_polygons
from vesselrl.data.records import DataFolder, Entry, Findings, Listing, below, list_files
from vesselrl.errors import DataError

ANNOTATIONS = "annotations.json"
COCO_NAMES = ["coco", "_annotations.coco", "annotations", "instances", "instances_default"]
COCO_NAMES += [f"instances_{subset}{year}" for subset in ("train", "val", "test") for year in ("", "2017")]
OPEN_SHAPES = ("point", "points", "line", "linestrip")
PAIRS = "image and mask files"


def list_entries(root: Path, findings: Findings) -> Listing:
    """The entries of a data root in the first layout that is there."""
    if not root.is_dir():
        raise DataError(f"The data root {root} is not a folder. Give the folder that holds images/.")
    folder = DataFolder(root)
    for read in READERS:
        if (listing := read(folder, findings)) is not None:
            return listing
    raise DataError(
        f"{root} holds no annotations: neither annotations.json nor masks/, and no json/, COCO file or pairs "
        f"of images and labels either. Add one of them (label folders: {', '.join(records.LABEL_FOLDERS)})."
    )


def _size(content: Mapping, *fields: str) -> tuple | None:
    """Width and height as a record gives them; None without."""
    values = tuple(content.get(name) for name in fields)
    return None if values == (None, None) else values


def _read_parts(parts: list, read: Callable, size: Size, record: str, findings: Findings) -> list[Outline]:
    """The outlines of an image from (place, content) of its parts; a broken part is a finding."""
    found: list[Outline | None] = []  # None: a part that encloses nothing
    for place, content in parts:
        with findings.catching(record):
            found += read(content, size, f"{record}: {place}")
    if skipped := sum(part is None for part in found):
        findings.add("few_points", record, count=skipped)
    return [part for part in found if part is not None]


def read_record_list(folder: DataFolder, findings: Findings) -> Listing | None:
    """`annotations.json`: a list of `{image, mask, text, …}`, polygons flat or nested; it may be COCO."""
    if not (folder.path / ANNOTATIONS).is_file():
        return None
    contents = records.read_json(folder.path / ANNOTATIONS, ANNOTATIONS)
    if _is_coco(contents):
        return _list_coco(folder, [(ANNOTATIONS, contents)], findings)
    if not isinstance(contents, list) or not contents:
        fault = "is an empty list" if contents == [] else "holds no list"
        advice = 'Write a record for each image: [{"image": ..., "mask": ...}, ...].'
        raise DataError(f"{ANNOTATIONS} {fault}. {advice}", "bad_json")
    entries = []
    for index, content in enumerate(contents):
        place = f"{ANNOTATIONS} record {index}"
        with findings.catching(place, ANNOTATIONS):
            content = content if isinstance(content, dict) else {}
            located = folder.locate(content.get("image"), place)
            label = partial(_read_mask_field, content["mask"]) if "mask" in content else None
            size = _size(content, "imageWidth", "imageHeight") or _size(content, "width", "height")
            entries.append(Entry(located[0], place, located[1], label, size, content))
    return folder.listing(ANNOTATIONS, entries)


def _read_mask_field(mask: object, size: Size, record: str, findings: Findings) -> list[Outline]:
    """The polygons of a `mask` field of either nesting."""
    right = "Write [[x1, y1, x2, y2, ...], ...]"
    if not isinstance(mask, list):
        fault = f"{record}: 'mask' is {describe(mask)}, not a list of polygons. {right}"
        raise DataError(f"{fault}, or put the mask as a PNG file into masks/.", "bad_record")
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
    return _read_parts(parts, lambda *args: [polygons.read_polygon(*args)], size, record, findings)


def read_coco(folder: DataFolder, findings: Findings) -> Listing | None:
    """COCO files with polygons or run lengths; an image without annotations has an empty mask."""
    folders = (folder.path, folder.image_folder, folder.path / "annotations")
    files = [place / f"{name}.json" for place in folders for name in COCO_NAMES]
    contents = [(file.name, records.read_json(file, file.name)) for file in files if file.is_file()]
    for name, content in contents:
        if not _is_coco(content):
            raise DataError(f"{name} has no lists 'images' and 'annotations', as COCO files do.", "bad_json")
    return _list_coco(folder, contents, findings) if contents else None


def _is_coco(content: object) -> bool:
    lists = (content.get("images"), content.get("annotations")) if isinstance(content, dict) else (None,)
    return all(isinstance(part, list) for part in lists)


def _list_coco(folder: DataFolder, contents: list[tuple[str, dict]], findings: Findings) -> Listing:
    """An entry for each image of some COCO objects, given with the names of their files."""
    entries = []
    for file, content in contents:
        known = {image["id"] for image in content["images"] if _has_id(image, "id")}
        annotations = defaultdict(list)
        for index, annotation in enumerate(content["annotations"]):
            place = f"{file} annotation {index}"
            with findings.catching(place, file):
                if not _has_id(annotation, "image_id"):
                    raise DataError(f"{place} has no 'image_id'. Add it, or remove it.", "bad_record")
                if annotation["image_id"] not in known:
                    fault = "belongs to no image of the file. Add the image, or remove the annotation."
                    raise DataError(f"{place} {fault}", "missing_image")
                annotations[annotation["image_id"]].append((f"annotation {index}", annotation))
        first: dict[object, int] = {}
        for index, image in enumerate(content["images"]):
            place = f"{file} image {index}"
            with findings.catching(place, file):
                if not _has_id(image, "id"):
                    raise DataError(f"{place} has no 'id'. Add it, or remove it.", "bad_record")
                if (other := first.setdefault(image["id"], index)) != index:
                    fault = f"{place} has the same 'id' as image {other}. Give each image its own."
                    raise DataError(fault, "duplicate_record")
                name, path = folder.locate(image.get("file_name"), place, "file_name")
                parts = annotations[image["id"]]
                label = partial(_read_parts, parts, _read_annotation)
                size = _size(image, "width", "height")
                entries.append(Entry(name, place, path, label, size, {"annotations": [a for _, a in parts]}))
    if not entries:
        raise DataError(f"{contents[0][0]} names no images. Add an object for each image.", "bad_json")
    return folder.listing("COCO", entries)


def _has_id(value: object, name: str) -> bool:
    return isinstance(value, dict) and type(value.get(name)) in (int, str)


def _read_annotation(annotation: dict, size: Size, where: str) -> list[Outline | None]:
    found = annotation.get("segmentation")
    if isinstance(found, dict):
        return [polygons.read_run_lengths(found, size, where)]
    if isinstance(found, list):
        return [polygons.read_polygon(p, size, f"{where}, part {n}") for n, p in enumerate(found)] or [None]
    fault = f"{where}: 'segmentation' is {describe(found)}, not polygons or run lengths. Remove it."
    raise DataError(fault, "bad_polygon")


def read_labelme(folder: DataFolder, findings: Findings) -> Listing | None:
    """`json/<stem>.json`, or beside the images; images without one are entries if they have a label file."""
    json_folder = folder.path / "json"
    if not json_folder.is_dir():
        json_folder = folder.image_folder
        if not any(json_folder.glob("*.json")):
            return None
    if not (files := [path for path in list_files(json_folder) if path.suffix.lower() == ".json"]):
        raise DataError(f"{folder.path} holds no annotations: json/ is empty. Fill it, or remove it.")
    by_name = {below(path, folder.image_folder): path for path in reversed(folder.images)}
    entries = []
    for file in files:
        name, place = below(file, json_folder), folder.shown(file)
        with findings.catching(place, place):
            content = records.read_json(file, place)
            if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                raise DataError(f"{place} has no list 'shapes', so it is no LabelMe file.", "bad_json")
            if (image := by_name.get(name)) is None:
                with suppress(DataError):  # the path often holds the folders of another machine
                    written = str(content.get("imagePath")).replace("\\", "/").rsplit("/", 1)[-1]
                    image = folder.locate(written, "")[1]
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


def _read_shape(shape: object, size: Size, where: str) -> list[Outline | None]:
    if not isinstance(shape, dict):
        raise DataError(f"{where} is {describe(shape)}, not an object. Remove it.", "bad_polygon")
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    if kind in OPEN_SHAPES:
        return [None]
    fault, code = "", "bad_polygon"
    wrong = [p for p in points if not isinstance(p, list) or len(p) != 2] if isinstance(points, list) else []
    if not isinstance(points, list):
        fault = "has no list 'points'"
    elif wrong and not isinstance(wrong[0], list):
        fault = f"holds {describe(wrong[0])} where a point was expected"
    elif wrong:
        fault, code = f"has a point of {len(wrong[0])} coordinates", "odd_length"
    elif kind not in ("polygon", "rectangle", "mask"):
        fault = "is no polygon, rectangle or mask"
    elif kind != "polygon" and len(points) != 2:
        fault = f"has {len(points)} corners where 2 were expected"
    if fault:
        raise DataError(f"{where} {fault}. Draw it again as a polygon, or remove it.", code)
    if kind == "polygon":
        return [polygons.read_polygon([value for point in points for value in point], size, where)]
    (left, top), (right, bottom) = points
    corners = polygons.read_polygon([left, top, right, top, right, bottom, left, bottom], size, where)
    if kind == "rectangle":
        return [corners]
    text = shape.get("mask")
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        fault = f"its mask is {describe(text)}, no PNG in base64. Draw it again, or remove it."
        code = "bad_rle" if isinstance(text, str) else "bad_polygon"
        raise DataError(f"{where}: {fault}", code) from None
    # The first corner is the first pixel of the mask. A wrong corner must not draw outside the image.
    mask = read_mask(io.BytesIO(data), f"{where}: its mask")
    outlines = [outline + corners[0] for outline in mask_to_polygons(mask)]
    return [polygons.read_polygon(outline.ravel().tolist(), size, where) for outline in outlines] or [None]


def read_folder_pairs(folder: DataFolder, _: Findings) -> Listing | None:
    """`images/` and a folder of labels, as DRIVE and CHASE_DB1: LABEL_FOLDERS and _ENDINGS of `records`."""
    if folder.label_folder is None:
        return None
    labels, path, images = f"{folder.label_folder.name}/", folder.path, folder.images
    if not folder.image_folder.is_dir():
        raise DataError(f"{path} has {labels} but no images/. Put the images into images/.")
    entries = [Entry(below(image, folder.image_folder), folder.shown(image), image) for image in images]
    listing = folder.listing(PAIRS, entries)
    if not listing.entries:
        fault = f"none of {len(images)} images in images/ has a mask of the same name in {labels}"
        advice = "Name the masks <image>_mask.png or <image>.png."
        raise DataError(f"{path} holds no annotations: {fault}. {advice}")
    return listing


def read_flat_pairs(folder: DataFolder, _: Findings) -> Listing | None:
    """Images with their labels beside them, in `images/` or in the data root itself, as DCA1."""
    place = folder.image_folder if folder.image_folder.is_dir() else folder.path
    endings = tuple(ending for ending in records.LABEL_ENDINGS if ending)
    kinds: dict[bool, list[Path]] = {True: [], False: []}
    for file in records.list_images(place, deep=False):
        kinds[file.stem.endswith((*records.SECOND_OBSERVER, *endings))].append(file)
    labels = {path.stem: path for path in reversed(kinds[True])}
    pairs = [(path, records.find_label([path.stem], labels, endings)) for path in kinds[False]]
    entries = [Entry(path.stem, folder.shown(path), path, mask_path=mask) for path, mask in pairs if mask]
    return Listing(folder, PAIRS, entries, kinds[False], kinds[True]) if entries else None


# The first that knows the folder is used; the others return None.
READERS = (read_record_list, read_coco, read_labelme, read_folder_pairs, read_flat_pairs)
