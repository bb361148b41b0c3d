"""Records what vesselrl does today, and checks later that it still does the same.

    python tests/golden/golden.py record [--only ITEM ...]
    python tests/golden/golden.py check [--only ITEM ...] [--portable]

`check` prints `equal ITEM`, or `DIFFERENT ITEM` with the first differences, and ends with 1 if anything
differs that `MEANT` does not name. Everything is driven through what users see: verbs of the command line,
files that they write, the public names of `vesselrl`, and `vesselrl.scoring.rewards`. Charts are not drawn.

Numbers agree up to 1e-6 relative or 1e-9 absolute. What stands below a key `bits` (hashes of weights, masks)
and `machine` holds on the recording machine only; `--portable` leaves it out, and there numbers agree up to
1e-4, as sums in 32 bits do on any machine, mean grey levels of drawn pictures up to 0.5, and what follows the
first step of a training is free, as rounding decides it. The text of an error is kept under `message`, apart
from its exit code; other text is not kept.
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
MEANT: dict[str, str] = {}
# What the rounding of a first step decides, on which machines differ: with `--portable` any number will do.
AFTER_A_STEP = (
    "train_*/info/final_metrics/* train_*/info/best_* train_*/info/test_metrics/* train_*/info/*_norm* "
    "train_*/cases/*/after/* train_*/scores/*_latest/* train_*/scores/*_best/* train_*/scores/*_after/* "
    "train_*/metrics/*/[2-9]* train_*/metrics/*/1[0-9]* train_*/metrics/val*/1 "
    "reports/* comparing/* evaluating/*"
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
    nearness, off = (1e-4 if portable else 1e-6), (0.5 if portable and "/grey levels/" in path else 1e-9)
    is_free = portable and any(fnmatch.fnmatch(path, one) for one in AFTER_A_STEP)
    is_number = [isinstance(one, int | float) and not isinstance(one, bool) for one in (expected, got)]
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        expected, got = dict(enumerate(expected)), dict(enumerate(got))
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in expected | got:
            pair = expected.get(key, "(not there)"), got.get(key, "(not there)")
            yield from differences(*pair, f"{path}/{key}", portable)
    elif all(is_number) and (is_free or math.isclose(expected, got, rel_tol=nearness, abs_tol=off)):
        return
    elif all(is_number) or expected != got or type(expected) is not type(got):
        yield path, expected, got


def judge(name: str, expected: Any, got: Any, portable: bool) -> bool:
    """Prints how an item compares; whether nothing differs but what is meant to."""
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
