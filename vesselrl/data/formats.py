"""Readers of the layouts that a data root may have, the list READERS at the end, and writers of two of them.

All polygons, shapes and annotations of an image are one target; a label file goes before them.
"""

import base64
import io
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from vesselrl.data import pairing, polygons, records
from vesselrl.data.images import read_mask
from vesselrl.data.pairing import Names, below, fold, folder_key, list_files, list_images
from vesselrl.data.polygons import Outline, RunLengths, Size, describe, mask_to_polygons
from vesselrl.data.records import DataFolder, Entry, Findings, Listing
from vesselrl.errors import DataError

ANNOTATIONS = "annotations.json"
COCO_NAMES = ["coco", "_annotations.coco", "annotations", "instances", "instances_default"]
COCO_NAMES += [f"instances_{subset}{year}" for subset in ("train", "val", "test") for year in ("", "2017")]
# Other names of COCO files that messages may show; a name of other words may be a person's.
_COCO_WORDS = re.compile(
    r"(?:[-_. ]*(?:result|train|valid|val|test|coco|instances|annotations?|default|labels?|export|\d{1,6}))+"
)
OPEN_SHAPES = ("point", "points", "line", "linestrip")
PAIRS = "image and mask files"


def list_entries(root: Path, findings: Findings, **places: str | None) -> Listing:
    """The entries of a data root in the first layout that is there.

    `places`: image_dir and mask_dir, folders below it, and mask_suffix, what follows the image's name in that
    of its mask; they are searched where they are not given.
    """
    if not os.path.isdir(root):  # unlike Path's it is false where a folder above cannot be entered
        raise DataError("The data root is not a folder. Give the folder that holds images/.")
    folder = DataFolder(root, **places)
    if (listing := _read_first(folder, findings) or _list_subsets(folder, findings)) is not None:
        return listing
    raise DataError(
        "The data root holds no annotations: neither annotations.json nor masks/, and no json/, COCO file or "
        f"pairs of images and labels either. It holds {pairing.inventory(folder.path)}. Give the folder "
        "above images/ and masks/ as the data root, or name the two with --image_dir and --mask_dir "
        "(docs/data.md)."
    )


def _read_first(folder: DataFolder, findings: Findings) -> Listing | None:
    return next(filter(None, (read(folder, findings) for read in READERS)), None)


def _list_subsets(folder: DataFolder, findings: Findings) -> Listing | None:
    """The entries of train/, valid/ and test/: all of an export, the training images of published pairs.

    An export deals out single images, which is no split by patient; a published test set is left alone.
    """
    listings: list[Listing] = []
    folders = [] if folder.are_given else pairing.subfolders(folder.path)
    for path in (path for name in pairing.SUBSETS for path in folders if folder_key(path.name) == name):
        try:
            subset = DataFolder(path, mask_suffix=folder.mask_suffix, prefix=f"{path.name}/")
            listings += filter(None, [_read_first(subset, findings)])
        except DataError:
            if not listings or not listings[0].pairs:
                raise
    if not listings:
        return None
    first, *others = listings
    if first.pairs:
        first.folder.mapping_file = folder.mapping_file
        if others:
            counts = [f"{one.folder.prefix} ({len(one.entries)})" for one in others]
            findings.add("other_subsets", what=", ".join(counts))
        return first
    entries = [replace(e, name=one.folder.prefix + e.name) for one in listings for e in one.entries]
    images, masks = ([f for one in listings for f in getattr(one, kind)] for kind in ("images", "masks"))
    return Listing(folder, first.layout, entries, images, masks)


def _size(content: Mapping) -> tuple | None:
    """Width and height as a record gives them; None without."""
    for names in (("imageWidth", "imageHeight"), ("width", "height")):
        if any(content.get(name) is not None for name in names):
            return tuple(map(content.get, names))
    return None


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
    file = folder.prefix + ANNOTATIONS
    contents = records.read_json(folder.path / ANNOTATIONS, file)
    if _is_coco(contents, file):
        return _list_coco(folder, [(file, contents)], findings)
    if not isinstance(contents, list) or not contents:
        fault = "is an empty list" if contents == [] else "holds no list"
        advice = 'Write a record for each image: [{"image": ..., "mask": ...}, ...].'
        raise DataError(f"{file} {fault}. {advice}", "bad_json")
    entries = []
    for index, content in enumerate(contents):
        place = f"{file} record {index}"
        with findings.catching(place, file):
            content = content if isinstance(content, dict) else {}
            name, path = folder.locate(content.get("image"), place)
            label = partial(_read_mask_field, content["mask"]) if "mask" in content else None
            entries.append(Entry(name, place, path, label, _size(content), content))
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
    folders = dict.fromkeys((folder.path, folder.image_folder, folder.path / "annotations"))
    files = [place / f"{name}.json" for place in folders for name in COCO_NAMES]
    files = [(folder.prefix + file.name, file) for file in files if file.is_file()]
    contents = [(name, records.read_json(file, name)) for name, file in files]
    for name, content in contents:
        if not _is_coco(content, name):
            raise DataError(f"{name} has no lists 'images' and 'annotations', as COCO files do.", "bad_json")
    if not contents and folder.pair_folder is None:
        contents = [item for place in folders for item in _find_coco(folder, place)]
    return _list_coco(folder, contents, findings) if contents else None


