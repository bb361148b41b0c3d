"""One training from data to verdict: `train` is the whole story, its steps follow below it in order."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from vesselrl.data.dataset import BatchSource, TrainBatch, VesselDataset
from vesselrl.data.samples import Sample
from vesselrl.errors import NotFiniteError, Stopped
from vesselrl.evaluation import results
from vesselrl.evaluation.evaluate import evaluate, predict_each
from vesselrl.evaluation.figures import Case, choose_cases, curves_figure, save_png, write_cases
from vesselrl.evaluation.report import write_run_report
from vesselrl.evaluation.results import Evaluation
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.options import hide_paths
from vesselrl.experiment.run_folder import RunFolder, provenance
from vesselrl.experiment.stop import finish_first
from vesselrl.scoring.overlap import METRIC_SPEC
from vesselrl.scoring.postprocessing import post_processing
from vesselrl.scoring.rewards import Reward, source_hash
from vesselrl.training import checkpoint, processes, setup
from vesselrl.training.baselines import best_frangi, measure_fit
from vesselrl.training.checkpoint import PREVIOUS_FILE, STATE_FILE, Model, with_values
from vesselrl.training.health import Health, check_learned
from vesselrl.training.logging import Monitor
from vesselrl.training.ppo import PPOUpdate
from vesselrl.training.supervised import SupervisedUpdate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A finished run, for the command line."""

    folder: Path
    validation: list[dict]  # rows of `before_after_table`
    test: list[dict]  # the same on the test images; empty for a sanity run
    info: dict  # the content of training_info.json
    caveats: tuple[str, ...] = ()  # sentences to show beside the scores, such as that of a split that leaks


