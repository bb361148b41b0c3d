"""Metrics of a run: metrics.jsonl, TensorBoard, other trackers, the log, diagnosis.json, progress bars."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich import progress
from rich.console import Console

from vesselrl.errors import WriteError
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.options import hide_paths
from vesselrl.experiment.progress import Pace, Progress, log_progress
from vesselrl.experiment.run_folder import RunFolder, writing
from vesselrl.training import processes
from vesselrl.training.health import Issue

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger(__name__)

SHOWN = ("train/reward", "train/loss", "train/approx_kl", "train/clipfrac", "train/grad_norm")
# What the trackers call the name of a run; its project is vesselrl.
RUN_NAMES = {"wandb": "name", "swanlab": "experiment_name", "mlflow": "run_name", "trackio": "name"}


def start_tracker(name: str, run_name: str, settings: Mapping[str, Any]) -> "GeneralTracker":
    """Begins a run with one of accelerate's trackers."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # its log asks for one; of several processes there is one already
    tracker = LOGGER_TYPE_TO_CLASS[name]("vesselrl", **{RUN_NAMES[name]: run_name})
    tracker.start()
    tracker.store_init_configuration({name: str(value) for name, value in settings.items()})
    return tracker


class Monitor:
    """Writes the metrics of one run, which may go on after step `resumed_at`; a context manager."""

    def __init__(
        self,
        run: RunFolder,
        config: TrainConfig,
        total_steps: int = 0,
        console: Console | None = None,
        resumed_at: int | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run = run
        self.log_freq = config.run.log_freq
        self.grad_norm_max = 0.0
        self.issues: list[Issue] = []
        self._reward_s = self._step_s = 0.0
        purge_step = None if resumed_at is None else resumed_at + 1
        self._folder = run.path / "tensorboard"
        with writing(self._folder):
            self.board = SummaryWriter(str(self._folder), purge_step=purge_step)
        names, settings = config.run.trackers, hide_paths(config.to_dict())
        self._trackers = [start_tracker(n, run.path.name, settings) for n in names if processes.is_main()]
        columns = (*progress.Progress.get_default_columns()[:2], progress.TextColumn("{task.fields[count]}"),
                   progress.TimeElapsedColumn(), "left", progress.TimeRemainingColumn())  # fmt: skip
        hidden = {"console": console or Console(quiet=True), "disable": console is None}
        self._progress = progress.Progress(*columns, **hidden)
        self._total, self._pace = total_steps, Pace()
        epochs = range(1, config.optim.num_epochs + 1)
        passes = sum(config.passes_of_epoch(epoch, len(epochs)) for epoch in epochs)
        num_rl = [config.stage_of_epoch(epoch, len(epochs)) for epoch in epochs].count("rl")
        # PPO's steps come last; each passes over its images once to sample, and then as often as told.
        self._num_sft = total_steps - total_steps * num_rl // passes
        self._more_passes = config.ppo.num_passes
        work = self._work(total_steps)
        self._training = self._progress.add_task("training", total=work, count=f"0/{total_steps}")

    def __enter__(self) -> "Monitor":
        self._progress.start()
        self._write_issues()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        try:
            with writing(self._folder):
                self.board.close()
        except WriteError:
            if not any(exception):  # else the run has ended by what is more telling
                raise
        for tracker in self._trackers:
            tracker.finish()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stores any metrics."""
        self.run.append_metrics({"step": step, **metrics})
        with writing(self._folder):
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(dict(metrics), step=step)

    def show_image(self, path: Path) -> None:
        """Shows a picture in TensorBoard, if there is one."""
        if path.exists():
            pixels = np.asarray(Image.open(path))
            with writing(self._folder):
                self.board.add_image(f"train/{path.stem}", pixels, 0, dataformats="HWC")

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stores the metrics of one training step and moves the bar."""
        self.grad_norm_max = max(self.grad_norm_max, metrics.get("train/grad_norm", 0.0))
        self._reward_s += metrics.get("time/reward", 0.0)
        self._step_s += metrics.get("time/step", 0.0)
        self.log(step, metrics)
        done, work = self._work(step), self._work(self._total)
        self._progress.update(self._training, completed=done, count=f"{step}/{self._total}")
        shown = [f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics]
        left, is_due = self._pace.left(done, work), self._pace.is_due()
        if step % self.log_freq == 0 or is_due:
            logger.info("step %d of %d%s: %s", step, self._total, left, ", ".join(shown) or "taken back")

    def _work(self, step: int) -> int:
        """What the steps so far cost, in supervised steps."""
        return step + self._more_passes * max(0, step - self._num_sft)

    def log_validation(self, step: int, scores: Mapping[str, float]) -> None:
        """Stores the mean scores of a validation."""
        self.log(step, {f"val/{name}": value for name, value in scores.items()})
        logger.info("validation at step %d: %s", step, ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))

    def note(self, issue: Issue) -> None:
        """Writes an issue to the log, as a warning, and to diagnosis.json."""
        logger.log(logging.WARNING if processes.is_main() else logging.INFO, "%s", issue)
        self.issues.append(issue)
        self._write_issues()

    def _write_issues(self) -> None:
        self.run.write_json("diagnosis.json", {"findings": [issue.to_json() for issue in self.issues]})

    @property
    def reward_time_share(self) -> float:
        """Share of the training steps' time that was spent waiting for scores and credit, in [0, 1]."""
        return self._reward_s / self._step_s if self._step_s else 0.0

    def bar(self, label: str) -> Progress:
        """A callback (done, total) that shows a second bar for the length of an evaluation, or logs."""
        if self._progress.disable:
            return log_progress(label)
        task = self._progress.add_task(label, total=None, count="")

        def show(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total, count=f"{done}/{total}")
            if done == total:
                self._progress.remove_task(task)

        return show

    def state_dict(self) -> dict[str, Any]:
        """Sums and issues so far, and the length of metrics.jsonl."""
        sums = (self.grad_norm_max, self._reward_s, self._step_s)
        path = self.run.metrics_file
        with writing(path), path.open("ab") as file:  # on the disk before the state that counts on it
            os.fsync(file.fileno())
            return {"sums": sums, "issues": self.issues, "bytes": file.tell()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores sums and issues; metrics.jsonl loses what it got after that, and damaged lines."""
        self.grad_norm_max, self._reward_s, self._step_s = state["sums"]
        self.issues = [Issue(*issue) for issue in state["issues"]]
        if self.run.cut_metrics(state["bytes"]):
            logger.warning("%s has lost lines: curves lack those steps.", self.run.metrics_file)
        self._write_issues()
