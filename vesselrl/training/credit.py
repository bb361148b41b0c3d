"""What a pixel earns: R(pixel on) - R(pixel off) in the greedy mask of one image, in units of the reward.

The greedy mask (threshold 0.5) is what the policy gives when it is used. Drawn masks score lower in
everything, so that a target for recall looks missed in them when it is met: credit that is taken in drawn
masks makes a policy bloat.

Overlap terms depend on pixel counts, so the effect of one pixel is exact for all pixels at the price of four
evaluations: it depends only on the pixel's truth and its value. Topology, length and a user's own reward have
no such form. For them, connected regions are flipped one at a time and scored again; the difference is the
credit of all their pixels. Regions are where a drawn mask departs from the greedy one (a gap closed, a twig
lost) and the greedy mask's own components (a speck that could go).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from vesselrl.scoring.topology import Topology


class CreditedReward(Protocol):
    """The two halves of a reward; see `vesselrl.scoring.rewards`."""

    def overlap_terms(self, tp: Any, fp: Any, fn: Any) -> dict[str, np.ndarray]:
        """Weighted terms of pixel counts, elementwise."""

    def structure_terms(self, pred: np.ndarray, gt: np.ndarray, gt_topology: Topology) -> dict[str, float]:
        """Weighted terms that need the masks."""


@dataclass(frozen=True)
class Credit:
    """Credit of one image, and what its K drawn masks scored.

    Attributes:
        overlap: (H, W) float32, R(on) - R(off) of the overlap terms, exact.
        structure: (H, W) float32, R(on) - R(off) of topology and length less what regions of its kind earn,
            the mean over the scored regions that hold the pixel; 0 outside them.
        custom: (H, W) float32, the same of the user's own term, with nothing taken off.
        rewards: (K,) float, whole reward of each sample.
        terms: name -> (K,) weighted terms of the reward.
        greedy_reward: reward of the greedy mask.
        greedy_counts: its true positives, false positives and false negatives.
        num_regions: regions that were scored.
    """

    overlap: np.ndarray
    structure: np.ndarray
    custom: np.ndarray
    rewards: np.ndarray
    terms: dict[str, np.ndarray]
    greedy_reward: float
    greedy_counts: tuple[int, int, int]
    num_regions: int


def assign_credit(
    masks: np.ndarray,
    greedy: np.ndarray,
    truth: np.ndarray,
    truth_topology: Topology,
    reward: CreditedReward,
    undecided: np.ndarray,
    num_regions: int,
    rng: np.random.Generator,
) -> Credit:
    """Scores the samples of one image and credits its pixels.

    Args:
        masks: (K, H, W) bool samples.
        greedy: (H, W) bool, the mask that the policy would give at threshold 0.5.
        truth: (H, W) bool.
        truth_topology: of the truth, computed once.
        reward: splits into `overlap_terms` and `structure_terms`.
        undecided: (H, W) float in [0, 1], how much a pixel can be moved: 4 p (1 - p).
        num_regions: regions scored for the image; 0 for none.
        rng: chooses the regions.
    """
    terms: dict[str, list[float]] = {}
    for mask in masks:
        overlap = reward.overlap_terms(*overlap_counts(mask, truth))
        values = {name: float(value) for name, value in overlap.items()}
        values |= reward.structure_terms(mask, truth, truth_topology)
        for name, value in values.items():
            terms.setdefault(name, []).append(value)

    greedy_structure = reward.structure_terms(greedy, truth, truth_topology)
    # Without structure terms there is nothing for a region to earn.
    regions = choose_regions(masks, greedy, num_regions if greedy_structure else 0, rng)
    additions = np.array([not greedy[region].any() for region in regions], bool)
    flipped = [reward.structure_terms(greedy ^ region, truth, truth_topology) for region in regions]
    gains = on_minus_off(greedy_structure, flipped, additions)
    masses = np.array([undecided[region].sum() for region in regions])
    arrays = {name: np.array(values) for name, values in terms.items()}
    greedy_counts = overlap_counts(greedy, truth)
    greedy_overlap = sum(reward.overlap_terms(*greedy_counts).values())
    return Credit(
        overlap=overlap_credit(reward, *greedy_counts)[truth.astype(np.uint8), greedy.astype(np.uint8)],
        structure=spread(regions, against_others(gains[:, 0], additions, masses), truth.shape),
        custom=spread(regions, gains[:, 1], truth.shape),
        rewards=np.sum(list(arrays.values()), axis=0),
        terms=arrays,
        greedy_reward=float(greedy_overlap + sum(greedy_structure.values())),
        greedy_counts=greedy_counts,
        num_regions=len(regions),
    )


def overlap_counts(mask: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """True positive, false positive and false negative pixels."""
    tp = int(np.count_nonzero(mask & truth))
    return tp, int(np.count_nonzero(mask)) - tp, int(np.count_nonzero(truth)) - tp


def overlap_credit(reward: CreditedReward, tp: int, fp: int, fn: int) -> np.ndarray:
    """R(on) - R(off) for a pixel by its truth (first index) and its value (second); (2, 2) float32.

    Cases that do not occur in the mask (a false negative where there is none) are 0.
    """
    table = np.zeros((2, 2), np.float32)
    present = total_overlap(reward, tp, fp, fn)
    if fn:
        table[1, 0] = total_overlap(reward, tp + 1, fp, fn - 1) - present
    if tp:
        table[1, 1] = present - total_overlap(reward, tp - 1, fp, fn + 1)
    table[0, 0] = total_overlap(reward, tp, fp + 1, fn) - present
    if fp:
        table[0, 1] = present - total_overlap(reward, tp, fp - 1, fn)
    return table


def total_overlap(reward: CreditedReward, tp: int, fp: int, fn: int) -> float:
    """Sum of the overlap terms for given counts."""
    return float(sum(reward.overlap_terms(tp, fp, fn).values()))


def on_minus_off(
    present: dict[str, float], flipped: list[dict[str, float]], additions: np.ndarray
) -> np.ndarray:
    """(N, 2): what N regions are worth being on rather than off, by topology and length, and by custom.

    Args:
        present: structure terms of the greedy mask.
        flipped: the same with each region flipped alone.
        additions: (N,) bool, regions that are off in the greedy mask; the others are on.
    """

    def parts(terms: dict[str, float]) -> tuple[float, float]:
        shape = sum(value for name, value in terms.items() if name != "custom")
        return shape, terms.get("custom", 0.0)

    gains = np.array([parts(terms) for terms in flipped]).reshape(-1, 2) - parts(present)
    return np.where(additions[:, None], gains, -gains).astype(np.float32)


def against_others(gains: np.ndarray, additions: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """(N,) gains less the mean gain of the other regions of the same kind: where vessel goes, not how much.

    Flipping one region at a time overstates what vessels are worth: a lost piece of a branch costs a break,
    while one false speck among many costs nearly nothing. Without a baseline structure makes every mask
    swell. A region that is alone keeps its gain.

    Args:
        gains: (N,), R(on) - R(off).
        additions: (N,) bool, regions that are off in the greedy mask; the others are on.
        masses: (N,) above 0, weight of a region in the mean: what its pixels can be moved by.
    """
    result = gains.copy()
    for kind in (additions, ~additions):
        mass, value = masses[kind], masses[kind] * gains[kind]
        others = mass.sum() - mass
        baseline = np.divide(value.sum() - value, others, out=np.zeros_like(others), where=others > 0)
        result[kind] = gains[kind] - (baseline if len(mass) > 1 else 0.0)
    return result


def spread(regions: list[np.ndarray], values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) float32: the mean value of the regions that hold a pixel, 0 where none does."""
    total, covered = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for region, value in zip(regions, values, strict=True):
        total[region] += value
        covered[region] += 1
    return total / np.maximum(covered, 1)


def choose_regions(
    masks: np.ndarray, greedy: np.ndarray, count: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Up to `count` regions to flip: half components of the greedy mask, half departures of the samples.

    A component that holds more than half of the mask is the tree itself and is left alone. What one half does
    not use, the other may.

    Returns:
        Boolean masks (H, W), each one 8-connected region, wholly on or wholly off in the greedy mask.
    """
    if count == 0:
        return []
    own = labelled(greedy, max_area=int(np.count_nonzero(greedy)) // 2)
    changes = [part for mask in masks for part in (mask & ~greedy, greedy & ~mask)]
    departures = [pair for change in changes for pair in labelled(change)]
    num_own = min(len(own), max(count // 2, count - len(departures)))
    chosen = [own[k] for k in rng.permutation(len(own))[:num_own]]
    chosen += [departures[k] for k in rng.permutation(len(departures))[: count - num_own]]
    return [labels == label for labels, label in chosen]


def labelled(mask: np.ndarray, max_area: int | None = None) -> list[tuple[np.ndarray, int]]:
    """The 8-connected components of a mask as pairs of a label image and a label; large ones left out."""
    total, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    return [(labels, k) for k in range(1, total) if max_area is None or areas[k - 1] <= max_area]
