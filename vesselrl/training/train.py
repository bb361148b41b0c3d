"""One training from data to verdict, in numbered steps.

1. Data: find the samples, split them by patient, choose how many.
2. Model: load it, put adapters on the chosen parts.
3. Validate before the first update; the untouched adapter is the first `best_lora`.
4. Epoch by epoch: PPO or supervised steps, validation, the best adapter kept.
5. Test once: the untouched model and the best adapter, on patients that nothing was chosen on.
6. Write results, curves, pictures and the report.
"""

import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from vesselrl.data.annotations import Sample
from vesselrl.data.dataset import VesselDataset
from vesselrl.evaluation.cases import Case, choose_cases, write_cases
from vesselrl.evaluation.evaluate import Evaluation, before_after_table, evaluate, write_evaluation
from vesselrl.evaluation.figures import plot_curves, plot_panels
from vesselrl.evaluation.held_out import post_processing
from vesselrl.evaluation.run_report import write_run_report
from vesselrl.evaluation.run_reward import make_reward
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.runs import RunFolder, provenance
from vesselrl.inference.predictor import Prediction
from vesselrl.models.lora import check_scope
from vesselrl.scoring.rewards import Reward
from vesselrl.scoring.topology import METRIC_SPEC
from vesselrl.training.batches import BatchSource
from vesselrl.training.checks import LearningError
from vesselrl.training.control_learners import FrangiLearner, UNetLearner
from vesselrl.training.diagnosis import Diagnosis
from vesselrl.training.drift import DriftGuard
from vesselrl.training.learner import AdapterLearner, Learner
from vesselrl.training.learning_rate import staged_warm_cosine
from vesselrl.training.monitor import Monitor, check_wandb
from vesselrl.training.run_data import SHEET_FILE, RunData, prepare_data, training_batches
from vesselrl.training.setup import check_reward, load_policy, select_device

logger = logging.getLogger(__name__)

# On validation 0.95 was a little better than Adam's own 0.999 with every seed tried; docs/results.md, R040.
BETAS = (0.9, 0.95)

HEADLINE = ("reward", "dice", "recall", "precision", "cldice", "beta0_error", "length_ratio")


@dataclass(frozen=True)
class TrainResult:
    """What a finished run hands to the command line.

    Attributes:
        folder: the run folder.
        validation: rows of `before_after_table` on the validation images.
        test: the same on the test images; empty for a sanity run.
        info: the content of training_info.json.
        marks: what must be said beside the scores, such as a split that leaks.
    """

    folder: Path
    validation: list[dict]
    test: list[dict]
    info: dict
    marks: tuple[str, ...] = ()


def train(config: TrainConfig, argv: list[str], console: Console | None = None) -> TrainResult:
    """Runs one training; see the module's docstring for the steps.

    Args:
        config: all settings.
        argv: the command line, stored as provenance.
        console: for progress bars; None shows none.

    Raises:
        DataError, CheckpointError, RewardError, RunError: bad input, before anything is trained; the run
            folder is removed again.
        LearningError: the run does not learn.
    """
    reward = make_reward(config)
    check_scope(config.lora_scope)
    if config.use_wandb:
        check_wandb()
    run = RunFolder.create(config.output_dir)
    with ExitStack() as bad_input:
        bad_input.callback(run.remove)
        logger.info("run folder %s", run.path)
        data = prepare_data(config, run)
        check_reward(reward, data)
        device = select_device(config.gpu)
        learner = make_learner(config, device)
        counts = data.counts | {"trainable": learner.counts}
        for component, count in counts["trainable"].items():
            logger.info("trainable in %s: %s values", component, f"{count:,}")
        batches = training_batches(config, data, run)
        origin = provenance(argv, device)
        run.write_json("config.json", {"args": config.to_dict(), "counts": counts, "provenance": origin})
        bad_input.pop_all()  # from here on the folder stays
    return _Training(config, run, data, batches, learner, reward, origin, counts).run(console)


def make_learner(config: TrainConfig, device: str) -> Learner:
    """What the settings ask to train: a Sa2VA with adapters, or a control in its place.

    Raises:
        CheckpointError: unusable model or adapter folder.
    """
    if config.control == "unet":
        return UNetLearner(config, device)
    if config.control == "frangi":
        return FrangiLearner()
    return AdapterLearner(load_policy(config, device), config)


