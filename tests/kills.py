"""Kill test: short trainings are killed at random moments and resumed; they must end as if never interrupted.

    python tests/kills.py                  100 kills over all settings of RUNS
    python tests/kills.py --kills 10 sft   ten kills, of the settings whose name holds one of the words

Each kill is SIGKILL, at a random time or just before a random file operation of the process. What is left is
resumed, and perhaps killed once more, until it has ended; then metrics, weights and scores must be those of
the uninterrupted run, to the last bit. The exit code is 1 where one differs.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

SHORT = {"num_epochs": 2, "batch_size": 1, "val_freq": 2, "learning_rate": 1e-2, "cache_gb": 0.1}
FROZEN = {"lora_scope": ["projector", "mask_decoder"]}
CONSTRAINED = {"objective": "constrained", "curriculum": True}
RUNS = {
    "sft": SHORT | {"stage": "sft"},
    "sft, batches of 2, frozen encoder": SHORT | {"stage": "sft", "batch_size": 2} | FROZEN,
    "sft, augmented, curriculum": SHORT | {"stage": "sft", "augment": "light", "curriculum": True},
    "rl": SHORT | {"stage": "rl"},
    "rl, batches of 2": SHORT | {"stage": "rl", "batch_size": 2},
    "rl, frozen encoder": SHORT | {"stage": "rl"} | FROZEN,
    "rl, augmented": SHORT | {"stage": "rl", "augment": "light"},
    "sft+rl": SHORT | {"stage": "sft+rl", "lora_dropout": 0.1},
    "sft+rl, constrained, curriculum": SHORT | {"stage": "sft+rl"} | CONSTRAINED,
}  # fmt: skip
FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
MAX_ATTEMPTS = 20


class Outcome(NamedTuple):
    """What came of one kill."""

    num_kills: int
    before_anything: bool  # the first kill left nothing to resume
    differences: list[str]


def run_and_die(settings: dict, folder: Path | None, die_at: int | None, count: object, log: Path) -> None:
    """In a process of its own: trains, or resumes `folder`; dies before its `die_at`-th file operation.

    Without `die_at` the operations are counted in `count`.
    """
    sys.stdout = sys.stderr = log.open("a", encoding="utf-8", buffering=1)
    from tests.training.runs import no_charts
    from vesselrl.experiment.config import PRESETS
    from vesselrl.training.train import resume, train

    output, operations = settings["output_dir"], itertools.count(1)

    def watch(event: str, arguments: tuple) -> None:
        if event in FILE_OPERATIONS and str(arguments[0]).startswith(output):
            number = next(operations)
            count.value = number
            if number == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with no_charts:
        if folder is None:
            train(PRESETS["debug"].with_(**settings), ["first"])
        else:
            resume(folder, ["next"])


def run_process(settings: dict, folder: Path | None, log: Path, die_at: int | None = None,
                die_after_s: float | None = None) -> tuple[int, int, float]:  # fmt: skip
    """Exit code, number of file operations and seconds of one process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.warm"])
    count = context.Value("i", 0)
    process = context.Process(target=run_and_die, args=(settings, folder, die_at, count, log))
    start = time.monotonic()
    process.start()
    timer = threading.Timer(die_after_s, process.kill) if die_after_s is not None else None
    if timer:
        timer.start()
    process.join()
    if timer:
        timer.cancel()
    return process.exitcode, count.value, time.monotonic() - start


def run_folder(output: Path) -> Path | None:
    """The run folder that can be resumed, or the finished one; None: nothing has been begun."""
    runs = [folder for folder in output.glob("sa2va_lora_ppo_*") if (folder / "config.json").exists()]
    return max(runs, default=None)


def contents(folder: Path) -> dict[str, object]:
    """All that must be the same: metrics without times, bytes of weights, scores."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line).items() for line in lines]
    found = {"metrics": [{k: v for k, v in one if not k.startswith("time/")} for one in metrics]}
    for file in sorted(folder.rglob("*.safetensors")):
        found[str(file.relative_to(folder))] = file.read_bytes()
    for file in sorted(folder.glob("*_*.json")):
        if file.name.startswith(("val_", "test_")):
            values = json.loads(file.read_text(encoding="utf-8"))
            found[file.name] = [values["rows"], values["summary"]]
    info = json.loads((folder / "training_info.json").read_text(encoding="utf-8"))
    found["info"] = {k: v for k, v in info.items() if k not in ("provenance", "reward_time_share", "args")}
    found["left over"] = sorted(path.name for path in folder.rglob("*") if path.name.endswith(".partial"))
    return found


def kill_once(
    settings: dict, expected: dict, output: Path, rng: random.Random, size: tuple[int, float]
) -> Outcome:
    """Kills a run until the die says no more, resumes it to its end and compares."""
    settings = settings | {"output_dir": str(output)}
    num_operations, seconds = size
    log, kills, before = output.with_suffix(".log"), 0, False
    by_operation = rng.random() < 0.5
    for attempt in range(MAX_ATTEMPTS):
        folder = run_folder(output)
        again = attempt == 0 or (attempt < 3 and rng.random() < 0.3)
        plan = {}
        if again and by_operation:
            plan = {"die_at": rng.randint(1, num_operations)}
        elif again:
            plan = {"die_after_s": rng.uniform(0.05, seconds)}
        code, *_ = run_process(settings, folder, log, **plan)
        if code == -signal.SIGKILL:
            kills += 1
            before |= run_folder(output) is None
        elif code == 0:
            break
        else:
            lines = log.read_text(encoding="utf-8").splitlines()
            return Outcome(kills, before, [f"exit code {code}: {' '.join(lines[-1:])}"])
    got = contents(run_folder(output))
    keys = sorted({*expected, *got})
    return Outcome(kills, before, [key for key in keys if expected.get(key) != got.get(key)])


def run_kills(names: Sequence[str], num_kills: int, seed: int, scratch: Path) -> int:
    """Makes at least `num_kills` kills, in turn over the settings; returns the number of other ends."""
    rng, wrong, done = random.Random(seed), 0, 0
    whole = {}
    for name in names:
        output = scratch / f"whole {len(whole)}"
        settings = RUNS[name] | {"output_dir": str(output)}
        code, operations, seconds = run_process(settings, None, output.with_suffix(".log"))
        if code:
            raise SystemExit(f"{name}: the uninterrupted run ended with {code}, see {output}.log")
        whole[name] = contents(run_folder(output)), (operations, seconds)
    for number in itertools.count():
        if done >= num_kills:
            break
        name = names[number % len(names)]
        expected, size = whole[name]
        output = scratch / f"run {number}"
        outcome = kill_once(RUNS[name], expected, output, rng, size)
        done += outcome.num_kills
        wrong += bool(outcome.differences)
        note = " (the first left nothing to resume)" if outcome.before_anything else ""
        verdict = f"DIFFERENT: {', '.join(outcome.differences)}" if outcome.differences else "same"
        print(f"{done:4} {name}: {outcome.num_kills} kills{note}: {verdict}", flush=True)
        if not outcome.differences:
            shutil.rmtree(output, ignore_errors=True)
    print(f"{done} kills, {wrong} runs ended differently")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the names of settings; none: all")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    names = [name for name in RUNS if not args.words or any(word in name for word in args.words)]
    scratch = Path(mkdtemp(prefix="kills_"))
    wrong = run_kills(names, args.kills, args.seed, scratch)
    if not wrong:
        shutil.rmtree(scratch)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
