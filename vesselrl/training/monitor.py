"""Where a training's figures go: metrics.jsonl, TensorBoard, wandb on request, the log and a progress bar.

What the figures say about the run, the findings of `diagnosis.py`, goes to the log and to diagnosis.json.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vesselrl.experiment.run_folder import RunFolder
from vesselrl.training.diagnosis import Diagnosis, Finding

logger = logging.getLogger(__name__)


class Monitor:
    """Collects the figures of one run; a context manager that closes its writers.

    Args:
        run: gets metrics.jsonl, diagnosis.json and the TensorBoard files.
        total_steps: of the training, for the bar.
        console: shows progress bars; None shows none.
        log_freq: steps between log lines; every step is stored.
        wandb_settings: resolved settings to start a wandb run with; None starts none.
        diagnosis: reads all figures; None for one with the usual limits.
        resumed_at: step that an interrupted run goes on from; what TensorBoard has of later ones is hidden.

    Attributes:
        findings: what was noticed so far, in order.

    Raises:
        ModuleNotFoundError: wandb was asked for and is not installed.
    """

    def __init__(
        self,
        run: RunFolder,
        total_steps: int,
        console: Console | None = None,
        log_freq: int = 10,
        wandb_settings: dict | None = None,
        diagnosis: Diagnosis | None = None,
        resumed_at: int | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run = run
        self.log_freq = log_freq
        self.grad_norm_max = 0.0
        self.findings: list[Finding] = []
        self._diagnosis = diagnosis or Diagnosis()
        self._reward_s = self._step_s = 0.0
        self._board = SummaryWriter(
            str(run.path / "tensorboard"), purge_step=None if resumed_at is None else resumed_at + 1
        )
        self._wandb = start_wandb(run.name, wandb_settings) if wandb_settings is not None else None
        self._progress = new_progress(console)
        self._training = self._progress.add_task("training", total=total_steps)

    def __enter__(self) -> "Monitor":
        self._progress.start()
        self._write_findings()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def log_step(self, step: int, figures: dict[str, float]) -> None:
        """Stores the figures of one training step and moves the bar."""
        self.grad_norm_max = max(self.grad_norm_max, figures.get("train/grad_norm", 0.0))
        self._reward_s += figures.get("time/reward", 0.0)
        self._step_s += figures.get("time/step", 0.0)
        self.log(step, figures)
        self._progress.update(self._training, completed=step)
        names = ("train/reward", "train/loss", "train/approx_kl", "train/clipfrac", "train/grad_norm")
        shown = [f"{name} {figures[name]:.4g}" for name in names if name in figures]
        if step % self.log_freq == 0 and shown:
            logger.info("step %d: %s", step, ", ".join(shown))
        for finding in self._diagnosis.after_step(step, figures):
            self.note(finding)

    def log_validation(self, step: int, scores: Mapping[str, float]) -> None:
        """Stores the headline scores of a validation."""
        self.log(step, {f"val/{name}": value for name, value in scores.items()})
        logger.info("validation at step %d: %s", step, ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        for finding in self._diagnosis.after_validation(step, scores):
            self.note(finding)

    def note(self, finding: Finding) -> None:
        """Tells of a finding: a warning in the log and an entry of diagnosis.json."""
        logger.warning("%s", finding)
        self.findings.append(finding)
        self._write_findings()

    def state_dict(self) -> dict[str, Any]:
        """What was noticed and added up so far, and how long metrics.jsonl is."""
        return {
            "grad_norm_max": self.grad_norm_max,
            "reward_s": self._reward_s,
            "step_s": self._step_s,
            "findings": [asdict(finding) for finding in self.findings],
            "diagnosis": self._diagnosis.state_dict(),
            "metrics_bytes": self.run.metrics_file.stat().st_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave; what metrics.jsonl got after that is cut off."""
        self.grad_norm_max = state["grad_norm_max"]
        self._reward_s, self._step_s = state["reward_s"], state["step_s"]
        self.findings = [Finding(**finding) for finding in state["findings"]]
        self._diagnosis.load_state_dict(state["diagnosis"])
        os.truncate(self.run.metrics_file, state["metrics_bytes"])
        self._write_findings()

    def _write_findings(self) -> None:
        self.run.write_json("diagnosis.json", {"findings": [asdict(finding) for finding in self.findings]})

    @property
    def reward_time_share(self) -> float:
        """Share of the training steps' time that scoring and crediting masks took, in [0, 1]."""
        return self._reward_s / self._step_s if self._step_s else 0.0

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Stores any figures."""
        self.run.append_metrics({"step": step, **figures})
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(figures, step=step)

    def log_image(self, name: str, image: np.ndarray) -> None:
        """Stores a picture, uint8 (H, W, 3), with the TensorBoard files."""
        self._board.add_image(name, image, 0, dataformats="HWC")

    def bar(self, label: str) -> Callable[[int, int], None]:
        """A callback (done, total) that shows a second bar for the length of an evaluation."""
        task = self._progress.add_task(label, total=None)

        def show(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)
            if done == total:
                self._progress.remove_task(task)

        return show


def new_progress(console: Console | None) -> Progress:
    """Bars with counts, elapsed and remaining time; invisible without a console."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    return Progress(*columns, console=console or Console(quiet=True), disable=console is None)


def check_wandb() -> None:
    """Whether wandb can be used.

    Raises:
        ModuleNotFoundError: wandb is not installed; the message says how to get it.
    """
    if find_spec("wandb") is None:
        raise ModuleNotFoundError("--use_wandb needs the package wandb: pip install wandb.")


def start_wandb(name: str, settings: dict) -> object:
    """A wandb run.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """
    check_wandb()
    import wandb

    return wandb.init(project="vesselrl", name=name, config=settings)
