"""The layout of COCO: one JSON object with `images` and `annotations`, polygons or run lengths.

All annotations of an image are one target, whatever their category. The parts of a polygon are joined; a
hole survives in run lengths, or in a part that runs to the hole and back as those of `mask_to_polygons` do.
An image without annotations has an empty mask.
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from vesselrl.data.entries import (
    Entry,
    Listing,
    MaskFiles,
    Outlines,
    find_image,
    list_images,
    path_below_images,
    read_json,
    written_size,
)
from vesselrl.data.findings import Findings
from vesselrl.data.polygons import OnError, Size, describe, read_outline
from vesselrl.data.run_lengths import read_run_lengths
from vesselrl.errors import DataError

NAME = "COCO"
_NAMES = ["coco", "_annotations.coco", "annotations", "instances", "instances_default"]
_NAMES += [f"instances_{side}{year}" for side in ("train", "val", "test") for year in ("", "2017")]


def coco_files(root: Path) -> list[Path]:
    """The COCO files of a data root, by their usual names, in the root, in images/ and in annotations/."""
    folders = (root, root / "images", root / "annotations")
    files = [folder / f"{name}.json" for folder in folders for name in _NAMES]
    return [file for file in files if file.is_file() and file != root / "annotations.json"]


def is_coco(content: object) -> bool:
    """Whether the content of a JSON file is a COCO object."""
    return isinstance(content, dict) and "images" in content and "annotations" in content


def read_coco_files(root: Path, files: list[Path], findings: Findings) -> Listing:
    """The entries of all COCO files of a data root."""
    contents = []
    for file in files:
        content = read_json(file, file.name)
        if not is_coco(content):
            raise DataError(
                f"{file.name} has no 'images' and 'annotations', so it is no COCO file.", "bad_json"
            )
        contents.append((file.name, content))
    return list_coco(root, contents, findings)


def list_coco(root: Path, contents: list[tuple[str, dict]], findings: Findings) -> Listing:
    """An entry for each image of some COCO objects, given with the names of their files.

    Raises:
        DataError: `images` or `annotations` is no list, or there are no images.
    """
    found = []
    for file, content in contents:
        if not isinstance(content["images"], list) or not isinstance(content["annotations"], list):
            raise DataError(f"{file}: 'images' and 'annotations' must be lists.", "bad_json")
        annotations = _by_image(file, content, findings)
        found += _images(file, content["images"], annotations, findings)
    if not found:
        raise DataError(f"{contents[0][0]} names no images. Add an object for each image.", "bad_json")
    masks = MaskFiles(root, (str(path.with_suffix("")) for _, path, _, _ in found))
    entries = []
    for place, path, image, annotations in found:
        name = str(path.with_suffix(""))
        label = partial(_read_annotations, annotations)
        size = written_size(image, ("width", "height"))
        content = {"annotations": [annotation for _, annotation in annotations]}
        entries.append(Entry(name, place, find_image(root, path), masks.find(name), label, size, content))
    return Listing(NAME, entries, list_images(root / "images"), masks.paths)


def _by_image(file: str, content: dict, findings: Findings) -> dict[object, list[tuple[int, dict]]]:
    """Annotations and their places in the list, by the id of the image."""
    known = {image.get("id") for image in content["images"] if _has_id(image, "id")}
    result = defaultdict(list)
    for index, annotation in enumerate(content["annotations"]):
        place = f"{file} annotation {index}"
        if not _has_id(annotation, "image_id"):
            findings.error("bad_record", f"{place} has no 'image_id'. Add it, or remove it.", place, file)
        elif annotation["image_id"] not in known:
            message = f"{place} belongs to no image of the file. Add the image, or remove the annotation."
            findings.error("missing_image", message, place, file)
        else:
            result[annotation["image_id"]].append((index, annotation))
    return result


def _images(file: str, images: list, annotations: dict, findings: Findings) -> Iterator[tuple]:
    """Place, path, object and annotations of each usable image."""
    first: dict[object, int] = {}
    for index, image in enumerate(images):
        place = f"{file} image {index}"
        if not _has_id(image, "id"):
            findings.error("bad_record", f"{place} has no 'id'. Add it, or remove it.", place, file)
            continue
        if first.setdefault(image["id"], index) != index:
            message = f"{place} has the same 'id' as image {first[image['id']]}. Give each image its own."
            findings.error("duplicate_record", message, place, file)
            continue
        try:
            path = path_below_images(image.get("file_name"), place, "file_name")
        except DataError as error:
            findings.caught(error, place, file)
            continue
        yield place, path, image, annotations.get(image["id"], [])


def _has_id(value: object, name: str) -> bool:
    return isinstance(value, dict) and type(value.get(name)) in (int, str)


def _read_annotations(
    annotations: list[tuple[int, dict]], size: Size, record: str, on_error: OnError
) -> Outlines:
    polygons, rle, num_skipped = [], [], 0
    for index, annotation in annotations:
        segmentation = annotation.get("segmentation")
        where = f"{record}: annotation {index}"
        try:
            if isinstance(segmentation, dict):
                rle.append(read_run_lengths(segmentation, size, where))
            elif isinstance(segmentation, list):
                parts = [
                    read_outline(part, size, f"{where}, part {n}") for n, part in enumerate(segmentation)
                ]
                polygons += [part for part in parts if part is not None]
                num_skipped += sum(part is None for part in parts) or not parts
            else:
                kind = describe(segmentation)
                message = f"{where}: 'segmentation' is {kind}, not polygons or run lengths. Remove it."
                raise DataError(message, "bad_polygon")
        except DataError as error:
            on_error(error)
    return Outlines(tuple(polygons), tuple(rle), num_skipped)
