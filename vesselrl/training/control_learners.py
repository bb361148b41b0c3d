"""The controls in the training loop: a U-Net that takes steps, and a filter that is set once."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesselrl.data.annotations import Sample, load_image, load_mask
from vesselrl.errors import LearningError
from vesselrl.evaluation.thresholds import counts_by_threshold, threshold_curve
from vesselrl.experiment.config import TrainConfig
from vesselrl.inference.predictor import Prediction
from vesselrl.scoring.rewards import Reward
from vesselrl.training.batches import TrainBatch
from vesselrl.training.control_models import SIGMAS, Frangi, UNet, vesselness
from vesselrl.training.learner import Learner, Update
from vesselrl.training.supervised import SupervisedSteps


class UNetLearner(Learner):
    """A U-Net from random weights; its steps are supervised."""

    kind = "control"

    def __init__(self, config: TrainConfig, device: str) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.model = UNet(device)
        self.trainable = dict(self.model.net.named_parameters())
        self.counts = {"unet": sum(parameter.numel() for parameter in self.trainable.values())}
        self.start = self.values()

    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one image."""
        return self.model.predict(image)

    def updates(self, optimizer: torch.optim.Optimizer, reward: Reward) -> dict[str, Update]:
        """Supervised steps; the reward only chooses the best weights."""
        return {"sft": UNetUpdate(self, optimizer, self.config)}

    def values(self) -> dict[str, Tensor]:
        """A copy of the weights."""
        return {name: value.clone() for name, value in self.model.net.state_dict().items()}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Puts weights back."""
        self.model.net.load_state_dict(values)

    def distance(self) -> float:
        """Euclidean distance of the weights from their start."""
        now = self.model.net.state_dict()
        return float(sum((now[name] - self.start[name]).double().square().sum() for name in now) ** 0.5)

    def save(self, folder: Path) -> None:
        """Writes the net."""
        self.model.save(folder)


class UNetUpdate(SupervisedSteps):
    """Supervised steps of the U-Net; every step shows each image flipped at random."""

    def __init__(self, learner: UNetLearner, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        super().__init__(list(learner.trainable.values()), optimizer, config)
        self.learner = learner
        self.rng = np.random.default_rng([config.seed, 3])

    def forward(self, batch: TrainBatch) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and truths of a batch."""
        pairs = [self._flipped(*pair) for pair in zip(batch.images, batch.truths, strict=True)]
        logits = [self.learner.model.logits(image) for image, _ in pairs]
        return logits, [self.truth(mask, self.learner.model.device) for _, mask in pairs]

    def state_dict(self) -> dict[str, Any]:
        """Of the self-checks and of the flips."""
        return super().state_dict() | {"flips": self.rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        super().load_state_dict(state)
        self.rng.bit_generator.state = state["flips"]

    def check_gradients(self) -> None:
        """Every weight has a gradient."""
        silent = [name for name, weight in self.learner.trainable.items() if weight.grad is None]
        if silent:
            raise LearningError(f"{len(silent)} weights of the U-Net have no gradient, such as {silent[0]}.")

    def distance(self) -> float:
        """Of the weights from their start."""
        return self.learner.distance()

    def _flipped(self, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        axes = [axis for axis in (0, 1) if self.rng.random() < 0.5]
        return np.flip(image, axes).copy(), np.flip(mask, axes).copy()


class FrangiLearner(Learner):
    """The Frangi filter; `choose` looks for its sigmas and threshold on the training images."""

    kind = "control"

    def __init__(self) -> None:
        self.model = Frangi()
        self.trainable = {}
        self.counts = {}
        self.start = self.model

    def choose(self, samples: Sequence[Sample], progress: Callable[[int, int], None] | None = None) -> None:
        """Takes the sigmas and the threshold with the best mean over patients of Dice on these samples."""
        counted = {sigmas: [] for sigmas in SIGMAS}
        for number, sample in enumerate(samples, start=1):
            image, truth = load_image(sample), load_mask(sample)
            # The filter takes the largest response over its sigmas, so each is computed once for all sets.
            single = {s: vesselness(image, (s,)) for s in sorted({s for sigmas in SIGMAS for s in sigmas})}
            for sigmas, counts in counted.items():
                response = np.maximum.reduce([single[s] for s in sigmas])
                counts.append(counts_by_threshold(Frangi(sigmas).cut(response).probabilities, truth))
            if progress is not None:
                progress(number, len(samples))
        patients = [sample.patient for sample in samples]
        curves = {sigmas: threshold_curve(counts, patients) for sigmas, counts in counted.items()}
        best = max(curves, key=lambda sigmas: curves[sigmas].best.dice)
        share = curves[best].best.threshold
        # The curve's thresholds are on v / (v + start); the same cut as a vesselness.
        self.model = Frangi(best, self.start.threshold * share / (1 - share))

    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one image."""
        return self.model.predict(image)

    def updates(self, optimizer: torch.optim.Optimizer, reward: Reward) -> dict[str, Update]:
        """None: there is nothing to step."""
        return {}

    def values(self) -> Frangi:
        """The filter with its settings, which never changes."""
        return self.model

    def restore(self, values: Frangi) -> None:
        """Puts settings back."""
        self.model = values

    def distance(self) -> float:
        """Of the threshold from the default, as the difference of their logarithms."""
        return float(abs(np.log(self.model.threshold / self.start.threshold)))

    def save(self, folder: Path) -> None:
        """Writes the settings."""
        self.model.save(folder)
