"""The supervised objective.

It is the control that reinforcement learning must beat, and the miniature's pre-training.
"""

import time

import numpy as np
import torch
from torch import Tensor
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


class SupervisedUpdate:
    """One supervised step on a batch; the same adapters, data order and number of passes as `PPOUpdate`."""

    def __init__(self, policy: MaskPolicy, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.config = config
        self.checked = False

    def step(self, batch: TrainBatch) -> dict[str, float]:
        """The passes over one batch; returns the figures of the last.

        Raises:
            LearningError: at the first step, when gradients do not reach the adapters; later, when a loss is
                not finite.
        """
        started = time.perf_counter()
        self.policy.peft_model.train()  # LoRA dropout; the frozen model has none
        inputs = self.policy.prepare(batch.images)
        truths = [
            torch.from_numpy(truth.astype(np.float32)).to(self.policy.model.device) for truth in batch.truths
        ]
        for _ in range(self.config.num_passes):
            decoded = self.policy.decode(inputs, batch.keys)
            logits = self.policy.logits(decoded, decoded.best(), inputs)
            loss = torch.cat(
                [mask_loss(one[None], truth[None]) for one, truth in zip(logits, truths, strict=True)]
            )
            loss = loss.mean()
            checks.check_finite(loss)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if not self.checked:
                checks.check_gradients(self.policy.peft_model)
            norm = torch.nn.utils.clip_grad_norm_(self.policy.trainable.values(), self.config.max_grad_norm)
            self.optimizer.step()
            if not self.checked:
                checks.check_changed(adapter_delta_norm(self.policy.peft_model, self.policy.start))
                self.checked = True
        self.policy.peft_model.eval()
        return {
            "train/loss": float(loss.detach()),
            "train/grad_norm": float(norm),
            "time/step": time.perf_counter() - started,
        }
