"""Records what vesselrl does today, and checks later that it still does the same.

    python tests/golden/golden.py record [--only ITEM ...]
    python tests/golden/golden.py check [--only ITEM ...] [--portable]

`check` prints `equal ITEM`, or `DIFFERENT ITEM` with the first differences, and ends with 1 if anything
differs that `MEANT` does not name. Everything is driven through what users see: verbs of the command line,
files that they write, the public names of `vesselrl`, and `vesselrl.scoring.rewards`. Charts are not drawn.

Numbers agree up to 1e-6 relative or 1e-9 absolute. What stands below a key `bits` (hashes of trained weights
and of predicted masks) and `machine` holds on the recording machine only; `--portable` leaves it out. What a
training does after its first step may there be different as well, as the rounding of one step decides the
next. The text of an error is kept under `message`, apart from its exit code; other text is not kept.
"""

# ruff: noqa: E402
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # before numpy and torch look at it; a collection of tests must change nothing
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    os.environ |= {"COLUMNS": "1000", "MPLBACKEND": "Agg", "WANDB_MODE": "disabled"}
    os.environ.pop("VESSELRL_TRACEBACK", None)
    sys.path.insert(0, str(ROOT))

import argparse
import contextlib
import fnmatch
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from matplotlib.figure import Figure

import vesselrl
from tests.golden.items import ITEMS
from tests.golden.workbench import draw_nothing, prepare

EXPECTED = Path(__file__).with_name("expected.json")
# Differences on purpose since the recording: pattern of paths -> why.
MEANT = {
    "train_*/bits/*": "the noise of sampled masks is smoothed by OpenCV, which rounds otherwise",
    "reports/*/labels/*": "metrics have the field's names: Betti-0 error, Betti-1 error",
    "evaluating/*/labels/*": "metrics have the field's names: Betti-0 error, Betti-1 error",
    "comparing/*/ranking/*/0": "ranges of ranks were removed",
    "bad_input/*/message": "messages were shortened, or say subset in place of side",
    "broken_roots/*/message/*": "messages were shortened, or say subset in place of side",
    "doctor/*/checks": "all tensors are compared by name and shape, which is a line of its own",
    "doctor/*/message*": "a sample of the values is looked at, and all names and shapes; the lines say it",
    "help/doctor/options/--write_config*": "a missing config.json can be rebuilt",
    "bad_input/*/code": "2 for whatever is refused before the work begins, by any verb",
    "resuming/*/code": "2 for whatever is refused before the work begins",
    "masks/*/files": "predict lists its images, and a name that may be a person's becomes a pseudonym",
    "masks/predict people/bits/*": "predict has pseudonyms for all names, so their numbers are others",
    "evaluating/*/plan/*": "new options: layouts of any names",
    **dict.fromkeys(("*/config/args/lang", "help/*/options/--lang*"), "new option: reports in Chinese"),
    **dict.fromkeys(
        ("train_*/info/fit*", "*/marks*", "reports/*"),
        "built-in data and models are marked, and how well the model knows the images is a table",
    ),
    "train_unet/findings*": "a supervised run is not told about the reward",
    "help/listed": "bench and pretrain are no verbs any more: they stand in benchmarks/",
    "help/bench*": "bench is no verb any more: its parts are scripts in benchmarks/",
    "help/pretrain/*": "pretrain is no verb any more: it is a script in benchmarks/",
    "*/config/args/image_dir": "new option: layouts of any names",
    "*/config/args/mask_*": "new options: layouts of any names",
    "help/*/options/--sft_loss*": "new choices: SCNP and skeleton recall",
    "help/*/options/--image_dir*": "new option: layouts of any names",
    "help/*/options/--mask_*": "new options: layouts of any names",
    "doctor/ill/message/3": "says what lies in the data root, and which options name folders",
    "train_*/config/args_sha256": "settings carry a checksum",
    "splits/*/checksum": "splits carry a checksum",
    "pseudonyms/*/checksum": "splits carry a checksum",
    "bad_input/left behind": "adapter folders hold SHA256SUMS, runs keep the state before the newest",
    "help/train --resume_from x/options/--allow_change*": "--allow_change was added",
    "train_*files": "adapter folders hold SHA256SUMS",
    "resuming/*/cut/files": "adapter folders hold SHA256SUMS, runs keep the state before the newest",
    "resuming/*/message": "a run without config.json is refused before its state is looked for",
    **dict.fromkeys(
        "*/config/args/use_nf4 help/train/options/--use_nf4* help/doctor/options/--json* doctor/*/message "
        "help/doctor/options/--lora_scope* doctor/*/checks".split(),
        "new: a language model in 4 bits, and the doctor's estimate of memory",
    ),
    **dict.fromkeys(
        "*/data_root *plan/second_masks broken_roots/*/keys doctor/ill/message/* train_*files "
        "resuming/*/cut/files bad_input/left?behind".split(),
        "paths to data stand in paths.private.json alone; no other output and no message has them",
    ),
    "train_*/info/custom_*": "calls of the user's reward function are counted",
    "masks/predict */files": "predict lists its results, and keeps the mapping of made-up names too",
    "*/config/args/tile_px": "new option: large images in tiles",
    "help/*/options/--tile_px*": "new option: large images in tiles",
    "help/predict/options/--shard*": "new option: a folder shared by several processes",
    "help/predict/options/--format*": "new option: masks as LabelMe and COCO files",
    "help/data": "new: data merge",
    **dict.fromkeys(
        "*/config/args/detail_head help/*/options/--detail_head* help/*/options/--augment* "
        "help/*/options/--control*".split(),
        "new: a detail head, its control, and flips alone",
    ),
    "help/train --preset quick/options/--precision_*": "quick weighs precision more",
    **dict.fromkeys(
        ("help/train --preset full/options/--max_train*", "help/train --preset full/options/--num_passes*"),
        "full has a detail head, and reaches more in half of the passes",
    ),
    **dict.fromkeys(
        ("*/config/args/report_to", "help/*/options/--report_to*"), "new option: trackers beside TensorBoard"
    ),
    "help/*/options/--pixel_mm*": "new option: measurements in mm",
    "bad_input/others/train --preset*": "the parser of options itself says which presets there are",
    "help/merge/options/--lora_weights*": "merge takes the newest run where none is named",
    "evaluating/*/files": "evaluate writes the measurements of the vessels",
    "train_curriculum/difficulty.json/*": "branches are measured to the middle of where they meet",
    **dict.fromkeys(
        "*/config/args/target_kl help/*/options/--target_kl* resuming/*/last/train/* reports/constrained/* "
        "comparing/*/table/*".split(),
        "new: PPO's steps are shortened to a trust region, and have recall and precision",
    ),
    "train_augment/*": "soft clDice sends the gradient of equal pixels to one of them",
    **{
        f"train_{name}/{part}": "noise and regions are drawn anew for each rollout and place in the step"
        for name in "rl both curriculum constrained recall seed start embedded strong".split()
        for part in (
            "metrics/* info/* cases/* findings* scores/*_latest/* scores/*_best/* scores/*_after/*"
        ).split()
    },
}


