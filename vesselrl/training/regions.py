"""Connected regions of one image that are flipped as a whole, to see what they earn.

Three kinds, all connected, all wholly on or wholly off in the greedy mask:

- links, where vessel may go on: the mask at a lower threshold reaches across a gap or beyond an end;
- components of the greedy mask other than the tree itself: specks and cut-off pieces;
- departures of the drawn masks from the greedy one: a bump, a hole, a twig.
"""

import cv2
import numpy as np

from vesselrl.scoring.gaps import FainterMask

# Probabilities at which a vessel is followed beyond the greedy mask.
LINK_LEVELS = (0.1, 0.25)


def choose_regions(
    masks: np.ndarray, greedy: np.ndarray, on: np.ndarray, count: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Up to `count` regions to flip: up to half links, and of the rest half components, half departures.

    A component that holds more than half of the mask is the tree itself and is left alone. What one kind does
    not use, the next may.

    Args:
        masks: (K, H, W) bool, drawn.
        greedy: (H, W) bool.
        on: (H, W) float, probability of vessel.
        count: 0 for none.
        rng: chooses among more than there is room for.

    Returns:
        Boolean masks (H, W).
    """
    if count == 0:
        return []
    links = take(find_links(greedy, on), count // 2, rng)
    count -= len(links)
    own = labelled(greedy, max_area=int(np.count_nonzero(greedy)) // 2)
    changes = [part for mask in masks for part in (mask & ~greedy, greedy & ~mask)]
    departures = [pair for change in changes for pair in labelled(change)]
    own = take(own, max(count // 2, count - len(departures)), rng)
    chosen = links + own + take(departures, count - len(own), rng)
    return [labels == label for labels, label in chosen]


def take(
    regions: list[tuple[np.ndarray, int]], count: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, int]]:
    """Up to `count` of the regions, by chance."""
    return [regions[k] for k in rng.permutation(len(regions))[:count]]


def labelled(mask: np.ndarray, max_area: int | None = None) -> list[tuple[np.ndarray, int]]:
    """The 8-connected components of a mask as pairs of a label image and a label; large ones left out."""
    total, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    return [(labels, k) for k in range(1, total) if max_area is None or areas[k - 1] <= max_area]


def find_links(greedy: np.ndarray, on: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Where the greedy mask may go on; drawn masks rarely cross a gap in one piece."""
    found = []
    for level in LINK_LEVELS:
        labels, count = FainterMask(on, level).links(greedy)
        found += [(labels, k) for k in range(1, count + 1)]
    return found


def spread(regions: list[np.ndarray], values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) float32: the mean value of the regions that hold a pixel, 0 where none does."""
    total, covered = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for region, value in zip(regions, values, strict=True):
        total[region] += value
        covered[region] += 1
    return total / np.maximum(covered, 1)
