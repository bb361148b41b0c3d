"""How fast masks are scored, as a ratio to the obvious way (scikit-image and SciPy), measured in one process.

Ratios can be trusted on a busy machine, masks per second only as far as it was idle: all variants take turns
on the same masks, each ratio is the median over the rounds, one-thread ratios are of CPU time and two-thread
ratios of wall time. The truth's part is forgotten before every turn, so it is paid once per truth. The naive
way takes Zhang's skeleton, so its centreline scores differ; all other numbers are the same.
"""

import json as json_module
import time
from functools import partial
from typing import Any

import cv2
import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt
from skimage.measure import label
from skimage.morphology import skeletonize

from benchmarks import run
from vesselrl.scoring.scores import (
    TOLERANCE_PX,
    cached_truth,
    clear_truth_cache,
    in_threads,
    score_masks,
    surface_scores,
)
from vesselrl.synthetic.dataset import TARGET, draw_sequence

# Lowest ratio that is accepted, by variant, and the variant that it is compared with.
AIMS = {"one thread": 12.0, "two threads": 20.0, "HD95 and NSD": 4.5}
REFERENCES = {"one thread": "naive", "two threads": "naive", "HD95 and NSD": "naive HD95 and NSD"}
SAME = ("dice", "iou", "recall", "precision", "specificity", "beta0_error", "beta1_error")

Masks = list[np.ndarray]


def scoring(size: int = 512, num_rounds: int = 5, json: bool = False) -> int:
    """Times the scoring engine against a naive one, in one process.

    Args:
        size: side of the masks in px.
        num_rounds: rounds that the median is taken over.
        json: print the numbers as JSON.
    """
    cv2.setNumThreads(1)  # one thread means one thread
    result = measure(size, num_rounds=num_rounds)
    print(json_module.dumps(result, indent=1) if json else as_table(result))
    return int(not result["passed"])


def measure(size: int, num_truths: int = 4, preds_per_truth: int = 8, num_rounds: int = 5) -> dict[str, Any]:
    """Measures all variants; `passed`: the numbers are those of the naive way, and every aim is reached."""
    preds, truths = draw_masks(size, num_truths, preds_per_truth)
    scores = {name: variant(preds, truths) for name, variant in VARIANTS.items()}  # compiles, too
    seconds: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in VARIANTS}
    for _ in range(num_rounds):
        for name, variant in VARIANTS.items():
            clear_truth_cache()
            cpu, wall = time.process_time(), time.perf_counter()
            variant(preds, truths)
            seconds[name]["cpu"].append(time.process_time() - cpu)
            seconds[name]["wall"].append(time.perf_counter() - wall)
    rows = []
    for name in VARIANTS:
        clock, reference = "wall" if name == "two threads" else "cpu", REFERENCES.get(name)
        row = {"name": name, "reference": reference, "clock": clock, "aim": AIMS.get(name)}
        row["ms_per_mask"] = 1000 * float(np.median(seconds[name][clock])) / len(preds)
        row["masks_per_second"] = 1000 / row["ms_per_mask"]
        row["ratio"] = reference and float(
            np.median(np.divide(seconds[reference][clock], seconds[name][clock]))
        )
        rows.append(row)
    same = same_numbers(scores)
    passed = same and all(row["aim"] is None or row["ratio"] >= row["aim"] for row in rows)
    labels = {"size": size, "num_masks": len(preds), "num_rounds": num_rounds}
    return labels | {"same_numbers": same, "passed": passed, "rows": rows}


def same_numbers(scores: dict[str, list[dict]]) -> bool:
    """Whether the engine's numbers equal those of the naive way and do not depend on the threads."""

    def close(first: str, second: str, names: tuple[str, ...], atol: float) -> bool:
        pairs = zip(scores[first], scores[second], strict=True)
        return all(np.isclose(a[name], b[name], rtol=0, atol=atol) for a, b in pairs for name in names)

    surface = close("HD95 and NSD", "naive HD95 and NSD", ("hd95", "nsd"), 1e-4)
    return (
        scores["one thread"] == scores["two threads"] and close("one thread", "naive", SAME, 1e-9) and surface
    )


