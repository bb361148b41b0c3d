"""Trains the arms of the learning benchmark, each in a process of its own, and can be interrupted.

OUTPUT/SUITE/ARM_seedS/ holds `arm.json` (the settings), `train.log` and the run folder of the training. An
arm is finished when its run folder has a training_info.json; one that was cut off goes on after its last
validation, or is removed and trained anew where there was none.
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
from dataclasses import dataclass, fields
from pathlib import Path

from vesselrl.benchmarks.learning_arms import ARMS, SPLIT_SEED, Arm, Suite
from vesselrl.benchmarks.learning_data import SuiteData
from vesselrl.errors import RunError
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import write_json
from vesselrl.training.resuming import STATE_FILE

logger = logging.getLogger(__name__)

ARM_FILE = "arm.json"
LOG_FILE = "train.log"
# One process with one thread per core is faster than one process with several threads.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# Where things lie says nothing about what was trained.
PLACES = ("output_dir", "data_root", "split_file")


@dataclass(frozen=True)
class Job:
    """One training: an arm with a seed."""

    arm: Arm
    seed: int
    folder: Path
    config: TrainConfig
    # Fingerprint of the split.
    images: str

    @property
    def run(self) -> Path | None:
        """The finished run folder; None if there is none."""
        return finished_run(self.folder)

    @property
    def settings(self) -> dict:
        """What decides the result, for arm.json."""
        plain = {name: value for name, value in self.config.to_dict().items() if name not in PLACES}
        return plain | {"images": self.images}


def finished_run(folder: Path) -> Path | None:
    """The run folder with a training_info.json inside an arm's folder; None if there is none."""
    found = sorted(folder.glob("*/training_info.json"))
    return found[-1].parent if found else None


def arm_folder(output_dir: Path, suite: Suite, arm: str, seed: int) -> Path:
    """Where everything of an arm and a seed lies."""
    return output_dir / suite.name / f"{arm}_seed{seed}"


def plan_jobs(suite: Suite, data: SuiteData, output_dir: Path, seeds: Sequence[int]) -> list[Job]:
    """The trainings of a suite, seed by seed.

    Raises:
        RunError: the settings do not give every arm the same number of image passes.
    """
    jobs = []
    for seed in seeds:
        for arm in ARMS:
            if arm.settings is None:
                continue
            folder = arm_folder(output_dir, suite, arm.name, seed)
            config = TrainConfig(
                data_root=str(data.root),
                split_file=str(data.split_file),
                split_seed=SPLIT_SEED,
                seed=seed,
                output_dir=str(folder),
                **(suite.settings | arm.settings),
            )
            jobs.append(Job(arm, seed, folder, config, data.fingerprint))
    passes = {job.arm.name: job.config.num_epochs * job.config.num_passes for job in jobs}
    if len(set(passes.values())) > 1:
        raise RunError(
            f"The arms would see each image a different number of times: {passes}. Make them equal."
        )
    return jobs


def train_jobs(jobs: Sequence[Job], workers: int) -> dict[str, str]:
    """Trains what is not finished, `workers` at a time; a failure stops no other training.

    Returns:
        By name of the arm's folder, what went wrong.

    Raises:
        RunError: an arm was trained with other settings, to its end or to a validation, or a folder is not
            one of this benchmark; nothing is trained then.
    """
    for job in jobs:
        _check_settings(job)
    waiting = [job for job in jobs if job.run is None]
    logger.info("%d trainings, %d of them finished already", len(jobs), len(jobs) - len(waiting))
    failures: dict[str, str] = {}
    pool = ThreadPoolExecutor(workers)
    try:
        for job, error in zip(waiting, pool.map(train_arm, waiting), strict=True):
            if error:
                failures[job.folder.name] = error
                logger.error("%s failed: %s", job.folder.name, error)
    finally:
        pool.shutdown(cancel_futures=True)
    return failures


