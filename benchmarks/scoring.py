"""How fast masks are scored, as a ratio to the obvious way (scikit-image and SciPy), in one process."""

import json as json_module
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt
from skimage.measure import label
from skimage.morphology import skeletonize

from benchmarks import run
from vesselrl.scoring import scores
from vesselrl.synthetic.dataset import TARGET, draw_sequence

# The naive way takes Zhang's skeleton, so its centreline scores differ.
SAME = ("dice", "iou", "recall", "precision", "specificity", "beta0_error", "beta1_error")


def scoring(size: int = 512, num_rounds: int = 5, json: bool = False) -> int:
    """Times the scoring engine against a naive one, in one process.

    Args:
        size: side of the masks in px.
        num_rounds: rounds that the median is taken over.
        json: print the numbers as JSON.
    """
    cv2.setNumThreads(1)  # one thread means one thread
    result = measure(size, num_rounds=num_rounds)
    lines = ["{num_masks} masks of {size} x {size} px, median of {num_rounds} rounds".format_map(result)]
    lines.append(f"{'':<20}{'masks/s':>9}{'ms/mask':>9}  {'clock':<6}{'ratio':>7}{'aim':>7}")
    for row in result["rows"]:
        ratios = "".join(f"{row[name]:>6.1f}x" for name in ("ratio", "aim") if row[name] is not None)
        speed = f"{row['masks_per_second']:>9.0f}{row['ms_per_mask']:>9.2f}"
        lines.append(f"{row['name']:<20}{speed}  {row['clock']:<6}{ratios}".rstrip())
    lines.append(f"numbers equal to the naive way: {'yes' if result['same_numbers'] else 'NO'}")
    print(json_module.dumps(result, indent=1) if json else "\n".join(lines))
    return int(not result["passed"])


def measure(size: int, num_truths: int = 4, preds_per_truth: int = 8, num_rounds: int = 5) -> dict:
    """Measures all variants; `passed`: the numbers are those of the naive way, and every aim is reached."""
    preds, truths = draw_masks(size, num_truths, preds_per_truth)
    found = {name: variant(preds, truths) for name, (variant, *_) in VARIANTS.items()}  # compiles, too
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for _ in range(num_rounds):
        for name, (variant, *_) in VARIANTS.items():
            scores.truth_of_bits.cache_clear()  # so that the truth's part is paid once per truth
            cpu, wall = time.process_time(), time.perf_counter()
            variant(preds, truths)
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    rows = []
    for name, (_, clock, reference, aim) in VARIANTS.items():
        times = {key: np.array(taken)[:, int(clock == "wall")] for key, taken in seconds.items()}
        ms = 1000 * float(np.median(times[name])) / len(preds)
        ratio = reference and float(np.median(times[reference] / times[name]))
        row = {"name": name, "reference": reference, "clock": clock, "aim": aim, "ms_per_mask": ms}
        rows.append(row | {"masks_per_second": 1000 / ms, "ratio": ratio})
    same = found["one thread"] == found["two threads"]
    for name, metrics, atol in (("one thread", SAME, 1e-9), ("HD95 and NSD", ("hd95", "nsd"), 1e-4)):
        tables = ([[row[m] for m in metrics] for row in found[key]] for key in (name, VARIANTS[name][2]))
        same = same and np.allclose(*tables, rtol=0, atol=atol)
    passed = same and all(row["aim"] is None or row["ratio"] >= row["aim"] for row in rows)
    labels = {"size": size, "num_masks": len(preds), "num_rounds": num_rounds}
    return labels | {"same_numbers": same, "passed": passed, "rows": rows}


