"""How fast masks are scored, as a ratio to the obvious way measured beside it in the same process.

Ratios can be trusted on a busy machine, masks per second only as far as the machine was idle: all variants
take turns on the same masks, each ratio is the median over the rounds, one-thread ratios are of CPU time and
two-thread ratios of wall time. The truth's part is forgotten before every turn, so it is paid once per truth.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from vesselrl.benchmarks.naive_scoring import naive_scores, naive_surface_scores
from vesselrl.data.synthetic import TARGET, draw_sequence
from vesselrl.scoring.backend import compiled_kernels
from vesselrl.scoring.batch import in_threads, score_masks
from vesselrl.scoring.metrics import score_mask
from vesselrl.scoring.surface import TOLERANCE_PX, surface_scores
from vesselrl.scoring.topology import topology
from vesselrl.scoring.truth import forget_truths, known_truth

logger = logging.getLogger(__name__)

# Lowest ratio that is accepted, by variant.
AIMS = {"one thread": 12.0, "two threads": 20.0, "one thread, without numba": 3.4, "HD95 and NSD": 4.5}
AIMS_WITHOUT_NUMBA = ("one thread, without numba", "HD95 and NSD")

Masks = list[np.ndarray]


def benchmark_scoring(
    size: int = 512, num_truths: int = 4, preds_per_truth: int = 8, num_rounds: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Measure the scoring engine against the naive reference.

    Args:
        size: side of the square masks in px, a multiple of 4 from 64.
        num_truths: drawn vessel trees.
        preds_per_truth: spoilt copies of each, as a group of sampled masks has.
        num_rounds: turns of every variant; medians are over these.
        seed: of the masks.

    Returns:
        `size`, `num_masks`, `num_rounds`, `numba` (whether it was used), `same_numbers` (the engine's numbers
        are those of the naive reference where both define them alike, and do not depend on the variant),
        `passed` (same numbers, every aim reached) and `rows`, one per variant: `name`, `reference` (name of
        the row it is compared with, None for a reference itself), `masks_per_second`, `ms_per_mask`, `clock`
        ("cpu" or "wall"), `ratio`, `aim`.

    Raises:
        ValueError: fewer than one truth, prediction or round.
    """
    if min(num_truths, preds_per_truth, num_rounds) < 1:
        raise ValueError(
            f"num_truths, preds_per_truth and num_rounds must be at least 1, got {num_truths}, "
            f"{preds_per_truth} and {num_rounds}."
        )
    preds, truths = draw_masks(size, num_truths, preds_per_truth, seed)
    with opencv_on_one_thread():
        scores = {name: variant(preds[:1], truths[:1]) for name, variant in VARIANTS.items()}  # compiles
        scores = {name: variant(preds, truths) for name, variant in VARIANTS.items()}
        seconds = _take_turns(preds, truths, num_rounds)
    rows = [_row(name, seconds, len(preds)) for name in VARIANTS]
    same_numbers = _same_numbers(scores)
    return {
        "size": size,
        "num_masks": len(preds),
        "num_rounds": num_rounds,
        "numba": compiled_kernels() is not None,
        "same_numbers": same_numbers,
        "passed": same_numbers and all(row["aim"] is None or row["ratio"] >= row["aim"] for row in rows),
        "rows": rows,
    }


def format_scoring(result: dict[str, Any]) -> str:
    """The result of `benchmark_scoring` as a table for a terminal."""
    lines = [
        f"{result['num_masks']} masks of {result['size']} x {result['size']} px, median of "
        f"{result['num_rounds']} rounds, numba {'in use' if result['numba'] else 'missing'}",
        f"{'':<28}{'masks/s':>9}{'ms/mask':>9}  {'clock':<6}{'ratio':>7}{'aim':>7}",
    ]
    for row in result["rows"]:
        compared = "" if row["ratio"] is None else f"{row['ratio']:>6.1f}x"
        aim = "" if row["aim"] is None else f"{row['aim']:>6.1f}x"
        speed = f"{row['masks_per_second']:>9.0f}{row['ms_per_mask']:>9.2f}"
        lines.append(f"{row['name']:<28}{speed}  {row['clock']:<6}{compared:>7}{aim:>7}".rstrip())
    lines.append(f"numbers equal to the reference: {'yes' if result['same_numbers'] else 'NO'}")
    return "\n".join(lines)


# ---- The variants: (preds, truths) -> one dict of scores per mask ----


def _naive(preds: Masks, truths: Masks) -> list[dict]:
    return [naive_scores(pred, truth) for pred, truth in zip(preds, truths, strict=True)]


def _engine(num_threads: int) -> Callable[[Masks, Masks], list[dict]]:
    return lambda preds, truths: score_masks(preds, truths, num_threads=num_threads)


def _plain(preds: Masks, truths: Masks) -> list[dict]:
    shapes = {
        id(truth): topology(truth, "plain") for truth in {id(truth): truth for truth in truths}.values()
    }
    return [
        score_mask(pred, truth, shapes[id(truth)], "plain") for pred, truth in zip(preds, truths, strict=True)
    ]