@dataclass
class Training:
    """The parts of a run, and how far it has come."""

    config: TrainConfig
    run: RunFolder
    data: setup.RunData
    batches: BatchSource
    model: Model
    optimizer: torch.optim.Optimizer | None
    updates: dict[str, PPOUpdate | SupervisedUpdate]  # by stage, `rl` and `sft`; none: the model has no steps
    reward: Reward
    provenance: dict
    fingerprint: dict[str, Any]
    changed: list[str]  # parts of the fingerprint that are not as they were when the run began
    monitor: Monitor = field(init=False)
    health: Health = field(init=False)
    step: int = 0
    validated: int = -1  # the step of the latest validation
    before: Evaluation | None = None
    latest: Evaluation | None = None
    best: Evaluation | None = None
    best_step: int = 0
    best_values: Any = None

    def __post_init__(self) -> None:
        self.num_steps = self.batches.num_steps if self.updates else 0
        self.post = post_processing(self.config.to_dict())
        self.held_out = VesselDataset([*self.data.val, *self.data.test])
        self.places = {sample.key: k for k, sample in enumerate(self.held_out.samples)}

    def load(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Image and truth of a validation or test sample."""
        return self.held_out[self.places[sample.key]][:2]


def train(
    config: TrainConfig,
    argv: list[str],
    console: Console | None = None,
    resume_from: Path | None = None,
    allow_change: Sequence[str] = (),
) -> TrainResult | None:
    """Runs one training, or goes on with the interrupted one of `resume_from`, whose settings `config` are.

    `argv` is the command line, stored as provenance; without a console there are no progress bars.
    `allow_change`: parts of the fingerprint that may have changed since. The main process has the result.

    Bad input is an error before anything is trained, which leaves no new folder; LearningError: the run does
    not learn; Stopped: a signal, after the step that it came in, with the state to go on from saved.
    """
    reward = setup.check_settings(config)
    with processes.connected(), setup.open_run(config, resume_from) as run:
        # 1. Data and model: find and split the samples by patient, load the model, put adapters on it.
        state = resume_from and processes.from_main(partial(checkpoint.read_state, run.path))
        t = set_up(config, argv, run, reward, state, allow_change)
        with Monitor(run, config, t.num_steps, console, state and state["step"]) as t.monitor:
            t.health = Health(t.model, t.optimizer, config, t.monitor.note)
            if state is not None:
                restore(t, state)
            # 2. Validate before the first update: the starting adapter is the first `best_lora`.
            if t.latest is None:
                t.monitor.show_image(run.path / setup.SHEET_FILE)
                validate(t)
            # 3. Epoch by epoch: PPO or supervised steps, validation, the best adapter kept.
            if config.optim.control == "frangi":
                fit_filter(t)
            else:
                run_epochs(t)
            # 4. Save the last adapter.
            t.model.save(run.path / f"final_{t.model.kind}")
            check_learned(t.num_steps, t.model.distance())
            # 5. Test once, on patients that nothing was chosen on: the base model and the best adapter.
            tested, calls = score_test(t), processes.gather([t.reward.calls.to_json()])
        # 6. Write curves, pictures, results and the report.
        processes.from_main(partial(draw, t))
        return write_results(t, tested, calls) if processes.is_main() else None


def resume(
    folder: Path, argv: list[str], console: Console | None = None, allow_change: Sequence[str] = ()
) -> TrainResult:
    """Goes on with an interrupted training after its last validation, with its own settings; see `train`.

    On a CPU it ends as it would have without the interruption; with several images per step, up to rounding.
    """
    config = TrainConfig.from_dict(checkpoint.interrupted_settings(folder))
    return train(config, argv, console, folder, allow_change)


# ---- 1. Data and model


def set_up(
    config: TrainConfig,
    argv: list[str],
    run: RunFolder,
    reward: Reward,
    state: Mapping[str, Any] | None,
    allow_change: Sequence[str],
) -> Training:
    """Prepares data and model, checks that they are those of `state`, and writes the first files of a run."""
    fingerprint = {"settings": hide_paths(config.to_dict()), "reward": source_hash(reward)}
    changed = checkpoint.check_fingerprint(state, fingerprint, allow_change)  # before any data is drawn
    with setup.untouched(run, is_new=state is None) as place:
        data = processes.from_main(partial(setup.prepare_data, config, place))
        setup.check_reward(reward, data)
        device = setup.select_device(config.run.gpu)
        model, tiling = setup.make_model(config, device, data)
        setup.check_disk(config, model, run)
        batches = setup.training_batches(config, data, place, tiling)
        origin = provenance(argv, device)
        own = processes.from_main(partial(checkpoint.data_fingerprint, data.train, data.val, data.test))
        own |= {"model": processes.from_main(model.identity)}
        changed += checkpoint.check_fingerprint(state, own, allow_change)
        checkpoint.check_fits(state or {}, model)
        fingerprint |= own
        start = {"fingerprint": fingerprint, "provenance": origin, "step": 0}
        values = {"args": config.to_dict(), "counts": data.counts | {"trainable": model.counts}}
        checkpoint.write_first_files(run, place, state, start, values)
    optimizer, updates = setup.make_updates(config, model, reward)
    parts = (data, batches, model, optimizer, updates, reward, origin, fingerprint, changed)
    return Training(config, run, *parts)


# ---- 2. Validation


def validate(t: Training, is_last: bool = False, stage: str = "") -> None:
    """Scores the validation images; keeps the best weights; rolls back where Dice has fallen far."""
    latest = before = evaluate_subset(t, "val", "validation")
    if t.latest is None:
        t.health.history.fit = processes.from_main(partial(measure_fit, t.config, t.data, latest.rows))
    if t.before is None and t.model.base is not t.model.start:
        before = evaluate_subset(t, "val", "base model", t.model.base)
    if is_last and t.model.head:
        with t.model.head.register_forward_pre_hook(lambda _, given: (given[0], torch.zeros_like(given[1]))):
            t.health.history.fit["head_alone"] = evaluate_subset(t, "val", "head alone").headline["dice"]
    with finish_first():
        t.latest, t.validated, t.before = latest, t.step, t.before or before
        means = t.latest.headline
        t.monitor.log_validation(t.step, means)
        if t.best is None or means["reward"] > np.nan_to_num(t.best.headline["reward"], nan=-np.inf):
            keep_best(t, t.step, t.latest)
        name, scored = ("val_latest", t.latest) if t.step else ("val_before", t.before)
        results.write_evaluation(t.run.path, name, scored, {"step": t.step})
        t.health.after_validation(t.step, means, is_last)
        update_multipliers(t, stage)


def evaluate_subset(t: Training, subset: str, label: str, values: Any = None) -> Evaluation:
    """Scores the model on the `val` or `test` images, as it is or with other values."""
    caveats, samples = getattr(t.data, f"{subset}_caveats"), processes.share(getattr(t.data, subset))
    shared = {"load": t.load, "progress": t.monitor.bar(label), "gather": processes.gather}
    shared |= {"batch_size": t.model.images_per_pass, "post": t.post}
    with with_values(t.model, t.model.values() if values is None else values):
        scored = evaluate(t.model.predict_batch, samples, t.reward, caveats=caveats, **shared)
    t.run.check_there()
    return scored


def keep_best(t: Training, step: int, result: Evaluation) -> None:
    """Makes the present weights the best."""
    t.best_step, t.best, t.best_values = step, result, t.model.values()
    t.model.save(t.run.path / f"best_{t.model.kind}")
    results.write_evaluation(t.run.path, "val_best", result, {"step": step})


# ---- 3. Steps


@processes.stopping_together()
def run_epochs(t: Training) -> None:
    """Takes all steps that are left, with validations, checkpoints, and the state to resume from."""
    batches, run = t.batches, t.config.run
    stage_of, end = partial(t.config.stage_of_epoch, num_epochs=batches.num_epochs), 0
    rate_at = setup.learning_rate(t.config, batches)
    if t.step == 0:
        save_state(t)
    try:
        for epoch in range(1, batches.num_epochs + 1):
            stage, begin, end = stage_of(epoch), end, end + batches.num_batches(epoch)
            if end < t.step:
                continue
            begins_stage = epoch == 1 or stage != stage_of(epoch - 1)
            if t.step > begin:  # a signal may have come before the validation
                validate_if_due(t, stage, end)
            for batch in setup.read_ahead(batches.epoch(epoch, max(0, t.step - begin)), t.model.store):
                with finish_first():
                    if t.step == begin and begins_stage:
                        t.optimizer.state.clear()  # the moments of another loss say nothing about this one
                        update_multipliers(t, stage)
                    take_step(t, batch, stage, rate_at(t.step), epoch)
                validate_if_due(t, stage, end)
                processes.stop_together()
            if epoch % run.save_freq == 0 and not run.sanity_overfit:
                t.model.save(t.run.path / f"checkpoint_epoch_{epoch}")
    except Stopped:
        save_state(t)
        raise


def take_step(t: Training, batch: TrainBatch, stage: str, rate: float, epoch: int) -> None:
    """One update and its metrics, or a roll-back."""
    rate *= t.health.rate_factor
    for group in t.optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    t.step += 1
    try:
        for attempt in checkpoint.attempts(t.model, t.optimizer, t.updates[stage]):
            with attempt:
                metrics = t.updates[stage].step(batch)
    except NotFiniteError as error:
        metrics = {}
        t.health.roll_back(t.step, str(error))
    t.health.after_step(t.step, metrics)
    t.monitor.log_step(t.step, metrics | {"train/learning_rate": rate, "train/epoch": float(epoch)})


def validate_if_due(t: Training, stage: str, end: int) -> None:
    """Validates after some steps, an epoch, which ends with step `end`, and the last step; then saves."""
    is_last, ends_epoch = t.step == t.num_steps, t.step == end and not t.config.run.sanity_overfit
    if t.validated < t.step and (is_last or ends_epoch or t.step % t.config.run.val_freq == 0):
        validate(t, is_last, stage)
        save_state(t)


def update_multipliers(t: Training, stage: str) -> None:
    """Updates the Lagrange multipliers of the constrained objective from the latest validation."""
    if stage == "rl" and (constrained := t.updates[stage].constrained):
        constrained.update_multipliers(t.latest.headline)


def fit_filter(t: Training) -> None:
    """Chooses the settings of the Frangi filter on the training images, and scores them."""
    t.model.restore(best_frangi(t.data.train, t.monitor.bar("filter")))
    t.best, t.step = None, 1  # the training images have chosen; validation must not choose again
    validate(t, is_last=True)


def save_state(t: Training) -> None:
    """Writes all that an interrupted run needs to go on from here."""
    names = ("fingerprint", "provenance", "step", "validated", "best_step", "best_values")
    state = {name: getattr(t, name) for name in names}
    state |= {f"evaluation_{name}": getattr(t, name).to_json() for name in ("before", "best", "latest")}
    state |= {
        "values": t.model.values(),
        "moments": checkpoint.moments(t.optimizer, t.model),
        "updates": {stage: update.state_dict() for stage, update in t.updates.items()},
        "health": t.health.state_dict(),
        "monitor": t.monitor.state_dict(),
        "random": checkpoint.random_state(),
    }
    checkpoint.write_state(t.run.path, state)


def restore(t: Training, state: Mapping[str, Any]) -> None:
    """Restores the state that `save_state` wrote."""
    t.step, t.validated = state["step"], state.get("validated", state["step"])
    logger.info("going on after step %d of %d", t.step, t.num_steps)
    resumed = [*state["provenance"].get("resumed", ()), {"step": t.step} | t.provenance]
    t.provenance = state["provenance"] | {"resumed": resumed}
    if "values" not in state:  # nothing had been evaluated
        t.run.cut_metrics(0)
        return
    t.monitor.load_state_dict(state["monitor"])
    read = partial(results.evaluation_from_json, source=t.run.path / STATE_FILE)
    t.before, best, t.latest = (read(state[f"evaluation_{name}"]) for name in ("before", "best", "latest"))
    if t.changed:  # scores of other images, or by another reward, are no measure for later ones
        weights = (t.model.base, state["best_values"], state["values"])
        t.before, best, t.latest = (evaluate_subset(t, "val", "again", values) for values in weights)
        results.write_evaluation(t.run.path, "val_before", t.before, {"step": 0})
        results.write_evaluation(t.run.path, "val_latest", t.latest, {"step": t.step})
    with with_values(t.model, state["best_values"]):  # the folder may hold those of a later step
        keep_best(t, state["best_step"], best)
    if not t.run.metrics_file.read_bytes():  # all lost; curves need a point
        t.monitor.log_validation(t.step if t.changed else t.validated, t.latest.headline)
    t.model.restore(state["values"])
    checkpoint.restore_moments(t.optimizer, t.model, state["moments"])
    t.health.load_state_dict(state["health"])
    for stage, update in t.updates.items():
        update.load_state_dict(state["updates"][stage])
    checkpoint.restore_random_state(state["random"])


# ---- 4. to 6. The last weights, the test, and the results


def score_test(t: Training) -> dict[str, Evaluation]:
    """Scores the base model (`before`) and the best weights (`after`) on the test images."""
    tested = {}
    for name, values in (("before", t.model.base), ("after", t.best_values)) if t.data.test else ():
        scored = tested[name] = evaluate_subset(t, "test", f"test {name}", values)
        extra = {"threshold": 0.5, "run": t.run.path.name}
        results.write_evaluation(t.run.path, f"test_{name}", scored, extra)
    return tested


def draw(t: Training) -> None:
    """Curves, and image | truth | before | after for the best, median and worst validation images."""
    save_png(curves_figure(t.run.metrics_file), t.run.path / "curves.png")
    ranks, masks = choose_cases(t.best.rows), []
    samples = [next(sample for sample in t.data.val if sample.key == key) for key in ranks]
    for values in (t.model.base, t.best_values):
        with with_values(t.model, values):
            predicted = predict_each(t.model.predict_batch, samples, t.load, None, 1, t.post)
            masks.append([one and one.mask for one, _ in predicted])  # None: a prediction that failed
    shown = zip(samples, *masks, ranks.values(), strict=True)
    write_cases(t.run.path, [Case(one.key, *t.load(one), *rest) for one, *rest in shown])


def write_results(t: Training, tested: Mapping[str, Evaluation], calls: list[dict]) -> TrainResult:
    """Writes training_info.json and the report; the run cannot be resumed any more."""
    t.run.check_there()
    info = {
        "args": t.fingerprint["settings"],
        "counts": t.data.counts | {"trainable": t.model.counts},
        "initial_metrics": t.before.headline,
        "final_metrics": t.latest.headline,
        "best_metrics": t.best.headline,
        "test_metrics": {name: evaluation.headline for name, evaluation in tested.items()},
        "best_val_dice": t.best.headline["dice"],
        "total_steps": t.num_steps,
        "adapter_delta_norm": t.model.distance(),
        "grad_norm_max": t.monitor.grad_norm_max,
        "reward_time_share": t.monitor.reward_time_share,
        **{name: sum(one[name] for one in calls) for name in calls[0]},
        "fit": t.health.history.fit,
        "findings": [issue.to_json() for issue in t.monitor.issues],
        "metric_spec": METRIC_SPEC,
        "provenance": t.provenance,
    }
    t.run.write_json("training_info.json", info)
    write_run_report(t.run.path)
    for name in (PREVIOUS_FILE, STATE_FILE):
        (t.run.path / name).unlink(missing_ok=True)
    names = tuple(t.before.headline)
    validation = results.before_after_table(t.before, t.best, names)
    test = results.before_after_table(tested["before"], tested["after"], names) if tested else []
    caveats = dict.fromkeys((*t.data.val_caveats.values(), *t.data.test_caveats.values()))
    return TrainResult(t.run.path, validation, test, info, tuple(caveats))
