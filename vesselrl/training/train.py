"""One training from data to verdict, in numbered steps.

1. Data: find the samples, split them by patient, choose how many.
2. Model: load it, put adapters on the chosen parts.
3. Validate before the first update; the untouched adapter is the first `best_lora`.
4. Epoch by epoch: PPO or supervised steps, validation, the best adapter kept.
5. Test once: the untouched model and the best adapter, on patients that nothing was chosen on.
6. Write results, curves, pictures and the report.
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from vesselrl.data.annotations import Sample
from vesselrl.data.dataset import VesselDataset
from vesselrl.errors import LearningError
from vesselrl.evaluation.cases import Case, choose_cases, write_cases
from vesselrl.evaluation.evaluate import evaluate
from vesselrl.evaluation.figures import plot_curves, plot_panels
from vesselrl.evaluation.results import Evaluation, before_after_table, evaluation_from_json, write_evaluation
from vesselrl.evaluation.run_report import write_run_report
from vesselrl.evaluation.run_settings import make_reward, post_processing
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import RunFolder, provenance, run_settings
from vesselrl.inference.predictor import Prediction
from vesselrl.models.lora import check_scope
from vesselrl.scoring.rewards import Reward
from vesselrl.scoring.spec import METRIC_SPEC
from vesselrl.training.batches import BatchSource
from vesselrl.training.control_learners import FrangiLearner, UNetLearner
from vesselrl.training.diagnosis import Diagnosis
from vesselrl.training.learner import AdapterLearner, Learner
from vesselrl.training.loop import TrainingLoop
from vesselrl.training.monitor import Monitor, check_wandb
from vesselrl.training.resuming import STATE_FILE, check_origins, origins, read_state, write_state
from vesselrl.training.run_data import SHEET_FILE, RunData, prepare_data, training_batches
from vesselrl.training.setup import check_reward, load_policy, select_device

logger = logging.getLogger(__name__)

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
    reward = check_settings(config)
    run = RunFolder.create(config.output_dir)
    with ExitStack() as bad_input:
        bad_input.callback(run.remove)
        logger.info("run folder %s", run.path)
        training = prepare(config, reward, run, argv)
        facts = {"counts": training.counts, "provenance": training.provenance}
        run.write_json("config.json", {"args": config.to_dict()} | facts)
        bad_input.pop_all()  # from here on the folder stays
    if training.num_steps:
        logger.info("if interrupted it goes on with: vesselrl train --resume_from %s", run.path)
    return training.run(console)


def resume(folder: Path, argv: list[str], console: Console | None = None) -> TrainResult:
    """Goes on with an interrupted training after its last validation, with its own settings.

    On a CPU it ends with the values that it would have had without the interruption; with several images per
    step, up to the rounding of the reference policy's masks, which feel their neighbours in the batch.

    Args:
        folder: of the run.
        argv: the command line, stored beside the first one.
        console: as for `train`.

    Raises:
        RunError: the run has finished, or had not come to its first validation, or images or model have
            changed since. What the folder holds is left as it is.
        DataError, CheckpointError, RewardError, LearningError: as for `train`.
    """
    state, run = read_state(folder), RunFolder(folder)
    config = TrainConfig.from_dict(run_settings(folder))
    with TemporaryDirectory() as scratch:  # nothing is written to the run before all is known to fit
        training = prepare(config, check_settings(config), RunFolder(Path(scratch)), argv)
    check_origins(state["origins"], training.origins)
    training.folder = run
    return training.run(console, state)


def check_settings(config: TrainConfig) -> Reward:
    """The reward; raises what is wrong with settings that need no data to be judged."""
    reward = make_reward(config)
    check_scope(config.lora_scope)
    if config.use_wandb:
        check_wandb()
    return reward


def prepare(config: TrainConfig, reward: Reward, run: RunFolder, argv: list[str]) -> "_Training":
    """Data, model and batches of a training; what there is to say about the data is written to `run`."""
    data = prepare_data(config, run)
    check_reward(reward, data)
    device = select_device(config.gpu)
    learner = make_learner(config, device)
    for component, count in learner.counts.items():
        logger.info("trainable in %s: %s values", component, f"{count:,}")
    batches = training_batches(config, data, run)
    return _Training(config, run, data, batches, learner, reward, provenance(argv, device))


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
        provenance: dict,
    ) -> None:
        self.config = config
        self.folder = run
        self.data = data
        self.batches = batches
        self.learner = learner
        self.reward = reward
        self.provenance = provenance
        self.counts = data.counts | {"trainable": learner.counts}
        self.post = post_processing(config.to_dict())
        self.pixels = {s.key: (dataset, k) for dataset in map(VesselDataset, (data.val, data.test))
                       for k, s in enumerate(dataset.samples)}  # fmt: skip
        self.before: Evaluation | None = None
        self.latest: Evaluation | None = None
        self.best: Evaluation | None = None
        self.best_step, self.best_values = 0, learner.start
        self.origins = {} if isinstance(learner, FrangiLearner) else origins(data, learner.start)
        self.num_steps = 0 if isinstance(learner, FrangiLearner) else batches.num_steps

    def run(self, console: Console | None, state: Mapping[str, Any] | None = None) -> TrainResult:
        """The whole training, or what is left of it after the state of an interrupted one."""
        settings = self.config.to_dict() if self.config.use_wandb else None
        diagnosis = Diagnosis(self.config.max_grad_norm)
        resumed_at = None if state is None else state["loop"]["step"]
        with Monitor(
            self.folder, self.num_steps, console, self.config.log_freq, settings, diagnosis, resumed_at
        ) as monitor:
            if state is None:
                if (sheet := self.folder.path / SHEET_FILE).exists():
                    monitor.log_image("train/contact_sheet", np.asarray(Image.open(sheet)))
                self.before = self._validate(0, monitor)
            else:
                self._go_on(state, monitor)
            self._learn(monitor, state)
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
            "initial_metrics": headline(self.before),
            "final_metrics": headline(self.latest),
            "best_metrics": headline(self.best),
            "test_metrics": {name: headline(evaluation) for name, evaluation in tested.items()},
            "best_val_dice": headline(self.best)["dice"],
            "total_steps": self.num_steps,
            "adapter_delta_norm": delta_norm,
            "grad_norm_max": monitor.grad_norm_max,
            "reward_time_share": monitor.reward_time_share,
            "findings": [asdict(finding) for finding in monitor.findings],
            "metric_spec": METRIC_SPEC,
            "provenance": self.provenance,
        }
        self._draw()
        self.folder.write_json("training_info.json", info)
        write_run_report(self.folder.path)
        (self.folder.path / STATE_FILE).unlink(missing_ok=True)
        names = tuple(headline(self.before))
        validation = before_after_table(self.before, self.best, names)
        test = before_after_table(tested["before"], tested["after"], names) if tested else []
        marks = dict.fromkeys((*self.data.val_marks, *self.data.test_marks))
        return TrainResult(self.folder.path, validation, test, info, tuple(marks))

    def _learn(self, monitor: Monitor, state: Mapping[str, Any] | None) -> None:
        """Takes the steps, or lets a filter choose its settings."""
        if isinstance(self.learner, FrangiLearner):
            self.learner.choose(self.data.train, monitor.bar("filter"))
            self.best = None  # the training images have chosen; validation must not choose again
            self._validate(1, monitor)
            return
        loop = TrainingLoop(
            self.config, self.learner, self.batches, self.reward, monitor, headline(self.before)
        )
        if state is not None:
            loop.load_state_dict(state["loop"])
        keep = partial(self._keep_state, loop, monitor)
        if state is None:
            keep()
        loop.run(lambda step: headline(self._validate(step, monitor)), keep, self._save)

    def _keep_state(self, loop: TrainingLoop, monitor: Monitor) -> None:
        """Writes down all that an interrupted run needs to go on from here."""
        evaluations = {"before": self.before, "best": self.best, "latest": self.latest}
        state = {
            "origins": self.origins,
            "provenance": self.provenance,
            "evaluations": {name: evaluation.to_json() for name, evaluation in evaluations.items()},
            "best_step": self.best_step,
            "best_values": self.best_values,
            "monitor": monitor.state_dict(),
            "loop": loop.state_dict(),
        }
        write_state(self.folder.path, state)

    def _go_on(self, state: Mapping[str, Any], monitor: Monitor) -> None:
        """Puts back what was validated so far."""
        step, here = state["loop"]["step"], self.provenance
        logger.info("going on after step %d of %d", step, self.num_steps)
        self.provenance = dict(state["provenance"])
        self.provenance["resumed"] = [*self.provenance.get("resumed", ()), {"step": step} | here]
        monitor.load_state_dict(state["monitor"])
        source = self.folder.path / STATE_FILE
        evaluations = {
            name: evaluation_from_json(each, source) for name, each in state["evaluations"].items()
        }
        self.before, self.latest = evaluations["before"], evaluations["latest"]
        with self.learner.at(state["best_values"]):  # what lies in the folder may be of a later step
            self._keep_best(state["best_step"], evaluations["best"])

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
            self._keep_best(step, result)
        write_evaluation(
            self.folder.path, "val_before" if step == 0 else "val_latest", result, {"step": step}
        )
        self.latest = result
        return result

    def _keep_best(self, step: int, result: Evaluation) -> None:
        """The learner as it is now becomes the best."""
        self.best_step, self.best, self.best_values = step, result, self.learner.values()
        self._save(f"best_{self.learner.kind}")
        write_evaluation(self.folder.path, "val_best", result, {"step": step})

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
