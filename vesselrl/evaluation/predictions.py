"""Predicting each image once, and scoring masks that are there already.

`predict_once` keeps of every prediction what the later steps need: the mask as it is used, others made of the
same probabilities, and the counts by probability. `evaluate_masks` scores such masks, or those of a second
observer, by the same `evaluate` as a model.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vesselrl.evaluation.calibration import calibration
from vesselrl.evaluation.evaluate import EvaluatedSample, evaluate
from vesselrl.evaluation.probabilities import count_pixels, no_pixels
from vesselrl.evaluation.results import Evaluation, check_unique
from vesselrl.scoring.masks import as_mask
from vesselrl.scoring.postprocessing import THRESHOLD_ONLY, PostProcessing

logger = logging.getLogger(__name__)


class PackedMask(NamedTuple):
    """A mask with 8 pixels in a byte, so that those of a whole split fit in memory."""

    bits: np.ndarray
    shape: tuple[int, int]

    @classmethod
    def pack(cls, mask: np.ndarray) -> "PackedMask":
        """Pack a bool mask (H, W)."""
        return cls(np.packbits(mask), mask.shape)

    def unpack(self) -> np.ndarray:
        """The bool mask (H, W)."""
        height, width = self.shape
        return np.unpackbits(self.bits, count=height * width).reshape(self.shape).astype(bool)


@dataclass
class Predictions:
    """What one pass over a set of images left, by key.

    Attributes:
        truths: true masks.
        masks: predicted masks, post-processed; None = failed.
        variants: name -> masks with other post-processing.
        calibration: of the probabilities, see `calibration.py`; None if every prediction failed.
    """

    truths: dict[str, PackedMask] = field(default_factory=dict)
    masks: dict[str, PackedMask | None] = field(default_factory=dict)
    variants: dict[str, dict[str, PackedMask | None]] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None


def predict_once(
    predict: Callable[[np.ndarray], Any],
    samples: Sequence[EvaluatedSample],
    load: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    post: PostProcessing = THRESHOLD_ONLY,
    variants: Mapping[str, PostProcessing] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Predicts every image once; the predictor sees the image and nothing else.

    Args:
        predict: image uint8 (H, W, 3) -> object with `.mask` and `.probabilities`, (H, W), or None = failed.
        samples: objects with `key`, each key once.
        load: sample -> (image, true mask).
        post: what is done to the masks; its threshold was the predictor's.
        variants: name -> other post-processing to keep the masks of.
        progress: called with (images done, images in all) after every image.

    Raises:
        ValueError: no samples, a key twice, a mask or probabilities of the wrong shape or range. An exception
            raised by `predict` or `load` is passed on: a crash is not a failed prediction.
    """
    if not samples:
        raise ValueError("There is nothing to evaluate: got 0 samples. Check the split and max_val_samples.")
    check_unique([sample.key for sample in samples])
    variants = variants or {}
    done = Predictions(variants={name: {} for name in variants})
    counted = no_pixels()
    for sample in samples:
        key = sample.key
        image, truth = load(sample)
        truth = as_mask(truth, name=f"{key}: true mask")
        prediction = predict(image)
        done.truths[key] = PackedMask.pack(truth)
        if prediction is None:
            done.masks[key] = None
            for masks in done.variants.values():
                masks[key] = None
        else:
            mask = as_mask(prediction.mask, name=f"{key}: predicted mask")
            if not mask.shape == truth.shape == prediction.probabilities.shape == image.shape[:2]:
                raise ValueError(
                    f"{key}: the predicted mask is {mask.shape}, its probabilities "
                    f"{prediction.probabilities.shape}, the true mask {truth.shape}, the image "
                    f"{image.shape[:2]}. All must have the size of the original image."
                )
            done.masks[key] = PackedMask.pack(post.finisher(prediction.probabilities)(mask))
            counted += count_pixels(prediction.probabilities, truth)
            for name, other in variants.items():
                done.variants[name][key] = PackedMask.pack(other.mask(prediction.probabilities))
        if progress is not None:
            progress(len(done.masks), len(samples))
    failed = [key for key, mask in done.masks.items() if mask is None]
    if failed:
        logger.warning("%d of %d predictions failed: %s", len(failed), len(samples), ", ".join(failed[:5]))
    if len(failed) < len(samples):
        done.calibration = calibration(counted, len(failed))
    return done


class _MaskInPlace(NamedTuple):
    """Stands for the image, with the answer in it."""

    shape: tuple[int, int]
    answer: Any


class _Answer(NamedTuple):
    mask: np.ndarray


def evaluate_masks(
    samples: Sequence[EvaluatedSample],
    predicted: Callable[[Any], np.ndarray | None],
    truth: Callable[[Any], np.ndarray],
    reward: Callable[[np.ndarray, np.ndarray], tuple[float, dict]] | None = None,
) -> Evaluation:
    """Scores masks that are there already, as `evaluate` scores a model.

    Args:
        samples: objects with `key`, `patient`, `sequence`, each key once.
        predicted: sample -> mask (H, W) to be scored, None = failed, which counts as an empty mask.
        truth: sample -> mask (H, W) that it is scored against.
        reward: as for `evaluate`.

    Raises:
        ValueError: no samples, a key twice, or masks that do not fit together.
    """

    def load(sample: EvaluatedSample) -> tuple[_MaskInPlace, np.ndarray]:
        true_mask, mask = truth(sample), predicted(sample)
        return _MaskInPlace(true_mask.shape, None if mask is None else _Answer(mask)), true_mask

    return evaluate(lambda image: image.answer, samples, load, reward)


def unpacked(masks: Mapping[str, PackedMask | None]) -> Callable[[Any], np.ndarray | None]:
    """Looks up a sample's mask by its key, for `evaluate_masks`."""

    def find(sample: EvaluatedSample) -> np.ndarray | None:
        packed = masks[sample.key]
        return None if packed is None else packed.unpack()

    return find
