"""Evaluation: predictions or finished masks of samples -> one row of scores per image.

The predictor sees the image alone. A failed prediction is an empty mask, flagged and counted, never dropped.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vesselrl.data.images import read_size
from vesselrl.data.samples import Sample, load_fov, load_image, load_mask
from vesselrl.data.splits import Split, relative_paths
from vesselrl.errors import DataError, NotFiniteError
from vesselrl.evaluation.results import Caveat, Evaluation, read_caveats, summarise
from vesselrl.evaluation.statistics import check_unique
from vesselrl.evaluation.tuning import calibration, count_pixels
from vesselrl.experiment.config import RANDOM_MODEL
from vesselrl.experiment.progress import Progress
from vesselrl.scoring.overlap import METRIC_SPEC, as_mask, counts, overlap_scores
from vesselrl.scoring.postprocessing import THRESHOLD_ONLY, PostProcessing
from vesselrl.scoring.rewards import Reward, score_or_skip
from vesselrl.scoring.scores import evaluation_scores

logger = logging.getLogger(__name__)

MASK_SUFFIXES = ("_mask.png", ".png", ".tif", ".tiff")
# Image uint8 (H, W, 3) -> object with `.mask`, bool (H, W), or None = failed.
Predict = Callable[[np.ndarray], Any]
Pairs = Iterable[tuple[np.ndarray | None, np.ndarray]]  # predicted (None = failed) and true masks
Load = Callable[[Any], tuple[np.ndarray, np.ndarray]]
Gather = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def load_pixels(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Reads image and true mask of a sample."""
    return load_image(sample), load_mask(sample)


def evaluate(
    predict: Predict,
    samples: Sequence[Sample],
    reward: Reward | None = None,
    *,
    caveats: Mapping[Caveat, str] | None = None,
    gather: Gather = list,
    **options: Any,
) -> Evaluation:
    """Predicts and scores one image after the other; a crash is an error, not a failed prediction.

    A reward gives the column `reward`, a user's own function `custom_score`. `gather` adds the rows that
    other processes have scored. The options are those of `predict_each`.
    """
    predicted = predict_each(predict, samples, **options)
    pairs = ((None if prediction is None else prediction.mask, truth) for prediction, truth in predicted)
    return evaluate_masks(samples, pairs, reward, caveats, gather)


def predict_each(
    predict: Predict,
    samples: Sequence[Sample],
    load: Load = load_pixels,
    progress: Progress | None = None,
    batch_size: int | None = None,
    post: PostProcessing = THRESHOLD_ONLY,
) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields prediction (None: not finite) and true mask of every sample, then tells `progress`.

    The prediction is cut to the field of view, and its mask post-processed there. `load` makes image and true
    mask of a sample; `progress` takes (done, total). With a `batch_size` `predict` takes a list of so many
    images, and returns as many predictions.
    """
    check_unique([sample.key for sample in samples])
    predict_batch = predict if batch_size else lambda images: [predict(image) for image in images]
    step, done = batch_size or 1, 0
    for first in range(0, len(samples), step):
        batch = samples[first : first + step]
        images, truths = zip(*(_load_checked(sample, load) for sample in batch), strict=True)
        predictions = _or_failed(predict_batch, batch, [*images])
        for sample, prediction, truth in zip(batch, predictions, truths, strict=True):
            yield _finished(prediction, load_fov(sample), post), truth
            done += 1
            if progress is not None:
                progress(done, len(samples))


def _finished(prediction: Any, fov: np.ndarray | None, post: PostProcessing) -> Any:
    if prediction is None or (fov is None and not post.changes_masks):
        return prediction
    parts = {name: getattr(prediction, name, None) for name in ("mask", "probabilities")}
    inside = True if fov is None else fov
    found = SimpleNamespace(**{name: part * inside for name, part in parts.items() if part is not None})
    if post.changes_masks:
        found.mask = post.postprocess_for(found.probabilities)(found.mask)
    return found


def _load_checked(sample: Sample, load: Load) -> tuple[np.ndarray, np.ndarray]:
    image, truth = load(sample)
    truth = as_mask(truth, name=f"{sample.key}: true mask")
    if truth.shape != image.shape[:2]:
        sizes = f"the true mask is {truth.shape}, its image {image.shape[:2]}"
        raise ValueError(f"{sample.key}: {sizes}. They must be of one size; check the annotation.")
    return image, truth


def _or_failed(predict_batch: Callable, samples: Sequence[Sample], images: list[np.ndarray]) -> list[Any]:
    """Predictions of a batch; None for each that is not finite, whatever the others are."""
    try:
        return predict_batch(images)
    except NotFiniteError as error:
        if len(images) == 1:
            logger.warning("%s: failed, and counted as an empty mask. %s", samples[0].key, error)
            return [None]
    alone = (_or_failed(predict_batch, [s], [image]) for s, image in zip(samples, images, strict=True))
    return [*chain.from_iterable(alone)]


def evaluate_masks(
    samples: Sequence[Sample],
    pairs: Pairs,
    reward: Reward | None = None,
    caveats: Mapping | None = None,
    gather: Gather = list,
) -> Evaluation:
    """Scores one pair of masks per sample; `gather` as for `evaluate`."""
    rows = gather(score_rows(samples, pairs, reward))
    return summarise(rows, METRIC_SPEC, describe_reward(reward), caveats=dict(caveats or {}))


def score_rows(samples: Sequence[Sample], pairs: Pairs, reward: Reward | None = None) -> list[dict[str, Any]]:
    """Scores one row per sample; a failed prediction (None) counts as an empty mask."""
    rows = []
    for sample, (mask, truth) in zip(samples, pairs, strict=True):
        fov = load_fov(sample)
        pred = np.zeros(truth.shape, bool) if mask is None else _fitting_mask(mask, truth, sample.key, fov)
        row = {"key": sample.key, "patient": sample.patient, "sequence": sample.sequence}
        truth_hash = hashlib.sha256(f"{truth.shape}".encode() + np.packbits(truth).tobytes()).hexdigest()
        row |= {"failed": mask is None, "truth_hash": truth_hash[:16]}
        row |= {name: float(value) for name, value in evaluation_scores(pred, truth).items()}
        if fov is not None:  # specificity counts what is inside alone
            row |= overlap_scores(counts(pred[fov][None], truth[fov][None]))
        if reward is not None:
            value, terms = score_or_skip(reward, pred, truth)
            row["reward"] = float(value)
            if "custom_score" in terms:  # the user wants to see whether it moves
                row["custom_score"] = float(terms["custom_score"])
        rows.append(row)
    return rows


def _fitting_mask(mask: Any, truth: np.ndarray, key: str, fov: np.ndarray | None) -> np.ndarray:
    """A predicted mask of the right size, without what lies outside of the field of view."""
    mask = as_mask(mask, name=f"{key}: predicted mask")
    if mask.shape != truth.shape:
        sizes = f"the predicted mask is {mask.shape}, the image {truth.shape}"
        raise ValueError(f"{key}: {sizes}. Return masks at the size of the original image.")
    return mask if fov is None else mask & fov


def describe_reward(reward: Any) -> dict[str, Any] | None:
    """Class and settings of a reward, by which results can tell if their rewards agree; functions by name."""
    if reward is None:
        return None
    names = sorted(field.name for field in fields(reward)) if is_dataclass(reward) else ()
    described = {"class": reward} | {name: getattr(reward, name) for name in names}
    for name, value in described.items():
        if not isinstance(value, (bool, int, float, str, type(None))):
            described[name] = getattr(value, "__name__", type(value).__name__)
    return described


def evaluate_variants(
    samples: Sequence[Sample],
    predicted: Iterable[tuple[Any, np.ndarray]],
    variants: Mapping[str, PostProcessing],
    reward: Reward | None = None,
    caveats: Mapping[Caveat, str] | None = None,
) -> dict[str, Evaluation]:
    """Scores what `predict_each` yields: its masks (""), those of `variants` by probability."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("", *variants)}
    counted, failed = 0, []
    for sample, (prediction, truth) in zip(samples, predicted, strict=True):
        masks = dict.fromkeys(rows)
        if prediction is None:
            failed.append(sample.key)
        else:
            fov, probabilities = load_fov(sample), prediction.probabilities
            masks[""] = _fitting_mask(prediction.mask, truth, sample.key, fov)
            inside = ... if fov is None else fov
            counted = counted + count_pixels(probabilities[inside], truth[inside])
            masks |= {name: other.mask(probabilities) for name, other in variants.items()}
        for name, mask in masks.items():
            rows[name] += score_rows([sample], [(mask, truth)], reward)
    if failed:
        logger.warning("%d of %d predictions failed: %s", len(failed), len(samples), ", ".join(failed[:5]))
    calibrated = calibration(counted, len(failed)) if len(failed) < len(samples) else None
    stored = {"calibration": calibrated, "caveats": dict(caveats or {})}
    spec = describe_reward(reward)
    return {name: summarise(table, METRIC_SPEC, spec, **stored) for name, table in rows.items()}


