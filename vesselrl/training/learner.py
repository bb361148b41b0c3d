"""What one training trains, seen from the training loop: it predicts, steps, is put back, and is saved.

The loop in `loop.py` is one for all: a Sa2VA with adapters here, the controls in `control_learners.py`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from vesselrl.experiment.config import TrainConfig
from vesselrl.inference.predictor import Prediction, Predictor
from vesselrl.models.lora import adapter_delta_norm, save_adapter, trainable_counts
from vesselrl.scoring.rewards import Reward
from vesselrl.training.batches import TrainBatch
from vesselrl.training.policy import MaskPolicy
from vesselrl.training.ppo import PPOUpdate
from vesselrl.training.restorable import Restorable
from vesselrl.training.supervised import SupervisedUpdate


class Update(Protocol):
    """One training step on one batch."""

    def step(self, batch: TrainBatch) -> dict[str, float]:
        """Changes the learner and returns the figures of the step."""

    def validated(self, means: Mapping[str, float]) -> None:
        """Takes notice of a validation's mean scores: the last before its first step, and all later ones."""

    def state_dict(self) -> dict[str, Any]:
        """What its next step depends on, apart from learner and optimizer: see resuming.py."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave."""


class Learner(Restorable):
    """Something that is trained.

    Attributes:
        kind: names its folders, `best_<kind>` and `final_<kind>`.
        trainable: what the optimizer steps, by name.
        counts: trainable values per component.
        start: its values before the first step, as from `values`.
    """

    kind: str
    trainable: dict[str, nn.Parameter]
    counts: dict[str, int]
    start: Any

    @abstractmethod
    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one image, uint8 RGB (H, W, 3)."""

    @abstractmethod
    def updates(self, optimizer: torch.optim.Optimizer, reward: Reward) -> dict[str, Update]:
        """The steps by stage, `sft` or `rl`."""

    @abstractmethod
    def distance(self) -> float:
        """How far it has moved from `start`; 0 if it has not."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes it to a new folder."""


class AdapterLearner(Learner):
    """The adapters of a Sa2VA."""

    kind = "lora"

    def __init__(self, policy: MaskPolicy, config: TrainConfig) -> None:
        self.policy = policy
        self.config = config
        self.predictor = Predictor(policy.model, policy.processor, config.prompt)
        self.trainable = policy.trainable
        self.counts = trainable_counts(policy.peft_model)
        self.start = policy.start

    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one image."""
        self.policy.peft_model.eval()
        return self.predictor.predict(image)

    def updates(self, optimizer: torch.optim.Optimizer, reward: Reward) -> dict[str, Update]:
        """PPO and supervised steps."""
        return {
            "rl": PPOUpdate(self.policy, optimizer, reward, self.config),
            "sft": SupervisedUpdate(self.policy, optimizer, self.config),
        }

    def values(self) -> dict[str, torch.Tensor]:
        """A copy of the adapters' values."""
        return self.policy.values()

    def restore(self, values: dict[str, torch.Tensor]) -> None:
        """Puts adapters back."""
        self.policy.restore(values)

    def distance(self) -> float:
        """Euclidean distance of the adapters from their start."""
        return adapter_delta_norm(self.policy.peft_model, self.start)

    def save(self, folder: Path) -> None:
        """Writes the adapter in PEFT's layout."""
        save_adapter(self.policy.peft_model, folder)
