"""The items of the golden check, as plain values; those of data and wrong use are in `input_items.py`."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import vesselrl
from tests.golden import input_items as about_input
from tests.golden import workbench as bench
from tests.golden.broken_input import draw_mask
from tests.golden.workbench import DATA, DECIMAL, RUNS, call, files, pixels, read, run, sha, table, weights
from vesselrl.scoring import rewards

TRAINED = (*(name for name, options in RUNS.items() if "frangi" not in options), "frangi")
PROGRESSES = ("val_before", "val_best", "val_latest", "test_before", "test_after")


def mask_pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    tree = draw_mask(1)
    rng = np.random.default_rng(5)
    padded = np.pad(tree, 2)
    moved = np.stack([padded[y : y + 64, x : x + 64] for y in range(1, 4) for x in range(1, 4)])
    broken = tree.copy()
    broken[:, [15, 16, 17, 44, 45]] = False
    pairs = {"perfect": tree, "dilated": moved.any(0), "eroded": moved.all(0), "empty": tree & False}
    pairs |= {"full": tree | True, "broken": broken, "shifted": np.roll(tree, (2, 3), (0, 1))}
    pairs |= {"specks": tree | (rng.random(tree.shape) < 0.02), "noise": rng.random(tree.shape) < 0.3}
    pairs |= {"other": draw_mask(3), "dust": (np.arange(4096) % 700 == 0).reshape(64, 64)}
    found = {name: (mask, tree) for name, mask in pairs.items()}
    return found | {"no truth": (tree, tree & False), "both empty": (tree & False, tree & False)}


def reward_terms() -> dict:
    made = {
        "default": vesselrl.MultiObjectiveReward(),
        "seed": vesselrl.MultiObjectiveReward(spec="seed"),
        "weights": rewards.MultiObjectiveReward(0.2, 0.3, 0.4, 0.6, recall_target=0.9, precision_target=0.7),
        "dice": vesselrl.SimpleDiceReward(),
        "dice seed": vesselrl.SimpleDiceReward(spec="seed"),
        "recall": vesselrl.RecallFocusedReward(),
        "recall seed": rewards.RecallFocusedReward(spec="seed", recall_weight=0.4),
        "by name": vesselrl.get_reward_function("recall_focused", recall_weight=0.2, recall_target=0.5),
        "custom": vesselrl.get_reward_function(
            "simple_dice", custom=lambda pred, gt: pred.mean() - gt.mean(), custom_weight=3.0
        ),
    }
    found: dict[str, Any] = {}
    for name, reward in made.items():
        scored = {pair: reward(*masks) for pair, masks in mask_pairs().items()}
        found[name] = {pair: {"reward": total} | parts for pair, (total, parts) in scored.items()}
        counts = np.array([[0.0, 5, 30], [0, 4, 9], [0, 0, 12]])
        found[name]["terms of counts"] = {k: v.tolist() for k, v in reward.overlap_terms(*counts).items()}
    return found


def metric_values() -> dict:
    """Every metric of the mask pairs, as a second observer is scored."""
    rng = np.random.default_rng(3)
    for number, (mask, truth) in enumerate(mask_pairs().values()):
        image = rng.integers(0, 255, (64, 64))
        for folder, array in (("images", image), ("masks", truth * 255), ("other", mask * 255)):
            Path(f"pairs/{folder}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(f"pairs/{folder}/{number + 1}.png")
    options = "--data_root pairs --split all --second_masks pairs/other --output_dir out/pairs"
    code, _, message = call(f"evaluate {options}")
    found = bench.evaluation("out/pairs/all_human_agreement")
    return {"code": code, "message": message, "observer": found, "names": list(mask_pairs())}


def masks() -> dict:
    """What the embedded miniature predicts, with and without post-processing, and `predict`."""
    call("data draw --root large --num_patients 2 --num_sequences 1 --num_frames 1 --size 256 --seed 3")
    found: dict[str, Any] = {}
    paths = sorted(Path("large/images").iterdir()) + sorted(Path("data/images").iterdir())[:2]
    images = [np.dstack([one] * 3) if one.ndim == 2 else one for one in map(pixels, paths)]
    for post in ((0.5, 0, 0.0), (0.3, 40, 0.0), (0.5, 20, 0.01), (0.7, 0, 0.05)):
        predictor = vesselrl.Predictor.from_pretrained(post=vesselrl.PostProcessing(*post))
        results = [predictor.predict(image) for image in images]
        bits = [sha(one.mask, one.probabilities, one.logits) for one in results]
        found[f"post {post}"] = {"pixels": [int(one.mask.sum()) for one in results], "bits": bits}
        shares = (0.05, 0.5, 0.9, 0.99)
        quantiles = [np.quantile(one.probabilities, shares).round(4).tolist() for one in results]
        means = [round(float(one.logits.mean()), 3) for one in results]
        found["probabilities"] = [[mean, *values] for mean, values in zip(means, quantiles, strict=True)]
    adapter, post = "--lora_weights RUN:embedded", "--min_component_px 9 --close_gaps 0.02"
    ways = {"base": "", "merged": f"--base_model {bench.merged_model()} {adapter} {post}"}
    ways |= {"embedded": f"{adapter} --threshold 0.4", "people": "--prompt Segment"}
    for name, options in ways.items():
        image = "people/images" if name == "people" else "large/images"
        folder = Path(f"out/predicted_{name}")
        code = call(f"predict --image {image} --output_dir {folder} {options}")[0]
        found[f"predict {name}"] = {"code": code, "files": files(folder), "bits": bench.pictures(folder)}
    return found


def training(name: str) -> dict:
    folder = run(name)
    info, config = read(folder / "training_info.json"), read(folder / "config.json")
    same = info.pop("args") == config["args"] and info.pop("counts") == config["counts"]
    findings = [[one["step"], one["code"]] for one in info.pop("findings")]
    others = files(folder) if name == "rl" else sorted({*files(folder)} ^ {*files(run("rl"))})
    found = {"files" if name == "rl" else "other files": others, "info": info}
    found |= {"findings": findings, "metrics": bench.metrics(folder)}
    default = read(run("rl") / "config.json")["args"]
    args = config["args"] if name == "rl" else {k: v for k, v in config["args"].items() if default[k] != v}
    found |= {"config": config | {"args": args}, "config is the same in training_info": same}
    names = PROGRESSES if name in ("sft", "unet") else ("val_best", "test_after")
    full = {"val_best"} if name == "sft" else ()
    found["scores"] = {one: bench.evaluation(folder / one, one in full) for one in names}
    trained = [path for path in sorted(folder.iterdir()) if list(path.glob("*.safetensors"))]
    found["bits"] = {path.name: weights(path) for path in trained}
    extra = ("cases/cases.json", "difficulty.json", "frangi.json", "split.json")
    found |= {one: read(folder / one) for one in extra if (folder / one).is_file()}
    if (folder / "contact_sheet.png").exists():
        found["bits"]["contact sheet"] = sha(pixels(folder / "contact_sheet.png"))
    return found


def evaluating() -> dict:
    """Every file that `evaluate` writes, in its ways."""
    shutil.copytree("data/images", "second/images")
    Path("second/masks").mkdir()
    for path in Path("data/masks").iterdir():
        Image.fromarray(np.roll(pixels(path), 1, 0)).save(f"second/masks/{path.name}")
    ways = {
        "run": "--lora_weights RUN:sft --tune_post --second_masks second/masks --output_dir out/run",
        "flips": "--lora_weights RUN:sft --flips --split val --threshold 0.4 --output_dir out/flips",
        "post": "--lora_weights RUN:post --split train --no_tune --output_dir out/post",
        "given": "--lora_weights RUN:both/final_lora --min_component_px 5 --close_gaps 0.3 "
        "--output_dir out/given",
        "base": f"{DATA} --split_file RUN:fold/data_split.json --base_trained_on all --output_dir out/base",
        "new split": f"{DATA} --base_model {bench.merged_model()} --split val --output_dir out/new",
        "in place": "--lora_weights RUN:augment RUN:rl",
    }
    found: dict[str, Any] = {}
    for name, options in ways.items():
        code, out, message = call(f"evaluate {options}")
        found[name] = {"code": code, "message": message, "decimals printed": len(DECIMAL.findall(out))}
        if "--output_dir" not in options:
            found[name]["report"] = bench.numbers_of_report(run("augment") / "report.md")["html"]
            continue
        folder = Path(options.split()[-1])
        found[name]["files"] = [bench.plain_text(file) for file in files(folder)]
        for path in sorted(folder.glob("*.json")):
            if path.with_suffix(".csv").exists():
                full = name == "run" and path.stem.endswith("_test_best_lora")
                value: Any = bench.evaluation(path.with_suffix(""), full)
            else:
                value = read(path) if name == "run" else list(read(path))
            found[name][bench.plain_text(path.name)] = value
        texts = {bench.plain_text(path.name): bench.numbers_of_report(path) for path in folder.glob("*.md")}
        found[name]["report"] = texts
    return found


def comparing() -> dict:
    for number, name in enumerate(("rl", "sft", "both", "unet", "frangi", "embedded")):
        shutil.copytree(run(name), f"compared/sa2va_lora_ppo_20200101_00000{number}", dirs_exist_ok=True)
    found = {}
    for options in ("", "--baseline sa2va_lora_ppo_20200101_000002 --rank_by cldice", "--rank_by hd95"):
        code, out, message = call(f"compare --output_dir compared {options}")
        folder = Path("compared/comparison")
        rows = [[cell for cell in row if cell != "STAMP"] for row in table(folder / "comparison.csv")]
        rows = rows if options != "--rank_by hd95" else [row[:10] for row in rows]
        found[options] = {"code": code, "message": message, "table": rows, "files": files(folder)}
        found[options]["decimals printed"] = len(DECIMAL.findall(out))
        found[options]["ranking"] = re.findall(r"^\| (\d[^|]*) \| \w+_00000(\d) ", out, re.M)
        found[options]["html"] = bench.numbers_of_report(folder / "comparison.md")["html"]
    return found


def merging() -> dict:
    model, dice = bench.merged_model(), DECIMAL.findall(Path("merged.txt").read_text())
    keep, other = {"files": files(model), "bits": weights(model), "dice": dice}, Path("merged16")
    options = f"--lora_weights RUN:embedded/final_lora --output_model {other} --dtype bfloat16"
    code, out, _ = call(f"merge {options}")
    in_16_bits = {"code": code, "dice": DECIMAL.findall(out), "bits": weights(other), "files": files(other)}
    return {"keep": keep, "bfloat16": in_16_bits}


def of_runs(look: Callable[[Path], Any], file: str, names: str) -> Callable[[], dict]:
    return lambda: {name: look(run(name) / file) for name in names.split("|")}


SPLITS = "rl|builtin|seed 7|seed 8|fold|frame|people|start|split file|sanity"
# In this order: some write into folders of others.
ITEMS: dict[str, Callable[[], Any]] = {"rewards": reward_terms, "drawn": about_input.drawn}
ITEMS["splits"] = of_runs(read, "data_split.json", SPLITS)  # who is on which side, by seed, fold and unit
ITEMS |= {f"train_{name.replace(' ', '_')}": lambda name=name: training(name) for name in TRAINED}
ITEMS["reports"] = of_runs(bench.numbers_of_report, "report.md", "sft|constrained|frangi")
ITEMS["comparing"] = comparing
ITEMS |= {"pseudonyms": about_input.pseudonyms, "contact_sheets": about_input.contact_sheets}
ITEMS |= {"masks": masks, "metric_values": metric_values, "evaluating": evaluating, "merging": merging}
ITEMS |= {"help": about_input.help_texts, "doctor": about_input.doctor}
ITEMS |= {"bad_input": about_input.bad_input, "broken_roots": about_input.broken_roots}
