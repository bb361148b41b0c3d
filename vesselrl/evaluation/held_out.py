"""Evaluates adapters on the held-out side of the split that they were trained with.

On the test side each image is predicted once and scored twice: at the plan's threshold, and at the one that
gave the best Dice on the validation patients; a third time with all post-processing chosen there, if asked
for. Files, for an adapter called best_lora:

    test_best_lora.json, .csv              at the plan's threshold (0.5)
    test_best_lora_tuned.json, .csv        at the threshold chosen on validation
    test_best_lora_thresholds.json         the validation curve and the choice
    test_best_lora_tuned_post.json, .csv   with threshold, smallest component and closing of gaps chosen
    test_best_lora_post_processing.json    every candidate's validation reward, and the choice
    test_human_agreement.json, .csv        the second observer against the first, if there is one
    test_best_lora.html, .md               all of these on one page

With test-time flips every name has `_flips` after best_lora: their scores never replace those without.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vesselrl.data.annotations import Sample, find_samples, load_image, load_mask
from vesselrl.data.builtin import FULL, SMALL, builtin_data
from vesselrl.data.check import foreground_shares
from vesselrl.data.in_sample import base_trained_on
from vesselrl.data.splits import Split, read_split, split_by_patient
from vesselrl.errors import DataError, RunError
from vesselrl.evaluation.evaluation_report import write_evaluation_report
from vesselrl.evaluation.flips import with_flips
from vesselrl.evaluation.marks import marks_of
from vesselrl.evaluation.observers import observer_agreement, second_observer
from vesselrl.evaluation.predictions import (
    PackedMask,
    Predictions,
    evaluate_masks,
    predict_once,
    unpacked,
)
from vesselrl.evaluation.results import Evaluation, read_extra, write_evaluation
from vesselrl.evaluation.run_report import write_run_report
from vesselrl.evaluation.run_settings import make_reward, post_processing
from vesselrl.evaluation.tuning import Tuning, tune
from vesselrl.experiment.config import RANDOM_MODEL, TrainConfig
from vesselrl.experiment.run_folder import check_writable, find_run, run_settings, write_json
from vesselrl.inference.predictor import Predictor, adapter_folder
from vesselrl.models.lora import check_adapter
from vesselrl.models.miniature import random_checkpoint
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import Reward

logger = logging.getLogger(__name__)

SIDES = ("test", "val", "train", "all")
UNKNOWN_PATIENTS = (
    "UNKNOWN PATIENTS: no data_split.json tells whether the adapter was trained on patients of these images."
)


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated on what.

    Attributes:
        base_model: checkpoint folder; None: the one that the run was trained from, or the embedded miniature.
        lora_weights: adapter or run folder; None: the untouched base.
        data_root: data folder; None: the run's own.
        side: side of the split: test, val, train or all.
        split_file: a data_split.json to use; None: the run's own where it belongs to the data, or a new one.
        output_dir: where results go; None: `evaluation` in the run folder, or `output/evaluation`.
        threshold: probability above which a pixel is vessel.
        min_component_px: smallest component that masks keep, in px; None: the run's own, or 0 = all.
        close_gaps: probability above which gaps are closed; None: the run's own, or 0 = none.
        prompt: the question; None: the run's own.
        patient_pattern: for file names, see `find_samples`; None: the run's own.
        patient_aliases: CSV file, see `find_samples`; None: the run's own.
        base_trained_on: none, all or a file, see `vesselrl.data.in_sample`; None: the run's own, or none.
        use_bf16: vision tower and language model in bfloat16.
        tune: also score at the threshold that is best on validation; on the test side only.
        tune_post: also score with threshold, smallest component and closing of gaps that together have the
            highest reward on validation; on the test side only.
        flips: mean of the probabilities over the image and its three mirror images, in files of their own.
        second_masks: folder with a second observer's masks of the same images, scored as "human agreement".
    """

    base_model: str | None = None
    lora_weights: str | None = None
    data_root: str | None = None
    side: str = "test"
    split_file: str | None = None
    output_dir: str | None = None
    threshold: float = 0.5
    min_component_px: int | None = None
    close_gaps: float | None = None
    prompt: str | None = None
    patient_pattern: str | None = None
    patient_aliases: str | None = None
    base_trained_on: str | None = None
    use_bf16: bool = False
    tune: bool = True
    tune_post: bool = False
    flips: bool = False
    second_masks: str | None = None


@dataclass(frozen=True)
class HeldOutResult:
    """What one plan gave, each with the JSON file that holds it; None: not asked for, or not possible."""

    # At the plan's threshold.
    evaluation: Evaluation
    path: Path
    # All results on one HTML page; Markdown lies beside it.
    report_path: Path
    # At the threshold chosen on validation, on the same predictions.
    tuned: Evaluation | None = None
    tuned_path: Path | None = None
    # With threshold, smallest component and closing of gaps chosen on validation, likewise.
    tuned_post: Evaluation | None = None
    tuned_post_path: Path | None = None
    # What was chosen, and the threshold's curve.
    tuning: Tuning | None = None
    curve_path: Path | None = None
    # The second observer against the first.
    human: Evaluation | None = None
    human_path: Path | None = None


