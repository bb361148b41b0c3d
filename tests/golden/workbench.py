"""Runs verbs of the command line and reads what they write, for the items of the golden check."""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from tests.golden.broken_input import CODE, write_angiograms
from vesselrl.launch import main

ROOT = Path(__file__).resolve().parents[2]
STAMP = re.compile(r"sa2va_lora_ppo_\d{8}_\d{6}(_\d+)?")
DECIMAL = re.compile(r"[+-]?\d+\.\d+")
DATA = "--data_root data"  # 30 drawn patients with one 64-px image each
RUNS = {
    "rl": f"{DATA} --stage rl",
    "sft": f"{DATA} --stage sft --learning_rate 0.02 --num_epochs 2",
    "both": f"{DATA} --stage sft+rl --learning_rate 0.02 --num_epochs 2",
    "unet": f"{DATA} --control unet --num_epochs 4",
    "frangi": f"{DATA} --control frangi",
    "augment": f"{DATA} --stage sft --augment light --seed 7 --sft_loss bce_dice_cldice",
    "strong": "--stage rl --augment strong --advantage plain --pixel_action sampled --lora_dropout 0.1",
    "curriculum": f"{DATA} --stage sft+rl --num_epochs 4 --rl_epochs 2 --batch_size 1 --curriculum",
    "constrained": f"{DATA} --objective constrained --dice_floor 0.2 --num_epochs 3 --val_freq 1",
    "post": f"{DATA} --stage sft --min_component_px 9 --close_gaps 0.4 --lora_scope projector mask_decoder",
    "recall": f"{DATA} --reward_type recall_focused --num_regions 4 --num_samples 3 --kl_coef 0.1",
    "seed": f"{DATA} --reward_spec seed --reward_fn golden_reward:score --reward_fn_weight 0.5",
    "builtin": "--control frangi",
    "seed 7": "--control frangi --split_seed 7",
    "seed 8": f"{DATA} --control frangi --split_seed 8 --max_val_samples 1",
    "fold": f"{DATA} --control frangi --fold 2/5",
    "frame": "--data_root angiograms --control frangi --split_unit frame --near_duplicates allow",
    "people": "--data_root people --control frangi --near_duplicates allow",
    "aliases": "--data_root people --control frangi --near_duplicates allow --patient_aliases aliases.csv",
    "start": f"{DATA} --init_lora RUN:sft --stage sft",
    "sanity": f"{DATA} --control frangi --sanity_overfit 2",
    "split file": f"{DATA} --control frangi --split_file RUN:fold/data_split.json",
    "embedded": f"{DATA} --model_path None --stage sft+rl --num_epochs 2 --max_train_samples 2 "
    "--max_val_samples 1",
}
REWARD = """
def score(pred, gt):
    return float((pred & gt).mean())
"""


