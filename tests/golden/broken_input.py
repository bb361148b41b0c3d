"""Bad input of every kind for the golden check: data roots, model folders, rewards, settings."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

POLYGONS = ("annotations", "nested", "labelme", "coco")
PAIRS = {
    "masks": [(f"images/P{k}_frame_00000{k}.png", f"masks/P{k}_frame_00000{k}_mask.png") for k in range(4)],
    "drive": [(f"images/{21 + k}_training.tif", f"1st_manual/{21 + k}_manual1.gif") for k in range(4)],
    "chase": [(f"Image_0{1 + k // 2}{'LR'[k % 2]}.jpg", f"Image_0{1 + k // 2}{'LR'[k % 2]}_1stHO.png")
              for k in range(4)],
    "dca1": [(f"{1 + k}.pgm", f"{1 + k}_gt.pgm") for k in range(4)],
}  # fmt: skip
LAYOUTS = (*POLYGONS, "rle", "both", *PAIRS)
WITH_MASKS = ("both", *PAIRS)
NAMES = tuple(Path(image).stem for image, _ in PAIRS["masks"])


def draw_mask(number: int) -> np.ndarray:
    """A winding vessel with a branch and a ring, another one for each number; bool (64, 64)."""
    rows, columns = np.mgrid[:64, :64]
    winding = np.abs(rows - (18 + 6 * number + 5 * np.sin(columns / 7 + number))) < 2.5
    branch = (np.abs(rows - columns - 8 * number + 12) < 2) & (columns > 10) & (columns < 60)
    distance = np.hypot(rows - 44, columns - 18 - 4 * number)
    return ((winding | branch) & (columns > 2) & (columns < 61)) | ((distance > 6) & (distance < 9))


def outlines(number: int) -> list[list[float]]:
    y = 8.0 + 9 * number
    return [[4, y, 60, y, 60, y + 4, 4, y + 4], [28.5, 2, 33.5, 2.25, 33, y, 28, y]]


def bars(number: int) -> np.ndarray:
    """The mask of `outlines`, bool (64, 64)."""
    mask, y = np.zeros((64, 64), bool), 8 + 9 * number
    mask[y : y + 4, 4:60] = mask[2:y, 28:33] = True
    return mask


@dataclass
class DataRoot:
    """A data root on disk, and how to change the record of its second image."""

    path: Path
    layout: str

    def image(self, number: int = 1) -> Path:
        return self.path / PAIRS.get(self.layout, PAIRS["masks"])[number][0]

    def mask(self, number: int = 1) -> Path:
        return self.path / PAIRS.get(self.layout, PAIRS["masks"])[number][1]

    @property
    def file(self) -> Path:
        if self.layout == "labelme":
            return self.path / "json" / f"{NAMES[1]}.json"
        return self.path / ("coco.json" if self.layout in ("coco", "rle") else "annotations.json")

    def change(self, **fields: object) -> None:
        content = json.loads(self.file.read_text())
        records = content["images"] if "coco" in self.file.name else content
        (content if self.layout == "labelme" else records[1]).update(fields)
        self.file.write_text(json.dumps(content))

    def set_outlines(self, polygons: list) -> None:
        if self.layout == "coco":
            content = json.loads(self.file.read_text())
            others = [one for one in content["annotations"] if one["image_id"] != 1]
            mine = [{"image_id": 1, "category_id": 1, "segmentation": polygons}] if polygons else []
            self.file.write_text(json.dumps(content | {"annotations": others + mine}))
        elif self.layout == "labelme":
            self.change(shapes=[shape(one) for one in polygons])
        else:
            nested = [[one] for one in polygons] if self.layout == "nested" else polygons
            self.change(mask=nested, text=["blood vessel"] * len(polygons))


def shape(polygon: list) -> dict:
    points = [polygon[k : k + 2] for k in range(0, len(polygon), 2)]
    return {"label": "artery", "shape_type": "polygon", "points": points}


def write_root(path: Path, layout: str) -> DataRoot:
    root, rng = DataRoot(path, layout), np.random.default_rng(0)
    for folder in (root.image().parent, root.mask().parent if layout in WITH_MASKS else root.file.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for k in range(4):
        pixels = rng.integers(0, 256, (8, 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        Image.fromarray(pixels).save(root.image(k))
        if layout in WITH_MASKS:
            Image.fromarray(bars(k).astype(np.uint8) * 255).save(root.mask(k))
    names = [f"{name}.png" for name in NAMES]
    if layout in ("annotations", "nested", "both"):
        masks = [[[one] for one in outlines(k)] if layout == "nested" else outlines(k) for k in range(4)]
        records = [{"image": names[k], "mask": masks[k], "text": ["blood vessel"] * 2} for k in range(4)]
        root.file.write_text(json.dumps(records))
    elif layout == "labelme":
        for k, name in enumerate(names):
            content = {"imagePath": name, "imageWidth": 64, "imageHeight": 64}
            content["shapes"] = [*map(shape, outlines(k))]
            (path / "json" / name).with_suffix(".json").write_text(json.dumps(content))
    elif layout in ("coco", "rle"):
        images = [{"id": k, "file_name": name, "width": 64, "height": 64} for k, name in enumerate(names)]
        label = outlines if layout == "coco" else lambda k: run_lengths(bars(k))
        labels = [{"image_id": k, "category_id": 1, "segmentation": label(k)} for k in range(4)]
        root.file.write_text(json.dumps({"images": images, "annotations": labels, "categories": []}))
    return root


def run_lengths(mask: np.ndarray) -> dict:
    flat = np.concatenate([[False], mask.ravel(order="F"), [not mask[-1, -1]]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": [64, 64], "counts": [int(n) for n in np.diff(ends, prepend=0)]}


def write_angiograms(path: Path, with_people: bool = False) -> None:
    """Images and masks of ten patients, named as exports are; `with_people`: in every form of name."""
    forms = ["ZHANG_SAN{a}(123456789{n})_1-2_3_0A1B2C3D_frame_{f:06d}"] * 10
    if with_people:
        forms[2:] = ("LI MING^(987654321{n})_4-5_6_0A1B2C3E_frame_{f:06d}", "LI_MING_frame_{f:06d}",
                 "WANG_FANG_987654320{n}__1-1_2_ABCDEF01_frame_{f:06d}", "ZHAO WEI_frame_{f:06d}",
                 "ZHAO_WEI_1-2_3_ABCDEF02_frame_{f:06d}", "Chen__987654322{n}__1-1_2_ABCDEF03_frame_{f:06d}",
                 "picture of somebody {n}{f}", "张三(123456788{n})_1-1_2_ABCDEF04_frame_{f:06d}")  # fmt: skip
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (path / folder).mkdir(parents=True)
    for n, form in enumerate(forms):
        for f in (3, 11):
            name = f"{form.format(a='ABCDEFGHIJ'[n], n=n, f=f)}.png"
            mask, row = np.zeros((64, 64), bool), 4 + 4 * n + f // 4
            mask[row : row + 4, 4:60] = mask[row : row + 18, 28 : 32 + n] = True
            image = np.where(mask, 70, 160) + rng.integers(-60, 60, (16, 16)).repeat(4, 0).repeat(4, 1)
            for folder, pixels in (("images", image), ("masks", mask * 255)):
                Image.fromarray(pixels.astype(np.uint8)).save(path / folder / name)


def again(change: Callable[[Image.Image], Image.Image], **options: object) -> Callable[[DataRoot], None]:
    def plant(root: DataRoot) -> None:
        with Image.open(root.image()) as image:
            changed = change(image.copy())
        changed.save(root.image(), **options)

    return plant


def redraw(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[DataRoot], None]:
    return lambda root: Image.fromarray(change(bars(1).astype(np.uint8) * 255)).save(root.mask())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def add(*polygon: float) -> Callable[[DataRoot], None]:
    return lambda root: root.set_outlines([*outlines(1), list(polygon)])


def declare(width: object, height: object) -> Callable[[DataRoot], None]:
    """Another size of the labelled image, with outlines twice as large."""

    def plant(root: DataRoot) -> None:
        root.set_outlines([[2 * value for value in one] for one in outlines(1)])
        names = ("width", "height") if root.layout == "coco" else ("imageWidth", "imageHeight")
        root.change(**dict(zip(names, (width, height), strict=True)))

    return plant


def double_record(root: DataRoot) -> None:
    content, file = json.loads(root.file.read_text()), root.file
    if root.layout == "labelme":
        file = file.with_name("again.json")
    elif "coco" in file.name:
        content["images"].append(content["images"][1] | {"id": 9})
    else:
        content.append(content[1])
    file.write_text(json.dumps(content))


def deepen(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def soften(values: np.ndarray) -> np.ndarray:
    return np.where(np.roll(values, 1) != values, 100, values).astype(np.uint8)


EXIF = Image.Exif()
EXIF[0x0112] = 3
WHOLE = [0, 0, 64, 0, 64, 64, 0, 64]
IN_16_BITS = ("annotations", "labelme", "coco", "both", "masks", "drive", "dca1")
RECORDS = ("annotations", "nested")
# Name of the fault -> the layouts that can have it, and how it is planted.
FAULTS: dict[str, tuple[tuple[str, ...], Callable[[DataRoot], object]]] = {
    "missing": (LAYOUTS, lambda root: root.image().unlink()),
    "unreadable": (LAYOUTS, lambda root: root.image().write_text("no image")),
    "truncated": (LAYOUTS, lambda root: cut(root.image())),
    "extra": (LAYOUTS, lambda r: shutil.copyfile(r.image(), r.image().with_name(f"extra{r.image().suffix}"))),
    "same pixels": (LAYOUTS, lambda root: shutil.copyfile(root.image(0), root.image(1))),
    "no images": (LAYOUTS, lambda root: [root.image(k).unlink() for k in range(4)]),
    "16 bits": (IN_16_BITS, again(deepen)),
    "RGBA": (("annotations", "rle", "masks", "drive"), again(lambda image: image.convert("RGBA"))),
    "turned": (("annotations", "coco", "masks", "chase"), again(lambda image: image, exif=EXIF)),
    "single point": (POLYGONS, add(5, 5)),
    "odd length": (POLYGONS, add(1, 1, 9, 1, 9)),
    "outside": (POLYGONS, add(1, 1, 99, 1, 9, 9)),
    "not finite": (POLYGONS, add(1, 1, float("nan"), 1, 9, 9)),
    "larger image": (POLYGONS, declare(128, 128)),
    "other proportions": (POLYGONS, declare(100, 80)),
    "size of words": (POLYGONS, declare("64 px", 64)),
    "empty": (POLYGONS, lambda root: root.set_outlines([])),
    "all foreground": (POLYGONS, lambda root: root.set_outlines([WHOLE])),
    "duplicate record": ((*POLYGONS, "rle", "both"), double_record),
    "damaged JSON": ((*POLYGONS, "rle", "both"), lambda root: cut(root.file)),
    "text as a string": (RECORDS, lambda root: root.change(text="blood vessel")),
    "too many texts": (RECORDS, lambda root: root.change(text=["blood vessel"] * 7)),
    "text of numbers": (RECORDS, lambda root: root.change(text=[1])),
    "disagreement": (("both",), redraw(lambda values: np.roll(values, 20, 0))),
    "soft mask": (WITH_MASKS, redraw(soften)),
    "empty mask": (WITH_MASKS, redraw(lambda values: values * 0)),
    "white mask": (WITH_MASKS, redraw(lambda values: values * 0 + 255)),
    "inverted mask": (WITH_MASKS, redraw(lambda values: 255 - values)),
    "double size": (WITH_MASKS, redraw(lambda values: values.repeat(2, 0).repeat(2, 1))),
    "cut mask": (WITH_MASKS, redraw(lambda values: values[:-9])),
    "unreadable mask": (WITH_MASKS, lambda root: root.mask().write_text("no mask")),
    "extra mask": (WITH_MASKS, lambda r: shutil.copyfile(r.mask(), r.mask().with_name(f"x{r.mask().name}"))),
}  # fmt: skip


def change_tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def change_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return spoil


def lose_a_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    half = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(sorted(tensors))}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": half}))


MODELS: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "no config": lambda m: (m / "config.json").unlink(),
    "missing shard": lose_a_shard,
    "truncated": lambda m: cut(m / "model.safetensors"),
    "no weights": lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
    "unknown tensor": change_tensors(lambda t: t.update(bogus=t["mlp1.0.weight"].copy())),
    "missing tensor": change_tensors(lambda t: t.pop("mlp1.0.weight")),
    "wrong shape": change_tensors(lambda t: t.update({"mlp1.0.weight": t["mlp1.0.weight"][:3].copy()})),
    "config without a field": change_json("config.json", lambda c: c["vision_config"].pop("hidden_size")),
    "damaged config": lambda m: (m / "config.json").write_text("{"),
    "side-car with a word": change_json("sam2_config.json", lambda c: c.update(image_size="128 px")),
    "index without shards": lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": []}'),
    "no tokenizer": lambda m: (m / "vocab.json").unlink(),
    "damaged tokenizer": lambda m: (m / "vocab.json").write_text('{"a":'),
}
# Modules of rewards that cannot work.
MY_REWARD = 'number = 3\ndef fails(pred, gt): return 1 / 0\ndef answers(pred, gt): return "good"'
CODE = {"my_reward": MY_REWARD, "broken_module": "undefined_name"}
REWARDS = ("my_reward:fails", "my_reward:answers", "my_reward:absent", "my_reward:number", "my_reward",
           "no_such_module:f", "broken_module:f")  # fmt: skip
SETTINGS = (
    "--recall_target 85", "--patient_pattern (", "--patient_pattern ^(?P<p>.)", "--lora_scope everything",
    "--use_wandb", "--num_samples 1", "--reward_type best", "--learning_rate -1", "--fold 6/5", "--fold 1",
    "--close_gaps 1", "--min_component_px -1", "--dice_floor 0.5", "--curriculum", "--stage sft+rl",
    "--rl_epochs 2", "--rl_learning_rate 1e-3", "--control unet --init_lora x", "--sft_loss bce_dice_cldice",
    "--deep_supervision 0.1",
    "--control frangi --stage sft+rl --num_epochs 2", "--split_file x --fold 1/5", "--learning_rate 0",
    "--dice_weight 0 --recall_weight 0 --topology_weight 0 --length_weight 0", "--warmup_share 1", "--clip 0",
    "--patient_aliases nowhere.csv", "--init_lora data", "--split_file nowhere.json", "--num_epochs 0",
    "--base_trained_on nowhere.txt", "--reward_spec old", "--augment much", "--control tree",
)  # fmt: skip