def second_observer(samples: Sequence[Sample], folder: Path | str) -> list[Sample]:
    """Finds a second observer's mask, `<image>_mask.png` or `<image>.png`, alone or in the image's folder."""
    folder = Path(folder)
    if not folder.is_dir():
        advice = "Give the folder with the second observer's masks."
        raise DataError(f"There is no folder --second_masks. {advice}")
    others, num_named = [], Counter(sample.image_path.stem for sample in samples)
    for sample, below in zip(samples, relative_paths(samples), strict=True):
        stems = [below.with_suffix(""), below.stem] if num_named[below.stem] == 1 else [below.with_suffix("")]
        tried = (folder / f"{stem}{end}" for stem in stems for end in MASK_SUFFIXES)
        if (path := next((path for path in tried if path.is_file()), None)) is None:
            missing = f"{sample.key}: the second observer has no mask of it"
            raise DataError(f"{missing}. Name masks as the images, or leave the second observer out.")
        record = f"{sample.record}: second observer"
        size, image_size = read_size(path, record), read_size(sample.image_path, sample.record)
        if size != image_size:
            sizes = "the mask has {}×{} px, its image {}×{} px".format(*size, *image_size)
            raise DataError(f"{record}: {sizes}. Bring the mask to that size (nearest neighbour).")
        others.append(replace(sample, mask_path=path, outlines=(), record=record))
    return others


def caveats_of(
    split: Split | None, samples: Sequence[Sample], seen: Collection[str] = ()
) -> dict[Caveat, str]:
    """Collects the caveats of results on samples of a split; `seen` are keys that the base was trained on."""
    caveats = {Caveat.PATIENT_LEAKAGE: Caveat.PATIENT_LEAKAGE.text()} if split and split.is_leaky else {}
    caveats |= read_caveats(split.caveats if split else ())
    if num_seen := sum(sample.key in seen for sample in samples):
        overlap = Caveat.PRETRAINING_OVERLAP
        caveats[overlap] = overlap.text(seen=num_seen, total=len(samples))
    return caveats


def caveats_of_built_in(data_root: str | None, model_path: str | None) -> dict[Caveat, str]:
    """Collects the caveats of results on built-in images (no root), and of a model that is not a real one."""
    found = {Caveat.SYNTHETIC: data_root is None, Caveat.MINIATURE: model_path in (None, RANDOM_MODEL)}
    return {caveat: caveat.text() for caveat, holds in found.items() if holds}
