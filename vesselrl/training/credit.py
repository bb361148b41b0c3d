"""Counterfactual credit assignment: R(on) - R(off) of every pixel of one image, in units of the reward.

This difference reward (Wolpert & Tumer 2002) is taken in the mask that is used: greedy (probability above
0.5), then post-processed. Taken in sampled masks, which miss a target for recall that the used one meets, it
makes a policy bloat. Four evaluations give the exact effect of every pixel on overlap. For topology, length
and a user's own reward connected regions are flipped one at a time and scored anew; what a region earns
beyond its pixels' overlap is shared evenly among them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import cv2
import numpy as np

from vesselrl.errors import RewardError
from vesselrl.scoring.overlap import counts
from vesselrl.scoring.postprocessing import LowThresholdMask, PostProcessing
from vesselrl.scoring.rewards import Reward
from vesselrl.scoring.topology import Topology

# Probabilities at which a vessel is followed beyond the greedy mask.
BRIDGE_LEVELS = (0.1, 0.25)
# Change of a Lagrange multiplier per validation and unit of violation, and its largest value; in points of
# reward per unit of the score: the default reward pays 5 for Dice.
MULTIPLIER_RATE = 100.0
MAX_MULTIPLIER = 20.0

Labelled = tuple[np.ndarray, int]  # a label image and one of its labels


class RolloutImage(NamedTuple):
    """The sampled masks of one image, and what they are scored with."""

    masks: np.ndarray  # (K, H, W) bool
    probabilities: np.ndarray  # (H, W) float32
    truth: np.ndarray  # (H, W) bool
    truth_topology: Topology


@dataclass(frozen=True)
class Credit:
    """Difference rewards of one image, and the scores of its K sampled masks."""

    overlap: np.ndarray  # (H, W) float32, R(on) - R(off) of the overlap terms, exact
    # (H, W) float32, what a region's flip changes beyond its pixels' overlap, per pixel; mean over regions.
    structure: np.ndarray
    rewards: np.ndarray  # (K,) of the sampled masks
    terms: dict[str, np.ndarray]  # name -> (K,) weighted terms of these
    greedy_reward: float  # of the mask that is used
    greedy_counts: tuple[int, int, int]  # its true positives, false positives and false negatives
    num_regions: int  # that were scored


@dataclass
class ConstrainedReward:
    """A reward with constraints in place of weights, by Lagrange multipliers.

    Maximises the reward's Dice and structure terms subject to mean recall, precision and Dice on validation
    patients >= their lower bounds. Every validation is one step of dual ascent: a multiplier rises by the
    violation, or falls, down to 0, by what the mean lies above its bound.
    """

    reward: Reward  # its other overlap terms give way to the constraints
    lower_bounds: dict[str, float]  # metric (dice, recall, precision) to the mean that it must reach
    multipliers: dict[str, float] = field(default_factory=dict)  # in [0, MAX_MULTIPLIER]; all begin at 0

    def __post_init__(self) -> None:
        self.multipliers = dict.fromkeys(self.lower_bounds, 0.0) | self.multipliers

    def overlap_terms(self, tp: Any, fp: Any, fn: Any) -> dict[str, np.ndarray]:
        """Dice term of the reward and, per bound, multiplier x (score - bound), elementwise over counts."""
        scores = self.reward.overlap_scores(tp, fp, fn)
        terms = {"dice": self.reward.overlap_terms(tp, fp, fn)["dice"]}
        for name, bound in self.lower_bounds.items():
            terms[f"{name}_floor"] = self.multipliers[name] * (scores[name] - bound)
        return terms

    def structure_terms(self, pred: np.ndarray, gt: np.ndarray, gt_topology: Any = None) -> dict[str, float]:
        """Structure terms of the reward."""
        return self.reward.structure_terms(pred, gt, gt_topology)

    def without_custom(self, error: RewardError) -> "ConstrainedReward":
        """The same without the user's own term; see `Reward.without_custom`."""
        return replace(self, reward=self.reward.without_custom(error))

    def update_multipliers(self, means: Mapping[str, float]) -> None:
        """One step of dual ascent from the mean scores of a validation."""
        for name, bound in self.lower_bounds.items():
            multiplier = self.multipliers[name] + MULTIPLIER_RATE * (bound - means[name])
            self.multipliers[name] = min(max(multiplier, 0.0), MAX_MULTIPLIER)


def assign_credit(
    image: RolloutImage,
    reward: Reward | ConstrainedReward,
    post: PostProcessing,
    num_regions: int,
    rng: np.random.Generator,
    map_masks: Callable[..., Iterable] = map,
) -> Credit:
    """Scores the post-processed sampled masks of one image; credits its pixels by `num_regions` flips.

    Where the user's function fails, no mask of this image has its term: all are compared by the same. `rng`
    chooses the regions; `map_masks` is `map`, or that of a pool whose threads share the masks.
    """
    try:
        return _credit_by(reward, image, post, num_regions, deepcopy(rng), map_masks)
    except RewardError as error:
        return _credit_by(reward.without_custom(error), image, post, num_regions, rng, map_masks)


