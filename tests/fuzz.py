"""Fuzz test: commands read damaged files; they must end in words, in time, and leave all other files alone.

    python tests/fuzz.py              2,000 mutations, a table of what came of them
    python tests/fuzz.py --only 1234  that mutation again, with all that the command printed

One file of a sandbox is changed, then a forked process runs a command that reads it. A failure is a
traceback, an exit code other than 0 to 3, a refusal without a word, more than 10 s, 1 GB more memory than
before, a person's name in what is printed, or a file that was touched outside the folders for output.
"""

import argparse
import faulthandler
import gc
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads do not outlive a fork
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

from tests.golden.broken_input import lose_a_shard, write_angiograms, write_root
from tests.mutations import TABLE, mutate
from vesselrl.data.pseudonyms import MAPPING_FILE

MAX_SECONDS, MAX_BYTES, KINDS = 10, 10**9, TABLE["kinds"]  # seconds of a processor: others may be busy
PERSON = re.compile(r"ZHANG|SAN[A-J]|123456789\d")


class Attempt(NamedTuple):
    """What came of one command."""

    code: int
    text: str
    seconds: float
    num_bytes: int  # of memory, at the most
    faults: Sequence[str] = ()


def make_box(scratch: Path) -> Path:
    """Data in all layouts, two models, a finished and a stopped run, and a canary beside them."""
    from tests.test_faults import OPTIONS, run, the_run
    from vesselrl.models.miniature import random_sa2va, write_miniature

    box = scratch / "box"
    (box / "canary").mkdir(parents=True)
    (box / "canary" / "file.txt").write_text("alive")
    for layout in ("annotations", "nested", "coco", "rle", "labelme", "masks", "drive", "chase", "dca1"):
        write_root(box / "data" / layout, layout)
    shutil.copytree(box / "data" / "labelme" / "images", box / "data" / "studio" / "images")
    task = {"id": 1, "data": {"image": "P0_frame_000000.png"}, "annotations": [{"result": [{"value": {}}]}]}
    (box / "data" / "studio" / "project.json").write_text(json.dumps([task]))
    write_angiograms(box / "data" / "people")
    write_miniature(box / "model", random_sa2va(seed=3))
    shutil.copytree(box / "model", box / "shards")
    lose_a_shard(box / "shards")
    shutil.copy(next((box / "shards").glob("*01-of*")), box / "shards" / "model-00002-of-00002.safetensors")
    words = f"train {OPTIONS} --model_path model --data_root data/people --curriculum --learning_rate 0.01"
    done = run_forked(words.split(), box, scratch / "log", patience_s=60 * MAX_SECONDS)
    assert done.code == 0, done.text
    the_run(box).rename(box / "run")
    assert run(words, box, "report", "SIGTERM").code == 143
    the_run(box).rename(box / "stopped")
    return box


def run_forked(words: list[str], box: Path, log: Path, patience_s: float = 6 * MAX_SECONDS) -> Attempt:
    """Runs a command line in a forked process, by the clock for so long; without words it does nothing."""
    start = time.monotonic()
    if (pid := os.fork()) == 0:
        run_child(words, box, log, patience_s)
    while (ended := os.wait4(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() - start > patience_s:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.003)
    code, used = os.waitstatus_to_exitcode(ended[1]), ended[2]
    text = log.read_text(encoding="utf-8", errors="replace")
    return Attempt(code, text, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def run_child(words: list[str], box: Path, log: Path, patience_s: float) -> None:
    """Runs the command and ends the process; nothing of the parent's is written twice."""
    code = 70
    try:
        os.chdir(box)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        faulthandler.dump_traceback_later(0.8 * patience_s, file=2)  # where it hangs
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 4 * MAX_BYTES, resource.RLIM_INFINITY))
        from vesselrl import launch

        code = launch.main(words) if words else 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def snapshot(box: Path) -> dict[Path, tuple]:
    """Every file and folder with what shows that it was touched; of folders only that they are there."""
    found = ((path.relative_to(box), path.lstat(), path.is_dir()) for path in box.rglob("*"))
    return {path: (s.st_mode, is_dir or (s.st_size, s.st_mtime_ns)) for path, s, is_dir in found}


