"""Evaluation: predictions or finished masks of samples -> one row of scores per image.

The predictor sees the image and nothing else; the truth only scores the mask that comes back. A failed
prediction is an empty mask, flagged and counted, never dropped.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vesselrl.data.images import read_size
from vesselrl.data.samples import Sample, load_image, load_mask
from vesselrl.data.splits import Split, relative_paths
from vesselrl.errors import DataError
from vesselrl.evaluation.results import Caveat, Evaluation, check_unique, read_caveats, summarise
from vesselrl.evaluation.tuning import calibration, count_pixels
from vesselrl.scoring.overlap import METRIC_SPEC, as_mask
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import Reward
from vesselrl.scoring.scores import evaluation_scores

logger = logging.getLogger(__name__)

MASK_SUFFIXES = ("_mask.png", ".png", ".tif", ".tiff")
# As seen, mirrored left to right, upside down, and both.
FLIPS = tuple((slice(None, None, y), slice(None, None, x)) for y in (None, -1) for x in (None, -1))

# Image uint8 (H, W, 3) -> object with `.mask`, bool (H, W), or None = failed.
Predict = Callable[[np.ndarray], Any]
Load = Callable[[Any], tuple[np.ndarray, np.ndarray]]
Progress = Callable[[int, int], None]


class EvaluatedSample(Protocol):
    """A sample as an evaluation sees it: pseudonyms only."""

    key: str
    patient: str
    sequence: str


def load_pixels(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Reads image and true mask of a sample."""
    return load_image(sample), load_mask(sample)


