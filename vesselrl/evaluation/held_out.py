"""Evaluates adapters on the held-out subset of the split that they were trained with.

For best_lora: test_best_lora.json, .csv and a report; `_tuned` and `_tuned_post` as chosen on validation
(from `_thresholds.json`, `_post_processing.json`); test_human_agreement. With flips: best_lora_flips.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from vesselrl.data.check import foreground_shares
from vesselrl.data.near_duplicates import pretraining_overlap
from vesselrl.data.samples import Sample, find_samples, load_mask
from vesselrl.data.splits import Split, read_split, split_by_patient
from vesselrl.data.tiles import tile_px_of
from vesselrl.errors import DataError, RefusedError
from vesselrl.evaluation import evaluate, results
from vesselrl.evaluation.evaluate import Predict, Progress, caveats_of
from vesselrl.evaluation.report import write_evaluation_report, write_run_report
from vesselrl.evaluation.results import Caveat, Evaluation, read_evaluation, write_evaluation
from vesselrl.evaluation.tuning import PredictedImage, Tuning, tune
from vesselrl.experiment.config import RANDOM_MODEL, READING
from vesselrl.experiment.options import Evaluate, hide_paths
from vesselrl.experiment.run_folder import check_writable, find_run, reading, write_json, write_text
from vesselrl.inference.predictor import Predictor
from vesselrl.models.lora import adapter_folder, adapter_settings, check_adapter
from vesselrl.models.processing import DEFAULT_PROMPT
from vesselrl.scoring.measurements import check_pixel_mm, measurement_row, vessel_measurements
from vesselrl.scoring.postprocessing import PostProcessing, post_processing
from vesselrl.scoring.rewards import make_reward
from vesselrl.synthetic.dataset import FULL, SMALL, builtin_data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutResult:
    """Results of one model, each with the JSON file that holds it."""

    # "": at the threshold asked for; tuned, tuned_post: of the same predictions, as chosen on validation;
    # human: the second observer against the first. What was not asked for, or is not possible, is not there.
    scored: dict[str, tuple[Evaluation, Path]]
    report_path: Path  # all results on one HTML page; Markdown lies beside it
    tuning: Tuning | None = None

    @property
    def evaluation(self) -> Evaluation:
        """The result at the threshold asked for."""
        return self.scored[""][0]


def evaluate_held_out(
    options: Evaluate, lora_weights: str | None = None, progress: Progress | None = None
) -> HeldOutResult:
    """Scores one model (None: the base) on one subset of a split; writes JSON, CSV and reports."""
    check_pixel_mm(options.pixel_mm)
    if options.tune_post and not options.tune:
        raise ValueError("--tune_post is tuning; leave out --no-tune.")
    if lora_weights:
        check_adapter(adapter_folder(lora_weights))
    run, settings = find_run(lora_weights), adapter_settings(lora_weights)
    folder, name = result_place(options, lora_weights, run)
    check_writable(folder)
    plan = hide_paths({"side" if key == "split" else key: value for key, value in vars(options).items()})
    plan |= {"lora_weights": lora_weights, "lang": options.lang or settings.get("lang", "en")}
    if run is None:
        _refuse_to_replace(folder / f"{name}.json", plan)
    samples, validation, caveats = choose_samples(options, lora_weights, run, settings)
    places = options.data_root or settings.get("data_root"), options.base_model or settings.get("model_path")
    caveats |= evaluate.caveats_of_built_in(*places)
    post = post_processing(settings, options.threshold, options.min_component_px, options.close_gaps)
    reward = make_reward(settings)
    observed = evaluate.second_observer(samples, options.second_masks) if options.second_masks else None
    predict = make_predictor(options, settings, lora_weights)
    total, numbers = len(samples) + len(validation), count(1)  # one progress for both passes
    tell = progress and (lambda *_: progress(next(numbers), total))
    asked = reward if options.tune_post else None
    predict_all = partial(evaluate.predict_each, predict, progress=tell)
    images = (
        PredictedImage(prediction and prediction.probabilities, truth, sample.patient)
        for sample, (prediction, truth) in zip(validation, predict_all(validation), strict=True)
    )
    tuning = tune(images, post, asked) if validation else None
    choices = tuning.choices if tuning else {}
    measured: list[dict] = []
    predicted = with_measurements(samples, predict_all(samples, post=post), options.pixel_mm, measured)
    done = evaluate.evaluate_variants(samples, predicted, choices, reward, caveats)

    written: dict[str, tuple[Evaluation, Path]] = {}
    for ending, scored in done.items():
        extra = {"plan": plan, "flips": options.flips} | asdict(choices.get(ending, post))
        extra |= {"chosen_on": "val"} if ending else {}
        file = f"{name}_{ending}" if ending else name
        written[ending] = scored, write_evaluation(folder, file, scored, extra)
    write_text(folder / f"{name}_measurements.csv", results.csv_text(measured))
    if tuning:
        write_json(folder / f"{name}_thresholds.json", tuning.curve.to_json() | {"flips": options.flips})
        if tuning.grid:
            write_json(folder / f"{name}_post_processing.json", tuning.grid_json() | {"flips": options.flips})
    if observed:
        pairs = zip(map(load_mask, observed), map(load_mask, samples), strict=True)
        human = evaluate.evaluate_masks(samples, pairs, reward)
        written["human"] = human, write_evaluation(folder, f"{options.split}_human_agreement", human)
    report_path, _ = write_evaluation_report(written[""][1])
    if run and folder.resolve() == (run / "evaluation").resolve() and (run / "training_info.json").is_file():
        try:
            write_run_report(run)
        except ValueError as error:  # a damaged file of the run does not undo the evaluation
            logger.warning("The report of the run is the old one: %s", error)
    return HeldOutResult(written, report_path, tuning)


def base_beside(options: Evaluate, lora_weights: str | None, adapted: Evaluation) -> list[dict]:
    """Paired differences to the base model, where the adapter's run has its scores of the same masks."""
    run = find_run(lora_weights)
    file = run and run / f"{options.split}_before.json"
    asked = options.threshold, options.min_component_px, options.close_gaps, options.prompt, options.tile_px
    is_base = options.base_model in (None, adapter_settings(lora_weights).get("model_path"))
    is_as_trained = is_base and not options.flips and asked == (0.5, None, None, None, None)
    if not is_as_trained or not file or not file.is_file():
        return []
    base = read_evaluation(file)
    mismatch = results.set_mismatch(base, adapted, "base", "adapter")
    return [] if mismatch else results.before_after_table(base, adapted)


