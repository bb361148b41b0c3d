"""Masks laid over their image, and the places where a mask breaks the vessel tree."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np

from vesselrl.scoring.overlap import as_mask, as_mask_pair
from vesselrl.scoring.topology import topology

# The same in every picture of the project, and told apart by the colour-blind: white, vermilion, blue.
HIT = (255, 255, 255)
MISSED = (230, 75, 10)
INVENTED = (40, 140, 235)
REACH = 3  # how far beside a missed stretch the prediction may join its two sides, in px


def overlay(image: np.ndarray, mask: np.ndarray, truth: np.ndarray | None = None) -> np.ndarray:
    """Lay a mask over a copy of its image, uint8 (H, W, 3) RGB, blue; with a truth over a dark grey copy."""
    mask = as_mask(mask)
    if image.shape != (*mask.shape, 3) or image.dtype != np.uint8:
        needed = f"a uint8 image of shape {(*mask.shape, 3)}, got {image.dtype} {image.shape}"
        raise ValueError(f"the mask needs {needed}. Use the mask at the size of the original image.")
    layers, result = [(mask, INVENTED)], image.copy()
    if truth is not None:
        mask, truth = as_mask_pair(mask, truth)
        layers = [(mask & truth, HIT), (truth & ~mask, MISSED), (mask & ~truth, INVENTED)]
        # Or bright vessels would look like found ones, and a red fundus like missed ones.
        result = np.dstack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) // 2] * 3)
    for region, colour in layers:
        for channel, value in enumerate(colour):  # by a table: floats of a large image would fill the memory
            pixels, blend = result[:, :, channel], np.round(0.15 * np.arange(256) + 0.85 * value)
            pixels[region] = blend.astype(np.uint8)[pixels[region]]
    return result


class TopologyErrors(NamedTuple):
    """Where a prediction breaks the tree, adds components, adds or loses loops, each as (row, column)."""

    breaks: tuple[tuple[int, int], ...]
    false_pieces: tuple[tuple[int, int], ...]
    wrong_loops: tuple[tuple[int, int], ...]


def topology_errors(pred: Any, truth: Any) -> TopologyErrors:
    """Find breaks, false components and wrong loops of a prediction; both masks are bool or 0/1 (H, W).

    A break is a missed stretch of the true centreline with found vessel on both sides, not joined within
    REACH. A false component touches no true pixel, the hole of a wrong loop no hole of the other mask.
    """
    pred, truth = as_mask_pair(pred, truth)
    centreline = topology(truth).skeleton
    found, padded_pred = np.pad(centreline & pred, REACH), np.pad(pred, REACH)
    breaks = []
    for stretch, window in _components(np.pad(centreline & ~pred, REACH), margin=REACH):
        pixels = stretch.astype(np.uint8)
        contacts = found[window] & (cv2.dilate(pixels, np.ones((3, 3), np.uint8)) > 0)
        beside = cv2.dilate(pixels, np.ones((2 * REACH + 1, 2 * REACH + 1), np.uint8)) > 0
        _, labels = cv2.connectedComponents((padded_pred[window] & beside).astype(np.uint8), connectivity=8)
        if len(np.unique(labels[contacts])) > 1:  # it meets several components of the prediction
            row, column = _middle(stretch, window)
            breaks.append((row - REACH, column - REACH))
    holes = _holes(pred), _holes(truth)
    false_pieces = _apart(pred, truth)
    wrong_loops = [*_apart(*holes, ways=4), *_apart(*holes[::-1], ways=4)]
    return TopologyErrors(*(tuple(sorted(places)) for places in (breaks, false_pieces, wrong_loops)))


def _apart(mask: np.ndarray, other: np.ndarray, ways: int = 8) -> list[tuple[int, int]]:
    """The middles of the components of a mask that touch no pixel of the other one."""
    return [_middle(*one) for one in _components(mask, ways=ways) if not (one[0] & other[one[1]]).any()]


def _holes(mask: np.ndarray) -> np.ndarray:
    """Background that the foreground of a mask encloses, bool (H, W)."""
    background = np.pad(~mask, 1, constant_values=True).view(np.uint8)
    _, outside = cv2.connectedComponents(background, connectivity=4)
    return ~mask & (outside != outside[0, 0])[1:-1, 1:-1]


def _components(
    mask: np.ndarray, margin: int = 0, ways: int = 8
) -> Iterator[tuple[np.ndarray, tuple[slice, slice]]]:
    """Yield each component of a mask, 8- or 4-connected, as a mask of a window around it."""
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=ways)
    for number in range(1, count):
        left, top, width, height = boxes[number, :4].tolist()
        window = np.s_[top - margin : top + height + margin, left - margin : left + width + margin]
        yield labels[window] == number, window


def _middle(region: np.ndarray, window: tuple[slice, slice]) -> tuple[int, int]:
    """Pixel of a region that is nearest to its centre of mass."""
    places = np.argwhere(region)
    nearest = np.argmin(((places - places.mean(axis=0)) ** 2).sum(axis=1))
    return int(places[nearest, 0]) + window[0].start, int(places[nearest, 1]) + window[1].start
