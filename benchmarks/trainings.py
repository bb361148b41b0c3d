"""The methods of the learning benchmark, its suites, the split of their images, and all trainings."""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from vesselrl.data.samples import Sample, find_samples
from vesselrl.data.splits import SUBSETS, Split, read_split, split_by_patient, take, write_split
from vesselrl.errors import DataError, RefusedError, Stopped
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import CONFIG_FILE, read_json, write_json
from vesselrl.scoring.postprocessing import PostProcessing

logger = logging.getLogger(__name__)

SEED = 42  # of the split, and of the first training of a method; the others have 43, ...
SETTINGS_FILE, INFO_FILE = "arm.json", "training_info.json"
_STARTED: list[subprocess.Popen] = []
# One process with one thread per core is faster than one process with several threads.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Method(NamedTuple):
    """One row of the comparison: a training, or another post-processing of the predictions of one."""

    label: str
    options: dict[str, Any] | None = None  # of `vesselrl train`; None: nothing is trained
    # Whose predictions are taken; its own if empty, of several those of highest tuned validation reward.
    sources: tuple[str, ...] = ()
    # "raw": threshold 0.5; "fixed": `FIXED_POST`; "threshold": the same, its threshold tuned on validation;
    # "tuned": threshold, smallest component and closing of gaps tuned.
    post: str = "fixed"


TABLE = tomllib.loads(Path(__file__).with_name("learning.toml").read_text(encoding="utf-8"))
FIXED_POST = PostProcessing(0.5, TABLE["common"]["min_component_px"], TABLE["common"]["close_gaps"])
METHODS = {name: Method(**values) for name, values in TABLE["methods"].items()}


class Suite(NamedTuple):
    """Images, sizes and schedule, the same for every method."""

    title: str
    num_epochs: int
    val_freq: int
    sizes: dict[str, int]  # most images of a subset; all of one that is not named
    num_val_patients: int = 0  # of the published training half; 0: built-in images, split by patient
    dropped: Sequence[str] = ()  # file names without ending that no subset gets


SUITES = {name: Suite(**values) for name, values in TABLE["suites"].items()}


def prepare_split(suite: Suite, root: Path, path: Path) -> Split:
    """Finds the images; writes data_split.json at `path`, or makes sure that it is still the same."""
    samples = find_samples(root)
    split = published_split(suite, samples) if suite.num_val_patients else split_by_patient(samples, SEED)
    subsets = [tuple(take(getattr(split, name), suite.sizes.get(name), SEED)) for name in SUBSETS]
    split = Split(*subsets, SEED, tuple(len(s) / sum(map(len, subsets)) for s in subsets))
    if not path.exists():
        write_split(path, split)
    elif read_split(path, samples) != split:
        raise DataError(
            f"{path} is of other images. Give another --output_dir, or delete {path.parent} to train again."
        )
    return split


def published_split(suite: Suite, samples: Sequence[Sample]) -> Split:
    """Files named train_* for training and validation, test_* for test."""
    halves: dict[str, list[Sample]] = {"train": [], "test": []}
    for sample in samples:
        if sample.image_path.stem not in suite.dropped:
            halves.setdefault(sample.image_path.stem.partition("_")[0], []).append(sample)
    patients = sorted({sample.patient for sample in halves["train"]})
    if len(halves) > 2 or not halves["test"] or len(patients) <= suite.num_val_patients:
        raise DataError(
            f"{suite.title}: got {', '.join(halves)} files, {len(patients)} training patients; need train_*, "
            f"of more than {suite.num_val_patients} patients, and test_*. Give the --data_root of that set."
        )
    chosen = random.Random(SEED).sample(patients, suite.num_val_patients)
    train, val = (tuple(s for s in halves["train"] if (s.patient in chosen) == val) for val in (False, True))
    return Split(train, val, tuple(halves["test"]), SEED)


def last_run(folder: Path, file: str = INFO_FILE) -> Path | None:
    """The last run folder inside a method's folder that has this file, by default that of a finished run."""
    return max((path.parent for path in folder.glob(f"*/{file}")), default=None)


def plain_settings(options: dict[str, Any]) -> dict[str, Any]:
    """All settings of a training with these options, as JSON stores them, without the places of files."""
    settings = json.loads(json.dumps(TrainConfig.from_dict(options).to_dict()))
    return {k: v for k, v in settings.items() if k not in ("output_dir", "data_root", "split_file")}