# What the rounding of a first step decides, on which machines differ: with `--portable` any number will do.
AFTER_A_STEP = (
    "train_*/info/final_metrics/* train_*/info/best_* train_*/info/test_metrics/* train_*/info/*_norm* "
    "train_*/cases/*/after/* train_*/scores/*_latest/* train_*/scores/*_best/* train_*/scores/*_after/* "
    "train_*/metrics/*/[1-9]* reports/* comparing/* resuming/* evaluating/*"
).split()


def rounded(value: Any) -> Any:
    """The value as it stands in JSON, floats with eight digits."""
    if isinstance(value, dict):
        return {str(key): rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else str(value)
    return value


def differences(expected: Any, got: Any, path: str, portable: bool) -> Iterator[tuple[str, Any, Any]]:
    """Where two values differ: path, expected, got."""
    if portable and path.rpartition("/")[2] in ("bits", "machine"):
        return
    is_free = portable and any(fnmatch.fnmatch(path, one) for one in AFTER_A_STEP)
    is_number = [isinstance(one, int | float) and not isinstance(one, bool) for one in (expected, got)]
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        expected, got = dict(enumerate(expected)), dict(enumerate(got))
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in expected | got:
            pair = expected.get(key, "(not there)"), got.get(key, "(not there)")
            yield from differences(*pair, f"{path}/{key}", portable)
    elif all(is_number) and (is_free or math.isclose(expected, got, rel_tol=1e-6, abs_tol=1e-9)):
        return
    elif all(is_number) or expected != got or type(expected) is not type(got):
        yield path, expected, got


def judge(name: str, expected: Any, got: Any, portable: bool) -> bool:
    """Prints how an item compares; whether nothing differs but what is meant to."""
    for one in expected.values() if name == "comparing" else ():
        one["table"] = [row[:1] + row[3:] for row in one["table"]]  # ranges of ranks were removed on purpose
    found = list(differences(expected, got, name, portable))
    meant = {path: why for path, *_ in found for one, why in MEANT.items() if fnmatch.fnmatch(path, one)}
    others = [one for one in found if one[0] not in meant]
    for why in dict.fromkeys(meant.values()):
        print(f"meant {name}: {why}")
    if others:
        print(f"DIFFERENT {name}: {len(others)} values")
        for path, first, second in others[:8]:
            print(f"  {path}\n    expected {str(first)[:300]}\n    got      {str(second)[:300]}")
    elif not found:
        print(f"equal {name}")
    return not others


def work(names: list[str]) -> Iterator[tuple[str, Any]]:
    """The items one after the other, in a folder of their own."""
    logging.getLogger().addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        prepare()
        for name in names:
            start = time.perf_counter()
            with mock.patch.object(Figure, "savefig", draw_nothing):
                value = rounded(ITEMS[name]())
            print(f"{time.perf_counter() - start:6.1f} s {name}", file=sys.stderr, flush=True)
            yield name, value


def run_check(arguments: list[str]) -> int:
    """Records or checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "check"))
    add = parser.add_argument
    add("--only", nargs="+", choices=ITEMS, default=list(ITEMS), metavar="ITEM", help=", ".join(ITEMS))
    add("--portable", action="store_true", help="leave out what holds on the recording machine only")
    args = parser.parse_args(arguments)
    names = [name for name in ITEMS if name in args.only]  # in this order: some write into folders of others
    print(f"package: {Path(vesselrl.__file__).parent}", file=sys.stderr)
    expected = json.loads(EXPECTED.read_text(encoding="utf-8")) if EXPECTED.exists() else {}
    if args.action == "check":
        results = [judge(name, expected.get(name), value, args.portable) for name, value in work(names)]
        return int(not all(results))
    expected |= dict(work(names))
    blocks, write = [], json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    for name in filter(expected.get, ITEMS):
        parts = [f"  {json.dumps(key)}: {write(one)}" for key, one in expected[name].items()]
        blocks.append(f'"{name}": {{\n' + ",\n".join(parts) + "\n}")
    EXPECTED.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
    print(f"{EXPECTED.stat().st_size / 1000:.0f} kB in {EXPECTED.name}")
    return 0


if __name__ == "__main__":
    sys.exit(run_check(sys.argv[1:]))
