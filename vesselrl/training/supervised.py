"""Supervised steps: the controls that reinforcement learning must beat, and the miniature's pre-training."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from vesselrl.data.dataset import TrainBatch
from vesselrl.experiment.config import TrainConfig
from vesselrl.training.checkpoint import Model
from vesselrl.training.health import check_moved, take_step

# Erosions of the soft skeleton; 10 reach the centre line of vessels up to 22 px wide, MONAI's 3 up to 8 px.
SKELETON_ITERATIONS = 10


def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice loss per image, at the image's own size.

    Mean over pixels of BCE + 1 - (2 * sum(p t) + 1) / (sum(p) + sum(t) + 1), with p = sigmoid(logit); logits
    and truth in {0, 1} are (B, H, W), losses (B,).
    """
    probability = torch.sigmoid(logits)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    overlap = (probability * truth).sum((1, 2))
    soft_dice = (2 * overlap + 1) / (probability.sum((1, 2)) + truth.sum((1, 2)) + 1)
    return cross_entropy + 1 - soft_dice


def mask_cldice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Half `mask_loss`, half MONAI's soft-clDice loss; shapes as for `mask_loss`.

    Soft clDice is 2 * tprec * tsens / (tprec + tsens), where tprec is the share of the prediction's soft
    skeleton inside the truth and tsens the reverse, both with 1 added above and below. One half is the
    largest weight that Shit et al. (clDice, 2021) use, and favours connectivity most.
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


class SupervisedUpdate:
    """Supervised steps of the adapters or of the U-Net, with self-checks at the first.

    With `flips` each image is flipped at random with its truth.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        config: TrainConfig,
        flips: np.random.Generator | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.max_grad_norm = config.optim.max_grad_norm
        self.loss = SFT_LOSSES[config.optim.sft_loss]
        self.flips = flips
        self.checked = False

    def step(self, batch: TrainBatch) -> dict[str, float]:
        """One update on a batch, and its metrics; LearningError where the model does not move at first."""
        started = time.perf_counter()
        images, truths = batch.images, batch.truths
        if self.flips:
            drawn = [[k for k in (0, 1) if self.flips.random() < 0.5] for _ in range(batch.size)]
            axes = drawn[batch.first :: batch.stride] or drawn[:1]
            images, truths = ([*map(flip, pixels, axes)] for pixels in (images, truths))
        logits = self.model.batch_logits(images, batch.keys)
        losses = [
            self.loss(one[None], torch.from_numpy(truth.astype(np.float32)).to(one.device)[None])
            for one, truth in zip(logits, truths, strict=True)
        ]
        loss = torch.cat(losses).mean() * batch.weight
        shared = self.model, self.optimizer, loss, self.max_grad_norm
        value, norm = take_step(*shared, is_first=not self.checked)
        if not self.checked:
            check_moved(self.model.distance())
            self.checked = True
        metrics = {"train/loss": value, "train/grad_norm": norm}
        return metrics | {"time/step": time.perf_counter() - started}

    def state_dict(self) -> dict[str, Any]:
        """State of the self-checks and of the flips."""
        return {"checked": self.checked, "flips": self.flips and self.flips.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the self-checks and the flips."""
        self.checked = state["checked"]
        if self.flips:
            self.flips.bit_generator.state = state["flips"]


def flip(pixels: np.ndarray, axes: list[int]) -> np.ndarray:
    """A copy of an image or mask, flipped along some axes."""
    return np.flip(pixels, axes).copy()
