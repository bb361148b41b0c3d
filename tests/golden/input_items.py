"""Items of the golden check about data, help and what cannot work."""

import contextlib
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import vesselrl
from tests.golden import workbench as bench
from tests.golden.broken_input import FAULTS, LAYOUTS, MODELS, REWARDS, SETTINGS, write_root
from tests.golden.workbench import DATA, call, failure, files, pictures, read, run, sha

VERBS = "train|evaluate|predict|merge|compare|doctor|pretrain|data check|data show|data draw|bench scoring|"
VERBS += "bench caching|bench learning|train --preset quick|train --preset full|train --preset debug|"
VERBS += "train --resume_from x"


def pseudonyms() -> dict:
    """Keys of images whose file names carry people, with aliases and with a pattern."""
    aliases = "file_name,patient\nZHAO WEI_frame_000003.png,one\nLI_MING_frame_000011.png,one\n"
    Path("aliases.csv").write_text(aliases)
    shutil.copytree("people", "fresh", ignore=shutil.ignore_patterns("*.mapping.json"))
    run("people")
    ways = {
        "fresh": "data check fresh --json --patient_aliases aliases.csv",
        "plain": "data check people --json",
        "aliases": "data check people --json --patient_aliases aliases.csv",
        "angiograms": "data check angiograms --json",
        "pattern": ["data", "check", "people", "--json", "--patient_pattern", r"(?P<patient>^..)"],
    }
    found: dict[str, Any] = {}
    for name, options in ways.items():
        code, out, _ = call(options)
        values = json.loads(bench.plain_text(out))
        messages = [one.pop("message") for one in values["findings"]]
        values["foreground"] = [f"{key} {share:.4f}" for key, share in values["foreground"].items()]
        found[name] = {"code": code, "report": values, "message": messages}
    # The salt is the hash of the file names, so that keys are the same everywhere.
    found["mapping file"] = read("people/patients.mapping.json")
    found["mode"] = oct(Path("people/patients.mapping.json").stat().st_mode & 0o777)
    folder = bench.run("aliases")
    found["with aliases"] = read(folder / "data_split.json")
    return found


