"""What is rewarded: one number per predicted mask, and how each part of it was earned.

Every reward is called as `reward(pred, gt) -> (float, dict)`. For credit assignment it also splits in two:
`overlap_terms` need only pixel counts and work on arrays of counts (one entry per "what if this pixel
flipped"), `structure_terms` need the masks. The two halves add up to the call.

Two specifications exist. "default" is bounded, defined for empty masks, and pays for structure only where
the centrelines agree. "seed" is the prototype's formula to the last digit, kept for comparison: it prefers a
bloated mask to a thin one and punishes a correct empty mask.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np

from vesselrl.errors import RewardError
from vesselrl.scoring.masks import as_mask_pair
from vesselrl.scoring.metrics import (
    check_topology,
    cldice_scores,
    counts,
    dice_from_counts,
    length_ratio,
    precision_from_counts,
    recall_from_counts,
)
from vesselrl.scoring.seed_reward import prototype_shape_scores
from vesselrl.scoring.topology import Topology, topology

logger = logging.getLogger(__name__)

# Version of each specification, stored with every result; raise it whenever a formula changes. Version 1 of
# the default paid for structure in any place, and for predicting nothing where the prediction was poor.
SPEC_VERSIONS = {"default": 2, "seed": 1}
SPECS = tuple(SPEC_VERSIONS)

# Weight of the precision guard, by measurement: the smallest multiple of 0.05 at which
#   perfect > dilated 3x3 > eroded 3x3 > dilated 7x7 > empty > all-foreground
# holds by at least 0.2 at every step, on drawn trees 3 to 9 px wide and on real angiogram masks, 3 to 13 %
# foreground. Two steps decide: eroded over dilated 7x7 needs 0.74 on real masks; the last one needs 0.53 at
# 5 % foreground, 0.71 at 11 %, 0.83 at 16 %.
PRECISION_WEIGHT = 0.75

# custom(pred, gt) -> number, both masks bool (H, W)
CustomReward = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What all rewards share: the specification, a term of the user's own, and the sum over all terms."""

    # "default" (bounded, defined for empty masks) or "seed" (the prototype's formula)
    spec: str = "default"
    # the user's function, added as term "custom"
    custom: CustomReward | None = None
    # factor on the custom function; not part of the normalisation to 1
    custom_weight: float = 1.0
    # not an option: which formulas `spec` stood for, so that results of older ones are not compared
    spec_version: int = field(init=False)

    def __post_init__(self) -> None:
        if self.spec not in SPECS:
            raise ValueError(f"unknown reward spec {self.spec!r}. Choose one of: {', '.join(SPECS)}.")
        object.__setattr__(self, "spec_version", SPEC_VERSIONS[self.spec])
        if self.custom is not None and not callable(self.custom):
            raise ValueError(f"custom must be a function custom(pred, gt) -> float, got {self.custom!r}.")
        _check_range(-math.inf, math.inf, custom_weight=self.custom_weight)

    def __call__(
        self, pred: Any, gt: Any, gt_topology: Topology | None = None
    ) -> tuple[float, dict[str, float]]:
        """Score one prediction.

        Args:
            pred: bool or 0/1 (H, W).
            gt: bool or 0/1 (H, W), the truth.
            gt_topology: `topology(gt)` if the caller has it already.

        Returns:
            The reward, and a dict with dice, recall, precision (in [0, 1]; where the truth is empty recall is
            1 in spec "default" and 0 in "seed"), every weighted term as `<name>_term`, and what the custom
            function returned as custom_score. The terms add up to the reward.

        Raises:
            ValueError: not masks, or of different size.
            RewardError: the custom function failed.
        """
        pred, gt = as_mask_pair(pred, gt)
        tp, fp, fn, _ = counts(pred, gt)
        terms = {name: float(term) for name, term in self.overlap_terms(tp, fp, fn).items()}
        terms.update(self.structure_terms(pred, gt, gt_topology))
        details = {name: float(score) for name, score in self.overlap_scores(tp, fp, fn).items()}
        details.update({f"{name}_term": term for name, term in terms.items()})
        if self.custom is not None:
            weight = self.custom_weight
            details["custom_score"] = (
                terms["custom"] / weight if weight else _call_custom(self.custom, pred, gt)
            )
        return math.fsum(terms.values()), details

    def overlap_scores(self, tp: Any, fp: Any, fn: Any) -> dict[str, np.ndarray]:
        """Dice, recall, precision, unweighted, elementwise over counts; both masks empty: 1 ("seed": 0)."""
        empty = 0.0 if self.spec == "seed" else 1.0
        return {
            "dice": dice_from_counts(tp, fp, fn, empty),
            "recall": recall_from_counts(tp, fn, empty),
            "precision": precision_from_counts(tp, fp, fn, empty),
        }

    def overlap_terms(self, tp: Any, fp: Any, fn: Any) -> dict[str, np.ndarray]:
        """Weighted terms that depend on pixel counts only, for numbers or float arrays of counts."""
        raise NotImplementedError

    def structure_terms(self, pred: Any, gt: Any, gt_topology: Topology | None = None) -> dict[str, float]:
        """Weighted terms that depend on the shape of the masks: topology, length, and the custom function."""
        pred, gt = as_mask_pair(pred, gt)
        terms = self._shape_terms(pred, gt, gt_topology)
        if self.custom is not None:
            # At weight 0 it is worth nothing and may be slow.
            weight = self.custom_weight
            terms["custom"] = weight * _call_custom(self.custom, pred, gt) if weight else 0.0
        return terms

    def _shape_terms(
        self, pred: np.ndarray, gt: np.ndarray, gt_topology: Topology | None
    ) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class MultiObjectiveReward(Reward):
    """Overlap, recall, an unbroken tree of the right shape and the right length, with a precision guard.

    reward = sum of weight x term, the four weights divided by their sum, plus the guard. With the default
    settings the maximum is 6.15, reached by the perfect mask only, and the minimum lies above -11. Terms
    before weighting, in spec "default":

    - dice, 10·Dice: in [0, 10]. Alone it barely notices a thin vessel that is lost or broken.
    - recall, (R - target)·20 below the target, ·5 above: in [-17, 0.75] for target 0.85. Alone it is gamed by
      painting the whole image; an empty truth counts as R = 1.
    - topology, 5·clDice·(0.4·pieces + 0.4·junctions + 0.2·ends): in [0, 5]; each is an agreement of counts,
      (1+smaller)/(1+larger). Counts say nothing about place, so clDice says how far they are counts of the
      same vessels. What stays: a break and a lost speck cancel, and specks or rough edges in numbers take
      the whole term, never more. Exactly one empty mask: 0.
    - length, -5·(1 - clDice·(1 - min(|1 - L/L_gt|, 1))) with skeleton lengths: in [-5, 0]. False twigs that
      replace lost vessels cost what clDice loses.
    - precision, the guard, -precision_weight·10·s·max(0, precision_target - P), outside the normalisation:
      in [-8.5·precision_weight, 0]. s = A²/(1+A²) with A the predicted area over the true one; an empty
      prediction raises no false alarm and pays nothing. It makes the first two terms safe: without it a
      bloated mask beats a thin one. Gamed by leaving out doubtful vessels, which the recall term answers.

    Spec "seed" is the prototype: no guard, Zhang-Suen skeletons, length unbounded below, extra junctions
    free, topology -1 for fewer than 10 predicted pixels, Dice 0 for two empty masks. Perfect 6.15,
    empty -4.90.

    Raises:
        ValueError: a weight is negative or not finite, all four are 0, or a target lies outside [0, 1].

    >>> tree = np.zeros((32, 32), bool)
    >>> tree[14:19, 2:30] = True
    >>> round(MultiObjectiveReward()(tree, tree)[0], 2)
    6.15
    """

    dice_weight: float = 0.5
    recall_weight: float = 0.2
    topology_weight: float = 0.2
    length_weight: float = 0.1
    recall_target: float = 0.85
    precision_target: float = 0.85
    precision_weight: float = PRECISION_WEIGHT

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(0, math.inf, **self._given_weights(), precision_weight=self.precision_weight)
        _check_range(0, 1, recall_target=self.recall_target, precision_target=self.precision_target)
        if not any(self._given_weights().values()):
            names = ", ".join(self._given_weights())
            raise ValueError(f"{names} are all 0. Give at least one of them a positive weight.")

    def _given_weights(self) -> dict[str, float]:
        names = ("dice_weight", "recall_weight", "topology_weight", "length_weight")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def weights(self) -> dict[str, float]:
        """The weights of dice, recall, topology and length, normalised to sum 1."""
        given = self._given_weights()
        total = math.fsum(given.values())
        return {name.removesuffix("_weight"): weight / total for name, weight in given.items()}

    def overlap_terms(self, tp: Any, fp: Any, fn: Any) -> dict[str, np.ndarray]:
        """Weighted terms dice, recall and, in spec "default", precision; elementwise over counts."""
        scores = self.overlap_scores(tp, fp, fn)
        recall_term = _recall_term(scores["recall"], self.recall_target, below=20, above=5)
        terms = {
            "dice": self.weights["dice"] * 10 * scores["dice"],
            "recall": self.weights["recall"] * recall_term,
        }
        if self.spec == "default":
            terms["precision"] = self.precision_weight * _precision_guard(tp, fp, fn, self.precision_target)
        return terms

    def _shape_terms(
        self, pred: np.ndarray, gt: np.ndarray, gt_topology: Topology | None
    ) -> dict[str, float]:
        topology_weight, length_weight = self.weights["topology"], self.weights["length"]
        if topology_weight == 0 and length_weight == 0:
            return {"topology": 0.0, "length": 0.0}
        score = prototype_shape_scores if self.spec == "seed" else _shape_scores
        topology_score, length_score = score(pred, gt, gt_topology)
        return {"topology": topology_weight * 5 * topology_score, "length": length_weight * 5 * length_score}