def as_table(result: dict[str, Any]) -> str:
    """The result of `measure` for a terminal."""
    about = "{num_masks} masks of {size} x {size} px, median of {num_rounds} rounds".format_map(result)
    lines = [about, f"{'':<20}{'masks/s':>9}{'ms/mask':>9}  {'clock':<6}{'ratio':>7}{'aim':>7}"]
    for row in result["rows"]:
        ratios = "".join(f"{row[name]:>6.1f}x" for name in ("ratio", "aim") if row[name] is not None)
        speed = f"{row['masks_per_second']:>9.0f}{row['ms_per_mask']:>9.2f}"
        lines.append(f"{row['name']:<20}{speed}  {row['clock']:<6}{ratios}".rstrip())
    return "\n".join([*lines, f"numbers equal to the naive way: {'yes' if result['same_numbers'] else 'NO'}"])


def draw_masks(size: int, num_truths: int, preds_per_truth: int, seed: int = 0) -> tuple[Masks, Masks]:
    """Predictions and truths, bool (size, size), one truth per prediction: vessel trees and spoilt copies."""
    rng = np.random.default_rng(seed)
    preds, truths = [], []
    for patient in range(1, num_truths + 1):
        _, truth = draw_sequence(TARGET, patient, sequence=1, num_frames=1, size=size, seed=seed)[0]
        preds += [spoil(truth, rng) for _ in range(preds_per_truth)]
        truths += [truth] * preds_per_truth
    return preds, truths


def spoil(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A prediction as of a half-trained model: rough edges, 8 to 25 breaks, 20 to 80 specks."""
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


# ---- The naive way: every skeleton where it is needed, the truth again for every prediction


def naive_scores(pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Overlap, clDice and differences in shape of two non-empty bool masks (H, W)."""
    tp, fp = np.logical_and(pred, truth).sum(), np.logical_and(pred, ~truth).sum()
    fn, tn = np.logical_and(~pred, truth).sum(), np.logical_and(~pred, ~truth).sum()
    shape, true_shape = naive_shape(pred), naive_shape(truth)
    skeleton, true_skeleton = skeletonize(pred), skeletonize(truth)
    tprec = np.sum(skeleton & truth) / skeleton.sum()
    tsens = np.sum(true_skeleton & pred) / true_skeleton.sum()
    return {
        "dice": 2 * tp / (2 * tp + fp + fn),
        "iou": tp / (tp + fp + fn),
        "recall": tp / (tp + fn),
        "precision": tp / (tp + fp),
        "specificity": tn / (tn + fp),
        "cldice": 2 * tprec * tsens / (tprec + tsens),
        **{f"{name}_error": abs(shape[name] - true_shape[name]) for name in shape if name != "length"},
        "length_ratio": shape["length"] / true_shape["length"],
    }


def naive_shape(mask: np.ndarray) -> dict[str, int]:
    """Components, loops, ends, junctions and length of a mask."""
    skeleton = skeletonize(mask)
    pixels = skeleton.astype(np.uint8)
    ones = np.ones((3, 3), np.uint8)
    num_neighbours = cv2.filter2D(pixels, -1, ones, borderType=cv2.BORDER_CONSTANT) - pixels
    return {
        "length": skeleton.sum(),
        "beta0": label(mask, connectivity=2).max(),
        "beta1": label(np.pad(~mask, 1, constant_values=True), connectivity=1).max() - 1,
        "ends": np.sum(skeleton & (num_neighbours == 1)),
        "junctions": np.sum(skeleton & (num_neighbours >= 3)),
    }


def naive_surface_scores(pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """hd95 and nsd of two non-empty bool masks (H, W), by SciPy's exact distance transform."""
    border, true_border = pred ^ binary_erosion(pred), truth ^ binary_erosion(truth)
    to_truth = distance_transform_edt(~true_border)[border]
    to_pred = distance_transform_edt(~border)[true_border]
    near = np.sum(to_truth <= TOLERANCE_PX) + np.sum(to_pred <= TOLERANCE_PX)
    hd95 = max(np.percentile(to_truth, 95), np.percentile(to_pred, 95))
    return {"hd95": hd95, "nsd": near / (len(to_truth) + len(to_pred))}


def engine_surface_scores(pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The same by the engine."""
    return surface_scores(pred, cached_truth(truth).surface)


VARIANTS = {
    "naive": partial(in_threads, naive_scores, num_threads=1),
    "one thread": partial(score_masks, num_threads=1),
    "two threads": partial(score_masks, num_threads=2),
    "naive HD95 and NSD": partial(in_threads, naive_surface_scores, num_threads=1),
    "HD95 and NSD": partial(in_threads, engine_surface_scores, num_threads=1),
}

if __name__ == "__main__":
    run(scoring)
