"""Who earned the reward: credit for every pixel of every sampled mask of one image.

Overlap terms depend on pixel counts, so the effect of one pixel, R(pixel on) - R(pixel off) with the rest of
the sample kept, is exact for all pixels at the price of four evaluations: it depends only on the pixel's
truth and its sampled value. Topology, length and a user's own reward have no such form. For them, connected
regions where a sample departs from the greedy mask are flipped in the greedy mask one at a time and scored
again; the difference is every such pixel's credit.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from vesselrl.scoring.rewards import Reward
from vesselrl.scoring.topology import Topology


@dataclass(frozen=True)
class Credit:
    """Credit of K masks of one image.

    Attributes:
        overlap: (K, H, W) float32, R(on) - R(off) of the overlap terms, exact.
        structure: (K, H, W) float32, R(on) - R(off) of the other terms, 0 outside the chosen regions.
        rewards: (K,) float, whole reward of each sample.
        terms: name -> (K,) weighted terms of the reward.
        greedy_reward: reward of the greedy mask.
        num_regions: regions that were scored.
    """

    overlap: np.ndarray
    structure: np.ndarray
    rewards: np.ndarray
    terms: dict[str, np.ndarray]
    greedy_reward: float
    num_regions: int


def assign_credit(
    masks: np.ndarray,
    greedy: np.ndarray,
    truth: np.ndarray,
    truth_topology: Topology,
    reward: Reward,
    num_regions: int,
    rng: np.random.Generator,
) -> Credit:
    """Scores the samples of one image and credits their pixels.

    Args:
        masks: (K, H, W) bool samples.
        greedy: (H, W) bool, the mask that the policy would give at threshold 0.5.
        truth: (H, W) bool.
        truth_topology: of the truth, computed once.
        reward: splits into `overlap_terms` and `structure_terms`.
        num_regions: regions scored per sample, drawn with probability proportional to their area; 0 for none.
        rng: chooses the regions.
    """
    overlap = np.empty(masks.shape, np.float32)
    structure = np.zeros(masks.shape, np.float32)
    greedy_structure = reward.structure_terms(greedy, truth, truth_topology)
    greedy_total = sum(greedy_structure.values())
    terms: dict[str, list[float]] = {}
    scored = 0
    for k, mask in enumerate(masks):
        tp, fp, fn = overlap_counts(mask, truth)
        overlap[k] = overlap_credit(reward, tp, fp, fn)[truth.astype(np.uint8), mask.astype(np.uint8)]
        values = {name: float(value) for name, value in reward.overlap_terms(tp, fp, fn).items()}
        values |= reward.structure_terms(mask, truth, truth_topology)
        for name, value in values.items():
            terms.setdefault(name, []).append(value)
        # Without structure terms there is nothing for a region to earn.
        for region in choose_regions(mask ^ greedy, num_regions if greedy_structure else 0, rng):
            flipped = sum(reward.structure_terms(greedy ^ region, truth, truth_topology).values())
            structure[k][region] = np.where(greedy[region], greedy_total - flipped, flipped - greedy_total)
            scored += 1
    arrays = {name: np.array(values) for name, values in terms.items()}
    greedy_overlap = reward.overlap_terms(*overlap_counts(greedy, truth)).values()
    return Credit(
        overlap=overlap,
        structure=structure,
        rewards=np.sum(list(arrays.values()), axis=0),
        terms=arrays,
        greedy_reward=greedy_total + float(sum(greedy_overlap)),
        num_regions=scored,
    )


def overlap_counts(mask: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """True positive, false positive and false negative pixels."""
    tp = int(np.count_nonzero(mask & truth))
    return tp, int(np.count_nonzero(mask)) - tp, int(np.count_nonzero(truth)) - tp


def overlap_credit(reward: Reward, tp: int, fp: int, fn: int) -> np.ndarray:
    """R(on) - R(off) for a pixel by its truth (first index) and its sampled value (second); (2, 2) float.

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


def total_overlap(reward: Reward, tp: int, fp: int, fn: int) -> float:
    """Sum of the overlap terms for given counts."""
    return float(sum(reward.overlap_terms(tp, fp, fn).values()))


def choose_regions(difference: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Up to `count` 8-connected regions of a difference mask, without repetition, larger ones more often.

    Returns:
        Boolean masks (H, W), one per region.
    """
    if count == 0 or not difference.any():
        return []
    total, labels, stats, _ = cv2.connectedComponentsWithStats(difference.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA].astype(float)
    chosen = rng.choice(total - 1, size=min(count, total - 1), replace=False, p=areas / areas.sum())
    return [labels == label + 1 for label in chosen]