@dataclass(frozen=True)
class SimpleDiceReward(Reward):
    """Dice alone, 10·Dice, in [0, 10]; two empty masks 10 (0 in spec "seed"), exactly one empty mask 0.

    Nearly blind to lost or broken thin vessels, which hold few pixels.

    >>> bar = np.ones((4, 4), bool)
    >>> SimpleDiceReward()(bar, bar)[0]
    10.0
    """

    def overlap_terms(self, tp: Any, fp: Any, fn: Any) -> dict[str, np.ndarray]:
        """Weighted term dice, elementwise over counts."""
        return {"dice": 10 * self.overlap_scores(tp, fp, fn)["dice"]}


@dataclass(frozen=True)
class RecallFocusedReward(Reward):
    """Find everything: (1-w)·10·Dice + w·(R - target)·{30 below the target, 10 above}, w = recall_weight 0.7.

    In [-17.85, 4.05] before the guard. Spec "default" adds the precision guard of `MultiObjectiveReward`,
    which curbs but does not stop over-segmentation here: an all-foreground mask still beats an empty one by
    far. Choose this reward only where a missed vessel costs more than a false one. An empty truth counts as
    R = 1. Spec "seed" is the prototype's formula: no guard, all scores 0 for two empty masks.

    Raises:
        ValueError: recall_weight or a target outside [0, 1], or a negative precision_weight.

    >>> bar = np.ones((4, 4), bool)
    >>> round(RecallFocusedReward()(bar, bar)[0], 2)
    4.05
    """

    recall_target: float = 0.85
    recall_weight: float = 0.7
    precision_target: float = 0.85
    precision_weight: float = PRECISION_WEIGHT

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(0, 1, recall_target=self.recall_target, precision_target=self.precision_target)
        _check_range(0, 1, recall_weight=self.recall_weight)
        _check_range(0, math.inf, precision_weight=self.precision_weight)

    def overlap_terms(self, tp: Any, fp: Any, fn: Any) -> dict[str, np.ndarray]:
        """Weighted terms dice, recall and, in spec "default", precision; elementwise over counts."""
        scores = self.overlap_scores(tp, fp, fn)
        recall_term = _recall_term(scores["recall"], self.recall_target, below=30, above=10)
        terms = {
            "dice": (1 - self.recall_weight) * 10 * scores["dice"],
            "recall": self.recall_weight * recall_term,
        }
        if self.spec == "default":
            terms["precision"] = self.precision_weight * _precision_guard(tp, fp, fn, self.precision_target)
        return terms


