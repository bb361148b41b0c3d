"""The data roots and faults of the golden check, in files that are called after persons."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as pycocotools_mask

from tests.golden import broken_input
from tests.golden.broken_input import LAYOUTS, PAIRS, POLYGONS, DataRoot, add, again, bars, outlines, redraw
from vesselrl.data.patients import is_impersonal
from vesselrl.data.polygons import mask_to_polygons

PERSONS = ("CHEN_JING", "LI_MING", "WANG_FANG", "ZHAO_WEI")
SECRETS = (*PERSONS, *(f"123456789{number}" for number in range(4)))
NAMES = tuple(f"{name}(123456789{k})_1-2_3_0A1B2C3D_frame_00000{k}" for k, name in enumerate(PERSONS))
PAIR_LAYOUTS = tuple(PAIRS)


def break_runs(root: DataRoot) -> None:
    with edited(root.file) as content:
        content["annotations"][1]["segmentation"]["counts"] = [4095]


def in_alpha(root: DataRoot) -> None:
    alpha = bars(1).astype(np.uint8) * 255
    Image.fromarray(np.dstack([alpha * 0, alpha])).save(root.mask())


def in_palette(root: DataRoot) -> None:
    image = Image.frombytes("P", (64, 64), bars(1).tobytes())
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(root.mask())


def to_be_ignored(values: np.ndarray) -> np.ndarray:
    return np.where(values, 1, np.where(np.roll(values, 1, 0), 255, 0)).astype(np.uint8)


SHARES = [[value / 64 for value in one] for one in outlines(1)]
FRAMES = {"save_all": True, "append_images": [Image.new("L", (64, 64))]}
PNG_MASKS = ("both", "masks", "chase")
FAULTS = broken_input.FAULTS | {
    "broken run lengths": (("rle",), break_runs),
    "shares": (POLYGONS, lambda root: root.set_outlines(SHARES)),
    "no area": (POLYGONS, add(10, 10, 30, 10, 60, 10, 45, 10)),
    "thin": (POLYGONS, add(2, 50, 60, 62.2, 60, 62.5)),
    "twice around": (POLYGONS, add(*2 * [2, 40, 24, 40, 24, 60, 2, 60])),
    "frames": (("annotations", "masks", "drive"), again(lambda image: image, **FRAMES)),
    "12 bits": (broken_input.IN_16_BITS, again(lambda i: Image.fromarray(np.asarray(i).astype("u2") * 16))),
    "to be ignored": (broken_input.WITH_MASKS, redraw(to_be_ignored)),
    "numbers": (broken_input.WITH_MASKS, redraw(lambda v: v // 255 * np.arange(32, 96, dtype="u1") // 32)),
    "alpha": (PNG_MASKS, in_alpha),
    "palette": ((*PNG_MASKS, "drive"), in_palette),
}  # fmt: skip
# The finding of each fault.
CODES = {
    "missing": "missing_image", "unreadable": "unreadable_image", "truncated": "unreadable_image",
    "extra": "extra_image", "same pixels": "duplicate_image", "16 bits": "sixteen_bit_image",
    "RGBA": "alpha_image", "turned": "rotated_image", "single point": "few_points",
    "odd length": "odd_length", "outside": "outside_image", "not finite": "bad_polygon",
    "larger image": "scaled_label", "other proportions": "label_size", "size of words": "label_size",
    "empty": "empty_mask", "all foreground": "all_foreground", "duplicate record": "duplicate_record",
    "shares": "shares", "no area": "few_points", "thin": "thin_polygon", "twice around": "traced_twice",
    "frames": "several_frames", "12 bits": "sixteen_bit_image", "to be ignored": "ignore_mask",
    "numbers": "numbered_mask", "alpha": "alpha_mask", "palette": "palette_mask",
    "broken run lengths": "bad_rle", "text as a string": "text_string",
    "too many texts": "text_length", "text of numbers": "bad_text",
    "disagreement": "disagreement", "soft mask": "non_binary_mask", "empty mask": "empty_mask",
    "white mask": "all_foreground", "inverted mask": "mostly_foreground", "double size": "scaled_label",
    "cut mask": "label_size", "unreadable mask": "unreadable_mask", "extra mask": "extra_mask",
}  # fmt: skip
PLANTED = [(layout, name) for layout in LAYOUTS for name in CODES if layout in FAULTS[name][0]]


def personal(path: Path) -> Path:
    """The file P1_frame_000001.png under the name of the person."""
    return path.with_name(re.sub(r"P(\d)_frame_\d+", lambda found: NAMES[int(found[1])], path.name))


class Root(DataRoot):
    """A data root on disk, and how to change the record of its second image."""

    def image(self, number: int = 1) -> Path:
        return personal(super().image(number))

    def mask(self, number: int = 1) -> Path:
        return personal(super().mask(number))

    @property
    def file(self) -> Path:
        return personal(super().file)

    def place(self, number: int = 1) -> str:
        """How findings name the record of an image."""
        if self.layout in ("annotations", "nested", "both"):
            return f"annotations.json record {number}"
        if self.layout in ("coco", "rle"):
            return f"coco.json image {number}"
        if self.layout in ("labelme", "masks"):
            return f"{'json' if self.layout == 'labelme' else 'images'}/ file {number + 1} in name order"
        shown = self.image(number).relative_to(self.path).as_posix()
        return shown if is_impersonal(Path(shown).stem) else f"images/ file {number + 1} in name order"


def write_root(folder: Path, layout: str, *faults: str) -> Root:
    """`folder/root` with four images of four patients; the second has the faults."""
    root = Root(folder / "root", layout)
    broken_input.write_root(root.path, layout)
    for file in [file for file in root.path.rglob("*") if file.is_file()]:
        if file.suffix == ".json":
            file.write_text(re.sub(r"P(\d)_frame_\d+", lambda found: NAMES[int(found[1])], file.read_text()))
        file.rename(personal(file))
    for fault in faults:
        FAULTS[fault][1](root)
    return root


@contextmanager
def edited(file: Path) -> Iterator[list | dict]:
    """The content of a JSON file, which is written back."""
    content = json.loads(file.read_text())
    yield content
    file.write_text(json.dumps(content))


def flat_polygons(mask: np.ndarray) -> list[list[float]]:
    return [polygon.ravel().tolist() for polygon in mask_to_polygons(mask)]


def encode_mask(mask: np.ndarray) -> dict:
    """A mask as the compressed run lengths of pycocotools."""
    rle = pycocotools_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