def try_mutation(path: Path, words: list[str], box: Path, log: Path, least: int) -> Attempt:
    """Runs a command that reads a mutated file, and lists in words what was wrong."""
    before = snapshot(box)
    attempt = run_forked(words, box, log)
    after, lines, faults = snapshot(box), attempt.text.strip().splitlines(), []
    if attempt.seconds > MAX_SECONDS or attempt.code == -signal.SIGKILL:
        faults.append("hang")
    elif "Traceback (most recent call last)" in attempt.text:
        faults.append(f"traceback: {lines[-1][:150]}")
    elif attempt.code not in (0, 1, 2, 3) or (attempt.code and not lines):
        faults.append(f"exit code {attempt.code} after {len(lines)} lines")
    if attempt.num_bytes - least > MAX_BYTES:
        faults.append(f"{(attempt.num_bytes - least) / 1e6:.0f} MB")
    if PERSON.search(attempt.text):
        faults.append("names a person")
    allowed = TABLE["may write to"].get(words[0], ["out"])
    touched = sorted(file for file in before | after if before.get(file) != after.get(file))
    outside = (file for file in touched if not any(map(file.is_relative_to, allowed)))
    # Beside data, and runs.
    mapping_or_log = re.compile(rf"{re.escape(MAPPING_FILE)}|train_resumed_\d+_\d+\.log")
    faults += [f"touched {file}" for file in outside if not mapping_or_log.fullmatch(file.name)]
    return attempt._replace(faults=faults)


def fuzz(numbers: Sequence[int], seed: int, scratch: Path) -> int:
    """Makes the mutations of these numbers, in turn over the kinds; returns how many failed."""
    import cv2

    from tests.training.runs import no_charts
    from vesselrl import launch
    from vesselrl.training import train

    cv2.setNumThreads(1)
    no_charts.start()
    train.draw = lambda t: None
    box, whole, log = make_box(scratch), scratch / "whole", scratch / "log"
    # What every command imports and compiles is there before the first fork.
    with chdir(box), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for verb, root in (("data", "data/masks"), ("model", "model"), ("results", "")):
            for words in TABLE["commands"][verb]:
                assert launch.main(words.format(root=root).split()) == 0, words
    shutil.rmtree(box / "out")
    for file in box.glob(f"data/[!p]*/{MAPPING_FILE}"):
        file.unlink()
    shutil.copytree(box, whole)
    gc.freeze()  # or each fork would look through all that is here, and copy it
    least, rows = run_forked([], box, log).num_bytes, defaultdict(list)
    for number in numbers:
        name, rng = [*KINDS][number % len(KINDS)], random.Random(f"{seed} {number}")
        root, files, verb = KINDS[name]
        path = rng.choice(sorted(file for part in files.split() for file in (box / root).glob(part)))
        mutate(path, rng, box)
        words = rng.choice(TABLE["commands"][verb]).format(root=root)
        rows[name].append(attempt := try_mutation(path, words.split(), box, log, least))
        if attempt.faults or len(numbers) == 1:
            print(f"{number}: {path.relative_to(box)}, {words}: {'; '.join(attempt.faults)}", flush=True)
        if len(numbers) == 1:
            print(attempt.text)
        shutil.rmtree(box)
        shutil.copytree(whole, box)
    print_table(rows, least)
    return sum(bool(one.faults) for attempts in rows.values() for one in attempts)


def print_table(rows: dict[str, list[Attempt]], least: int) -> None:
    form = "{:26} {:>9} {:>8} {:>7} {:>7} {:>8} {:>8}"
    print(form.format("kind of file", "mutations", "accepted", "refused", "failed", "worst s", "worst MB"))
    for name, found in [*rows.items(), ("all", [*chain(*rows.values())])]:
        failed = sum(bool(one.faults) for one in found)
        accepted = sum(one.code == 0 and not one.faults for one in found)
        counted = len(found), accepted, len(found) - accepted - failed, failed
        most = (max(one.num_bytes for one in found) - least) / 1e6
        print(form.format(name, *counted, f"{max(one.seconds for one in found):.1f}", f"{most:.0f}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of one mutation")
    args = parser.parse_args()
    numbers = range(args.mutations) if args.only is None else [args.only]
    with TemporaryDirectory(prefix="fuzz_") as scratch:
        return int(fuzz(numbers, args.seed, Path(scratch)) > 0)


if __name__ == "__main__":
    sys.exit(main())