_REWARDS: dict[str, type[Reward]] = {
    "multi_objective": MultiObjectiveReward,
    "simple_dice": SimpleDiceReward,
    "recall_focused": RecallFocusedReward,
}


def get_reward_function(reward_type: str = "multi_objective", **options: Any) -> Reward:
    """Make a reward by name, from one common set of options.

    Args:
        reward_type: multi_objective, simple_dice or recall_focused.
        **options: keywords of `MultiObjectiveReward`. What another reward has no use for is left out, so the
            same options serve all three. The four term weights belong to multi_objective alone:
            recall_focused keeps its own 0.3 / 0.7 whatever recall_weight says here.

    Raises:
        ValueError: unknown name or option, with the list of those that exist.

    >>> get_reward_function("simple_dice", dice_weight=0.5).spec
    'default'
    """
    if reward_type not in _REWARDS:
        raise ValueError(f"unknown reward_type {reward_type!r}. Choose one of: {', '.join(_REWARDS)}.")
    known = _options_of(MultiObjectiveReward)
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(
            f"unknown reward option: {', '.join(unknown)}. Choose from: {', '.join(sorted(known))}."
        )
    reward_class = _REWARDS[reward_type]
    used = _options_of(reward_class)
    if reward_class is RecallFocusedReward:
        used.remove("recall_weight")
    unused = sorted(options.keys() - used)
    if unused:
        logger.debug("reward %s does not use: %s", reward_type, ", ".join(unused))
    return reward_class(**{name: value for name, value in options.items() if name in used})


