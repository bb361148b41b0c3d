"""All scores of a prediction, one dict per mask, and the parts of a truth that are computed once."""

import functools
import math
from typing import Any

import cv2
import numpy as np

from vesselrl.scoring.overlap import METRIC_SPEC, as_mask, as_mask_pair, counts, overlap_scores
from vesselrl.scoring.topology import Topology, topology

TOLERANCE_PX: float = METRIC_SPEC["nsd_tolerance_px"]


def evaluation_scores(pred: Any, truth: Any) -> dict[str, float]:
    """The scores of `score_mask`, `surface_scores` and `recall_by_width` of two bool or 0/1 masks (H, W)."""
    pred, truth = as_mask_pair(pred, truth)
    known = cached_truth(truth)
    return score_mask(pred, known) | surface_scores(pred, known) | recall_by_width(pred, known)


class Truth:
    """A true mask, bool (H, W), and what its scores need, each computed when first asked for."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask

    @functools.cached_property
    def topology(self) -> Topology:
        """Centreline and shape counts."""
        return topology(self.mask)

    @functools.cached_property
    def border(self) -> np.ndarray:
        """The border, bool (H, W)."""
        return border_of(self.mask)

    @functools.cached_property
    def to_border(self) -> np.ndarray:
        """Distance of every pixel to the border within its column, int32 (H, W)."""
        from vesselrl.scoring.kernels import distances_in_columns

        return distances_in_columns(self.border)

    @functools.cached_property
    def widths(self) -> np.ndarray:
        """Width class of every pixel: 0 background, 1 thin, 2 medium, 3 thick; uint8 (H, W).

        A centreline pixel is as wide as the largest disc inside the truth that covers it: thick from a
        diameter of 9 px, medium from 5 px. Every other pixel takes the class of the nearest of them.
        """
        from scipy.ndimage import distance_transform_edt

        if not self.mask.any():
            return np.zeros(self.mask.shape, np.uint8)
        widths = np.ones(self.mask.shape, np.uint8)
        widths[covered_by_discs(self.mask, METRIC_SPEC["calibre_medium_from_px"])] = 2
        widths[covered_by_discs(self.mask, METRIC_SPEC["calibre_thick_from_px"])] = 3
        nearest = distance_transform_edt(~self.topology.skeleton, return_distances=False, return_indices=True)
        return widths[tuple(nearest)] * self.mask


def cached_truth(mask: Any) -> Truth:
    """The `Truth` of a mask, bool or 0/1 (H, W); masks of equal content share one, with its own copy."""
    mask = as_mask(mask, "truth")
    return truth_of_bits(mask.shape, np.packbits(mask).tobytes())


@functools.lru_cache(maxsize=32)  # a truth of 512 x 512 with all its parts takes 2 MB
def truth_of_bits(shape: tuple[int, int], bits: bytes) -> Truth:
    """The `Truth` of a mask whose pixels are packed."""
    pixels = np.unpackbits(np.frombuffer(bits, np.uint8), count=shape[0] * shape[1])
    return Truth(pixels.reshape(shape).astype(bool))


def score_mask(pred: Any, truth: Truth) -> dict[str, float]:
    """Score one predicted mask, bool or 0/1 (H, W): overlap, centreline and topology.

    dice, iou, recall, precision, specificity, cldice, tprec, tsens: in [0, 1]; beta0_error, beta1_error:
    absolute differences in the number of connected components and of loops; foreground: share of the image
    that the prediction covers. nan means undefined: recall of an empty truth, length_ratio of a non-empty
    prediction to an empty truth, specificity without background.
    """
    pred, mask = as_mask_pair(pred, truth.mask)
    shape, truth_shape = topology(pred), truth.topology
    return {
        **overlap_scores(counts(pred, mask)),
        **cldice_scores(pred, mask, shape, truth_shape),
        "beta0_error": float(abs(shape.num_components - truth_shape.num_components)),
        "beta1_error": float(abs(shape.num_loops - truth_shape.num_loops)),
        "length_ratio": length_ratio(shape, truth_shape),
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


def covered_by_discs(mask: np.ndarray, diameter_px: int) -> np.ndarray:
    """Pixels of a bool mask (H, W) that some disc inside it, of an odd diameter, covers; bool (H, W)."""

    def distance(pixels: np.ndarray) -> np.ndarray:
        return cv2.distanceTransform(pixels.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)

    centres = distance(np.pad(mask, 1))[1:-1, 1:-1] > diameter_px / 2
    return distance(~centres) < diameter_px / 2 if centres.any() else centres


def recall_by_width(pred: Any, truth: Truth) -> dict[str, float]:
    """Share of the thin (few pixels), medium and thick truth that was found; nan where there is none."""
    pred, _ = as_mask_pair(pred, truth.mask)
    present = np.bincount(truth.widths.ravel(), minlength=4)
    found = np.bincount(truth.widths[pred], minlength=4)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan
        shares = found[1:] / present[1:]
    return dict(zip(("recall_thin", "recall_medium", "recall_thick"), shares.tolist(), strict=True))


def border_of(mask: np.ndarray) -> np.ndarray:
    """Foreground pixels with a background 4-neighbour, bool (H, W); outside the image is background."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inside = cv2.erode(mask.view(np.uint8), cross, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return mask & ~inside.view(bool)


def surface_scores(pred: Any, truth: Truth, tolerance_px: float = TOLERANCE_PX) -> dict[str, float]:
    """HD95 and normalised surface Dice of one prediction, bool or 0/1 (H, W), as in `METRIC_SPEC`.

    Defined as in MONAI; tools that measure on a half-pixel grid differ. hd95, in px, is 0 for two empty
    masks, the diagonal of the image for exactly one; nsd, in [0, 1], is then 1 and 0.
    """
    from vesselrl.scoring.kernels import distances_in_columns, distances_to_border

    pred, mask = as_mask_pair(pred, truth.mask)
    if not pred.any() or not mask.any():
        both_empty = pred.any() == mask.any()
        return {"hd95": 0.0 if both_empty else math.hypot(*pred.shape), "nsd": float(both_empty)}
    border = border_of(pred)
    to_truth = distances_to_border(truth.to_border, np.flatnonzero(border))
    to_pred = distances_to_border(distances_in_columns(border), np.flatnonzero(truth.border))
    num_close = np.count_nonzero(to_truth <= tolerance_px) + np.count_nonzero(to_pred <= tolerance_px)
    return {
        "hd95": float(max(np.percentile(to_truth, 95), np.percentile(to_pred, 95))),
        "nsd": float(num_close / (to_truth.size + to_pred.size)),
    }
