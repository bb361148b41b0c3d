"""Evaluation: a predictor on a split -> one row per image.

The predictor sees the image and nothing else; the truth is used only to score what came back. A failed
prediction is an empty mask, flagged and counted, never dropped. What becomes of the rows (patient means,
intervals, files, tables) is in `results.py`; its names can be imported from here too.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import numpy as np

from vesselrl.evaluation.results import (
    Evaluation,
    before_after_table,
    check_unique,
    read_evaluation,
    summarise,
    write_evaluation,
)
from vesselrl.scoring.masks import as_mask
from vesselrl.scoring.spec import METRIC_SPEC
from vesselrl.scoring.truth import evaluation_scores

__all__ = ["Evaluation", "before_after_table", "evaluate", "read_evaluation", "summarise", "write_evaluation"]


class EvaluatedSample(Protocol):
    """What an evaluation needs to know of a sample: pseudonyms only."""

    key: str
    patient: str
    sequence: str


def evaluate(
    predict: Callable[[np.ndarray], Any],
    samples: Sequence[EvaluatedSample],
    load: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    reward: Callable[[np.ndarray, np.ndarray], tuple[float, dict]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a predictor on samples, one row per image; a failed prediction counts as an empty mask.

    Args:
        predict: image uint8 (H, W, 3) -> object with `.mask`, bool (H, W) of the same size, or None = failed.
        samples: objects with `key`, `patient`, `sequence` (pseudonyms), each key once.
        load: sample -> (image, true mask).
        reward: (predicted mask, true mask) -> (float, terms); stored as column `reward`, and what
            a user's own function returned, `custom_score`, as a column of that name.
        progress: called with (images done, images in all) after every image.

    Raises:
        ValueError: no samples, a key twice, a truth or a prediction of the wrong shape. An exception raised
            by `predict` or `load` is passed on: a crash is not a failed prediction.
    """
    if not samples:
        raise ValueError("There is nothing to evaluate: got 0 samples. Check the split and max_val_samples.")
    check_unique([sample.key for sample in samples])
    rows: list[dict[str, Any]] = []
    for sample in samples:
        image, truth = load(sample)
        truth = as_mask(truth, name=f"{sample.key}: true mask")
        if truth.shape != image.shape[:2]:
            raise ValueError(
                f"{sample.key}: the true mask is {truth.shape}, its image {image.shape[:2]}. Both must "
                "have the size of the original image; check the annotation."
            )
        row = {"key": sample.key, "patient": sample.patient, "sequence": sample.sequence}
        rows.append(row | _score(predict(image), truth, reward, sample.key))
        if progress is not None:
            progress(len(rows), len(samples))
    return summarise(rows, METRIC_SPEC, None if reward is None else describe_reward(reward))


def describe_reward(reward: Any) -> dict[str, Any]:
    """Class name and plain settings of a reward object, so that two results can tell if their rewards agree.

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


def _score(prediction: Any, truth: np.ndarray, reward: Callable | None, key: str) -> dict[str, Any]:
    """Scores of one prediction; None is an empty mask with failed=True."""
    failed = prediction is None
    pred = (
        np.zeros(truth.shape, dtype=bool)
        if failed
        else as_mask(prediction.mask, name=f"{key}: predicted mask")
    )
    if pred.shape != truth.shape:
        raise ValueError(
            f"{key}: the predicted mask is {pred.shape}, the image {truth.shape}. Return masks at the "
            "size of the original image."
        )
    scores: dict[str, Any] = {"failed": failed, "truth_hash": _mask_hash(truth)}
    scores |= {name: float(value) for name, value in evaluation_scores(pred, truth).items()}
    if reward is not None:
        value, details = reward(pred, truth)
        scores["reward"] = float(value)
        if "custom_score" in details:  # the user wants to see whether it moves
            scores["custom_score"] = float(details["custom_score"])
    return scores


def _mask_hash(mask: np.ndarray) -> str:
    """First 16 hex digits of the sha256 of a mask's shape and bits."""
    bits = np.packbits(np.ascontiguousarray(mask, dtype=bool)).tobytes()
    return hashlib.sha256(f"{mask.shape}".encode() + bits).hexdigest()[:16]