class _Training:
    """State of a running training; the steps are its methods, in order."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        data: RunData,
        batches: BatchSource,
        learner: Learner,
        reward: Reward,
        origin: dict,
        counts: dict,
    ) -> None:
        self.config = config
        self.folder = run
        self.data = data
        self.batches = batches
        self.learner = learner
        self.reward = reward
        self.origin = origin
        self.counts = counts
        self.post = post_processing(config.to_dict())
        self.pixels = {s.key: (dataset, k) for dataset in map(VesselDataset, (data.val, data.test))
                       for k, s in enumerate(dataset.samples)}  # fmt: skip
        self.best: Evaluation | None = None
        self.best_values = learner.start
        self.num_steps = 0 if isinstance(learner, FrangiLearner) else batches.num_steps

    def run(self, console: Console | None) -> TrainResult:
        settings = self.config.to_dict() if self.config.use_wandb else None
        diagnosis = Diagnosis(self.config.max_grad_norm)
        with Monitor(
            self.folder, self.num_steps, console, self.config.log_freq, settings, diagnosis
        ) as monitor:
            if (sheet := self.folder.path / SHEET_FILE).exists():
                monitor.log_image("train/contact_sheet", np.asarray(Image.open(sheet)))
            before = self._validate(0, monitor)
            after = self._learn(monitor) or before
            self._save(f"final_{self.learner.kind}")
            delta_norm = self.learner.distance()
            if delta_norm == 0 and self.num_steps:
                raise LearningError(
                    f"After {self.num_steps} steps the adapter is exactly where it started: no sampled mask "
                    "ever earned more than another, or every change had to be taken back (the log says so). "
                    "Check the reward (a constant one teaches nothing) and --learning_rate."
                )
            tested = self._test(monitor)
        info = {
            "args": self.config.to_dict(),
            "counts": self.counts,
            "initial_metrics": headline(before),
            "final_metrics": headline(after),
            "best_metrics": headline(self.best),
            "test_metrics": {name: headline(evaluation) for name, evaluation in tested.items()},
            "best_val_dice": headline(self.best)["dice"],
            "total_steps": self.num_steps,
            "adapter_delta_norm": delta_norm,
            "grad_norm_max": monitor.grad_norm_max,
            "reward_time_share": monitor.reward_time_share,
            "findings": [asdict(finding) for finding in monitor.findings],
            "metric_spec": METRIC_SPEC,
            "provenance": self.origin,
        }
        self._draw()
        self.folder.write_json("training_info.json", info)
        write_run_report(self.folder.path)
        names = tuple(headline(before))
        validation = before_after_table(before, self.best, names)
        test = before_after_table(tested["before"], tested["after"], names) if tested else []
        marks = dict.fromkeys((*self.data.val_marks, *self.data.test_marks))
        return TrainResult(self.folder.path, validation, test, info, tuple(marks))

    def _learn(self, monitor: Monitor) -> Evaluation | None:
        """Takes the steps, or lets a filter choose its settings; returns the last validation."""
        if isinstance(self.learner, FrangiLearner):
            self.learner.choose(self.data.train, monitor.bar("filter"))
            self.best = None  # the training images have chosen; validation must not choose again
            return self._validate(1, monitor)
        return self._epochs(monitor)

    def _epochs(self, monitor: Monitor) -> Evaluation | None:
        stages = self._stages()
        # The schedule's factors are the rates themselves.
        optimizer = torch.optim.AdamW(
            self.learner.trainable.values(), lr=1.0, betas=BETAS, weight_decay=self.config.weight_decay
        )
        guard = DriftGuard(self.learner, optimizer, headline(self.best)["dice"], monitor.note)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: guard.rate_factor * staged_warm_cosine(step, stages, self.config.warmup_share),
        )
        updates = self.learner.updates(optimizer, self.reward)
        step, end_of_epoch, latest, stage = 0, 0, None, None
        for epoch in range(1, self.batches.num_epochs + 1):
            previous, stage = stage, self.config.stage_of_epoch(epoch, self.batches.num_epochs)
            update = updates[stage]
            if previous != stage:
                optimizer.state.clear()  # the moments of another loss say nothing about this one
                update.validated(headline(latest or self.best))
            end_of_epoch += self.batches.num_batches(epoch)
            for batch in self.batches.epoch(epoch):
                step += 1
                rate = schedule.get_last_lr()[0]
                figures = guard.step(step, update, batch)
                schedule.step()
                monitor.log_step(step, figures | {"train/learning_rate": rate, "train/epoch": float(epoch)})
                last_of_run = step == self.batches.num_steps
                due = last_of_run or (step == end_of_epoch and not self.config.sanity_overfit)
                if due or step % self.config.val_freq == 0:
                    latest = self._validate(step, monitor)
                    if not last_of_run:  # the adapter of the last step is kept as it was validated
                        update.validated(headline(latest))
                        guard.after_validation(step, headline(latest)["dice"])
            if epoch % self.config.save_freq == 0 and not self.config.sanity_overfit:
                self._save(f"checkpoint_epoch_{epoch}")
        return latest

    def _stages(self) -> list[tuple[int, float]]:
        """Number of steps and peak learning rate of each stage."""
        epochs = range(1, self.batches.num_epochs + 1)
        by_stage = groupby(epochs, lambda epoch: self.config.stage_of_epoch(epoch, self.batches.num_epochs))
        return [
            (sum(map(self.batches.num_batches, group)), self.config.rate_of_stage(stage))
            for stage, group in by_stage
        ]

    def _evaluate(self, side: str, monitor: Monitor, label: str) -> Evaluation:
        samples, marks = getattr(self.data, side), getattr(self.data, f"{side}_marks")

        def load(sample: Sample) -> tuple:
            dataset, index = self.pixels[sample.key]
            return dataset[index][:2]

        result = evaluate(self._predict, samples, load, self.reward, monitor.bar(label))
        return replace(result, marks=marks)

    def _predict(self, image: np.ndarray) -> Prediction:
        """Segments one image as masks of this run are used."""
        prediction = self.learner.predict(image)
        finish = self.post.finisher(prediction.probabilities)
        return prediction._replace(mask=finish(prediction.mask))

    def _validate(self, step: int, monitor: Monitor) -> Evaluation:
        result = self._evaluate("val", monitor, "validation")
        means = headline(result)
        monitor.log_validation(step, means)
        if self.best is None or means["reward"] > headline(self.best)["reward"]:
            self.best = result
            self.best_values = self.learner.values()
            self._save(f"best_{self.learner.kind}")
            write_evaluation(self.folder.path, "val_best", result, {"step": step})
        write_evaluation(
            self.folder.path, "val_before" if step == 0 else "val_latest", result, {"step": step}
        )
        return result

    def _test(self, monitor: Monitor) -> dict[str, Evaluation]:
        """Scores the untouched model and the best adapter on the test images, once."""
        if not self.data.test:
            return {}
        with self.learner.at(self.learner.start):
            before = self._evaluate("test", monitor, "test before")
        with self.learner.at(self.best_values):
            after = self._evaluate("test", monitor, "test after")
        for name, evaluation in (("test_before", before), ("test_after", after)):
            write_evaluation(self.folder.path, name, evaluation, {"threshold": 0.5, "run": self.folder.name})
        return {"before": before, "after": after}

    def _draw(self) -> None:
        """Curves, and image | truth | before | after for the best, median and worst validation images."""
        plot_curves(self.folder.path / "metrics.jsonl", self.folder.path / "curves.png")
        cases = []
        for key, rank in choose_cases(self.best.rows).items():
            dataset, index = self.pixels[key]
            image, truth, _ = dataset[index]
            with self.learner.at(self.learner.start):
                first = self._predict(image).mask
            with self.learner.at(self.best_values):
                last = self._predict(image).mask
            cases.append(Case(key, image, truth, first, last, rank))
        panels = [(case.key, case.image, case.truth, case.before, case.after) for case in cases]
        plot_panels(panels, self.folder.path / "panel.png")
        write_cases(self.folder.path, cases)

    def _save(self, name: str) -> None:
        self.learner.save(self.folder.path / name)


def headline(evaluation: Evaluation) -> dict[str, float]:
    """Patient-macro means of the headline metrics, and of the user's own term where there is one."""
    metrics = evaluation.summary["metrics"]
    return {name: metrics[name]["patient_mean"] for name in (*HEADLINE, "custom_score") if name in metrics}
