"""Masks laid over their image, and the places where a mask breaks the vessel tree.

The colours mean the same in every picture of the project: white is a vessel found, red (vermilion) a vessel
missed, blue a vessel invented; told apart by the colour-blind too.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vesselrl.scoring.masks import as_mask, as_mask_pair, check_same_shape
from vesselrl.scoring.topology import topology

HIT = (255, 255, 255)
MISSED = (230, 75, 10)
INVENTED = (40, 140, 235)
REACH = 3  # how far beside a missed stretch the prediction may join its two sides, in px


def overlay(image: np.ndarray, mask: np.ndarray, truth: np.ndarray | None = None) -> np.ndarray:
    """Lay a mask over its image: found white, missed red, invented blue; without a truth the mask is blue.

    An empty mask leaves the image as it is (without a truth) or shows every true vessel as missed.

    Args:
        image: uint8 (H, W, 3), RGB.
        mask: bool (H, W), the prediction.
        truth: bool (H, W), or None.

    Returns:
        uint8 (H, W, 3), RGB, a new array.

    Raises:
        ValueError: the sizes of image, mask and truth differ.

    >>> overlay(np.zeros((1, 2, 3), np.uint8), np.array([[True, False]]), np.array([[True, False]])).tolist()
    [[[217, 217, 217], [0, 0, 0]]]
    """
    mask = as_mask(mask, name="mask")
    if image.shape != (*mask.shape, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"overlay needs a uint8 image of shape {(*mask.shape, 3)} for its mask: got {image.dtype} "
            f"{image.shape}. Use the mask at the size of the original image."
        )
    if truth is None:
        layers = [(mask, INVENTED)]
    else:
        truth = as_mask(truth, name="truth")
        check_same_shape(mask, truth)
        layers = [(mask & truth, HIT), (truth & ~mask, MISSED), (mask & ~truth, INVENTED)]
    result = image.copy()
    for region, colour in layers:
        blend = 0.15 * result[region] + 0.85 * np.array(colour, dtype=np.float64)
        result[region] = np.round(blend).astype(np.uint8)
    return result


@dataclass(frozen=True)
class TopologyErrors:
    """Where a prediction breaks the vessel tree and where it adds pieces to it; positions as (row, column).

    Attributes:
        breaks: the middle of each stretch of the truth's centreline that the prediction misses although it
            finds the vessel on both sides of the stretch, and does not join the two sides beside it
            (within `REACH` px).
        false_pieces: the middle of each 8-connected piece of the prediction that touches no true pixel.
    """

    breaks: tuple[tuple[int, int], ...]
    false_pieces: tuple[tuple[int, int], ...]


def topology_errors(pred: Any, truth: Any) -> TopologyErrors:
    """Find the breaks and the false pieces of a prediction.

    A vessel that only ends too early is not a break, nor is one that is missed entirely; a hole or a bend of
    the prediction that still joins both sides is none either. An empty truth has no breaks, and every piece
    of a prediction is then false; an empty prediction has neither.

    Args:
        pred: bool or 0/1 (H, W).
        truth: bool or 0/1 (H, W).

    Raises:
        ValueError: not masks, or of different size.

    >>> truth = np.zeros((9, 30), bool)
    >>> truth[3:6, 2:28] = True
    >>> pred = truth.copy()
    >>> pred[:, 12:17] = False  # a gap of five columns
    >>> pred[0, 0] = True  # and a speck
    >>> topology_errors(pred, truth)
    TopologyErrors(breaks=((4, 14),), false_pieces=((0, 0),))
    """
    import cv2

    pred, truth = as_mask_pair(pred, truth)
    centreline = topology(truth).skeleton
    found = np.pad(centreline & pred, REACH)
    near_pred = np.pad(pred, REACH)
    missed = np.pad(centreline & ~pred, REACH).astype(np.uint8)

    breaks = []
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(missed, connectivity=8)
    for number in range(1, count):
        left, top, width, height = boxes[number, :4]
        window = np.s_[top - REACH : top + height + REACH, left - REACH : left + width + REACH]
        stretch = labels[window] == number
        if _is_break(stretch, found[window], near_pred[window]):
            row, column = _middle(stretch)
            breaks.append((row + int(top) - 2 * REACH, column + int(left) - 2 * REACH))

    count, labels, boxes, _ = cv2.connectedComponentsWithStats(pred.astype(np.uint8), connectivity=8)
    touching = np.unique(labels[truth])
    false_pieces = []
    for number in np.setdiff1d(np.arange(1, count), touching):
        left, top, width, height = boxes[number, :4]
        row, column = _middle(labels[top : top + height, left : left + width] == number)
        false_pieces.append((row + int(top), column + int(left)))
    return TopologyErrors(tuple(sorted(breaks)), tuple(sorted(false_pieces)))


def _is_break(stretch: np.ndarray, found: np.ndarray, pred: np.ndarray) -> bool:
    """True if the found centreline meets the stretch in several pieces of the prediction near it."""
    import cv2

    pixels = stretch.astype(np.uint8)
    contacts = found & (cv2.dilate(pixels, np.ones((3, 3), np.uint8)) > 0)
    beside = cv2.dilate(pixels, np.ones((2 * REACH + 1, 2 * REACH + 1), np.uint8)) > 0
    _, pieces = cv2.connectedComponents((pred & beside).astype(np.uint8), connectivity=8)
    return len(np.unique(pieces[contacts])) > 1


def _middle(region: np.ndarray) -> tuple[int, int]:
    """The pixel of a region that is nearest to its centre of mass; the first in reading order if tied."""
    places = np.argwhere(region)
    nearest = np.argmin(((places - places.mean(axis=0)) ** 2).sum(axis=1))
    return int(places[nearest, 0]), int(places[nearest, 1])
