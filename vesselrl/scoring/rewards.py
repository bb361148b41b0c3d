"""The rewards: one number per predicted mask, and how each term of it was earned; see docs/rewards.md.

`reward(pred, gt) -> (float, dict)` is for credit assignment also the sum of `overlap_terms`, of pixel counts
or arrays of them (one entry per "if this pixel flipped"), and `structure_terms`, of masks.
"""

import hashlib
import importlib
import inspect
import logging
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Real
from typing import Any, ClassVar

import numpy as np

from vesselrl.errors import RewardError
from vesselrl.scoring import overlap
from vesselrl.scoring.scores import cldice_scores, length_ratio
from vesselrl.scoring.topology import Topology, check_topology, prototype_topology, topology

# Version of each specification, stored with every result; raise it whenever a formula changes.
SPEC_VERSIONS = {"default": 2, "seed": 1}
TERM_WEIGHTS = ("dice_weight", "recall_weight", "topology_weight", "length_weight")

# Weight of the precision guard: the smallest multiple of 0.05 that keeps the order perfect > dilated 3x3 >
# eroded 3x3 > dilated 7x7 > empty > all-foreground by 0.2 at every step (measurements in docs/rewards.md).
PRECISION_WEIGHT = 0.75

# The user's function: seconds that a call may take, the largest number that float32 arithmetic bears, and the
# failures that are skipped: this share of all calls, or the first few.
CALL_LIMIT_S = 60.0
MAX_CUSTOM_SCORE = 1e30
MAX_FAILED_SHARE, MIN_FAILURES = 0.05, 5
CustomReward = Callable[[np.ndarray, np.ndarray], float]  # of two bool masks (H, W)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The common part of all rewards: specification, term 10·Dice, the user's own term, sum of all."""

    spec: str = "default"  # "seed": the prototype's, which prefers bloated masks, punishes right empty ones
    custom: CustomReward | None = None  # the user's function, added as term "custom"
    custom_weight: float = 1.0  # not part of the normalisation to 1
    spec_version: int = field(init=False)  # so that results of older formulas are not compared
    limits: ClassVar[dict[str, tuple[float, float]]] = {  # of the settings, where a reward has them
        "custom_weight": (-math.inf, math.inf),
        **dict.fromkeys((*TERM_WEIGHTS, "precision_weight"), (0, math.inf)),
        **dict.fromkeys(("recall_target", "precision_target"), (0, 1)),
    }

    def __post_init__(self) -> None:
        if self.spec not in SPEC_VERSIONS:
            raise ValueError(f"unknown reward spec {self.spec!r}. Choose one of: {', '.join(SPEC_VERSIONS)}.")
        object.__setattr__(self, "spec_version", SPEC_VERSIONS[self.spec])
        if self.custom is not None and not callable(self.custom):
            raise ValueError(f"custom must be a function custom(pred, gt) -> float, got {self.custom!r}.")
        for name, (low, high) in self.limits.items():
            value = getattr(self, name, 0)
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}.")
            if not low <= value <= high:
                limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"{name} must be {limits}, got {value}.")

    def __call__(self, pred: Any, gt: Any, gt_topology: Topology | None = None) -> tuple[float, dict]:
        """Score one prediction against its truth, both bool or 0/1 (H, W): the reward and its details.

        These are dice, recall, precision (in [0, 1]; recall of an empty truth is 1 in spec "default" and 0 in
        "seed"), the weighted terms as `<name>_term`, which add up to the reward, and the custom_score.
        """
        pred, gt = overlap.as_mask_pair(pred, gt)
        tp, fp, fn, _ = overlap.counts(pred, gt)
        terms = {name: float(term) for name, term in self.overlap_terms(tp, fp, fn).items()}
        terms.update(self.structure_terms(pred, gt, gt_topology))
        details = {name: float(score) for name, score in self.overlap_scores(tp, fp, fn).items()}
        details.update({f"{name}_term": term for name, term in terms.items()})
        if self.custom is not None:
            weight = self.custom_weight
            details["custom_score"] = terms["custom"] / weight if weight else self.calls.score(pred, gt)
        return math.fsum(terms.values()), details

    def overlap_scores(self, tp: Any, fp: Any, fn: Any) -> dict[str, np.ndarray]:
        """Dice, recall, precision, unweighted, elementwise over counts; both masks empty: 1 ("seed": 0)."""
        empty = 0.0 if self.spec == "seed" else 1.0
        return {
            "dice": overlap.dice_from_counts(tp, fp, fn, empty),
            "recall": overlap.recall_from_counts(tp, fn, empty),
            "precision": overlap.precision_from_counts(tp, fp, fn, empty),
        }

    def overlap_terms(self, tp: Any, fp: Any, fn: Any) -> dict[str, np.ndarray]:
        """Weighted terms of pixel counts, elementwise over numbers or float arrays of them."""
        return {"dice": 10 * self.overlap_scores(tp, fp, fn)["dice"]}

    def structure_terms(self, pred: Any, gt: Any, gt_topology: Topology | None = None) -> dict[str, float]:
        """Weighted terms of the shape of the masks, bool or 0/1 (H, W): topology, length, custom."""
        pred, gt = overlap.as_mask_pair(pred, gt)
        terms = self._shape_terms(pred, gt, gt_topology)
        if self.custom is not None:
            weight = self.custom_weight  # at 0 it is worth nothing and may be slow
            terms["custom"] = weight * self.calls.score(pred, gt) if weight else 0.0
        return terms

    def _shape_terms(self, pred: np.ndarray, gt: np.ndarray, gt_topology: Topology | None) -> dict:
        return {}

    @cached_property
    def calls(self) -> "CustomCalls":
        """The calls of the user's function so far."""
        return CustomCalls(self.custom)

    def without_custom(self, error: RewardError) -> "Reward":
        """The reward for an image on which the user's function failed; raises where that is too often."""
        self.calls.skip(error)
        return replace(self, custom=None)


