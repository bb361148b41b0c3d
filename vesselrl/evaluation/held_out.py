"""Evaluates adapters on the held-out side of the split that they were trained with."""

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from vesselrl.data.annotations import DataError, Sample, find_samples, load_image, load_mask
from vesselrl.data.builtin import FULL, SMALL, builtin_data
from vesselrl.data.splits import read_split, split_by_patient
from vesselrl.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from vesselrl.evaluation.run_reward import make_reward
from vesselrl.experiment.config import RANDOM_MODEL, TrainConfig
from vesselrl.experiment.runs import check_writable
from vesselrl.inference.predictor import Predictor, adapter_folder
from vesselrl.models.lora import check_adapter
from vesselrl.models.miniature import random_checkpoint

logger = logging.getLogger(__name__)

SIDES = ("test", "val", "train", "all")


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated on what.

    Attributes:
        base_model: checkpoint folder; None: the one that the run was trained from, or the embedded miniature.
        lora_weights: adapter or run folder; None: the untouched base.
        data_root: data folder; None: the run's own.
        side: side of the split: test, val, train or all.
        output_dir: where results go; None: `evaluation` in the run folder, or `output/evaluation`.
        threshold: probability above which a pixel is vessel.
        prompt: the question; None: the run's own.
        patient_pattern: for file names, see `find_samples`; None: the run's own.
        use_bf16: vision tower and language model in bfloat16.
    """

    base_model: str | None = None
    lora_weights: str | None = None
    data_root: str | None = None
    side: str = "test"
    output_dir: str | None = None
    threshold: float = 0.5
    prompt: str | None = None
    patient_pattern: str | None = None
    use_bf16: bool = False


def evaluate_plan(
    plan: EvaluationPlan, progress: Callable[[int, int], None] | None = None
) -> tuple[Evaluation, Path]:
    """Scores one model on one side of a split and writes JSON and CSV.

    Returns:
        The evaluation and its JSON file.

    Raises:
        DataError: unusable data, split or settings of the run.
        RunError: the folder for the results cannot be written to.
        CheckpointError: unusable model or adapter.
    """
    if plan.side not in SIDES:
        raise DataError(f"--split {plan.side} is unknown; choose one of {', '.join(SIDES)}.")
    if plan.lora_weights:
        check_adapter(adapter_folder(Path(plan.lora_weights)))
    run = run_folder(plan.lora_weights)
    settings = run_settings(run)
    folder, name = result_place(plan, run)
    check_writable(folder)
    samples = choose_samples(plan, run, settings)
    reward = make_reward(TrainConfig.from_dict(settings))
    prompt = plan.prompt or settings.get("prompt")
    options = {"threshold": plan.threshold, "use_bf16": plan.use_bf16} | (
        {"prompt": prompt} if prompt else {}
    )
    with base_folder(plan, settings) as base:
        predictor = Predictor.from_pretrained(base, plan.lora_weights, **options)
    result = evaluate(predictor.predict, samples, load_pixels, reward, progress)
    path, _ = write_evaluation(folder, name, result, {"plan": vars(plan), "threshold": plan.threshold})
    return result, path


def base_folder(plan: EvaluationPlan, settings: dict) -> AbstractContextManager[str | Path | None]:
    """The base model's folder; that of a debug run is random and made again from the run's seed."""
    base = plan.base_model or settings.get("model_path")
    return random_checkpoint(settings["seed"]) if base == RANDOM_MODEL and settings else nullcontext(base)


def result_place(plan: EvaluationPlan, run: Path | None) -> tuple[Path, str]:
    """Folder and name of the result; in a folder for several runs the name begins with the run's."""
    if plan.lora_weights is None:
        return Path(plan.output_dir or "output/evaluation"), f"{plan.side}_base"
    weights = Path(plan.lora_weights).resolve()
    if run is None:
        return Path(plan.output_dir or "output/evaluation"), f"{plan.side}_{weights.name}"
    if plan.output_dir is None:
        return run / "evaluation", f"{plan.side}_{adapter_folder(weights).name}"
    return Path(plan.output_dir), f"{run.resolve().name}_{plan.side}_{adapter_folder(weights).name}"


def load_pixels(sample: Sample) -> tuple:
    """(image, mask) of a sample."""
    return load_image(sample), load_mask(sample)


def choose_samples(plan: EvaluationPlan, run: Path | None, settings: dict) -> list[Sample]:
    """The samples of the wanted side; the run's own split where there is one."""
    root = plan.data_root or settings.get("data_root")
    if root is None:
        size = SMALL if settings.get("model_path") == RANDOM_MODEL else FULL
        root = builtin_data(run.resolve().parent if run else "output", size)
    samples = find_samples(root, plan.patient_pattern or settings.get("patient_pattern"))
    if plan.side == "all":
        return samples
    if run is not None and plan.data_root in (None, settings.get("data_root")):
        split = read_split(run / "data_split.json", samples)
    else:
        logger.warning("no data_split.json belongs to this data: splitting by patient anew (seed 42)")
        split = split_by_patient(samples)
    return list(getattr(split, plan.side))


def run_folder(lora_weights: str | None) -> Path | None:
    """The run an adapter belongs to: the folder itself or its parent, whichever has a data_split.json."""
    if lora_weights is None:
        return None
    folder = Path(lora_weights)
    return next((f for f in (folder, folder.parent) if (f / "data_split.json").exists()), None)


def run_settings(run: Path | None) -> dict:
    """The settings that a run was trained with; empty without a run."""
    if run is None or not (run / "config.json").exists():
        return {}
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8"))["args"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise DataError(f"{run / 'config.json'} is damaged: it holds no settings of a run.") from None