def evaluate(
    predict: Predict,
    samples: Sequence[EvaluatedSample],
    reward: Reward | None = None,
    *,
    load: Load = load_pixels,
    caveats: Mapping[Caveat, str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Predicts and scores one image after the other.

    Args:
        predict: image uint8 (H, W, 3) -> object with `.mask`, bool (H, W) of the same size, or None = failed.
        samples: objects with `key`, `patient`, `sequence` (pseudonyms), each key once.
        reward: (predicted mask, true mask) -> (float, terms); stored as column `reward`, and the value of a
            user's own function, `custom_score`, as a column of that name.
        load: sample -> (image, true mask).
        caveats: stored with the result.
        progress: called with (images done, images in all) after every image.

    An exception raised by `predict` or `load` is passed on: a crash is not a failed prediction.
    """
    predicted = predict_each(predict, samples, load, progress)
    pairs = ((None if prediction is None else prediction.mask, truth) for prediction, truth in predicted)
    return evaluate_masks(samples, pairs, reward, caveats=caveats)


def predict_each(
    predict: Predict,
    samples: Sequence[EvaluatedSample],
    load: Load = load_pixels,
    progress: Progress | None = None,
) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields prediction and true mask of every sample; `progress` is told when they were used."""
    if not samples:
        raise ValueError("There is nothing to evaluate: got 0 samples. Check the split and max_val_samples.")
    check_unique([sample.key for sample in samples])
    for number, sample in enumerate(samples, start=1):
        image, truth = load(sample)
        truth = as_mask(truth, name=f"{sample.key}: true mask")
        if truth.shape != image.shape[:2]:
            raise ValueError(
                f"{sample.key}: the true mask is {truth.shape}, its image {image.shape[:2]}. Both must "
                "have the size of the original image; check the annotation."
            )
        yield predict(image), truth
        if progress is not None:
            progress(number, len(samples))


def evaluate_masks(
    samples: Sequence[EvaluatedSample],
    pairs: Iterable[tuple[np.ndarray | None, np.ndarray]],
    reward: Reward | None = None,
    **stored: Any,
) -> Evaluation:
    """Scores masks as `evaluate` scores a model's; calibration and caveats can be stored with the result.

    `pairs` are predicted mask (None = failed) and true mask of each sample, in their order.
    """
    rows = score_rows(samples, pairs, reward)
    return summarise(rows, METRIC_SPEC, None if reward is None else describe_reward(reward), **stored)


def score_rows(
    samples: Sequence[EvaluatedSample],
    pairs: Iterable[tuple[np.ndarray | None, np.ndarray]],
    reward: Reward | None = None,
) -> list[dict[str, Any]]:
    """Scores one row per sample; a failed prediction (None) counts as an empty mask."""
    rows = []
    for sample, (mask, truth) in zip(samples, pairs, strict=True):
        pred = np.zeros(truth.shape, bool) if mask is None else _fitting_mask(mask, truth, sample.key)
        row = {"key": sample.key, "patient": sample.patient, "sequence": sample.sequence}
        row |= {"failed": mask is None, "truth_hash": _mask_hash(truth)}
        row |= {name: float(value) for name, value in evaluation_scores(pred, truth).items()}
        if reward is not None:
            value, terms = reward(pred, truth)
            row["reward"] = float(value)
            if "custom_score" in terms:  # the user wants to see whether it moves
                row["custom_score"] = float(terms["custom_score"])
        rows.append(row)
    return rows


def _fitting_mask(mask: Any, truth: np.ndarray, key: str) -> np.ndarray:
    mask = as_mask(mask, name=f"{key}: predicted mask")
    if mask.shape != truth.shape:
        raise ValueError(
            f"{key}: the predicted mask is {mask.shape}, the image {truth.shape}. Return masks at the "
            "size of the original image."
        )
    return mask


def _mask_hash(mask: np.ndarray) -> str:
    bits = np.packbits(np.ascontiguousarray(mask, dtype=bool)).tobytes()
    return hashlib.sha256(f"{mask.shape}".encode() + bits).hexdigest()[:16]


def describe_reward(reward: Any) -> dict[str, Any]:
    """Class name and plain settings of a reward, by which two results can tell if their rewards agree.

    Settings that are no plain values (a user's function) are described by their name.
    """
    if is_dataclass(reward):  # its fields only: cached values appear in vars() with use
        settings = {field.name: getattr(reward, field.name) for field in fields(reward)}
    else:
        settings = vars(reward) if hasattr(reward, "__dict__") else {}
    described = {"class": getattr(reward, "__name__", type(reward).__name__)}
    for name, value in sorted(settings.items()):
        plain = value is None or isinstance(value, (bool, int, float, str))
        described[name] = value if plain else getattr(value, "__name__", type(value).__name__)
    return described


@dataclass
class Predictions:
    """All masks of one pass over a set of images, in the order of the samples.

    They are packed, 8 pixels in a byte, so that those of a whole split fit in memory.
    """

    # By variant of post-processing, "" is the given one; None = failed.
    masks: dict[str, list[np.ndarray | None]]
    # True masks with their shapes.
    truths: list[tuple[np.ndarray, tuple[int, int]]] = field(default_factory=list)
    # None if every prediction failed.
    calibration: dict[str, Any] | None = None

    def pairs(self, variant: str) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
        """Yields predicted and true mask of every sample, for `evaluate_masks`."""
        for packed, (truth, shape) in zip(self.masks[variant], self.truths, strict=True):
            yield None if packed is None else _unpack(packed, shape), _unpack(truth, shape)


def _unpack(packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.unpackbits(packed, count=shape[0] * shape[1]).reshape(shape).astype(bool)


def predict_all(
    predict: Predict,
    samples: Sequence[EvaluatedSample],
    post: PostProcessing,
    variants: Mapping[str, PostProcessing],
    *,
    load: Load = load_pixels,
    progress: Progress | None = None,
) -> Predictions:
    """Predicts every image once and keeps the masks that several variants of post-processing make of it.

    Predictions have `.probabilities`, (H, W), beside the mask. `post` is applied to the predictor's masks,
    whose threshold it has, `variants` (by name) to the probabilities.
    """
    done = Predictions({name: [] for name in ("", *variants)})
    counted, failed = None, []
    predicted = predict_each(predict, samples, load, progress)
    for sample, (prediction, truth) in zip(samples, predicted, strict=True):
        done.truths.append((np.packbits(truth), truth.shape))
        if prediction is None:
            failed.append(sample.key)
            for masks in done.masks.values():
                masks.append(None)
            continue
        mask, probabilities = _fitting_mask(prediction.mask, truth, sample.key), prediction.probabilities
        counts = count_pixels(probabilities, truth)
        counted = counts if counted is None else counted + counts
        done.masks[""].append(np.packbits(post.postprocess_for(probabilities)(mask)))
        for name, other in variants.items():
            done.masks[name].append(np.packbits(other.mask(probabilities)))
    if failed:
        logger.warning("%d of %d predictions failed: %s", len(failed), len(samples), ", ".join(failed[:5]))
    done.calibration = None if counted is None else calibration(counted, len(failed))
    return done


class FlippedPrediction(NamedTuple):
    """A prediction of `with_flips`, both (H, W): mask bool, probabilities float32 in [0, 1]."""

    mask: np.ndarray
    probabilities: np.ndarray


def with_flips(predict: Predict, threshold: float = 0.5) -> Callable[[np.ndarray], FlippedPrediction | None]:
    """Makes masks of the mean probability of an image and its three mirror images; None if one of them is."""

    def predict_four(image: np.ndarray) -> FlippedPrediction | None:
        total = np.zeros(image.shape[:2], np.float32)
        for flip in FLIPS:
            prediction = predict(np.ascontiguousarray(image[flip]))
            if prediction is None:
                return None
            total += prediction.probabilities[flip]
        mean = total / np.float32(len(FLIPS))
        return FlippedPrediction(mean > np.float32(threshold), mean)

    return predict_four


def second_observer(samples: Sequence[Sample], folder: Path | str) -> list[Sample]:
    """Finds the masks of a second observer, `<image>_mask.png` or `<image>.png`, for the same images.

    Masks may lie in folders as the images do; where images share a name, they must. Every image needs one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. Give the folder with the second observer's masks.")
    others = []
    shared = Counter(sample.image_path.stem for sample in samples)
    for sample, below in zip(samples, relative_paths(samples), strict=True):
        stems = [below.with_suffix("")]
        stems += [sample.image_path.stem] if shared[sample.image_path.stem] == 1 else []
        tried = (folder / f"{stem}{end}" for stem in stems for end in MASK_SUFFIXES)
        path = next((path for path in tried if path.is_file()), None)
        if path is None:
            raise DataError(
                f"{sample.key}: the second observer has no mask of it in {folder}. Name the masks as the "
                "images, or leave the second observer out."
            )
        record = f"{sample.record}: second observer"
        size, image_size = read_size(path, record), read_size(sample.image_path, sample.record)
        if size != image_size:
            raise DataError(
                f"{record}: the mask has {size[0]}×{size[1]} px, its image {image_size[0]}×{image_size[1]} "
                "px. Bring the mask to the size of the image (nearest neighbour)."
            )
        others.append(replace(sample, mask_path=path, polygons=None, record=record))
    return others


def caveats_of(
    split: Split | None, samples: Sequence[Sample], seen: Collection[str] = ()
) -> dict[Caveat, str]:
    """Collects the caveats of results on samples of a split; `seen` are keys that the base was trained on."""
    leaky = split is not None and split.is_leaky
    caveats = {Caveat.PATIENT_LEAKAGE: Caveat.PATIENT_LEAKAGE.text()} if leaky else {}
    caveats |= read_caveats(() if split is None else split.caveats)
    num_seen = sum(sample.key in seen for sample in samples)
    if num_seen:
        overlap = Caveat.PRETRAINING_OVERLAP
        caveats[overlap] = overlap.text(seen=num_seen, total=len(samples))
    return caveats