def draw_masks(size: int, num_truths: int, preds_per_truth: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Predictions as of a half-trained model (rough, broken, with specks) and their truths, bool (H, W)."""
    rng = np.random.default_rng(0)
    preds, truths = [], []
    for patient in np.repeat(range(1, num_truths + 1), preds_per_truth).tolist():
        ((_, truth),) = draw_sequence(TARGET, patient, sequence=1, num_frames=1, size=size)
        inside, outside = (cv2.distanceTransform(m.astype(np.uint8), cv2.DIST_L2, 5) for m in (truth, ~truth))
        noise = cv2.GaussianBlur(rng.normal(size=truth.shape).astype(np.float32), (0, 0), 2)
        pred, vessel = (inside - outside + 6 * noise > 0).astype(np.uint8), np.argwhere(truth)
        for row, column in vessel[rng.integers(len(vessel), size=rng.integers(8, 26))]:
            cv2.circle(pred, (int(column), int(row)), int(rng.integers(3, 9)), 0, -1)
        for row, column in rng.integers(size, size=(rng.integers(20, 81), 2)):
            cv2.circle(pred, (int(column), int(row)), int(rng.integers(0, 3)), 1, -1)
        preds.append(pred.astype(bool))
        truths.append(truth)
    return preds, truths


def naive_scores(pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Overlap, clDice and differences in shape of two non-empty bool masks (H, W), nothing computed once."""
    tp, fp = np.logical_and(pred, truth).sum(), np.logical_and(pred, ~truth).sum()
    fn, tn = np.logical_and(~pred, truth).sum(), np.logical_and(~pred, ~truth).sum()
    shape, true_shape = naive_shape(pred), naive_shape(truth)
    skeleton, true_skeleton = skeletonize(pred), skeletonize(truth)
    tprec = np.sum(skeleton & truth) / skeleton.sum()
    tsens = np.sum(true_skeleton & pred) / true_skeleton.sum()
    values = {"dice": 2 * tp / (2 * tp + fp + fn), "iou": tp / (tp + fp + fn), "recall": tp / (tp + fn)}
    values |= {"precision": tp / (tp + fp), "specificity": tn / (tn + fp)}
    values |= {"cldice": 2 * tprec * tsens / (tprec + tsens)}
    values |= {"length_ratio": shape["length"] / true_shape["length"]}
    return values | {f"{name}_error": abs(shape[name] - true_shape[name]) for name in shape}


def naive_shape(mask: np.ndarray) -> dict[str, int]:
    """Components, loops, ends, junctions and length of a mask."""
    skeleton = skeletonize(mask)
    pixels, ones = skeleton.astype(np.uint8), np.ones((3, 3), np.uint8)
    num_neighbours = cv2.filter2D(pixels, -1, ones, borderType=cv2.BORDER_CONSTANT) - pixels
    num_background = label(np.pad(~mask, 1, constant_values=True), connectivity=1).max()
    shape = {"beta0": label(mask, connectivity=2).max(), "beta1": num_background - 1}
    shape |= {"ends": np.sum(skeleton & (num_neighbours == 1)), "length": skeleton.sum()}
    return shape | {"junctions": np.sum(skeleton & (num_neighbours >= 3))}


def over_threads(score: Callable, num_threads: int = 1) -> Callable:
    """A function of lists of masks, which it shares out among threads."""
    pool = ThreadPoolExecutor(num_threads)
    return lambda preds, truths: list(pool.map(score, preds, truths))


def naive_surface_scores(pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """hd95 and nsd of two non-empty bool masks (H, W), by SciPy's exact distance transform."""
    border, true_border = pred ^ binary_erosion(pred), truth ^ binary_erosion(truth)
    to_truth = distance_transform_edt(~true_border)[border]
    to_pred = distance_transform_edt(~border)[true_border]
    near = np.sum(to_truth <= scores.TOLERANCE_PX) + np.sum(to_pred <= scores.TOLERANCE_PX)
    hd95 = max(np.percentile(to_truth, 95), np.percentile(to_pred, 95))
    return {"hd95": hd95, "nsd": near / (len(to_truth) + len(to_pred))}


engine = lambda pred, truth: scores.score_mask(pred, scores.cached_truth(truth))  # noqa: E731
surfaces = lambda pred, truth: scores.surface_scores(pred, scores.cached_truth(truth))  # noqa: E731
# What is timed, by which clock, the variant that it is compared with, and the lowest ratio that is accepted.
VARIANTS = {
    "naive": (over_threads(naive_scores), "cpu", None, None),
    "one thread": (over_threads(engine), "cpu", "naive", 12.0),
    "two threads": (over_threads(engine, 2), "wall", "naive", 20.0),
    "naive HD95 and NSD": (over_threads(naive_surface_scores), "cpu", None, None),
    "HD95 and NSD": (over_threads(surfaces), "cpu", "naive HD95 and NSD", 4.5),
}

if __name__ == "__main__":
    run(scoring)
