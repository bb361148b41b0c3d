"""Goals instead of weights: the best masks among the policies that keep their floors.

    maximise   the reward's Dice and structure terms (topology, length, the user's own)
    subject to mean recall >= floor, mean precision >= floor, mean Dice >= floor on validation patients

Each floor has a multiplier, the price of falling short of it. At every validation it rises by the shortfall
of the mean, or falls, down to 0, by what the mean lies above (dual ascent). So nobody has to guess weights: a
goal that is kept costs nothing, one that is missed grows until it is met or its limit is reached. Training
images would not do: the model has seen them, and keeps floors on them that it misses on other patients.
A price holds for all images alike, where the reward's own recall and precision terms switch at their target
image by image; single images then pull a policy to and fro.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vesselrl.scoring.rewards import Reward

# A price says how many points of reward one unit of the score is worth: the default reward pays 5 for Dice.
# Rate is the change of a price per validation and unit of shortfall.
RATE = 100.0
LIMIT = 20.0


@dataclass
class Goals:
    """The floors, their multipliers, and the reward as credit assignment wants it.

    Attributes:
        reward: whose Dice and structure terms are maximised; its other overlap terms give way to the floors.
        floors: metric (dice, recall, precision) to the mean that it must reach, in [0, 1].
        multipliers: metric to its price, in [0, LIMIT]; all begin at 0.
    """

    reward: Reward
    floors: dict[str, float]
    multipliers: dict[str, float] = field(default_factory=dict)

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

    def validated(self, means: Mapping[str, float]) -> None:
        """One step of dual ascent from the mean scores of a validation."""
        for name, floor in self.floors.items():
            price = self.multipliers[name] + RATE * (floor - means[name])
            self.multipliers[name] = min(max(price, 0.0), LIMIT)

    def figures(self) -> dict[str, float]:
        """The prices, for the log."""
        return {f"train/price/{name}": price for name, price in self.multipliers.items()}