@dataclass(frozen=True)
class MultiObjectiveReward(Reward):
    """Overlap, recall, an unbroken tree of the right shape and the right length, with a precision guard.

    reward = sum of weight x term, the four weights divided by their sum, plus the guard. With the default
    settings the maximum is 6.15, reached by the perfect mask only, and the minimum lies above -11. Terms
    before weighting, in spec "default":

    - dice, 10·Dice: in [0, 10].
    - recall, (R - target)·20 below the target, ·5 above: in [-17, 0.75]; R = 1 for an empty truth.
    - topology, 5·clDice·(0.4·components + 0.4·junctions + 0.2·ends): in [0, 5]; each is an agreement of
      counts, (1+smaller)/(1+larger).
    - length, -5·(1 - clDice·(1 - min(|1 - L/L_gt|, 1))) with skeleton lengths: in [-5, 0].
    - precision, the guard, -precision_weight·10·s·max(0, precision_target - P): in [-6.375, 0].
      s = A²/(1+A²) with A the predicted area over the true one.

    Spec "seed" is the prototype: no guard, Zhang-Suen skeletons, length unbounded below, extra junctions
    free, topology -1 for fewer than 10 predicted pixels, Dice 0 for two empty masks.
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
        if not any(getattr(self, name) for name in TERM_WEIGHTS):
            names = ", ".join(TERM_WEIGHTS)
            raise ValueError(f"{names} are all 0. Give at least one of them a positive weight.")

    @cached_property
    def weights(self) -> dict[str, float]:
        """The weights of dice, recall, topology and length, normalised to sum 1."""
        total = math.fsum(getattr(self, name) for name in TERM_WEIGHTS)
        return {name.removesuffix("_weight"): getattr(self, name) / total for name in TERM_WEIGHTS}

    def overlap_terms(self, tp: Any, fp: Any, fn: Any) -> dict[str, np.ndarray]:
        """Weighted terms dice, recall and, in spec "default", precision; elementwise over counts."""
        weights = self.weights["dice"], self.weights["recall"]
        return _dice_recall_guard(self, (tp, fp, fn), weights, slopes=(20, 5))

    def _shape_terms(self, pred: np.ndarray, gt: np.ndarray, gt_topology: Topology | None) -> dict:
        topology_weight, length_weight = self.weights["topology"], self.weights["length"]
        if topology_weight == 0 and length_weight == 0:
            return {"topology": 0.0, "length": 0.0}
        score = _prototype_shape_scores if self.spec == "seed" else _shape_scores
        topology_score, length_score = score(pred, gt, gt_topology)
        return {"topology": topology_weight * 5 * topology_score, "length": length_weight * 5 * length_score}


@dataclass(frozen=True)
class SimpleDiceReward(Reward):
    """Dice alone, 10·Dice, in [0, 10]: nearly blind to lost or broken thin vessels, which hold few pixels."""


@dataclass(frozen=True)
class RecallFocusedReward(Reward):
    """Find everything: (1-w)·10·Dice + w·(R - target)·{30 below the target, 10 above}, w = recall_weight 0.7.

    Spec "default" adds the precision guard of `MultiObjectiveReward`, which curbs but does not stop
    over-segmentation here: an all-foreground mask still beats an empty one by far.
    """

    recall_target: float = 0.85
    recall_weight: float = 0.7
    precision_target: float = 0.85
    precision_weight: float = PRECISION_WEIGHT

    limits: ClassVar = Reward.limits | {"recall_weight": (0, 1)}

    def overlap_terms(self, tp: Any, fp: Any, fn: Any) -> dict[str, np.ndarray]:
        """Weighted terms dice, recall and, in spec "default", precision; elementwise over counts."""
        weights = 1 - self.recall_weight, self.recall_weight
        return _dice_recall_guard(self, (tp, fp, fn), weights, slopes=(30, 10))


def score_or_skip(reward: Reward, *masks: Any) -> tuple[float, dict]:
    """Reward and details of one prediction; nan for both scores where the user's function failed on it."""
    try:
        return reward(*masks)
    except RewardError as error:
        reward.without_custom(error)
        return math.nan, {"custom_score": math.nan}