def with_measurements(
    samples: Sequence[Sample], predicted: Iterable, pixel_mm: float | None, rows: list
) -> Iterator[tuple]:
    """The predictions; adds a row of measurements of the true and of the predicted mask for each."""
    for sample, (prediction, truth) in zip(samples, predicted, strict=True):
        masks = {"true": truth}
        if prediction is not None:
            masks["predicted"] = prediction.mask
        for whose, mask in masks.items():
            row = {"key": sample.key, "mask": whose, "foreground": round(float(mask.mean()), 6)}
            rows.append(row | measurement_row(vessel_measurements(mask), pixel_mm))
        yield prediction, truth


def make_predictor(options: Evaluate, settings: Mapping[str, Any], lora_weights: str | None) -> Predict:
    """Loads a model as a function of an image."""
    given = {"post": PostProcessing(options.threshold), "use_bf16": options.use_bf16, "flips": options.flips}
    given["prompt"] = options.prompt or settings.get("prompt") or DEFAULT_PROMPT
    given["tile_px"] = tile_px_of(settings, options.tile_px)
    return Predictor.from_pretrained(options.base_model, lora_weights, **given).predict


def result_place(options: Evaluate, lora_weights: str | None, run: Path | None) -> tuple[Path, str]:
    """Folder and name of the result; in a folder for several runs the name begins with the run's."""
    flips = "_flips" if options.flips else ""
    folder = Path(options.output_dir or "output/evaluation")
    if lora_weights is None:
        return folder, f"{options.split}_base{flips}"
    weights = Path(lora_weights).resolve()
    if run is None:
        return folder, f"{options.split}_{weights.name}{flips}"
    name = f"{options.split}_{adapter_folder(weights).name}{flips}"
    return (folder, f"{run.resolve().name}_{name}") if options.output_dir else (run / "evaluation", name)