def _credit_by(
    reward: Reward | ConstrainedReward,
    image: RolloutImage,
    post: PostProcessing,
    num_regions: int,
    rng: np.random.Generator,
    map_masks: Callable[..., Iterable],
) -> Credit:
    """The credit by one reward, or its RewardError; see `assign_credit`."""
    masks, probabilities, truth, truth_topology = image
    postprocess = post.postprocess_for(probabilities)

    def score(mask: np.ndarray) -> dict[str, float]:
        overlap = reward.overlap_terms(*counts(mask, truth)[:3])
        values = {name: float(value) for name, value in overlap.items()}
        return values | reward.structure_terms(mask, truth, truth_topology)

    def value_of(region: np.ndarray) -> float | None:  # of each pixel, beyond its overlap credit
        changed = postprocess(greedy ^ region)
        # What is removed or closed anyway changes nothing; its overlap credit goes on teaching.
        if np.array_equal(changed, used):
            return None
        gain = sum(score(changed).values()) - greedy_reward
        pixels = np.flatnonzero(region)
        difference = -gain if greedy.flat[pixels[0]] else gain
        return (difference - float(overlap.flat[pixels].sum())) / pixels.size

    sampled = [*map_masks(lambda mask: score(postprocess(mask)), masks)]
    terms = {name: np.array([one[name] for one in sampled]) for name in sampled[0]}

    greedy = probabilities > 0.5
    used = postprocess(greedy)
    used_counts = counts(used, truth)[:3]
    overlap = overlap_credit(reward, *used_counts)[truth.astype(np.uint8), used.astype(np.uint8)]
    used_terms = score(used)
    greedy_reward = sum(used_terms.values())
    # Without structure terms, and with masks used as they are, a region earns what its pixels earn.
    has_structure = post.changes_masks or len(used_terms) > len(reward.overlap_terms(*used_counts))
    regions = choose_regions(masks, greedy, probabilities, num_regions if has_structure else 0, rng)
    pairs = zip(regions, map_masks(value_of, regions), strict=True)
    flipped = [(region, value) for region, value in pairs if value is not None]
    return Credit(
        overlap=overlap,
        structure=mean_over_regions(flipped, truth.shape),
        rewards=np.sum(list(terms.values()), axis=0),
        terms=terms,
        greedy_reward=greedy_reward,
        greedy_counts=used_counts,
        num_regions=len(flipped),
    )


def overlap_credit(reward: Reward | ConstrainedReward, tp: int, fp: int, fn: int) -> np.ndarray:
    """(2, 2) float32, R(on) - R(off) of a pixel by its truth and its value; 0 for what does not occur."""

    def total(tp: int, fp: int, fn: int) -> float:
        return float(sum(reward.overlap_terms(tp, fp, fn).values()))

    now = total(tp, fp, fn)
    background = total(tp, fp + 1, fn) - now, now - total(tp, fp - 1, fn) if fp else 0
    vessel = total(tp + 1, fp, fn - 1) - now if fn else 0, now - total(tp - 1, fp, fn + 1) if tp else 0
    return np.array([background, vessel], np.float32)


def choose_regions(
    masks: np.ndarray, greedy: np.ndarray, probabilities: np.ndarray, count: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Up to `count` boolean masks (H, W) to flip, each connected, and wholly on or off in the greedy mask.

    Up to half are bridges of a lower threshold, over a gap or beyond an end; of the rest half are components
    of at most half of the greedy mask, half sample-greedy differences. What one kind leaves, the next takes.
    """
    if count == 0:
        return []
    bridges = []  # sampled masks rarely cross a gap in one connected component
    for level in BRIDGE_LEVELS:
        labels, num_bridges = LowThresholdMask(probabilities, level).bridges(greedy)
        bridges += [(labels, k) for k in range(1, num_bridges + 1)]
    bridges = _some(bridges, count // 2, rng)
    count -= len(bridges)
    components = _components(greedy, max_area=int(np.count_nonzero(greedy)) // 2)
    parts = (part for mask in masks for part in (mask & ~greedy, greedy & ~mask))
    differences = [pair for part in parts for pair in _components(part)]
    components = _some(components, max(count // 2, count - len(differences)), rng)
    chosen = bridges + components + _some(differences, count - len(components), rng)
    return [labels == label for labels, label in chosen]


def mean_over_regions(valued: Sequence[tuple[np.ndarray, float]], shape: tuple[int, int]) -> np.ndarray:
    """(H, W): the mean value of the regions, given as (mask, value), that hold a pixel; 0 where none does."""
    total, covered = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for region, value in valued:
        pixels = np.flatnonzero(region)  # a few of many
        total.flat[pixels] += np.float32(value)
        covered.flat[pixels] += 1
    return total / np.maximum(covered, 1)


def _components(mask: np.ndarray, max_area: int | None = None) -> list[Labelled]:
    """8-connected components, without those above `max_area`."""
    total, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    return [(labels, k) for k in range(1, total) if max_area is None or areas[k - 1] <= max_area]


def _some(regions: list[Labelled], count: int, rng: np.random.Generator) -> list[Labelled]:
    return [regions[k] for k in rng.permutation(len(regions))[:count]]