def _options_of(reward_class: type[Reward]) -> set[str]:
    return {option.name for option in fields(reward_class) if option.init}


# ---- Terms, unweighted ----


def _recall_term(recall: np.ndarray, target: float, below: float, above: float) -> np.ndarray:
    return (recall - target) * np.where(recall < target, below, above)


def _precision_guard(tp: Any, fp: Any, fn: Any, target: float) -> np.ndarray:
    """-10·s·max(0, target - P) with s = A²/(1+A²), A the predicted area over the true one.

    s is 1/2 for a mask of the right size, near 1 for a bloated one and near 0 for a small one, so that the
    guard is no reason to predict nothing. An empty prediction raises no false alarm and pays nothing.
    """
    tp, fp, fn = (np.asarray(count, np.float64) for count in (tp, fp, fn))
    predicted, true = (tp + fp) ** 2, (tp + fn) ** 2
    share = predicted / np.where(predicted + true > 0, predicted + true, 1)
    return 10 * share * np.minimum(0.0, precision_from_counts(tp, fp, fn=0) - target)


def _shape_scores(pred: np.ndarray, gt: np.ndarray, gt_topology: Topology | None) -> tuple[float, float]:
    """(topology score in [0, 1], length score in [-1, 0]), both at their worst where clDice is 0."""
    truth_shape = topology(gt) if gt_topology is None else gt_topology
    check_topology(truth_shape, gt)
    pred_shape = topology(pred)
    gate = cldice_scores(pred, gt, pred_shape, truth_shape)["cldice"]
    if gate == 0:
        return 0.0, -1.0
    topology_agreement = (
        0.4 * _count_agreement(pred_shape.num_components, truth_shape.num_components)
        + 0.4 * _count_agreement(pred_shape.num_junctions, truth_shape.num_junctions)
        + 0.2 * _count_agreement(pred_shape.num_ends, truth_shape.num_ends)
    )
    length_agreement = 1 - min(abs(1 - length_ratio(pred_shape, truth_shape)), 1.0)
    return gate * topology_agreement, gate * length_agreement - 1


def _count_agreement(first: int, second: int) -> float:
    """(1+smaller) / (1+larger) in (0, 1]: 1 only for equal counts, and no cliff where a count is 0."""
    return (1 + min(first, second)) / (1 + max(first, second))


def _call_custom(custom: CustomReward, pred: np.ndarray, gt: np.ndarray) -> float:
    """Call the user's function on copies; whatever goes wrong inside it is reported under its name."""
    name = getattr(custom, "__qualname__", repr(custom))
    try:
        value = custom(pred.copy(), gt.copy())
    except Exception as error:  # the user's code can raise anything; it is passed on, never swallowed
        problem = f"{type(error).__name__}: {error}"
        raise RewardError(f"custom reward {name} failed with {problem}. Fix the function.") from error
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a 0-d array or tensor
    if not isinstance(value, Real) or not math.isfinite(value):
        raise RewardError(f"custom reward {name} must return a finite number, got {value!r}.")
    return float(value)


def _check_range(low: float, high: float, **numbers: float) -> None:
    for name, value in numbers.items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}.")
        if not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"{name} must be {limits}, got {value}.")