def train_arm(job: Job) -> str:
    """Trains one arm, or what is left of it; returns what went wrong, "" if nothing did."""
    interrupted = interrupted_run(job)
    if interrupted is None:
        if job.folder.exists():
            shutil.rmtree(job.folder)
        job.folder.mkdir(parents=True)
        write_json(job.folder / ARM_FILE, {"settings": job.settings})
        arguments = command(job.config)
    else:
        arguments = ["train", "--resume_from", str(interrupted)]
    logger.info("%s: %s", job.folder.name, "training" if interrupted is None else "going on")
    started = time.monotonic()
    code = run_training(arguments, job.folder / LOG_FILE)
    seconds = time.monotonic() - started
    log = job.folder / LOG_FILE
    if code != 0:
        return f"exit code {code} after {seconds:.0f} s, see {log}{_last_words(log)}"
    if job.run is None:
        return f"it ended without a training_info.json, see {log}{_last_words(log)}"
    # How long an arm took that was cut off is not known.
    timing = {"seconds": round(seconds)} if interrupted is None else {}
    write_json(job.folder / ARM_FILE, {"settings": job.settings} | timing)
    logger.info("%s: done in %.0f s", job.folder.name, seconds)
    return ""


def interrupted_run(job: Job) -> Path | None:
    """The run folder of a training that was cut off after a validation; None if there is none."""
    found = sorted(job.folder.glob(f"*/{STATE_FILE}"))
    return found[-1].parent if found else None


def run_training(arguments: Sequence[str], log_file: Path) -> int:
    """Runs one command line of vesselrl with one thread; returns its exit code."""
    with log_file.open("a", encoding="utf-8") as log:
        return subprocess.run(
            [sys.executable, "-m", "vesselrl", *arguments],
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | ONE_THREAD,
            check=False,
        ).returncode  # fmt: skip


def command(config: TrainConfig) -> list[str]:
    """The arguments of `vesselrl` that give these settings: all that differ from the default.

    >>> command(TrainConfig(stage="sft", seed=43))
    ['train', '--stage', 'sft', '--seed', '43']
    """
    usual, arguments = TrainConfig(), ["train"]
    for name in (field.name for field in fields(TrainConfig)):
        value = getattr(config, name)
        if value == getattr(usual, name):
            continue
        if isinstance(value, bool):
            arguments.append(f"--{name}")  # every flag is off by default
        else:
            arguments += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return arguments


def image_passes(run: Path) -> int:
    """How often a training looked at an image with gradient: epochs x training images x passes."""
    info = read_info(run)
    return info["args"]["num_epochs"] * info["counts"]["train"]["used"] * info["args"]["num_passes"]


def check_equal_passes(jobs: Sequence[Job]) -> int:
    """The number of image passes that all finished trainings share; filters, which take no step, have none.

    Raises:
        RunError: the numbers differ, so that the comparison would not be fair; the message has them all.
    """
    runs = {job.folder.name: job.run for job in jobs if job.run is not None}
    passes = {name: image_passes(run) for name, run in runs.items() if read_info(run)["total_steps"]}
    if len(set(passes.values())) > 1:
        listed = ", ".join(f"{name} {number}" for name, number in passes.items())
        raise RunError(
            f"The arms did not look at the same number of images ({listed}): they cannot be compared. Delete "
            "the folders that deviate and run the benchmark again."
        )
    return next(iter(passes.values()), 0)


def read_info(run: Path) -> dict:
    """The training_info.json of a run."""
    return json.loads((run / "training_info.json").read_text(encoding="utf-8"))


def training_seconds(job: Job) -> float | None:
    """How long a finished training took; None if it was cut off on its way."""
    return read_arm(job).get("seconds")


def read_arm(job: Job) -> dict:
    """The arm.json of a job that has begun."""
    return json.loads((job.folder / ARM_FILE).read_text(encoding="utf-8"))


def _check_settings(job: Job) -> None:
    """Refuses a folder of others, and a training with other settings than are asked for now.

    One that has neither finished nor validated is nothing to keep: it will be trained anew.
    """
    path = job.folder / ARM_FILE
    if not path.is_file():
        if job.folder.exists():
            raise RunError(
                f"{job.folder} is no arm of this benchmark (no {ARM_FILE}). Give another --output_dir."
            )
        return
    if job.run is None and interrupted_run(job) is None:
        return
    before, now = read_arm(job)["settings"], job.settings
    defaults = TrainConfig().to_dict()  # a setting that was added since had its default then
    names = [name for name in now if before.get(name, defaults.get(name)) != now[name]]
    if names:
        changes = ", ".join(
            f"{name} {before.get(name, defaults.get(name))}, now {now[name]}" for name in names
        )
        raise RunError(
            f"{job.folder} was trained with other settings ({changes}). Delete that folder to train the arm "
            "again, or give another --output_dir."
        )


def _last_words(log: Path) -> str:
    """The last line of a log, for a message."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return f" ({lines[-1][:200]})" if lines else ""