def _refuse_to_replace(path: Path, plan: Mapping[str, Any]) -> None:
    """Refuses to write over the result of another model, where the name does not tell them apart."""
    if not path.is_file():
        return
    with reading(path, "Give another --output_dir."):
        both = read_evaluation(path).extra.get("plan") or {}, plan
        keys = ("base_model", "lora_weights")
        one, other = ([one.get(key) and Path(one[key]).resolve() for key in keys] for one in both)
        if one != other:
            raise RefusedError(f"{path} holds the evaluation of another model. Give another --output_dir.")


def choose_samples(
    options: Evaluate, lora_weights: str | None, run: Path | None, settings: Mapping[str, Any]
) -> tuple[list[Sample], list[Sample], dict[Caveat, str]]:
    """The samples of the wanted subset, those to choose a threshold on, and the caveats of the former."""
    stored = settings.get("data_root")
    root = options.data_root or stored
    own = root == stored or (stored is not None and Path(root).resolve() == Path(stored).resolve())
    kept = settings if own else {}  # settings of a run about its own data hold for no other
    if root is None:
        size = SMALL if settings.get("model_path") == RANDOM_MODEL else FULL
        root = builtin_data(run.resolve().parent if run else "output", size)
    reading = {name: getattr(options, name) or kept.get(name) for name in READING}
    samples = find_samples(root, **reading)
    seen = pretraining_overlap(options.base_trained_on or kept.get("base_trained_on", "none"), samples)
    if options.split == "all":
        return samples, _validation(options, []), caveats_of(None, samples, seen)
    split, caveats = _known_split(options, run, own, samples), {}
    if split is None:
        logger.warning("no data_split.json belongs to this data: splitting by patient anew (seed 42)")
        shares = foreground_shares(root, **reading) if options.data_root or stored else None
        split = split_by_patient(samples, shares=shares)
        if lora_weights:
            caveats = {Caveat.UNKNOWN_PATIENTS: Caveat.UNKNOWN_PATIENTS.text()}
            logger.warning(Caveat.UNKNOWN_PATIENTS.text())
    subset = list(getattr(split, options.split))
    return subset, _validation(options, split.val), caveats | caveats_of(split, subset, seen)


def _known_split(options: Evaluate, run: Path | None, own: bool, samples: list[Sample]) -> Split | None:
    """The split that was asked for, or that of the run; None: there is none, or it is of other images."""
    if options.split_file is not None:
        return read_split(options.split_file, samples)
    if run is None:
        return None
    try:
        return read_split(run / "data_split.json", samples)  # the data may have moved
    except DataError as error:
        if own:
            raise
        logger.info("these are not the images of the run: %s", error)
    return None


def _validation(options: Evaluate, validation: Sequence[Sample]) -> list[Sample]:
    """The validation samples if a threshold is to be chosen on them; else none, and the reason is logged."""
    reason = ""
    if not options.tune:
        reason = "it was not asked for"
    elif options.split != "test":
        reason = f"the subset is {options.split}; a threshold chosen on validation is judged on test alone"
    elif not validation:
        reason = "the split has no validation images, and it is never chosen on test"
    if reason:
        logger.info("No score at a tuned threshold: %s.", reason)
    return [] if reason else list(validation)
