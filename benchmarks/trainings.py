"""Trains the methods of the learning benchmark, each in a process of its own, and can be interrupted.

OUTPUT/SUITE/METHOD_seedS/ holds `arm.json` (the settings), `train.log` and the run folder of the training,
which is finished when it has a training_info.json. A training that was cut off goes on after its last
validation, or is removed and begun anew where there was none.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.methods import FIRST_SEED, METHODS, SPLIT_SEED, Suite
from vesselrl.errors import RunError
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import write_json
from vesselrl.training.checkpoint import STATE_FILE

logger = logging.getLogger(__name__)

METHOD_FILE = "arm.json"
# One process with one thread per core is faster than one process with several threads.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# The places of files say nothing about what was trained.
PLACES = ("output_dir", "data_root", "split_file")


@dataclass(frozen=True)
class Training:
    """One method with one seed."""

    method: str
    seed: int
    folder: Path
    options: dict[str, Any]  # of `vesselrl train`
    images: str  # fingerprint of the split

    @property
    def run(self) -> Path | None:
        """The finished run folder; None if there is none."""
        return finished_run(self.folder)

    @property
    def interrupted(self) -> Path | None:
        """The run folder of a training that was cut off after a validation; None if there is none."""
        found = sorted(self.folder.glob(f"*/{STATE_FILE}"))
        return found[-1].parent if found else None

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the result."""
        return plain_settings(TrainConfig.from_dict(self.options)) | {"images": self.images}

    @property
    def stored(self) -> dict[str, Any]:
        """The arm.json of a training that has begun: `settings` and, of one not cut off, `seconds`."""
        return json.loads((self.folder / METHOD_FILE).read_text(encoding="utf-8"))


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """Settings as JSON stores them, without places."""
    return json.loads(json.dumps({k: v for k, v in config.to_dict().items() if k not in PLACES}))


def finished_run(folder: Path) -> Path | None:
    """The run folder with a training_info.json inside a method's folder; None if there is none."""
    found = sorted(folder.glob("*/training_info.json"))
    return found[-1].parent if found else None


def read_info(run: Path) -> dict[str, Any]:
    """The training_info.json of a run."""
    return json.loads((run / "training_info.json").read_text(encoding="utf-8"))


def plan_trainings(suite: Suite, data_root: Path, folder: Path, num_seeds: int) -> list[Training]:
    """The trainings of a suite, seed by seed; `folder` has its data_split.json."""
    split_file = folder / "data_split.json"
    images = json.loads(split_file.read_text(encoding="utf-8"))["sha256"]
    common = {"data_root": str(data_root), "split_file": str(split_file), "split_seed": SPLIT_SEED}
    trainings = []
    for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
        for name, method in METHODS.items():
            if method.options is not None:
                place = folder / f"{name}_seed{seed}"
                own = {"seed": seed, "output_dir": str(place)} | suite.options | method.options
                trainings.append(Training(name, seed, place, common | own, images))
    return trainings


def train_all(trainings: Sequence[Training], workers: int) -> dict[str, str]:
    """Trains what is not finished, `workers` at a time; returns the failures by folder name.

    Nothing is trained if something was trained with other settings, or a folder is not one of this benchmark.
    """
    for training in trainings:
        _check_settings(training)
    waiting = [training for training in trainings if training.run is None]
    logger.info("%d trainings, %d of them finished already", len(trainings), len(trainings) - len(waiting))
    failures: dict[str, str] = {}
    pool = ThreadPoolExecutor(workers)
    try:
        for training, error in zip(waiting, pool.map(train_one, waiting), strict=True):
            if error:
                failures[training.folder.name] = error
                logger.error("%s failed: %s", training.folder.name, error)
    finally:
        pool.shutdown(cancel_futures=True)
    return failures


def train_one(training: Training) -> str:
    """Trains one method, or the rest of it; returns the reason of a failure, "" if there was none."""
    interrupted, log = training.interrupted, training.folder / "train.log"
    if interrupted is None:
        shutil.rmtree(training.folder, ignore_errors=True)
        training.folder.mkdir(parents=True)
        write_json(training.folder / METHOD_FILE, {"settings": training.settings})
        arguments = [word for name, value in training.options.items() for word in (f"--{name}", str(value))]
    else:
        arguments = ["--resume_from", str(interrupted)]
    logger.info("%s: %s", training.folder.name, "training" if interrupted is None else "going on")
    started = time.monotonic()
    code = run_command(["train", *arguments], log)
    seconds = time.monotonic() - started
    if code != 0 or training.run is None:
        end = f"exit code {code} after {seconds:.0f} s" if code else "it ended without a training_info.json"
        last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        return f"{end}, see {log} ({last[:200]})"
    # The time of a training that was cut off is not known.
    timing = {"seconds": round(seconds)} if interrupted is None else {}
    write_json(training.folder / METHOD_FILE, {"settings": training.settings} | timing)
    logger.info("%s: done in %.0f s", training.folder.name, seconds)
    return ""


def run_command(arguments: Sequence[str], log_file: Path) -> int:
    """Runs one command line of vesselrl with one thread; returns its exit code."""
    command = [sys.executable, "-m", "vesselrl", *arguments]
    with log_file.open("a", encoding="utf-8") as log:
        into_log = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        return subprocess.run(command, **into_log, env=os.environ | ONE_THREAD, check=False).returncode


def check_equal_passes(trainings: Sequence[Training]) -> int:
    """The image passes (epochs x images x passes) of every finished training; filters take no step."""
    passes = {}
    for training in trainings:
        if training.run is not None and (info := read_info(training.run))["total_steps"]:
            args, images = info["args"], info["counts"]["train"]["used"]
            passes[training.folder.name] = args["num_epochs"] * images * args["num_passes"]
    if len(set(passes.values())) > 1:
        listed = ", ".join(f"{name} {number}" for name, number in passes.items())
        raise RunError(
            f"The methods did not look at the same number of images ({listed}): they cannot be compared. "
            "Delete the folders that deviate and run the benchmark again."
        )
    return next(iter(passes.values()), 0)


def _check_settings(training: Training) -> None:
    """One that has neither finished nor validated is nothing to keep: it will be trained anew."""
    folder = training.folder
    if folder.exists() and not (folder / METHOD_FILE).is_file():
        raise RunError(f"{folder} is not of this benchmark (no {METHOD_FILE}). Give another --output_dir.")
    if training.run is None and training.interrupted is None:
        return
    now = training.settings
    # A setting that was added since had its default then.
    before = plain_settings(TrainConfig()) | training.stored["settings"]
    changes = [f"{name} {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]]
    if changes:
        raise RunError(
            f"{folder} was trained with other settings ({', '.join(changes)}). Delete that folder to train "
            "again, or give another --output_dir."
        )
