"""Sound data roots in every layout, and faults to plant in them: one image, one fault."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as pycocotools_mask

from vesselrl.data.patients import is_impersonal
from vesselrl.data.polygons import mask_to_polygons, rasterise

SIDE = 64
PERSONS = ("LI_MING", "ZHAO_WEI", "WANG_FANG", "CHEN_JING")
SECRETS = (*PERSONS, *(f"123456789{number}" for number in range(4)))
NAMES = tuple(
    f"{name}(123456789{number})_1-2_3_0A1B2C3D_frame_{number:06d}" for number, name in enumerate(PERSONS)
)
POLYGON_LAYOUTS = ("annotations", "nested", "labelme", "coco")
PAIR_LAYOUTS = ("masks", "drive", "chase", "dca1")
LAYOUTS = (*POLYGON_LAYOUTS, "rle", "both", *PAIR_LAYOUTS)
RECORD_LISTS = ("annotations", "nested", "both")
# Image and label of each image in the layouts of pairs.
PAIRS = {
    "masks": [(f"images/{name}.png", f"masks/{name}_mask.png") for name in NAMES],
    "drive": [(f"images/{21 + k}_training.tif", f"1st_manual/{21 + k}_manual1.gif") for k in range(4)],
    "chase": [(f"Image_0{1 + k // 2}{'LR'[k % 2]}.jpg", f"Image_0{1 + k // 2}{'LR'[k % 2]}_1stHO.png")
              for k in range(4)],
    "dca1": [(f"{1 + k}.pgm", f"{1 + k}_gt.pgm") for k in range(4)],
}  # fmt: skip


def draw_mask(number: int, side: int = SIDE) -> np.ndarray:
    """A winding vessel of 4 px with a loop, another one for each number."""
    t = np.linspace(0, 1, 60)
    middle = side * (0.3 + 0.1 * number) + 5 * np.sin(6 * t + number)
    line = np.stack([2 + (side - 4) * t, middle], axis=1)
    down = np.array([0, 1])
    vessel = np.concatenate([line - 2 * down, (line + 2 * down)[::-1]])
    mask = rasterise([vessel], (side, side))
    rows, columns = np.ogrid[:side, :side]
    distance = np.hypot(rows - side / 2, columns - side / 2)
    return mask | ((distance > 8) & (distance < 12))


def encode_mask(mask: np.ndarray) -> dict:
    """A mask as the compressed run lengths of pycocotools."""
    rle = pycocotools_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def flat_polygons(mask: np.ndarray) -> list[list[float]]:
    return [polygon.ravel().tolist() for polygon in mask_to_polygons(mask)]


def labelme_shapes(polygons: list[list[float]]) -> list[dict]:
    points = [[polygon[k : k + 2] for k in range(0, len(polygon), 2)] for polygon in polygons]
    return [{"label": "artery", "shape_type": "polygon", "points": pairs} for pairs in points]


@dataclass
class Root:
    """A data root on disk, and how to change it."""

    path: Path
    layout: str

    def image(self, number: int) -> Path:
        return self.path / (PAIRS.get(self.layout) or PAIRS["masks"])[number][0]

    def mask(self, number: int) -> Path:
        return self.path / (PAIRS.get(self.layout) or PAIRS["masks"])[number][1]

    def place(self, number: int) -> str:
        """How findings name the record of an image; the names are in the order of the alphabet or not."""
        if self.layout in RECORD_LISTS:
            return f"annotations.json record {number}"
        if self.layout in ("coco", "rle"):
            return f"coco.json image {number}"
        order = 5 if number == 4 else sorted(NAMES).index(NAMES[number]) + 1
        if self.layout in ("labelme", "masks"):
            return f"{'json' if self.layout == 'labelme' else 'images'}/ file {order} in name order"
        shown = self.image(number).relative_to(self.path).as_posix()
        return shown if is_impersonal(Path(shown).stem) else f"images/ file {number + 1} in name order"

    @property
    def file(self) -> Path:
        return self.path / ("annotations.json" if self.layout in RECORD_LISTS else "coco.json")

    def change(self, number: int, change: Callable[[dict], object]) -> None:
        """Changes the record, the LabelMe file, or the image of a COCO file."""
        file = self.path / "json" / f"{NAMES[number]}.json" if self.layout == "labelme" else self.file
        content = json.loads(file.read_text())
        if self.layout == "labelme":
            change(content)
        else:
            change(content[number] if isinstance(content, list) else content["images"][number])
        file.write_text(json.dumps(content))

    def set_label(self, number: int, polygons: list[list[float]]) -> None:
        """Replaces the outlines of an image by flat polygons."""
        if self.layout == "coco":
            content = json.loads(self.file.read_text())
            others = [item for item in content["annotations"] if item["image_id"] != number]
            added = [{"image_id": number, "category_id": 1, "segmentation": polygons}] if polygons else []
            self.file.write_text(json.dumps(content | {"annotations": [*others, *added]}))
        elif self.layout == "labelme":
            self.change(number, lambda content: content.update(shapes=labelme_shapes(polygons)))
        else:
            mask = [[polygon] for polygon in polygons] if self.layout == "nested" else polygons
            self.change(number, lambda c: c.update(mask=mask, text=["blood vessel"] * len(mask)))

    def polygons(self, number: int) -> list[list[float]]:
        """The sound outlines of an image."""
        return flat_polygons(draw_mask(number))


def write_root(path: Path, layout: str) -> Root:
    """Four images of four patients without any fault."""
    root = Root(path, layout)
    rng = np.random.default_rng(0)
    for number in range(4):
        image = rng.integers(0, 256, (SIDE // 8, SIDE // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        root.image(number).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root.image(number))
        if layout in ("both", *PAIR_LAYOUTS):
            root.mask(number).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_mask(number).astype(np.uint8) * 255).save(root.mask(number))
    files = [f"{name}.png" for name in NAMES]
    if layout in RECORD_LISTS:
        root.file.write_text(json.dumps([{"image": file} for file in files]))
    elif layout in ("coco", "rle"):
        images = [{"id": k, "file_name": file, "width": SIDE, "height": SIDE} for k, file in enumerate(files)]
        annotations = [{"image_id": k, "category_id": 1, "segmentation": encode_mask(draw_mask(k))}
                       for k in range(4) if layout == "rle"]  # fmt: skip
        root.file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    elif layout == "labelme":
        (path / "json").mkdir()
        for name, file in zip(NAMES, files, strict=True):
            content = {"imagePath": file, "imageWidth": SIDE, "imageHeight": SIDE, "shapes": []}
            (path / "json" / f"{name}.json").write_text(json.dumps(content))
    if layout in (*POLYGON_LAYOUTS, "both"):
        for number in range(4):
            root.set_label(number, root.polygons(number))
    return root


# ---- Faults of images, for all layouts


def save_again(root: Root, number: int, change: Callable[[Image.Image], Image.Image], **options) -> None:
    path = root.image(number)
    with Image.open(path) as image:
        changed = change(image.copy())
    changed.save(path, **options)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def deepen(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def turn(root: Root, number: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    save_again(root, number, lambda image: image, exif=exif)


def add_image(root: Root, number: int) -> None:
    """An image that nothing belongs to, whose name comes last."""
    path = root.image(number)
    Image.fromarray(np.full((SIDE, SIDE), 77, np.uint8)).save(path.with_name(f"ZZ_ZHAO_WEI{path.suffix}"))


# Name of the fault: how to plant it, and the code it must get.
IMAGE_FAULTS = {
    "missing": (lambda root, k: root.image(k).unlink(), "missing_image"),
    "unreadable": (lambda root, k: root.image(k).write_text("no image"), "unreadable_image"),
    "truncated": (lambda root, k: cut(root.image(k)), "unreadable_image"),
    "16 bits": (lambda root, k: save_again(root, k, deepen), "sixteen_bit_image"),
    "RGBA": (lambda root, k: save_again(root, k, lambda i: i.convert("RGBA")), "alpha_image"),
    "turned": (turn, "rotated_image"),
    "extra": (add_image, "extra_image"),
    "same pixels": (lambda root, k: shutil.copyfile(root.image(k - 1), root.image(k)), "duplicate_image"),
}
# What a format cannot hold.
IMPOSSIBLE = {("16 bits", ".jpg"), ("RGBA", ".jpg"), ("RGBA", ".pgm"), ("turned", ".pgm")}


# ---- Faults of outlines


def double_record(root: Root, number: int) -> None:
    """The same image once more, at the end of the list."""
    if root.layout == "labelme":
        file = root.path / "json" / f"{NAMES[number]}.json"
        shutil.copyfile(file, file.with_name("ZZ_LI_MING.json"))
        return
    content = json.loads(root.file.read_text())
    if root.layout in ("coco", "rle"):
        content["images"].append(content["images"][number] | {"id": 99})
    else:
        content.append(content[number])
    root.file.write_text(json.dumps(content))


def declare(root: Root, number: int, width: int, height: int, factor: float) -> None:
    """Writes the size of the labelled image, and scales the outlines."""
    root.set_label(number, [[factor * value for value in polygon] for polygon in root.polygons(number)])
    names = ("width", "height") if root.layout == "coco" else ("imageWidth", "imageHeight")
    root.change(number, lambda content: content.update(zip(names, (width, height), strict=True)))


def break_runs(root: Root, number: int) -> None:
    content = json.loads(root.file.read_text())
    content["annotations"][number]["segmentation"]["counts"] = [SIDE * SIDE - 1]
    root.file.write_text(json.dumps(content))


def add_polygon(*polygon: float) -> Callable[[Root, int], None]:
    return lambda root, number: root.set_label(number, [*root.polygons(number), list(polygon)])


def text(value: object) -> Callable[[Root, int], None]:
    return lambda root, number: root.change(number, lambda content: content.update(text=value))


WHOLE = [0, 0, SIDE, 0, SIDE, SIDE, 0, SIDE]
OUTLINE_FAULTS = {
    "single point": (add_polygon(5, 5), "few_points"),
    "odd length": (add_polygon(1, 1, 9, 1, 9), "odd_length"),
    "outside": (add_polygon(1, 1, 99, 1, 9, 9), "outside_image"),
    "not finite": (add_polygon(1, 1, float("nan"), 1, 9, 9), "bad_polygon"),
    "larger image": (lambda root, k: declare(root, k, 100, 100, 100 / SIDE), "scaled_label"),
    "other proportions": (lambda root, k: declare(root, k, 100, 80, 1), "label_size"),
    "size of words": (lambda root, k: declare(root, k, "64 px", 64, 1), "label_size"),
    "empty": (lambda root, k: root.set_label(k, []), "empty_mask"),
    "all foreground": (lambda root, k: root.set_label(k, [WHOLE]), "all_foreground"),
    "duplicate record": (double_record, "duplicate_record"),
}
TEXT_FAULTS = {
    "text as a string": (text("blood vessel"), "text_string"),
    "too many texts": (text(["blood vessel"] * 7), "text_length"),
    "no texts": (text([]), "text_length"),
    "text of numbers": (text([1]), "bad_text"),
}


# ---- Faults of mask files


def redraw(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Root, int], None]:
    def plant(root: Root, number: int) -> None:
        Image.fromarray(change(draw_mask(number).astype(np.uint8) * 255)).save(root.mask(number))

    return plant


def grey_edge(values: np.ndarray) -> np.ndarray:
    """Soft edges, as a mask that was interpolated has them."""
    values = values.copy()
    values[0, :3] = (64, 100, 120)
    return values


def add_mask(root: Root, number: int) -> None:
    path = root.mask(number)
    shutil.copyfile(path, path.with_name(f"ZZ_ZHAO_WEI{path.stem[-8:]}{path.suffix}"))


MASK_FAULTS = {
    "not binary": (redraw(grey_edge), "non_binary_mask"),
    "empty mask": (redraw(lambda values: values * 0), "empty_mask"),
    "white mask": (redraw(lambda values: values * 0 + 255), "all_foreground"),
    "inverted mask": (redraw(lambda values: 255 - values), "mostly_foreground"),
    "double size": (redraw(lambda values: values.repeat(2, 0).repeat(2, 1)), "scaled_label"),
    "cut mask": (redraw(lambda values: values[:-9]), "label_size"),
    "unreadable mask": (lambda root, k: root.mask(k).write_text("no mask"), "unreadable_mask"),
    "extra mask": (add_mask, "extra_mask"),
}


def expected(root: Root, name: str, number: int) -> tuple[str, str]:
    """The code of the finding of a planted fault, and what its record must contain."""
    code = faults(root.layout)[name][1]
    pairs = root.layout in PAIR_LAYOUTS
    if name in ("extra", "extra mask") or (name == "missing" and pairs):
        # In pairs, a lonely label means that its image is missing.
        return {"extra": "missing_label"}.get(name, "missing_image") if pairs else code, " file "
    if name == "duplicate record":
        return code, root.place(4)
    if name == "same pixels":
        # The second of the two, in the order of the layout.
        return code, max(root.place(number), root.place(number - 1))
    return code, root.place(number)


def faults(layout: str) -> dict[str, tuple[Callable[[Root, int], object], str]]:
    """The faults that make sense in a layout."""
    found = dict(IMAGE_FAULTS)
    if layout in POLYGON_LAYOUTS:
        found |= OUTLINE_FAULTS
    if layout in ("annotations", "nested"):
        found |= TEXT_FAULTS
    if layout == "rle":
        found["broken run lengths"] = (break_runs, "bad_rle")
    if layout in ("rle", "both"):
        found["duplicate record"] = OUTLINE_FAULTS["duplicate record"]
    if layout in ("both", *PAIR_LAYOUTS):
        found |= MASK_FAULTS
    suffix = Path(PAIRS.get(layout, PAIRS["masks"])[0][0]).suffix
    return {name: fault for name, fault in found.items() if (name, suffix) not in IMPOSSIBLE}