def call(options: str | list[str]) -> tuple[int | str, str, str]:
    """Runs a verb; exit code or name of the exception, standard output, and what it says went wrong."""
    words = options.split() if isinstance(options, str) else options
    words = [re.sub(r"^RUN:([^/]+)", lambda found: str(run(found[1])), word) for word in words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: int | str = main(words)
        except Exception as error:
            code = type(error).__name__
            err.write(f"error: {error}")
    lines = re.sub(r"[╭╮╰╯─│]+|-{3,}", " ", err.getvalue()).splitlines()
    said = " ".join([line for line in lines if line.startswith("error:")] or lines)
    message = plain_text(" ".join(said.split()))
    choices = r"(?<=Expected one of \()[^)]*"  # the parser lists them in the order of a set
    message = re.sub(choices, lambda found: ", ".join(sorted(found[0].split(", "))), message)
    return code, out.getvalue(), message


def plain_text(text: str) -> str:
    """Without the folder of this check and the time of a run."""
    return STAMP.sub("STAMP", text.replace(str(Path.cwd()), "WORK").replace(str(ROOT), "ROOT"))


def failure(options: str | list[str]) -> dict[str, Any]:
    code, _, message = call(options)
    return {"code": code, "message": message}


@cache
def run(name: str) -> Path:
    """The folder of a training of `RUNS` with the debug preset, trained when it is asked for first."""
    output = f"runs/{name.replace(' ', '_')}"
    code, _, message = call(f"train --preset debug --output_dir {output} {RUNS[name]}")
    if code != 0:
        raise SystemExit(f"training {name} ended with {code}: {message}")
    (folder,) = (path for path in Path(output).iterdir() if STAMP.fullmatch(path.name))
    return folder


def draw_nothing(self: Any, target: Any, **options: Any) -> None:
    """Stands in for the drawing of charts, which costs seconds."""
    is_svg = options.get("format") == "svg"
    target.write("<svg></svg>") if is_svg else Image.new("L", (1, 1)).save(target, format="png")


def read(path: Path | str) -> Any:
    """A JSON file without what time and machine put into it."""
    values = json.loads(plain_text(Path(path).read_text(encoding="utf-8")))
    dropped = ("provenance", "reward_time_share", "metric_spec", "about", "salt", "args_sha256")
    return {k: v for k, v in values.items() if k not in dropped} if isinstance(values, dict) else values


def metrics(folder: Path) -> dict[str, dict]:
    """The columns of metrics.jsonl without times, by step."""
    columns: dict[str, dict] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        for name in (one for one in line if one != "step" and not one.startswith("time/")):
            columns.setdefault(name, {})[line["step"]] = line[name]
    return columns


def table(path: Path | str) -> list[list]:
    def value(text: str) -> str | float:
        with contextlib.suppress(ValueError):
            return float(text)
        return plain_text(text)

    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [[value(cell) for cell in row] for row in csv.reader(lines)]


def sha(*parts: Any) -> str:
    """The first 16 digits of SHA-256 of bytes, text and arrays."""
    digest = hashlib.sha256()
    for part in parts:
        is_array = isinstance(part, np.ndarray)
        digest.update(f"{part.dtype}{part.shape}".encode() if is_array else b"")
        digest.update(np.ascontiguousarray(part).tobytes() if is_array else str(part).encode())
    return digest.hexdigest()[:16]


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def weights(folder: Path) -> str:
    """Hash of all tensors of a folder of weights, with their names."""
    found = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    tensors = [(*pair, pair[1].float().numpy()) for one in found for pair in sorted(one.items())]
    return sha(*(part for name, one, values in tensors for part in (name, one.dtype, values)))


def pictures(folder: Path, ending: str = ".png") -> dict[str, str]:
    """Hashes of the pixels of all pictures of a folder."""
    return {name: sha(pixels(folder / name)) for name in files(folder) if name.endswith(ending)}


def files(folder: Path) -> list[str]:
    """The names of all files, but those of TensorBoard."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if "tfevents" not in name)


def numbers_of_report(path: Path) -> dict[str, Any]:
    """Numbers of a Markdown report by table and row, and how many there are of what in its HTML form."""
    rows: dict[str, list] = {}
    labels: list[str] = []
    count, is_new, width = 0, True, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if not line.startswith("|"):
            is_new = True
        elif is_new:
            count, is_new, width, row = count + 1, False, len(cells), 0
        elif width > 2 and set(line) - set("|-: "):  # in two columns there are settings, versions and dates
            row += 1
            labels.append(plain_text(cells[0]))
            rows[f"{count}.{row}"] = [float(text) for cell in cells[1:] for text in DECIMAL.findall(cell)]
    html = path.with_suffix(".html").read_text(encoding="utf-8")
    html = re.sub(r"<svg.*?</svg>", "<svg>", html, flags=re.S)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html, flags=re.S)
    decimals = sum(len(DECIMAL.findall(re.sub("<.*?>", " ", cell))) for cell in cells)
    tags = {tag: len(re.findall(f"<{tag}[ >]", html)) for tag in ("table", "svg", "img", "h2", "h3")}
    return {"rows": rows, "labels": labels, "html": tags | {"decimals in cells": decimals}}


def evaluation(path: str | Path, full: bool = True) -> dict:
    """A stored evaluation; `full`: with all but the rows of JSON, which are those of the CSV file."""
    values = read(f"{path}.json")
    rows = values.pop("rows")
    columns, *cells = table(f"{path}.csv")
    same = [len(rows) == len(cells), list(rows[0]) == columns]
    found = {"rows": cells, "columns": columns if full else sha(columns), "JSON has the same": same}
    if full:
        patients, sequences = values.pop("patients"), values.pop("sequences")
        found["patients"] = {name: list(means.values()) for name, means in patients.items()}
        found["sequences are patients"] = [*sequences.values()] == [*patients.values()]
        scores = values["summary"].pop("metrics")
        found["summary"] = {name: list(score.values()) for name, score in scores.items()}
        found |= {"rest": values, "columns of summary": list(next(iter(scores.values())))}
    return found


def findings_of(options: str) -> dict:
    """Codes, places and counts of a report in JSON; messages apart."""
    code, out, _ = call(options)
    report = json.loads(plain_text(out))
    rows = report.pop("findings")
    rows = [one for one in rows if one["code"] != "nested_mask"] or rows  # said of every record of a layout
    listed = [[one[k] for k in ("severity", "code", "file", "record", "count")] for one in rows]
    shares = {key: round(value, 6) for key, value in report["foreground"].items()}
    found = {"code": code, "message": [one["message"] for one in rows], "findings": listed, "shares": shares}
    found["facts"] = [report["layout"], list(report["counts"].values()), report["agreement"]]
    return found | {"keys": sorted(report), "severities are": sum(report["severities"].values())}


def options_in(text: str) -> dict[str, str]:
    """Option with its values -> default, from the text of --help."""
    found = {}
    # Boxes are drawn with lines or without them, as the terminal can.
    text = re.sub(r" *│? *$", "", text, flags=re.M)
    for entry in re.split(r"\n[│ ] ?(?=--?\w|\S+ STR|\[?\{)", text)[1:]:
        head = re.split(r"\s{2,}|\n", entry.strip())[0]
        defaults = re.findall(r"\((?:default: (.*?)|(required))\)$", entry, flags=re.M)
        found[head] = " ".join(defaults[-1]).strip() if defaults else ""
    return found


@cache
def merged_model() -> Path:
    """The embedded miniature with the adapter of a run inside."""
    code, out, message = call("merge --lora_weights RUN:embedded --output_model merged")
    if code != 0:
        raise SystemExit(f"merge ended with {code}: {message}")
    Path("merged.txt").write_text(out)
    return Path("merged")


def prepare() -> None:
    call("data draw --root data --num_patients 30 --num_sequences 1 --num_frames 1 --size 64")
    write_angiograms(Path("angiograms"))
    write_angiograms(Path("people"), with_people=True)
    Path("empty").mkdir()
    Path("masks_only").mkdir()
    for name, code in (CODE | {"golden_reward": REWARD}).items():
        Path(f"{name}.py").write_text(code)
    sys.path.insert(0, os.getcwd())