def train_all(
    suite: Suite, root: Path, folder: Path, num_seeds: int, workers: int, names: Container[str]
) -> tuple[dict[str, str], int]:
    """Trains these methods, `workers` at a time; returns failures by name, and the passes over images.

    `folder` has the data_split.json, and then a folder METHOD_seedS for each training; what is finished there
    is not trained again. Nothing is trained if something was trained with other settings, or a folder is
    not one of this benchmark.
    """
    split, trainings, settings = read_json(folder / "data_split.json"), {}, {}
    common = {"data_root": str(root), "split_file": str(folder / "data_split.json"), "split_seed": SEED}
    common |= TABLE["common"] | {"num_epochs": suite.num_epochs, "val_freq": suite.val_freq}
    for seed, (name, method) in product(range(SEED, SEED + num_seeds), METHODS.items()):
        if name in names and method.options is not None:
            place = folder / f"{name}_seed{seed}"
            trainings[place] = common | {"seed": seed, "output_dir": str(place)} | method.options
            settings[place] = plain_settings(trainings[place]) | {"images": split["sha256"]}
            check_settings(place, settings[place])
    failures = train_waiting({place: (trainings[place], settings[place]) for place in trainings}, workers)
    return failures, common["num_epochs"] * split["counts"]["train"] * common["num_passes"]


def train_waiting(jobs: dict[Path, tuple[dict[str, Any], dict[str, Any]]], workers: int) -> dict[str, str]:
    """Trains what is not finished, by folder its options and settings; returns failures by name."""
    waiting = [place for place in jobs if not last_run(place)]
    pool = ThreadPoolExecutor(workers)
    try:
        reasons = list(pool.map(lambda place: train_one(place, *jobs[place]), waiting))
    except Stopped as stop:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in _STARTED:
            process.terminate()  # it saves its state
        stop.add_note("The same command goes on from there.")
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return {place.name: reason for place, reason in zip(waiting, reasons, strict=True) if reason}


def check_settings(folder: Path, now: dict[str, Any]) -> None:
    """Raises RefusedError where another training than this would be removed or taken for this one."""
    if folder.exists() and not (folder / SETTINGS_FILE).is_file():
        raise RefusedError(f"{folder} is not of this benchmark (no {SETTINGS_FILE}). Give another folder.")
    if not last_run(folder) and not last_run(folder, CONFIG_FILE):
        return  # nothing to keep: it will be trained anew
    # A setting that was added since had its default then.
    before = plain_settings({}) | read_json(folder / SETTINGS_FILE)["settings"]
    if changes := [f"{n} {before.get(n)}, now {now[n]}" for n in now if before.get(n) != now[n]]:
        raise RefusedError(
            f"{folder} was trained with other settings ({', '.join(changes)}). Delete that folder to train "
            "again, or give another --output_dir."
        )


def train_one(folder: Path, options: dict[str, Any], settings: dict[str, Any]) -> str:
    """Trains one method, or the rest of it; returns the reason of a failure, "" if there was none."""
    interrupted, log = last_run(folder, CONFIG_FILE), folder / "train.log"
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    if interrupted:
        arguments = ["--resume_from", str(interrupted)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / SETTINGS_FILE, {"settings": settings})
    logger.info("%s: %s", folder.name, "going on" if interrupted else "training")
    code = run_command(["train", *arguments], log)
    if code == 0 and last_run(folder):
        return ""
    last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    reason = f"exit code {code}" if code else f"it ended without a {INFO_FILE}"
    return f"{reason}, see {log} ({last[:200]})"


def run_command(arguments: Sequence[str], log_file: Path) -> int:
    """Runs one command line of vesselrl with one thread; returns its exit code."""
    command = [sys.executable, "-m", "vesselrl", *arguments]
    with log_file.open("a", encoding="utf-8") as log:
        into_log = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        # In a group of their own, as Ctrl-C in a terminal would be a second signal for them.
        apart = {"env": os.environ | ONE_THREAD, "process_group": 0}
        with subprocess.Popen(command, **into_log, **apart) as process:
            _STARTED.append(process)
            return process.wait()
