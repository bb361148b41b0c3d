"""Evaluates adapters on the held-out side of the split that they were trained with."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vesselrl.data.annotations import DataError, Sample, find_samples, load_image, load_mask
from vesselrl.data.builtin import builtin_data
from vesselrl.data.splits import read_split, split_by_patient
from vesselrl.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from vesselrl.inference.predictor import Predictor
from vesselrl.scoring.rewards import MultiObjectiveReward

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
    """

    base_model: str | None = None
    lora_weights: str | None = None
    data_root: str | None = None
    side: str = "test"
    output_dir: str | None = None
    threshold: float = 0.5
    prompt: str | None = None
    patient_pattern: str | None = None


def evaluate_plan(
    plan: EvaluationPlan, progress: Callable[[int, int], None] | None = None
) -> tuple[Evaluation, Path]:
    """Scores one model on one side of a split and writes JSON and CSV.

    Returns:
        The evaluation and its JSON file.

    Raises:
        DataError: unusable data or split.
        CheckpointError: unusable model or adapter.
    """
    if plan.side not in SIDES:
        raise DataError(f"--split {plan.side} is unknown; choose one of {', '.join(SIDES)}.")
    run = run_folder(plan.lora_weights)
    settings = run_settings(run)
    samples = choose_samples(plan, run, settings)
    predictor = Predictor.from_pretrained(
        plan.base_model or settings.get("model_path"),
        plan.lora_weights,
        **({"prompt": prompt} if (prompt := plan.prompt or settings.get("prompt")) else {}),
        threshold=plan.threshold,
    )
    result = evaluate(predictor.predict, samples, load_pixels, MultiObjectiveReward(), progress)
    folder = (
        Path(plan.output_dir)
        if plan.output_dir
        else (run / "evaluation" if run else Path("output/evaluation"))
    )
    label = Path(plan.lora_weights).name if plan.lora_weights else "base"
    extra = {"plan": vars(plan), "threshold": plan.threshold}
    path, _ = write_evaluation(folder, f"{plan.side}_{label}", result, extra)
    return result, path


def load_pixels(sample: Sample) -> tuple:
    """(image, mask) of a sample."""
    return load_image(sample), load_mask(sample)


def choose_samples(plan: EvaluationPlan, run: Path | None, settings: dict) -> list[Sample]:
    """The samples of the wanted side; the run's own split where there is one."""
    root = plan.data_root or settings.get("data_root")
    if root is None:
        root = builtin_data(settings.get("output_dir", "output"))
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
    """The run that an adapter belongs to: the folder itself or its parent, whichever has a data_split.json."""
    if lora_weights is None:
        return None
    folder = Path(lora_weights)
    return next((f for f in (folder, folder.parent) if (f / "data_split.json").exists()), None)


def run_settings(run: Path | None) -> dict:
    """The settings that a run was trained with; empty without a run."""
    if run is None or not (run / "config.json").exists():
        return {}
    return json.loads((run / "config.json").read_text(encoding="utf-8"))["args"]
