"""The supervised objectives.

They are the controls that reinforcement learning must beat, and the miniature's pre-training.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vesselrl.experiment.config import TrainConfig
from vesselrl.models.lora import adapter_delta_norm
from vesselrl.training import checks
from vesselrl.training.batches import TrainBatch
from vesselrl.training.policy import MaskPolicy


def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice loss, at the image's own size.

    Per image: mean over pixels of BCE + 1 - (2 * sum(p t) + 1) / (sum(p) + sum(t) + 1), with
    p = sigmoid(logit).

    Args:
        logits: (B, H, W) float.
        truth: (B, H, W) float in {0, 1}.

    Returns:
        (B,) losses, at least 0.
    """
    probability = torch.sigmoid(logits)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    overlap = (probability * truth).sum((1, 2))
    soft_dice = (2 * overlap + 1) / (probability.sum((1, 2)) + truth.sum((1, 2)) + 1)
    return cross_entropy + 1 - soft_dice


# Erosions of the soft skeleton; 10 reach the centre line of vessels up to 22 px wide, MONAI's 3 up to 8 px.
SKELETON_ITERATIONS = 10


def mask_cldice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """`mask_loss` and MONAI's soft-clDice loss, half and half.

    Per image: 0.5 * mask_loss + 0.5 * (1 - 2 * tprec * tsens / (tprec + tsens)), where tprec is the share of
    the prediction's soft skeleton inside the truth and tsens that of the truth's inside the prediction, both
    with 1 added above and below. One half is the largest weight that Shit et al. (clDice, 2021) use and the
    one that favours connectivity most; they add it to soft Dice, here it is added to BCE + soft Dice.

    Args:
        logits: (B, H, W) float.
        truth: (B, H, W) float in {0, 1}.

    Returns:
        (B,) losses, at least 0.
    """
    from monai.losses import SoftclDiceLoss

    # One channel, which is the vessel: there is no background to leave out.
    cldice_loss = SoftclDiceLoss(iter_=SKELETON_ITERATIONS, reduction="none")
    structure = cldice_loss(torch.sigmoid(logits)[:, None], truth[:, None])
    return 0.5 * mask_loss(logits, truth) + 0.5 * structure


SFT_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce_dice": mask_loss,
    "bce_dice_cldice": mask_cldice_loss,
}


class SupervisedSteps(ABC):
    """Supervised steps of any model, one pass over a batch each, with the self-checks at the first.

    Args:
        parameters: that are trained.
        optimizer: of these.
        config: loss and largest gradient.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, config: TrainConfig
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.config = config
        self.loss = SFT_LOSSES[config.sft_loss]
        self.checked = False

    @abstractmethod
    def forward(self, batch: TrainBatch) -> tuple[list[Tensor], list[Tensor]]:
        """The logits and truths of the images, all (H, W)."""

    @abstractmethod
    def distance(self) -> float:
        """How far the model has moved from its start."""

    def step(self, batch: TrainBatch) -> dict[str, float]:
        """One update on a batch; returns its figures.

        Raises:
            LearningError: at the first step, when the model does not move; later, when a loss is not finite.
        """
        started = time.perf_counter()
        logits, truths = self.forward(batch)
        losses = [self.loss(one[None], truth[None]) for one, truth in zip(logits, truths, strict=True)]
        loss = torch.cat(losses).mean()
        checks.check_finite(loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not self.checked:
            self.check_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        if not self.checked:
            checks.check_changed(self.distance())
            self.checked = True
        return {
            "train/loss": float(loss.detach()),
            "train/grad_norm": float(norm),
            "time/step": time.perf_counter() - started,
        }

    def validated(self, means: Mapping[str, float]) -> None:  # noqa: B027  (nothing is meant)
        """The loss stays the same whatever the scores."""

    def state_dict(self) -> dict[str, Any]:
        """Whether the self-checks are done."""
        return {"checked": self.checked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.checked = state["checked"]

    @abstractmethod
    def check_gradients(self) -> None:
        """The first gradients reach what is trained.

        Raises:
            LearningError: they do not.
        """

    @staticmethod
    def truth(mask: np.ndarray, device: torch.device | str) -> Tensor:
        """A mask as the target of the loss."""
        return torch.from_numpy(mask.astype(np.float32)).to(device)


class SupervisedUpdate(SupervisedSteps):
    """Supervised steps of the adapters: the same adapters, images and number of passes as `PPOUpdate`."""

    def __init__(self, policy: MaskPolicy, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        super().__init__(list(policy.trainable.values()), optimizer, config)
        self.policy = policy

    def forward(self, batch: TrainBatch) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and truths of a batch; LoRA dropout is on, the frozen model has none."""
        self.policy.peft_model.train()
        inputs = self.policy.prepare(batch.images)
        truths = [self.truth(mask, self.policy.model.device) for mask in batch.truths]
        decoded = self.policy.decode(inputs, batch.keys)
        logits = self.policy.logits(decoded, decoded.best(), inputs)
        self.policy.peft_model.eval()
        return logits, truths

    def check_gradients(self) -> None:
        """Every adapter has a gradient, and nothing else has."""
        checks.check_gradients(self.policy.peft_model)

    def distance(self) -> float:
        """Of the adapters from their start."""
        return adapter_delta_norm(self.policy.peft_model, self.policy.start)
