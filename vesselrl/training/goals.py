"""Goals instead of weights: the best masks among the policies that keep their floors.

    maximise   the reward's Dice and structure terms (topology, length, the user's own)
    subject to mean recall >= floor, mean precision >= floor, mean Dice >= floor

Each floor has a multiplier, the price of falling short of it. It rises while the running mean of the greedy
masks lies below the floor and falls, down to 0, while it lies above (dual ascent). So nobody has to guess
weights: a goal that is kept costs nothing, one that is missed grows until it is met or its limit is reached.
A price holds for all images alike, where the reward's own recall and precision terms switch at their target
image by image; single images then pull a policy to and fro.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vesselrl.scoring.rewards import Reward

# A price says how many points of reward one unit of the score is worth: the default reward pays 5 for Dice.
# Rate is the change of a price per step and unit of shortfall.
RATE = 0.1
LIMIT = 20.0
# Memory of the running means, per step.
MEMORY = 0.98


@dataclass
class Goals:
    """The floors, their multipliers, and the reward as credit assignment wants it.

    Attributes:
        reward: whose Dice and structure terms are maximised; its other overlap terms give way to the floors.
        floors: metric (dice, recall, precision) to the mean that it must reach, in [0, 1].
        multipliers: metric to its price, in [0, LIMIT]; all begin at 0.
        means: running means of the greedy masks' scores.
    """

    reward: Reward
    floors: dict[str, float]
    multipliers: dict[str, float] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.multipliers = dict.fromkeys(self.floors, 0.0) | self.multipliers

    def overlap_terms(self, tp: Any, fp: Any, fn: Any) -> dict[str, np.ndarray]:
        """The reward's Dice term, and price x (score - floor) for every floor, elementwise over counts."""
        scores = self.reward.overlap_scores(tp, fp, fn)
        terms = {"dice": self.reward.overlap_terms(tp, fp, fn)["dice"]}
        for name, floor in self.floors.items():
            terms[f"{name}_floor"] = self.multipliers[name] * (scores[name] - floor)
        return terms

    def structure_terms(self, pred: np.ndarray, gt: np.ndarray, gt_topology: Any = None) -> dict[str, float]:
        """Those of the reward."""
        return self.reward.structure_terms(pred, gt, gt_topology)

    def update(self, counts: list[tuple[int, int, int]]) -> dict[str, float]:
        """One step of dual ascent from tp, fp, fn of a batch's greedy masks; returns figures for the log."""
        columns = (np.array(column, float) for column in zip(*counts, strict=True))
        scores = self.reward.overlap_scores(*columns)
        figures = {}
        for name, floor in self.floors.items():
            now = float(np.mean(scores[name]))
            self.means[name] = MEMORY * self.means.get(name, now) + (1 - MEMORY) * now
            price = self.multipliers[name] + RATE * (floor - self.means[name])
            self.multipliers[name] = min(max(price, 0.0), LIMIT)
            figures[f"train/price/{name}"] = self.multipliers[name]
        return figures
