"""The layouts without outlines: images, and label files that belong to them by their names.

    images/a.jpg                with  masks/a_mask.png  or  masks/a.png
    images/21_training.tif      with  1st_manual/21_manual1.gif      (DRIVE)
    images/Image_01L.jpg        with  labels/Image_01L_1stHO.png     (CHASE_DB1)
    Image_01L.jpg               with  Image_01L_1stHO.png beside it
    1.pgm                       with  1_gt.pgm beside it             (DCA1)

Labels of a second observer are not read.
"""

from pathlib import Path

from vesselrl.data.entries import (
    LABEL_ENDINGS,
    LABEL_FOLDERS,
    SECOND_OBSERVER,
    Entry,
    FileNames,
    Listing,
    MaskFiles,
    below,
    label_folder,
    list_images,
    without_drive_ending,
)
from vesselrl.data.findings import Findings
from vesselrl.errors import DataError

NAME = "image and mask files"


def list_pairs(root: Path, findings: Findings) -> Listing | None:
    """The images with a label file; None where the data root is not of this layout.

    Raises:
        DataError: there are label files but no images, or none of the images has a label.
    """
    folder = label_folder(root)
    if folder is None:
        return _list_flat(root, findings)
    if not (root / "images").is_dir():
        raise DataError(f"{root} has {folder.name}/ but no images/. Put the images into images/.")
    images = list_images(root / "images")
    by_name = _by_name(images, root, findings)
    masks = MaskFiles(root, by_name)
    pairs = [(name, path, masks.find(name)) for name, path in by_name.items()]
    if not any(mask for _, _, mask in pairs):
        raise DataError(
            f"{root} holds no annotations: none of {len(images)} images in images/ has a mask of the same "
            f"name in {folder.name}/. Name the masks <image>_mask.png or <image>.png."
        )
    shown = FileNames(root)
    entries = [Entry(name, shown.shown(path), path, mask) for name, path, mask in pairs if mask is not None]
    return Listing(NAME, entries, images, masks.paths)


def _by_name(images: list[Path], root: Path, findings: Findings) -> dict[str, Path]:
    """Image file by name; two files of one name are an error, and the first is used."""
    shown = FileNames(root)
    by_name: dict[str, Path] = {}
    for path in images:
        name = below(path, root / "images")
        first = by_name.setdefault(name, path)
        if first is not path:
            num_names = len({below(image, root / "images") for image in images})
            message = (
                f"{shown.shown(path)} has the name of {shown.shown(first)} with another ending: images/ "
                f"holds {len(images)} files but only {num_names} different names without the ending. "
                "Keep one file for each image."
            )
            findings.error("duplicate_record", message, shown.shown(path), shown.shown(path))
    return by_name


def _list_flat(root: Path, findings: Findings) -> Listing | None:
    """Images with their labels beside them, in images/ or in the data root itself; None without a pair."""
    folder = root / "images" if (root / "images").is_dir() else root
    files = list_images(folder, deep=False)
    by_stem = {path.stem: path for path in reversed(files)}
    endings = [ending for ending in LABEL_ENDINGS if ending]
    shown = FileNames(root)
    entries, labels = [], set()
    for path in files:
        bases = {path.stem, without_drive_ending(path.stem)}
        found = [by_stem[base + ending] for ending in endings for base in bases if base + ending in by_stem]
        if found:
            entries.append(Entry(path.stem, shown.shown(path), path, found[0]))
            labels |= set(found)
    if not entries:
        return None
    entries = [entry for entry in entries if entry.image_path not in labels]
    labels |= {path for path in files if path.stem.endswith((*SECOND_OBSERVER, *endings))}
    images = [path for path in files if path not in labels]
    return Listing(NAME, entries, images, [path for path in files if path in labels])


def expected_layouts(root: Path) -> str:
    """The message for a data root that is of no layout."""
    return (
        f"{root} holds no annotations: neither annotations.json nor masks/, and no json/, COCO file or pairs "
        f"of images and labels either. Add one of them (label folders: {', '.join(LABEL_FOLDERS)})."
    )
