"""The steps of a training, epoch by epoch, with what they need to go on after an interruption."""

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

import torch

from vesselrl.experiment.config import TrainConfig
from vesselrl.scoring.rewards import Reward
from vesselrl.training.batches import BatchSource, TrainBatch
from vesselrl.training.drift import DriftGuard
from vesselrl.training.learner import Learner
from vesselrl.training.learning_rate import staged_warm_cosine
from vesselrl.training.monitor import Monitor
from vesselrl.training.resuming import (
    optimizer_moments,
    random_state,
    restore_moments,
    restore_random_state,
)

# On validation 0.95 was a little better than Adam's own 0.999 with every seed tried; docs/results.md, R040.
BETAS = (0.9, 0.95)


class TrainingLoop:
    """Takes the steps of all epochs.

    Args:
        config: all settings.
        learner: is trained.
        batches: of all epochs.
        reward: that PPO earns.
        monitor: gets the figures of every step.
        means: scores of the validation before the first step.

    Attributes:
        step: done so far.
        means: scores of the latest validation.
    """

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        batches: BatchSource,
        reward: Reward,
        monitor: Monitor,
        means: dict[str, float],
    ) -> None:
        self.config = config
        self.learner = learner
        self.batches = batches
        self.monitor = monitor
        self.means = means
        self.step = 0
        self.optimizer = torch.optim.AdamW(
            learner.trainable.values(), betas=BETAS, weight_decay=config.weight_decay
        )
        self.guard = DriftGuard(learner, self.optimizer, means["dice"], monitor.note)
        self.updates = learner.updates(self.optimizer, reward)
        self._stages = self._plan_stages()

    def run(
        self,
        validate: Callable[[int], dict[str, float]],
        keep: Callable[[], None],
        save: Callable[[str], None],
    ) -> None:
        """All steps that are left.

        Args:
            validate: gives the mean scores on the validation images after so many steps.
            keep: writes down the state of the training; called after every validation.
            save: writes the learner to a folder of that name; called after every `save_freq` epochs.
        """
        end = 0
        for epoch in range(1, self.batches.num_epochs + 1):
            begin, end = end, end + self.batches.num_batches(epoch)
            if end < self.step:
                continue
            stage = self._stage(epoch)
            if self.step <= begin and (epoch == 1 or stage != self._stage(epoch - 1)):
                self.optimizer.state.clear()  # the moments of another loss say nothing about this one
                self.updates[stage].validated(self.means)
            for batch in self.batches.epoch(epoch, skip=max(0, self.step - begin)):
                self._take_step(epoch, stage, batch)
                last_of_run = self.step == self.batches.num_steps
                due = last_of_run or (self.step == end and not self.config.sanity_overfit)
                if due or self.step % self.config.val_freq == 0:
                    self.means = validate(self.step)
                    if not last_of_run:  # the adapter of the last step is kept as it was validated
                        self.updates[stage].validated(self.means)
                        self.guard.after_validation(self.step, self.means["dice"])
                    keep()
            if epoch % self.config.save_freq == 0 and not self.config.sanity_overfit:
                save(f"checkpoint_epoch_{epoch}")

    def _take_step(self, epoch: int, stage: str, batch: TrainBatch) -> None:
        """One step at its learning rate."""
        rate = self.guard.rate_factor * staged_warm_cosine(self.step, self._stages, self.config.warmup_share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.step += 1
        figures = self.guard.step(self.step, self.updates[stage], batch)
        self.monitor.log_step(self.step, figures | {"train/learning_rate": rate, "train/epoch": float(epoch)})

    def _stage(self, epoch: int) -> str:
        return self.config.stage_of_epoch(epoch, self.batches.num_epochs)

    def _plan_stages(self) -> list[tuple[int, float]]:
        """Number of steps and peak learning rate of each stage."""
        by_stage = groupby(range(1, self.batches.num_epochs + 1), self._stage)
        return [
            (sum(map(self.batches.num_batches, group)), self.config.rate_of_stage(stage))
            for stage, group in by_stage
        ]

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on."""
        return {
            "step": self.step,
            "means": self.means,
            "values": self.learner.values(),
            "moments": optimizer_moments(self.optimizer, self.learner.trainable),
            "guard": self.guard.state_dict(),
            "updates": {stage: update.state_dict() for stage, update in self.updates.items()},
            "random": random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.step, self.means = state["step"], dict(state["means"])
        self.learner.restore(state["values"])
        restore_moments(self.optimizer, self.learner.trainable, state["moments"])
        self.guard.load_state_dict(state["guard"])
        for stage, update in self.updates.items():
            update.load_state_dict(state["updates"][stage])
        restore_random_state(state["random"])