def _naive_surface(preds: Masks, truths: Masks) -> list[dict]:
    return [
        naive_surface_scores(pred, truth, TOLERANCE_PX) for pred, truth in zip(preds, truths, strict=True)
    ]


def _surface(preds: Masks, truths: Masks) -> list[dict]:
    return in_threads(lambda pred, truth: surface_scores(pred, known_truth(truth).surface), preds, truths,
                      num_threads=1)  # fmt: skip


VARIANTS: dict[str, Callable[[Masks, Masks], list[dict]]] = {
    "naive": _naive,
    "one thread": _engine(1),
    "two threads": _engine(2),
    "one thread, without numba": _plain,
    "naive HD95 and NSD": _naive_surface,
    "HD95 and NSD": _surface,
}
REFERENCES = dict.fromkeys(("one thread", "two threads", "one thread, without numba"), "naive") | {
    "HD95 and NSD": "naive HD95 and NSD"
}


# ---- Measuring ----


def _take_turns(preds: Masks, truths: Masks, num_rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every turn: variant -> clock -> one number per round."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in VARIANTS}
    for number in range(num_rounds):
        for name, variant in VARIANTS.items():
            forget_truths()
            cpu, wall = time.process_time(), time.perf_counter()
            variant(preds, truths)
            seconds[name]["cpu"].append(time.process_time() - cpu)
            seconds[name]["wall"].append(time.perf_counter() - wall)
        logger.debug("scoring benchmark: round %d of %d", number + 1, num_rounds)
    return seconds


def _row(name: str, seconds: dict[str, dict[str, list[float]]], num_masks: int) -> dict[str, Any]:
    clock = "wall" if name == "two threads" else "cpu"
    reference = REFERENCES.get(name)
    ratio = None
    if reference is not None:
        ratio = float(np.median(np.divide(seconds[reference][clock], seconds[name][clock])))
    per_mask = float(np.median(seconds[name][clock])) / num_masks
    return {
        "name": name,
        "reference": reference,
        "masks_per_second": 1 / per_mask,
        "ms_per_mask": 1000 * per_mask,
        "clock": clock,
        "ratio": ratio,
        "aim": AIMS.get(name) if compiled_kernels() or name in AIMS_WITHOUT_NUMBA else None,
    }


def _same_numbers(scores: dict[str, list[dict]]) -> bool:
    """Whether overlap, pieces, loops and surface equal the reference and all variants equal each other."""
    one, two, plain = (scores[name] for name in ("one thread", "two threads", "one thread, without numba"))
    shared = ("dice", "iou", "recall", "precision", "specificity", "beta0_error", "beta1_error")
    overlap = all(
        np.isclose(ours[name], theirs[name], rtol=0, atol=1e-9)
        for ours, theirs in zip(one, scores["naive"], strict=True)
        for name in shared
    )
    surface = all(
        np.isclose(ours[name], theirs[name], rtol=0, atol=1e-4)
        for ours, theirs in zip(scores["HD95 and NSD"], scores["naive HD95 and NSD"], strict=True)
        for name in ("hd95", "nsd")
    )
    return bool(one == two == plain and overlap and surface)


@contextmanager
def opencv_on_one_thread() -> Iterator[None]:
    """OpenCV's own threads off, so that one thread means one thread; put back afterwards."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


# ---- Masks ----


def draw_masks(size: int, num_truths: int, preds_per_truth: int, seed: int = 0) -> tuple[Masks, Masks]:
    """(predictions, truths), bool (size, size), one truth per prediction: vessel trees and spoilt copies."""
    rng = np.random.default_rng(seed)
    preds, truths = [], []
    for patient in range(1, num_truths + 1):
        _, truth = draw_sequence(TARGET, patient, sequence=1, num_frames=1, size=size, seed=seed)[0]
        for _ in range(preds_per_truth):
            preds.append(spoil(truth, rng))
            truths.append(truth)
    return preds, truths


def spoil(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A prediction as a half-trained model makes it: rough edges, 8 to 25 breaks, 20 to 80 specks.

    >>> truth = np.zeros((64, 64), bool)
    >>> truth[30:36] = True
    >>> spoil(truth, np.random.default_rng(0)).shape
    (64, 64)
    """
    import cv2

    inside, outside = truth.astype(np.uint8), (~truth).astype(np.uint8)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, 5) - cv2.distanceTransform(outside, cv2.DIST_L2, 5)
    noise = cv2.GaussianBlur(rng.normal(size=truth.shape).astype(np.float32), (0, 0), 2)
    pred = (depth + 6 * noise > 0).astype(np.uint8)
    vessel = np.argwhere(truth)
    for row, column in vessel[rng.integers(len(vessel), size=rng.integers(8, 26))]:
        cv2.circle(pred, (int(column), int(row)), int(rng.integers(3, 9)), 0, -1)
    for row, column in rng.integers(truth.shape[0], size=(rng.integers(20, 81), 2)):
        cv2.circle(pred, (int(column), int(row)), int(rng.integers(0, 3)), 1, -1)
    return pred.astype(bool)