def _find_coco(folder: DataFolder, place: Path) -> Iterator[tuple[str, dict]]:
    """COCO files of any other name in a folder; JSON that is called after an image is LabelMe."""
    images = {fold(file.stem) for file in list_images(place, deep=False)}
    for file in list_files(place, (".json",), deep=False):
        if fold(file.stem) in images:
            continue
        is_known = _COCO_WORDS.fullmatch(file.stem)
        shown = folder.prefix + file.name if is_known else folder.shown(file)
        try:
            content = records.read_json(file, shown)
        except DataError:
            if is_known:
                raise
            continue  # nothing says that it is about these images
        if _is_coco(content, shown):
            yield shown, content


def _is_coco(content: object, file: str) -> bool:
    """Whether JSON has the form of COCO; refuses those of Label Studio, which hold no outlines in px."""
    first = content[0] if isinstance(content, list) and content else None
    if isinstance(first, dict) and ({"data", "annotations"} <= set(first) or "annotation_id" in first):
        advice = "Export the project as COCO, or the brush labels as PNG."
        raise DataError(f"{file} is Label Studio's own JSON, which is not read. {advice}", "bad_json")
    parts = ("images", "annotations")
    return isinstance(content, dict) and all(isinstance(content.get(part), list) for part in parts)


def _list_coco(folder: DataFolder, contents: list[tuple[str, dict]], findings: Findings) -> Listing:
    """An entry for each image of some COCO objects, given with the names of their files."""
    entries = []
    for file, content in contents:
        known = {_id(image, "id") for image in content["images"]} - {None}
        annotations = defaultdict(list)
        for index, annotation in enumerate(content["annotations"]):
            place = f"{file} annotation {index}"
            with findings.catching(place, file):
                if (image_id := _id(annotation, "image_id")) is None:
                    raise DataError(f"{place} has no 'image_id'. Add it, or remove it.", "bad_record")
                if image_id not in known:
                    kinds = {type(value) for value in (*known, image_id)}
                    mixed = " (some ids are texts, others numbers)" if len(kinds) > 1 else ""
                    fault = f"{place} belongs to no image of the file{mixed}"
                    raise DataError(f"{fault}. Add the image, or remove the annotation.", "missing_image")
                annotations[image_id].append((f"annotation {index}", annotation))
        first: dict[object, int] = {}
        for index, image in enumerate(content["images"]):
            place = f"{file} image {index}"
            with findings.catching(place, file):
                if (image_id := _id(image, "id")) is None:
                    raise DataError(f"{place} has no 'id'. Add it, or remove it.", "bad_record")
                if (other := first.setdefault(image_id, index)) != index:
                    fault = f"{place} has the same 'id' as image {other}. Give each image its own."
                    raise DataError(fault, "duplicate_record")
                name, path = folder.locate(image.get("file_name"), place, "file_name")
                parts = annotations[image_id]
                label = partial(_read_parts, parts, _read_annotation)
                content = {"annotations": [annotation for _, annotation in parts]}
                entries.append(Entry(name, place, path, label, _size(image), content))
    if not entries:
        raise DataError(f"{contents[0][0]} names no images. Add an object for each image.", "bad_json")
    return folder.listing("COCO", entries)


def _id(value: object, name: str) -> int | str | None:
    """An id of COCO: 1, 1.0 (as pandas writes it) and "1" are the same; None: it has none."""
    found = value.get(name) if isinstance(value, dict) else None
    if isinstance(found, float):
        return int(found) if found.is_integer() else None
    if isinstance(found, str):
        return int(found) if re.fullmatch("0|[1-9][0-9]{0,17}", found) else found
    return found if type(found) is int else None


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
    by_name = Names({below(path, folder.image_folder): path for path in reversed(folder.images)})
    if not json_folder.is_dir():
        json_folder = folder.image_folder
        beside = [below(path, json_folder) for path in list_files(json_folder, (".json",), deep=False)]
        # In the data root itself JSON may be anything.
        if not beside or (json_folder == folder.path and not any(map(by_name.get, beside))):
            return None
    if not (files := list_files(json_folder, (".json",))):
        raise DataError("The data root holds no annotations: json/ is empty. Fill it, or remove it.")
    entries = []
    for file in files:
        name, place = below(file, json_folder), folder.shown(file)
        with findings.catching(place, place):
            content = records.read_json(file, place)
            if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                raise DataError(f"{place} has no list 'shapes', so it is no LabelMe file.", "bad_json")
            if (image := by_name.get(name)) is None:
                with suppress(DataError):  # the path often holds the folders of another machine
                    image = folder.locate(content.get("imagePath"), "")[1]
            if image is not None and image.is_relative_to(folder.image_folder):
                name = below(image, folder.image_folder)
            parts = [(f"shape {number}", shape) for number, shape in enumerate(content["shapes"])]
            label = partial(_read_parts, parts, _read_shape)
            content.pop("imageData", None)  # the image once more
            entries.append(Entry(name, place, image, label, _size(content), content))
    others = by_name.files.items() - {(entry.name, entry.image_path) for entry in entries}
    entries += [Entry(name, folder.shown(path), path) for name, path in sorted(others)]
    return folder.listing("LabelMe", entries, by_name.files)


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
    elif kind not in ("polygon", "rectangle", "rotation", "circle", "mask"):
        fault = "is no polygon, rectangle, circle or mask"
    elif kind in ("circle", "mask") and len(points) != 2:
        fault = f"has {len(points)} points where 2 were expected"
    elif kind == "rectangle" and len(points) not in (2, 4):
        fault = f"has {len(points)} corners where 2 or 4 were expected"
    if fault:
        raise DataError(f"{where} {fault}. Draw it again as a polygon, or remove it.", code)
    if kind == "circle":
        points = polygons.circle(points, size, where)
    if kind not in ("rectangle", "mask") or len(points) == 4:  # X-AnyLabeling writes all four corners
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


