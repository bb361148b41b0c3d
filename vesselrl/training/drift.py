"""Takes a run back when it goes wrong: the last good adapter, half the learning rate, and a word about it.

Whether an adapter was good shows only afterwards. So its values are kept at first as a candidate, and count
as good once another window of steps has passed without a sign.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesselrl.errors import LearningError, NotFiniteError
from vesselrl.training.batches import TrainBatch
from vesselrl.training.checks import check_finite_gradients
from vesselrl.training.diagnosis import Finding, comparable
from vesselrl.training.history import History
from vesselrl.training.learner import Learner, Update

# Steps that a sign is looked for in; a single step says nothing, unless it is not even a number.
WINDOW = 20
MAX_CORRECTIONS = 5
# Severity below which a window is healthy; at 1 the run is taken back.
HEALTHY = 0.5
# Fall of Dice below its start, on validation or in a window, at which the run is taken back.
DICE_FALL = 0.2


# Severity and sentence; nothing where the figure is not logged, or not yet for a whole window.
Sign = tuple[float, str] | None


class DriftGuard:
    """Watches the steps of a run and corrects it, a few times at most.

    Args:
        learner: whose values are kept and put back.
        optimizer: refuses gradients that are no numbers from now on; a correction clears its moments.
        start_dice: of the validation before the first update.
        note: is told of every correction.

    Attributes:
        rate_factor: what the learning rate must be multiplied by; halved at every correction.
    """

    def __init__(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        start_dice: float,
        note: Callable[[Finding], None],
    ) -> None:
        self.learner = learner
        self.optimizer = optimizer
        self.start_dice = start_dice
        self.note = note
        self.rate_factor = 1.0
        self.num_corrections = 0
        self._history = History(WINDOW)
        self._good: tuple[int, dict[str, Tensor]] = (0, learner.values())
        self._candidate = self._good
        optimizer.register_step_pre_hook(check_finite_gradients)

    def step(self, number: int, update: Update, batch: TrainBatch) -> dict[str, float]:
        """One step of `update`; its figures, none where a loss or gradient was no number.

        Raises:
            LearningError: a self-check failed, or the run went wrong once more than it may.
        """
        try:
            figures = update.step(batch)
        except NotFiniteError as error:
            self._go_back(number, str(error))
            return {}
        # The loss of PPO says nothing about learning.
        hidden = "train/loss" if "train/policy_loss" in figures else None
        self._history.add({name: value for name, value in comparable(figures).items() if name != hidden})
        severity, sign = worst_sign(self._history)
        if severity >= 1:
            self._go_back(number, sign)
        elif severity < HEALTHY and number >= self._candidate[0] + WINDOW:
            self._good, self._candidate = self._candidate, (number, self.learner.values())
        return figures

    def after_validation(self, number: int, dice: float) -> None:
        """Takes the run back if the validation Dice has fallen far below its start.

        Raises:
            LearningError: the run went wrong once more than it may.
        """
        if not dice >= self.start_dice - DICE_FALL:
            self._go_back(
                number, f"The validation Dice has fallen to {dice:.3f}, {self.start_dice:.3f} at the start."
            )

    def state_dict(self) -> dict[str, Any]:
        """The corrections so far, and the values to go back to."""
        return {
            "start_dice": self.start_dice,
            "rate_factor": self.rate_factor,
            "num_corrections": self.num_corrections,
            "history": self._history.state_dict(),
            "good": self._good,
            "candidate": self._candidate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.start_dice = state["start_dice"]
        self.rate_factor = state["rate_factor"]
        self.num_corrections = state["num_corrections"]
        self._history.load_state_dict(state["history"])
        self._good, self._candidate = tuple(state["good"]), tuple(state["candidate"])

    def _go_back(self, number: int, sign: str) -> None:
        good_step, values = self._good
        self.learner.restore(values)
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        self._history.forget_recent()
        self._candidate = (number, values)
        if self.num_corrections == MAX_CORRECTIONS:
            raise LearningError(
                f"The run went wrong {MAX_CORRECTIONS + 1} times, although the learning rate was halved each "
                f"time, to {self.rate_factor:.2g} of its setting. At step {number}: {sign} Lower "
                "--learning_rate; if that does not help, raise --kl_coef or --batch_size, or check the "
                "reward."
            )
        self.num_corrections += 1
        self.rate_factor /= 2
        advice = (
            f"Went back to the adapter of step {good_step} and go on with {self.rate_factor:.2g} of the set "
            f"learning rate (correction {self.num_corrections} of {MAX_CORRECTIONS}). Next time lower "
            "--learning_rate."
        )
        self.note(Finding(number, "correction", sign, advice))


def worst_sign(history: History) -> tuple[float, str]:
    """The most severe sign in the latest window, and the sentence for it.

    Returns:
        Severity (0 and below: none; 1: the run must be taken back) and sentence; (0, "") without figures.
    """
    signs = (rule(history) for rule in (jump, distance, spread, area, dice_fall, reward_fall, loss_rise))
    return max((sign for sign in signs if sign is not None), default=(0.0, ""))


def jump(history: History) -> Sign:
    """How far one step moves the policy; 1 at an approx_kl of 20."""
    values = history.recent("train/approx_kl")
    if values is None:
        return None
    moved = float(np.median(values))
    return moved / 20, f"Each step moves the policy by {moved:.3g} (train/approx_kl)."


def distance(history: History) -> Sign:
    """How far the policy is from where it began; 1 at a divergence of 300 per undecided pixel."""
    values = history.recent("train/kl_ref")
    if values is None:
        return None
    far = float(np.median(values))
    return far / 300, f"The policy is {far:.3g} away from where it began (train/kl_ref)."


def spread(history: History) -> Sign:
    """How often all drawn masks of an image earn the same; 1 is always. No sign where Dice has gained."""
    values, dice = (history.recent(f"train/{name}") for name in ("zero_variance_groups", "dice"))
    if values is None or dice is None or dice.mean() > history.start("train/dice"):
        return None
    return float(
        values.mean()
    ), "The policy is sure of every pixel, and no better: all drawn masks are alike."


def area(history: History) -> Sign:
    """Whether the predicted area has run away; 1 at three times, or a quarter, of the true one.

    Where the masks of the first steps were further off, it is measured against those.
    """
    values, first = history.recent("train/foreground"), history.start("train/foreground")
    if values is None or first is None:
        return None
    share, start = (float(np.clip(one, 1e-6, 1e6)) for one in (np.median(values), first))
    bloat = math.log(share / max(start, 1)) / math.log(3)
    shrink = math.log(min(start, 1) / share) / math.log(4)
    sentence = f"The masks hold {share:.3g} times the true vessel area, {start:.3g} at the start."
    return max(bloat, shrink), sentence


def dice_fall(history: History) -> Sign:
    """How far the Dice of the greedy masks has fallen."""
    values, first = (take("train/dice") for take in (history.recent, history.first))
    if values is None:
        return None
    now, start = float(values.mean()), float(first.mean())
    return (
        start - now
    ) / DICE_FALL, f"The Dice of the masks has fallen to {now:.3f}, {start:.3f} at the start."


def reward_fall(history: History) -> Sign:
    """How far the reward of the greedy masks has fallen; 1 at three standard deviations of its start."""
    values, first = (take("train/greedy_reward") for take in (history.recent, history.first))
    if values is None:
        return None
    now, start = float(values.mean()), float(first.mean())
    unit = 3 * max(float(first.std()), 0.1 * abs(start), 1e-3)
    return (start - now) / unit, f"The reward of the masks has fallen to {now:.3g}, {start:.3g} at the start."


def loss_rise(history: History) -> Sign:
    """How far the loss of a supervised run has risen; 1 at two and a half times that of the first steps."""
    values, first = (take("train/loss") for take in (history.recent, history.first))
    if values is None:
        return None
    now, start = float(values.mean()), float(first.mean())
    if min(now, start) <= 0:
        return None
    severity = math.log(now / start) / math.log(2.5)
    return severity, f"The loss has risen to {now:.3g}, {start:.3g} at the start."