def evaluate_held_out(
    plan: EvaluationPlan, progress: Callable[[int, int], None] | None = None
) -> HeldOutResult:
    """Scores one model on one side of a split, each image predicted once; writes JSON, CSV and a report.

    Where the results lie in the folder of a finished run, the run's own report is written anew.

    Args:
        plan: what is evaluated on what.
        progress: called with (images done, images in all), validation images included, after every image.

    Raises:
        DataError: unusable data, split or settings of the run.
        RunError: the folder for the results cannot be written to, or holds those of another model.
        CheckpointError: unusable model or adapter.
    """
    if plan.side not in SIDES:
        raise DataError(f"--split {plan.side} is unknown; choose one of {', '.join(SIDES)}.")
    if plan.tune_post and not plan.tune:
        raise ValueError("--tune_post is tuning; leave out --no-tune.")
    if plan.lora_weights:
        check_adapter(adapter_folder(Path(plan.lora_weights)))
    run = find_run(plan.lora_weights)
    settings = run_settings(run)
    folder, name = result_place(plan, run)
    check_writable(folder)
    if run is None:
        _refuse_to_replace(folder / f"{name}.json", plan)
    samples, validation, marks = choose_samples(plan, run, settings)
    post = post_processing(settings, plan.threshold, plan.min_component_px, plan.close_gaps)
    reward = make_reward(TrainConfig.from_dict(settings))
    observed = second_observer(samples, plan.second_masks) if plan.second_masks else None
    predict = make_predictor(plan, settings)
    count = _count_on(progress, len(samples) + len(validation))
    tuning = None
    if validation:
        asked = reward if plan.tune_post else None
        tuning = tune(predict, validation, load_pixels, post, asked, count(0))
    choices = tuning.choices if tuning else {}
    done = predict_once(predict, samples, load_pixels, post, choices, count(len(validation)))

    extra = {"plan": vars(plan), "flips": plan.flips}
    evaluation = replace(_score(done, done.masks, samples, reward), marks=marks)
    path, _ = write_evaluation(folder, name, evaluation, extra | asdict(post))
    others: dict[str, Any] = {}
    for ending, chosen in choices.items():
        others[ending] = replace(_score(done, done.variants[ending], samples, reward), marks=marks)
        facts = extra | asdict(chosen) | {"chosen_on": "val"}
        others[f"{ending}_path"], _ = write_evaluation(folder, f"{name}_{ending}", others[ending], facts)
    if tuning:
        others |= {"tuning": tuning, "curve_path": _write_choice(folder, name, tuning, plan.flips)}
    if observed:
        human = observer_agreement(samples, observed, reward)
        human_path, _ = write_evaluation(folder, f"{plan.side}_human_agreement", human)
        others |= {"human": human, "human_path": human_path}
    report_path, _ = write_evaluation_report(path)
    if run is not None and folder.resolve() == (run / "evaluation").resolve():
        _refresh_run_report(run)
    return HeldOutResult(evaluation, path, report_path, **others)


def _write_choice(folder: Path, name: str, tuning: Tuning, flips: bool) -> Path:
    """Writes what the choices were made by; returns the path of the threshold's curve."""
    if tuning.grid:
        write_json(folder / f"{name}_post_processing.json", tuning.grid_json() | {"flips": flips})
    path = folder / f"{name}_thresholds.json"
    write_json(path, tuning.curve.to_json() | {"flips": flips})
    return path


def _refresh_run_report(run: Path) -> None:
    """Writes the report of a finished run anew; a damaged file of the run does not undo the evaluation."""
    if not (run / "training_info.json").is_file():
        return
    try:
        write_run_report(run)
    except ValueError as error:
        logger.warning("The report of the run is the old one: %s", error)


def make_predictor(plan: EvaluationPlan, settings: dict) -> Callable[[np.ndarray], Any]:
    """The plan's model as a function of an image, with flips if the plan wants them."""
    options: dict[str, Any] = {"post": PostProcessing(plan.threshold), "use_bf16": plan.use_bf16}
    prompt = plan.prompt or settings.get("prompt")
    if prompt:
        options["prompt"] = prompt
    with base_folder(plan, settings) as base:
        predict = Predictor.from_pretrained(base, plan.lora_weights, **options).predict
    return with_flips(predict, plan.threshold) if plan.flips else predict


def _score(
    done: Predictions, masks: dict[str, PackedMask | None], samples: list[Sample], reward: Reward
) -> Evaluation:
    """Scores one set of masks of a finished pass."""
    evaluation = evaluate_masks(samples, unpacked(masks), unpacked(done.truths), reward)
    return replace(evaluation, calibration=done.calibration)