def labelme(name: str, mask: np.ndarray) -> dict:
    """The LabelMe file of an image file `name` beside it: the outlines of a bool mask (H, W), holes kept."""
    kind, others = {"label": "vessel", "shape_type": "polygon"}, {"group_id": None, "flags": {}}
    shapes = [kind | {"points": outline.tolist()} | others for outline in mask_to_polygons(mask)]
    height, width = mask.shape
    image = {"imagePath": name, "imageData": None, "imageHeight": height, "imageWidth": width}
    return {"version": "5.5.0", "flags": {}, "shapes": shapes, **image}


def coco(masks: Iterable[tuple[str, np.ndarray]]) -> dict:
    """The COCO file of (image file, bool mask (H, W)): run lengths, area and box; none of an empty mask."""
    images, annotations = [], []
    for number, (name, mask) in enumerate(masks, start=1):
        height, width = mask.shape
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        if mask.any():
            runs = {"size": [height, width], "counts": RunLengths.encode(mask).runs.tolist()}
            box = {"bbox": [*cv2.boundingRect(mask.view(np.uint8))], "area": int(mask.sum())}
            owner = {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0}
            annotations.append({**owner, "segmentation": runs, **box})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "vessel"}]}


def read_folder_pairs(folder: DataFolder, _: Findings) -> Listing | None:
    """A folder of images and one of labels, by their usual names, as DRIVE and nnU-Net; see `pairing`."""
    if folder.pair_folder in (None, folder.image_folder):
        return None
    if not folder.is_label_given:
        pairing.refuse_rivals(folder.path, folder.pair_folder)
    labels, images = folder.shown_folder(folder.pair_folder), folder.images
    if not folder.image_folder.is_dir():
        raise DataError(f"The data root has {labels} but no images/. Put the images into images/.")
    entries = [Entry(below(image, folder.image_folder), folder.shown(image), image) for image in images]
    listing = folder.listing(PAIRS, entries)
    if not listing.entries:
        place = folder.shown_folder(folder.image_folder)
        fault = f"none of {len(images)} images in {place} has a mask of the same name in {labels}"
        wanted = "<image>_mask.png or <image>.png, or with one and the same ending after all image names"
        wanted = wanted if len(folder.endings) > 1 else f"<image>{folder.endings[0]}.png"
        raise DataError(
            f"The data root holds no annotations: {fault}. It holds {pairing.inventory(folder.path)}. Name "
            f"the masks {wanted}, or give --image_dir, --mask_dir or --mask_suffix (docs/data.md)."
        )
    return listing


def read_flat_pairs(folder: DataFolder, _: Findings) -> Listing | None:
    """Images with their labels beside them, in `images/` or in the data root itself, as DCA1."""
    place = folder.image_folder if folder.image_folder.is_dir() else folder.path
    endings = tuple(fold(ending) for ending in (*folder.endings, *pairing.SECOND_OBSERVER) if ending)
    files = list_images(place, deep=False)
    masks = [path for path in files if fold(path.stem).endswith(endings)]
    images = [path for path in files if not fold(path.stem).endswith(endings)]
    labels = Names({path.stem: path for path in reversed(masks)})
    endings = labels.endings_in_use(filter(None, folder.endings))
    pairs = [(path, pairing.find_label([path.stem], labels, endings)) for path in images]
    entries = [Entry(path.stem, folder.shown(path), path, mask_path=mask) for path, mask in pairs if mask]
    pairing.refuse_shared({entry.name: entry.mask_path for entry in entries})
    return Listing(folder, PAIRS, entries, images, masks) if entries else None


# The first that knows the folder is used; the others return None.
READERS = (read_record_list, read_coco, read_labelme, read_folder_pairs, read_flat_pairs)
