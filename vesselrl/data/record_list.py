"""The layout with `annotations.json`, a list of `{image, mask, text, …}`, and the images in `images/`.

`mask` holds polygons, flat or one level deeper; all polygons of an image are one target. `imageWidth` and
`imageHeight`, or `width` and `height`, say on which size of the image they were drawn.
"""

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
    written_size,
)
from vesselrl.data.findings import Findings
from vesselrl.data.polygons import OnError, Size, parse_polygons
from vesselrl.errors import DataError

FILE = "annotations.json"


def list_records(root: Path, records: object, findings: Findings) -> Listing:
    """The entries of `annotations.json`; a broken record is reported and left out.

    Raises:
        DataError: it is no list, or an empty one.
    """
    if not isinstance(records, list):
        raise DataError(f'{FILE} holds no list. Write [{{"image": ..., "mask": ...}}, ...].', "bad_json")
    if not records:
        raise DataError(f"{FILE} is an empty list. Add a record for each image.", "bad_json")
    paths = {}
    for index, content in enumerate(records):
        place = f"{FILE} record {index}"
        name = content.get("image") if isinstance(content, dict) else None
        try:
            paths[index] = path_below_images(name, place)
        except DataError as error:
            findings.caught(error, place, FILE)
    masks = MaskFiles(root, (str(path.with_suffix("")) for path in paths.values()))
    entries = []
    for index, path in paths.items():
        content, name = records[index], str(path.with_suffix(""))
        entries.append(
            Entry(
                name,
                f"{FILE} record {index}",
                find_image(root, path),
                masks.find(name),
                partial(_read_label, content["mask"]) if "mask" in content else None,
                written_size(content, ("imageWidth", "imageHeight"), ("width", "height")),
                content,
            )
        )
    return Listing(FILE, entries, list_images(root / "images"), masks.paths)


def _read_label(mask: object, size: Size, record: str, on_error: OnError) -> Outlines:
    polygons, num_skipped = parse_polygons(mask, size, record, on_error)
    return Outlines(polygons, (), num_skipped)