class CustomCalls:
    """Calls the user's function, and counts the calls and those that failed, in several threads."""

    def __init__(self, function: CustomReward) -> None:
        self.function, self.name = function, getattr(function, "__qualname__", repr(function))
        self.num_calls, self.num_failed, self.hangs = 0, 0, False
        self.lock = threading.Lock()

    def to_json(self) -> dict[str, int]:
        """The numbers of all calls and of those that failed."""
        return {"custom_calls": self.num_calls, "custom_failures": self.num_failed}

    def score(self, pred: np.ndarray, gt: np.ndarray) -> float:
        """Calls the function on copies, in a thread of its own, which is left behind where it hangs."""
        outcome: Future = Future()

        def call() -> None:
            try:
                outcome.set_result(self.function(pred.copy(), gt.copy()))
            except BaseException as error:  # the user's code can raise anything, and call sys.exit
                outcome.set_exception(error)

        with self.lock:
            self.num_calls += 1
        if not self.hangs:  # else other images need not wait as long
            thread = threading.Thread(target=call, daemon=True)
            thread.start()
            thread.join(CALL_LIMIT_S)
        if not outcome.done():
            self.hangs = True
            limit = f"has not returned within {CALL_LIMIT_S:g} s"
            advice = "Make it faster, or look for a loop without an end."
            raise RewardError(f"custom reward {self.name} {limit}. {advice}")
        if error := outcome.exception():
            problem = f"failed with {type(error).__name__}: {error}"
            raise RewardError(f"custom reward {self.name} {problem}. Fix the function.") from error
        value = outcome.result()
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()  # a 0-d array or tensor
        if not isinstance(value, Real) or not abs(value) <= MAX_CUSTOM_SCORE:  # nan is not
            raise RewardError(f"custom reward {self.name} must return a finite number, got {value!r:.60}.")
        return float(value)

    def skip(self, error: RewardError) -> None:
        """Counts and logs a failure; raises it where the function hangs or has failed too often."""
        with self.lock:
            self.num_failed += 1
            failed, calls = self.num_failed, self.num_calls
        if self.hangs:
            raise error
        counted = f"{failed} of {calls} calls so far"
        if failed > MIN_FAILURES and failed > MAX_FAILED_SHARE * calls:
            limit = f"more than {MAX_FAILED_SHARE:.0%} of the calls"
            raise RewardError(f"{error} This was one of {counted}, {limit}.") from error
        if failed & (failed - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
            logger.warning("%s The image is left without this term (%s).", error, counted)


_REWARDS: dict[str, type[Reward]] = {
    "multi_objective": MultiObjectiveReward,
    "simple_dice": SimpleDiceReward,
    "recall_focused": RecallFocusedReward,
}


def get_reward_function(reward_type: str = "multi_objective", **options: Any) -> Reward:
    """Make the reward multi_objective, simple_dice or recall_focused from options of `MultiObjectiveReward`.

    Options without a use are left out. recall_focused keeps its own recall_weight of 0.7.
    """
    if reward_type not in _REWARDS:
        raise ValueError(f"unknown reward_type {reward_type!r}. Choose one of: {', '.join(_REWARDS)}.")
    known = _options_of(MultiObjectiveReward)
    if unknown := sorted(options.keys() - known):
        choices = ", ".join(sorted(known))
        raise ValueError(f"unknown reward option: {', '.join(unknown)}. Choose from: {choices}.")
    reward_class = _REWARDS[reward_type]
    used = _options_of(reward_class)
    if reward_class is RecallFocusedReward:
        used.remove("recall_weight")
    return reward_class(**{name: value for name, value in options.items() if name in used})


def make_reward(settings: Mapping[str, Any]) -> Reward:
    """Make the reward of a run from its flat settings, with the user's own term."""
    options = {name: settings[name] for name in _options_of(MultiObjectiveReward) & settings.keys()}
    function = settings.get("reward_fn")
    return get_reward_function(
        settings.get("reward_type", "multi_objective"),
        spec=settings.get("reward_spec", "default"),
        custom=import_function(function) if function else None,
        custom_weight=settings.get("reward_fn_weight", 1.0),
        **options,
    )


def source_hash(reward: Reward) -> str:
    """Hash of what a reward depends on beside settings: its version, and the text of the user's module."""
    module = inspect.getmodule(reward.custom) if reward.custom else None
    try:
        source = inspect.getsource(module) if module else ""
    except (OSError, TypeError):  # compiled, or typed in
        source = ""
    return hashlib.sha256(f"{type(reward).__name__} {reward.spec_version} {source}".encode()).hexdigest()


def import_function(name: str) -> CustomReward:
    """Import the function called `package.module:function`, or say in a ValueError why it cannot be."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"--reward_fn is {name!r}; give it as package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module can raise anything
        problem = f"--reward_fn {name}: the module cannot be imported ({type(error).__name__}: {error})"
        raise ValueError(f"{problem}. Put its folder on PYTHONPATH.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--reward_fn {name}: {module_name} has no function {function_name!r}.")
    return function


def _options_of(reward_class: type[Reward]) -> set[str]:
    return {option.name for option in fields(reward_class) if option.init}


def _dice_recall_guard(reward: Any, pixel_counts: tuple, weights: tuple, slopes: tuple) -> dict:
    """Terms dice, recall (slopes below and above the target) and, in spec "default", precision."""
    (tp, fp, fn), (dice_weight, recall_weight) = pixel_counts, weights
    scores = reward.overlap_scores(tp, fp, fn)
    recall, target = scores["recall"], reward.recall_target
    recall_term = (recall - target) * np.where(recall < target, *slopes)
    terms = {"dice": dice_weight * 10 * scores["dice"], "recall": recall_weight * recall_term}
    if reward.spec == "default":
        # The share is near 1 for a bloated mask and near 0 for a small one: no reason to predict nothing.
        predicted, true = (np.square(area, dtype=np.float64) for area in (tp + fp, tp + fn))
        share = predicted / np.where(predicted + true > 0, predicted + true, 1)
        lack = np.minimum(0.0, overlap.precision_from_counts(tp, fp, fn=0) - reward.precision_target)
        terms["precision"] = reward.precision_weight * (10 * share * lack)
    return terms


def _shape_scores(pred: np.ndarray, gt: np.ndarray, gt_topology: Topology | None) -> tuple[float, float]:
    """(topology score in [0, 1], length score in [-1, 0]), both at their worst where clDice is 0."""
    truth_shape = topology(gt) if gt_topology is None else gt_topology
    check_topology(truth_shape, gt)
    pred_shape = topology(pred)
    gate = cldice_scores(pred, gt, pred_shape, truth_shape)["cldice"]
    if gate == 0:
        return 0.0, -1.0
    names = ("num_components", "num_junctions", "num_ends")
    pairs = [(getattr(pred_shape, name), getattr(truth_shape, name)) for name in names]
    components, junctions, ends = ((1 + min(pair)) / (1 + max(pair)) for pair in pairs)
    topology_agreement = 0.4 * components + 0.4 * junctions + 0.2 * ends
    length_agreement = 1 - min(abs(1 - length_ratio(pred_shape, truth_shape)), 1.0)
    return gate * topology_agreement, gate * length_agreement - 1


def _prototype_shape_scores(pred: np.ndarray, gt: np.ndarray, gt_topology: Topology | None) -> tuple:
    """(topology score in [-1, 1], length score, 0 or below and without bound) by the prototype's rules."""
    given = gt_topology is not None and gt_topology.thinning == "zhang"
    truth_shape = gt_topology if given else prototype_topology(gt)
    pred_shape = prototype_topology(pred)
    if truth_shape.length_px > 0:
        length_score = -abs(1 - pred_shape.length_px / truth_shape.length_px)
    else:
        length_score = 0.0 if pred_shape.length_px == 0 else -1.0
    if np.count_nonzero(pred) < 10:
        return -1.0, length_score

    component_error = abs(pred_shape.num_components - truth_shape.num_components)
    component_score = 1 - min(component_error / max(truth_shape.num_components, 1), 1.0)
    junction_score = 1.0 if pred_shape.num_junctions == 0 else 0.5
    if truth_shape.num_junctions > 0:
        junction_score = min(pred_shape.num_junctions / truth_shape.num_junctions, 1.0)
    end_score = 1.0 if pred_shape.num_ends == 0 else 0.5
    if truth_shape.num_ends > 0:
        end_score = 1 - min(abs(pred_shape.num_ends - truth_shape.num_ends) / truth_shape.num_ends, 1.0)
    return 0.4 * component_score + 0.4 * junction_score + 0.2 * end_score, length_score
