"""All scores of a prediction, one dict per mask, and the parts of a truth that are computed once."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from vesselrl.scoring.overlap import METRIC_SPEC, as_mask, as_mask_pair, counts, overlap_scores
from vesselrl.scoring.topology import Topology, check_topology, topology

TOLERANCE_PX: float = METRIC_SPEC["nsd_tolerance_px"]


def score_mask(pred: Any, truth: Any, truth_topology: Topology | None = None) -> dict[str, float]:
    """Score one predicted mask, bool or 0/1 (H, W): overlap, centreline and topology.

    dice, iou, recall, precision, specificity, cldice, tprec, tsens: in [0, 1]; beta0_error, beta1_error:
    absolute differences in the number of connected components and of loops; foreground: share of the image
    that the prediction covers. nan means undefined: recall of an empty truth, length_ratio of a non-empty
    prediction to an empty truth, specificity without background.
    """
    pred, truth = as_mask_pair(pred, truth)
    truth_shape = topology(truth) if truth_topology is None else truth_topology
    check_topology(truth_shape, truth)
    pred_shape = topology(pred)
    return {
        **overlap_scores(counts(pred, truth)),
        **cldice_scores(pred, truth, pred_shape, truth_shape),
        "beta0_error": float(abs(pred_shape.num_components - truth_shape.num_components)),
        "beta1_error": float(abs(pred_shape.num_loops - truth_shape.num_loops)),
        "length_ratio": length_ratio(pred_shape, truth_shape),
        "foreground": float(np.count_nonzero(pred) / pred.size),
    }


def cldice_scores(pred: np.ndarray, truth: np.ndarray, pred_shape: Topology, truth_shape: Topology) -> dict:
    """Centreline Dice, the harmonic mean of tprec and tsens (Shit et al., CVPR 2021); both empty 1, one 0.

    tprec is the share of the predicted centreline inside the truth, tsens that of the true one inside the
    prediction. Never use it alone: an all-foreground mask can score 1.
    """
    if pred_shape.length_px == 0 or truth_shape.length_px == 0:
        agree = float(pred_shape.length_px == truth_shape.length_px)
        return {"cldice": agree, "tprec": agree, "tsens": agree}
    tprec = float(np.count_nonzero(pred_shape.skeleton & truth) / pred_shape.length_px)
    tsens = float(np.count_nonzero(truth_shape.skeleton & pred) / truth_shape.length_px)
    total = tprec + tsens
    return {"cldice": 2 * tprec * tsens / total if total > 0 else 0.0, "tprec": tprec, "tsens": tsens}


def length_ratio(pred: Topology, truth: Topology) -> float:
    """Centreline length of the prediction over that of the truth; both empty 1, only the truth empty nan."""
    if truth.length_px == 0:
        return 1.0 if pred.length_px == 0 else math.nan
    return pred.length_px / truth.length_px


# ---- Recall by vessel width: thin branches hold few pixels and vanish in any other score ----


def width_map(truth: Any, skeleton: np.ndarray | None = None) -> np.ndarray:
    """Width class of every pixel of a truth: 0 background, 1 thin, 2 medium, 3 thick; uint8 (H, W).

    A centreline pixel is as wide as the largest disc inside the truth that covers it: thick from a diameter
    of 9 px, medium from 5 px. Every other pixel of the truth takes the class of the nearest of them.
    """
    from scipy.ndimage import distance_transform_edt

    truth = as_mask(truth, "truth")
    if not truth.any():
        return np.zeros(truth.shape, np.uint8)
    skeleton = topology(truth).skeleton if skeleton is None else skeleton
    widths = np.ones(truth.shape, np.uint8)
    widths[covered_by_discs(truth, METRIC_SPEC["calibre_medium_from_px"])] = 2
    widths[covered_by_discs(truth, METRIC_SPEC["calibre_thick_from_px"])] = 3
    nearest = distance_transform_edt(~skeleton, return_distances=False, return_indices=True)
    return widths[tuple(nearest)] * truth


def covered_by_discs(mask: np.ndarray, diameter_px: int) -> np.ndarray:
    """Pixels of a bool mask (H, W) that some disc inside it, of an odd diameter, covers; bool (H, W)."""

    def distance(pixels: np.ndarray) -> np.ndarray:
        return cv2.distanceTransform(pixels.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)

    centres = distance(np.pad(mask, 1))[1:-1, 1:-1] > diameter_px / 2
    return distance(~centres) < diameter_px / 2 if centres.any() else centres


def recall_by_width(pred: Any, classes: np.ndarray) -> dict[str, float]:
    """Share of the thin, medium and thick truth (`width_map`) that was found; nan where there is none."""
    pred = _of_size(pred, classes.shape, "width_map")
    present = np.bincount(classes.ravel(), minlength=4)
    found = np.bincount(classes[pred], minlength=4)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan
        shares = found[1:] / present[1:]
    return dict(zip(("recall_thin", "recall_medium", "recall_thick"), shares.tolist(), strict=True))


def _of_size(pred: Any, shape: tuple[int, ...], function: str) -> np.ndarray:
    pred = as_mask(pred, "pred")
    if pred.shape != shape:
        sizes = f"prediction {pred.shape} and {function}(truth) {shape}"
        raise ValueError(f"{sizes} differ in size (H, W). Pass {function}(truth) of the same image.")
    return pred


# ---- Distances between borders, defined as in MONAI; tools that measure on a half-pixel grid differ ----


@dataclass(frozen=True, eq=False)
class Surface:
    """The border of one mask and how far every pixel is from it."""

    positions: np.ndarray  # flat positions of the border pixels, in reading order
    distance: np.ndarray  # float32 (H, W), exact, in pixels; of no meaning where the mask is empty


def surface(mask: Any) -> Surface:
    """Border and distance map of a mask, bool or 0/1 (H, W)."""
    border = border_of(as_mask(mask))
    distance = cv2.distanceTransform((~border).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return Surface(np.flatnonzero(border), distance)


def border_of(mask: np.ndarray) -> np.ndarray:
    """Foreground pixels with a background 4-neighbour, bool (H, W); outside the image is background."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inside = cv2.erode(mask.view(np.uint8), cross, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return mask & ~inside.view(bool)