def _count_on(
    progress: Callable[[int, int], None] | None, total: int
) -> Callable[[int], Callable[[int, int], None] | None]:
    """Makes one progress bar of several passes: start -> callback of the pass that starts there."""

    def begin(start: int) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, _: progress(start + done, total)

    return begin


def base_folder(plan: EvaluationPlan, settings: dict) -> AbstractContextManager[str | Path | None]:
    """The base model's folder; that of a debug run is random and made again from the run's seed."""
    base = plan.base_model or settings.get("model_path")
    return random_checkpoint(settings["seed"]) if base == RANDOM_MODEL and settings else nullcontext(base)


def result_place(plan: EvaluationPlan, run: Path | None) -> tuple[Path, str]:
    """Folder and name of the result; in a folder for several runs the name begins with the run's."""
    flips = "_flips" if plan.flips else ""
    if plan.lora_weights is None:
        return Path(plan.output_dir or "output/evaluation"), f"{plan.side}_base{flips}"
    weights = Path(plan.lora_weights).resolve()
    if run is None:
        return Path(plan.output_dir or "output/evaluation"), f"{plan.side}_{weights.name}{flips}"
    name = f"{plan.side}_{adapter_folder(weights).name}{flips}"
    if plan.output_dir is None:
        return run / "evaluation", name
    return Path(plan.output_dir), f"{run.resolve().name}_{name}"


def _refuse_to_replace(path: Path, plan: EvaluationPlan) -> None:
    """Refuses to write over the result of another model, where the name does not tell them apart."""
    if not path.is_file():
        return
    before = read_extra(path).get("plan") or {}
    models = (before.get("base_model"), before.get("lora_weights")), (plan.base_model, plan.lora_weights)
    first, second = ([model and Path(model).resolve() for model in pair] for pair in models)
    if first != second:
        raise RunError(
            f"{path} holds the evaluation of another model. Give another --output_dir, or remove the file."
        )


def load_pixels(sample: Sample) -> tuple:
    """(image, mask) of a sample."""
    return load_image(sample), load_mask(sample)


def choose_samples(
    plan: EvaluationPlan, run: Path | None, settings: dict
) -> tuple[list[Sample], list[Sample], tuple[str, ...]]:
    """The samples of the wanted side, those to choose a threshold on, if any, and the marks of the former.

    A threshold is chosen for the test side only; why not otherwise is logged.
    """
    stored = settings.get("data_root")
    own = plan.data_root is None or (
        stored is not None and Path(plan.data_root).resolve() == Path(stored).resolve()
    )
    kept = settings if own else {}  # what a run says of its own data holds for no other
    root = plan.data_root or stored
    if root is None:
        size = SMALL if settings.get("model_path") == RANDOM_MODEL else FULL
        root = builtin_data(run.resolve().parent if run else "output", size)
    names = {name: getattr(plan, name) or kept.get(name) for name in ("patient_pattern", "patient_aliases")}
    samples = find_samples(root, **names)
    seen = base_trained_on(plan.base_trained_on or kept.get("base_trained_on", "none"), samples)
    if plan.side == "all":
        return samples, _validation(plan, []), marks_of(None, samples, seen)
    split = _known_split(plan, run, own, samples)
    if split is None:
        logger.warning("no data_split.json belongs to this data: splitting by patient anew (seed 42)")
        shares = foreground_shares(root, **names) if plan.data_root or stored else None
        split = split_by_patient(samples, shares=shares)
        if plan.lora_weights:
            split = replace(split, doubts=(UNKNOWN_PATIENTS,))
            logger.warning(UNKNOWN_PATIENTS)
    side = list(getattr(split, plan.side))
    return side, _validation(plan, split.val), marks_of(split, side, seen)


def _known_split(plan: EvaluationPlan, run: Path | None, own: bool, samples: list[Sample]) -> Split | None:
    """The split that was asked for, or that of the run; None: there is none, or it is of other images.

    Raises:
        DataError: the file that was asked for, or the run's for its own data, does not belong to this data.
    """
    if plan.split_file is not None:
        return read_split(plan.split_file, samples)
    if run is None:
        return None
    try:
        return read_split(run / "data_split.json", samples)  # the data may have moved
    except DataError as error:
        if own:
            raise
        logger.info("these are not the images of the run: %s", error)
        return None


def _validation(plan: EvaluationPlan, validation: Sequence[Sample]) -> list[Sample]:
    """The validation samples if a threshold is to be chosen on them; else none, and the reason is logged."""
    reason = ""
    if not plan.tune:
        reason = "it was not asked for"
    elif plan.side != "test":
        reason = f"the side is {plan.side}; a threshold chosen on validation is judged on test alone"
    elif not validation:
        reason = "the split has no validation images, and it is never chosen on test"
    if reason:
        logger.info("No score at a tuned threshold: %s.", reason)
    return [] if reason else list(validation)
