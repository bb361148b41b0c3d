"""What a pixel earns: R(on) - R(off) for the mask of one image as it is used, in units of the reward.

The mask that is used is the greedy one (threshold 0.5), after the removal of small components and the closing
of gaps where those are asked for. Drawn masks score lower in everything, so that a target for recall looks
missed in them when it is met: credit that is taken in drawn masks makes a policy bloat.

Overlap terms depend on pixel counts, so the effect of one pixel is exact for all pixels at the price of four
evaluations: it depends only on the pixel's truth and its value. Topology, length and a user's own reward have
no such form. For them, connected regions are flipped one at a time, the mask is post-processed again and
scored anew. What a region earns beyond its pixels' overlap credit is shared out evenly among its pixels, so
that the credit of a region adds up to what flipping it is worth. A link that saves a cut-off vessel from
removal earns all of that vessel; a speck that is removed anyway, or a gap that is closed anyway, is left out.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.topology import Topology
from vesselrl.training.regions import choose_regions, spread


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
        structure: (H, W) float32, per pixel, what a region's flip changes in the reward, less the overlap
            credit of its pixels; the mean over the scored regions that hold the pixel, 0 outside them.
        rewards: (K,) float, whole reward of each sample.
        terms: name -> (K,) weighted terms of the reward.
        greedy_reward: reward of the mask that is used.
        greedy_counts: its true positives, false positives and false negatives.
        num_regions: regions that were scored.
    """

    overlap: np.ndarray
    structure: np.ndarray
    rewards: np.ndarray
    terms: dict[str, np.ndarray]
    greedy_reward: float
    greedy_counts: tuple[int, int, int]
    num_regions: int


def assign_credit(
    masks: np.ndarray,
    on: np.ndarray,
    truth: np.ndarray,
    truth_topology: Topology,
    reward: CreditedReward,
    post: PostProcessing,
    num_regions: int,
    rng: np.random.Generator,
) -> Credit:
    """Scores the samples of one image and credits its pixels.

    Args:
        masks: (K, H, W) bool samples.
        on: (H, W) float, probability of vessel; above 0.5 the greedy mask is on.
        truth: (H, W) bool.
        truth_topology: of the truth, computed once.
        reward: splits into `overlap_terms` and `structure_terms`.
        post: what becomes of a mask before it is used and scored.
        num_regions: regions scored for the image; 0 for none.
        rng: chooses the regions.
    """
    used = post.finisher(on)

    def score(mask: np.ndarray) -> dict[str, float]:
        overlap = reward.overlap_terms(*overlap_counts(mask, truth))
        values = {name: float(value) for name, value in overlap.items()}
        return values | reward.structure_terms(mask, truth, truth_topology)

    drawn = [score(used(mask)) for mask in masks]
    terms = {name: np.array([one[name] for one in drawn]) for name in drawn[0]}

    greedy = on > 0.5
    present = used(greedy)
    counts = overlap_counts(present, truth)
    overlap = overlap_credit(reward, *counts)[truth.astype(np.uint8), present.astype(np.uint8)]
    present_terms = score(present)
    # Without structure terms, and with masks used as they are, a region earns what its pixels earn.
    has_structure = post.changes_masks or len(present_terms) > len(reward.overlap_terms(*counts))
    regions = choose_regions(masks, greedy, on, num_regions if has_structure else 0, rng)
    greedy_reward = sum(present_terms.values())
    tried, shares = [], []
    for region in regions:
        flipped = used(greedy ^ region)
        # What is removed or closed anyway changes nothing; its overlap credit goes on teaching.
        if np.array_equal(flipped, present):
            continue
        gain = sum(score(flipped).values()) - greedy_reward
        tried.append(region)
        shares.append(region_share(gain, region, greedy, overlap))
    return Credit(
        overlap=overlap,
        structure=spread(tried, np.array(shares, np.float32), truth.shape),
        rewards=np.sum(list(terms.values()), axis=0),
        terms=terms,
        greedy_reward=greedy_reward,
        greedy_counts=counts,
        num_regions=len(tried),
    )


def region_share(gain: float, region: np.ndarray, mask: np.ndarray, overlap: np.ndarray) -> float:
    """What each pixel of a region earns by the region's being on rather than off, beyond its overlap credit.

    Args:
        gain: R(region flipped) - R(mask).
        region: (H, W) bool.
        mask: (H, W) bool, on in the whole of a region, or off.
        overlap: (H, W), credit of single pixels.
    """
    on_minus_off = -gain if mask[region].any() else gain
    return (on_minus_off - float(overlap[region].sum())) / np.count_nonzero(region)


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