def surface_scores(pred: Any, truth: Surface, tolerance_px: float = TOLERANCE_PX) -> dict[str, float]:
    """HD95 and normalised surface Dice of one prediction, bool or 0/1 (H, W), as in `METRIC_SPEC`.

    hd95, in px, is 0 for two empty masks, the diagonal of the image for exactly one; nsd, in [0, 1], is then
    1 and 0.
    """
    from vesselrl.scoring.kernels import distances_to_border

    pred = _of_size(pred, truth.distance.shape, "surface")
    if not tolerance_px >= 0:
        raise ValueError(f"tolerance_px must be at least 0, got {tolerance_px}.")
    border = border_of(pred)
    positions = np.flatnonzero(border)
    if positions.size == 0 or truth.positions.size == 0:
        both_empty = positions.size == truth.positions.size
        return {"hd95": 0.0 if both_empty else math.hypot(*pred.shape), "nsd": float(both_empty)}
    to_truth = _exact(truth.distance.ravel()[positions])
    to_pred = _exact(distances_to_border(border, truth.positions))
    num_close = np.count_nonzero(to_truth <= tolerance_px) + np.count_nonzero(to_pred <= tolerance_px)
    return {
        "hd95": float(max(np.percentile(to_truth, 95), np.percentile(to_pred, 95))),
        "nsd": float(num_close / (to_truth.size + to_pred.size)),
    }


def _exact(distances: np.ndarray) -> np.ndarray:
    """The float64 distances whose squares are whole; OpenCV's last bit differs from run to run."""
    return np.sqrt(np.rint(np.square(distances, dtype=np.float64)))


# ---- The truth's part, computed once per content ----


class Truth:
    """A true mask, bool (H, W), and its topology, surface and widths, each computed when first asked for."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask

    topology = functools.cached_property(lambda self: topology(self.mask))
    surface = functools.cached_property(lambda self: surface(self.mask))
    widths = functools.cached_property(lambda self: width_map(self.mask, self.topology.skeleton))


def cached_truth(mask: Any) -> Truth:
    """The `Truth` of a mask, bool or 0/1 (H, W); masks of equal content share one, with its own copy."""
    mask = as_mask(mask, "truth")
    return _truth_of(mask.shape, np.packbits(mask).tobytes())


@functools.lru_cache(maxsize=32)  # a truth of 512 x 512 with all its parts takes 2 MB
def _truth_of(shape: tuple[int, int], bits: bytes) -> Truth:
    pixels = np.unpackbits(np.frombuffer(bits, np.uint8), count=shape[0] * shape[1])
    return Truth(pixels.reshape(shape).astype(bool))


def clear_truth_cache() -> None:
    """Drop every kept truth; for measurements that must include the truth's part."""
    _truth_of.cache_clear()


def evaluation_scores(pred: Any, truth: Any) -> dict[str, float]:
    """The scores of `score_mask`, `surface_scores` and `recall_by_width` of two bool or 0/1 masks (H, W)."""
    pred, truth = as_mask_pair(pred, truth)
    cached = cached_truth(truth)
    scores = score_mask(pred, truth, cached.topology) | surface_scores(pred, cached.surface)
    return scores | recall_by_width(pred, cached.widths)