def drawn() -> dict:
    found = {}
    kinds = ("target annotations 64", "target nested 96", "target masks 64", "source masks 128")
    for number, (domain, layout, size) in enumerate(kind.split() for kind in kinds):
        root = Path(f"drawn/{domain}_{layout}")
        counts = "--num_patients 2 --num_sequences 2 --num_frames 2"
        options = f"--root {root} --domain {domain} --layout {layout} --size {size} --seed {number}"
        code = call(f"data draw {counts} {options}")[0]
        texts = {name: sha((root / name).read_text()) for name in files(root) if name.endswith(".json")}
        bits = pictures(root, ".jpg")  # a pixel rounds differently on some machines
        blocks = {name: bench.pixels(root / name).reshape(4, int(size) // 4, 4, -1) for name in bits}
        levels = {"grey levels": {name: one.mean((1, 3)).tolist() for name, one in blocks.items()}}
        found[root.name] = {"code": code, "pixels": pictures(root), "texts": texts, "bits": bits} | levels
    return found


def contact_sheets() -> dict:
    ways = {augment: f"data --augment {augment}" for augment in ("none", "light", "strong")}
    ways |= {"seed": "data --augment strong --seed 5 --split_seed 8", "few": "angiograms --num_images 3"}
    found = {}
    for name, options in ways.items():
        code, _, message = call(f"data show {options} --output out/sheet_{name}.png")
        sheet = pictures(Path("out")).get(f"sheet_{name}.png")
        found[name] = {"code": code, "bits": {"pixels": sheet}} if code == 0 else message
    return found


def help_texts() -> dict:
    listed = re.findall(r"^  (\w+) ", call("--help")[1], re.M)
    found: dict[str, Any] = {"": call("--help")[0], "listed": listed}
    for verb in VERBS.split("|"):
        code, out, _ = call(f"{verb} --help")
        options = bench.options_in(out)
        if "--preset" in verb:
            usual = found["train"]["options"]
            options = {name: default for name, default in options.items() if usual.get(name) != default}
        found[verb] = {"code": code, "options": options}
    for verb in ("data", "bench"):
        found[verb] = re.findall(r"^  (\w+) ", call(f"{verb} --help")[1], re.M)
    for script in bench.ROOT.glob("*.py"):
        out, sys.argv = io.StringIO(), [script.name, "--help"]
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
        found[script.stem] = re.findall(r"usage: vesselrl (\w+)", out.getvalue())
    command = [sys.executable, "-m", "vesselrl", "--help"]
    done = subprocess.run(command, cwd=bench.ROOT, capture_output=True, text=True, check=False)
    found["python -m vesselrl"] = {"code": done.returncode, "is the same": done.stdout == call("--help")[1]}
    found["public names"] = sorted(vesselrl.__all__)
    return found


def bad_input() -> dict:
    """Exit code and message of what cannot work: models, rewards, adapters, settings, data, folders."""
    model = bench.merged_model()
    found: dict[str, Any] = {"model": {}, "reward": {}, "adapter": {}, "setting": {}, "others": {}}
    debug = f"train --preset debug {DATA} --output_dir out/failed"
    for name, spoil in MODELS.items():
        shutil.copytree(model, "model")
        spoil(Path("model"))
        found["model"][name] = failure(f"{debug} --model_path model")
        shutil.rmtree("model", ignore_errors=True)
    found["reward"] = {name: failure(f"{debug} --reward_fn {name}") for name in REWARDS}
    for name, change in {
        "truncated": lambda file: file.write_bytes(b"\x08\0\0\0\0\0\0\0{"),
        "no type": lambda file: file.with_name("adapter_config.json").write_text("{}"),
        "no weights": lambda file: file.unlink(),
    }.items():
        shutil.copytree(run("sft") / "best_lora", "adapter", dirs_exist_ok=True)
        change(Path("adapter/adapter_model.safetensors"))
        found["adapter"][name] = failure(f"{debug} --init_lora adapter")
    found["adapter"]["of another base"] = failure(f"{debug} --model_path None --init_lora RUN:sft")
    found["setting"] = {options: failure(f"{debug} {options}") for options in SETTINGS}
    Path("file").write_text("kept")
    for number, name in enumerate(("rl", "fold")):
        shutil.copytree(run(name), f"mixed/sa2va_lora_ppo_20200101_00000{number}")
    shutil.copytree("data", "changed")
    sorted(Path("changed/images").iterdir())[0].unlink()
    for options in (
        f"train --preset debug {DATA} --output_dir file",
        f"train --preset debug {DATA} --output_dir file/x", "train --preset fast", "train --preset",
        "train --learnin_rate 1", "tarin", "merge --output_model x",
        f"merge --lora_weights RUN:embedded --output_model {model}",
        "merge --lora_weights data --output_model x", "predict --image nowhere",
        "predict --image masks_only", "evaluate --lora_weights data", "data", "bench nothing",
        f"evaluate {DATA} --split_file nowhere.json", f"evaluate {DATA} --split side",
        "evaluate --data_root nowhere", f"evaluate {DATA} --tune_post --no_tune",
        f"evaluate {DATA} --second_masks nowhere", "doctor --what", "compare --output_dir nowhere",
        "compare --output_dir data", "data show nowhere", "data check nowhere",
        "data draw --root data --seed 99", "train --preset debug --data_root changed",
        "train --preset debug --data_root empty",
        f"evaluate {DATA} --lora_weights RUN:sft --patient_aliases nowhere.csv",
        "data check data --fix data", "evaluate --data_root changed --lora_weights RUN:sft",
        "train --preset debug --data_root nowhere",
        "train --preset debug --data_root changed --init_lora RUN:sft",
        "compare --baseline nobody --output_dir mixed", "compare --output_dir mixed",
    ):  # fmt: skip
        found["others"][options.replace(str(model), "MODEL")] = failure(options)
    left = Path("out/failed")
    found["left behind"] = [bench.plain_text(name) for name in files(left)] if left.exists() else []
    return found


def broken_roots() -> dict:
    """What `data check` finds in data with one fault, in every layout, and what `--fix` writes."""
    found: dict[str, Any] = {}
    for layout in LAYOUTS:
        found[layout] = {}
        for name, (layouts, plant) in {"sound": (LAYOUTS, lambda root: None), **FAULTS}.items():
            if layout in layouts:
                root = write_root(Path(f"broken/{layout}_{name.replace(' ', '_')}"), layout)
                plant(root)
                values = bench.findings_of(f"data check {root.path} --json")
                if any(name in found[other] for other in LAYOUTS[: LAYOUTS.index(layout)]):
                    values["message"] = [sha(one) for one in values["message"]]  # in words once
                if sound := found[layout].get("sound", {}):
                    shares, before = values["shares"], sound["shares"]
                    values["shares"] = {key: one for key, one in shares.items() if before.get(key) != one}
                    values["without a share"] = sorted(before.keys() - shares)
                found[layout][name] = {key: one for key, one in values.items() if sound.get(key) != one}
    for layout, name in (
        ("annotations", "single point"), ("annotations", "odd length"), ("nested", "too many texts"),
        ("coco", "turned"), ("both", "disagreement"), ("labelme", "larger image"),
        ("annotations", "duplicate record"), ("masks", "16 bits"), ("masks", "double size"),
        ("drive", "soft mask"), ("dca1", "same pixels"), ("chase", "unreadable"),
    ):  # fmt: skip
        copy = Path(f"broken/{layout}_{name.replace(' ', '_')}_repaired")
        source = str(copy).removesuffix("_repaired")
        command = f"data check {source} --json --fix {copy}"
        fixed = found[layout][f"{name}, fixed"] = bench.findings_of(command)
        fixed |= {"files": files(copy), "pixels": [*pictures(copy).values()]}
    return found


def doctor() -> dict:
    found = {}
    shutil.copytree(bench.merged_model(), "ill")
    MODELS["missing tensor"](Path("ill"))
    ways = {"plain": "", "all": f"--base_model {bench.merged_model()} {DATA}"}
    ways["ill"] = "--base_model ill --data_root empty"
    for name, options in ways.items():
        code, out, _ = call(f"doctor --output_dir out {options}")
        checks = [re.split(r"\s+", line, maxsplit=2) for line in out.splitlines()]
        state = ("packages", "disk", "gpu", "processor", "python")
        others = [(status, check, text) for status, check, text in checks if check not in state]
        found[name] = {"code": code, "checks": [[check, status] for status, check, _ in others]}
        found[name]["machine"] = {check: status for status, check, _ in checks if check in state}
        found[name]["message"] = [text for *_, text in others]
    return found
