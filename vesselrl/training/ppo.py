"""One PPO update on a batch of images: sample masks, score them, credit pixels, clipped passes.

Left out on purpose, because an episode is a single mask: returns over time, a value network and generalised
advantage estimation. The order of a step:

1. encode the images and decode their mask logits (this pass also serves the first update);
2. draw K correlated masks per image, keep the per-pixel log-probabilities of both actions;
3. score them: exact credit for overlap, region credit for topology, length and a user's reward;
4. add both up, in units of the reward: the advantages;
5. at least two passes of the clipped loss, with a KL term to the frozen starting policy.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesselrl.evaluation.run_settings import post_processing
from vesselrl.experiment.config import TrainConfig
from vesselrl.models.lora import adapter_delta_norm
from vesselrl.models.processing import Sa2VAInputs
from vesselrl.scoring.metrics import dice_from_counts
from vesselrl.scoring.rewards import Reward
from vesselrl.training import checks
from vesselrl.training.batches import TrainBatch
from vesselrl.training.credit import Credit, assign_credit
from vesselrl.training.goals import Goals
from vesselrl.training.policy import MaskPolicy, sample_masks
from vesselrl.training.ppo_math import (
    action_logprobs,
    bernoulli_entropy,
    bernoulli_kl,
    clipped_policy_loss,
    success_normalised,
    undecided_weight,
)


@dataclass
class Rollout:
    """What one batch of sampled masks leaves behind; lists have one entry per image.

    Attributes:
        choice: (B, P) candidate mask that was used, kept for all passes.
        masks: (K, H, W) bool. old_logprobs: (2, H, W), of off and on. weight: (H, W).
        credit: (H, W), R(on) - R(off), scaled by `success_normalised` where that is asked for.
        share_on: (K, H, W) drawn actions, or (1, H, W) where both count as often as they would be drawn.
        metrics: flat figures for the log.
        reward_varies: whether any pixel earned anything.
    """

    choice: Tensor
    masks: list[Tensor] = field(default_factory=list)
    old_logprobs: list[Tensor] = field(default_factory=list)
    credit: list[Tensor] = field(default_factory=list)
    share_on: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    reward_varies: bool = True


class PPOUpdate:
    """Holds what outlives a step: policy, optimizer, reward, random generators and the scoring threads."""

    def __init__(
        self, policy: MaskPolicy, optimizer: torch.optim.Optimizer, reward: Reward, config: TrainConfig
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.reward = reward
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.rng = region_rng(config.seed)
        self.pool = ThreadPoolExecutor(max_workers=config.num_workers)
        self.post = post_processing(config.to_dict())
        self.goals = Goals(reward, config.floors) if config.objective == "constrained" else None
        self.checked = False

    def step(self, batch: TrainBatch) -> dict[str, float]:
        """One rollout and its passes; returns the figures of the step.

        Raises:
            LearningError: at the first step, when a self-check fails; later, when a loss is not finite.
        """
        started = time.perf_counter()
        self.policy.peft_model.eval()  # no dropout: the ratio must be exactly 1 before the first update
        start = None if self.checked else self._begin()
        inputs = self.policy.prepare(batch.images)
        decoded = self.policy.decode(inputs, batch.keys)
        choice = decoded.best()
        logits = self.policy.logits(decoded, choice, inputs)
        rollout = self.collect(batch, logits, choice)
        if rollout.reward_varies:
            reference = self.policy.reference_logits(inputs, batch.keys, choice)
            if start is not None:
                self._check_before(batch, inputs, rollout, reference)
            for number in range(self.config.num_passes):
                if number > 0:
                    logits = self.policy.logits(self.policy.decode(inputs, batch.keys), choice, inputs)
                figures = self._update(logits, rollout, reference)
                if number == 0:
                    rollout.metrics["train/first_ratio_gap"] = figures["ratio_gap"]
                if start is not None and not self.checked:
                    checks.check_changed(adapter_delta_norm(self.policy.peft_model, start))
                    self.checked = True
            rollout.metrics.update({f"train/{name}": value for name, value in figures.items()})
        else:
            # Nothing to learn from: an update would only add weight decay and noise.
            rollout.metrics["train/grad_norm"] = 0.0
        rollout.metrics["time/step"] = time.perf_counter() - started
        return rollout.metrics

    def validated(self, means: Mapping[str, float]) -> None:
        """Sets the prices of the constrained objective."""
        if self.goals is not None:
            self.goals.validated(means)

    def state_dict(self) -> dict[str, Any]:
        """Self-checks, reference policy, random generators and prices."""
        return {
            "checked": self.checked,
            "reference": self.policy.reference_values,
            "masks_drawn": self.generator.get_state(),
            "regions_chosen": self.rng.bit_generator.seed_seq.n_children_spawned,
            "prices": {} if self.goals is None else self.goals.multipliers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.checked = state["checked"]
        self.policy.freeze_reference(state["reference"])
        self.generator.set_state(state["masks_drawn"])
        self.rng = region_rng(self.config.seed, state["regions_chosen"])
        if self.goals is not None:
            self.goals.multipliers = dict(state["prices"])

    def _begin(self) -> dict[str, Tensor]:
        """The policy of this moment becomes the reference; returns its trainable values."""
        self.policy.freeze_reference()
        return self.policy.values()

    def collect(self, batch: TrainBatch, logits: list[Tensor], choice: Tensor) -> Rollout:
        """Samples, scores and credits K masks per image; no gradient flows here."""
        s, rollout = self.config, Rollout(choice)
        with torch.no_grad():
            for image_logits in logits:
                masks = sample_masks(
                    image_logits, s.num_samples, s.correlation_px, s.temperature, self.generator
                )
                rollout.masks.append(masks)
                rollout.old_logprobs.append(action_logprobs(image_logits, s.temperature))
                rollout.weight.append(undecided_weight(image_logits, s.temperature))
            started = time.perf_counter()
            credits = self._score(batch, rollout.masks, logits)
            rollout.metrics["time/reward"] = time.perf_counter() - started
            rollout.metrics.update(rollout_figures(credits))
            if self.goals is not None:
                rollout.metrics.update(self.goals.figures())
            rollout.reward_varies = any(c.overlap.any() or c.structure.any() for c in credits)
            for credit, masks, old in zip(credits, rollout.masks, rollout.old_logprobs, strict=True):
                on = old[1].exp()
                total = credit.overlap + s.structure_weight * credit.structure
                earned = torch.from_numpy(total).to(on.device)
                rollout.credit.append(success_normalised(earned, on) if s.advantage == "success" else earned)
                rollout.share_on.append(on[None] if s.pixel_action == "expected" else masks.float())
        return rollout

    def _score(self, batch: TrainBatch, masks: list[Tensor], logits: list[Tensor]) -> list[Credit]:
        samples = [one.cpu().numpy() for one in masks]
        # Masks are used as the model gives them: the temperature is for drawing alone, not for closing gaps.
        probabilities = [torch.sigmoid(one.float()).cpu().numpy() for one in logits]
        rewarded, seeds = self.goals or self.reward, self.rng.spawn(len(samples))
        images = zip(samples, probabilities, batch.truths, batch.topologies, seeds, strict=True)
        jobs = [
            self.pool.submit(assign_credit, m, p, t, top, rewarded, self.post, self.config.num_regions, seed)
            for m, p, t, top, seed in images
        ]
        return [job.result() for job in jobs]

    def _update(self, logits: list[Tensor], rollout: Rollout, reference: list[Tensor]) -> dict[str, float]:
        loss, figures = self._loss(logits, rollout, reference)
        checks.check_finite(loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not self.checked:
            checks.check_gradients(self.policy.peft_model)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.trainable.values(), self.config.max_grad_norm)
        self.optimizer.step()
        return figures | {"loss": float(loss.detach()), "grad_norm": float(norm)}

    def _loss(
        self, logits: list[Tensor], rollout: Rollout, reference: list[Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        s, total, rows = self.config, 0.0, []
        for k, image_logits in enumerate(logits):
            weight = rollout.weight[k]
            policy = clipped_policy_loss(
                action_logprobs(image_logits, s.temperature), rollout.old_logprobs[k], rollout.credit[k],
                rollout.share_on[k], weight, s.clip,
            )  # fmt: skip
            kl = bernoulli_kl(image_logits, reference[k], weight, s.temperature)
            entropy = bernoulli_entropy(image_logits, weight, s.temperature)
            total = total + policy.loss + s.kl_coef * kl - s.entropy_coef * entropy
            rows.append(
                {
                    "policy_loss": policy.loss,
                    "approx_kl": policy.approx_kl,
                    "clipfrac": policy.clipfrac,
                    "ratio_gap": policy.ratio_gap,
                    "kl_ref": kl,
                    "entropy": entropy,
                }
            )
        means = {name: float(torch.stack([row[name].detach() for row in rows]).mean()) for name in rows[0]}
        means["ratio_gap"] = max(float(row["ratio_gap"]) for row in rows)
        return total / len(logits), means

    def _check_before(
        self, batch: TrainBatch, inputs: Sa2VAInputs, rollout: Rollout, reference: list[Tensor]
    ) -> None:
        """Checks that need no update: a second pass must give ratio 1 and KL 0, the image must matter."""
        for masks in rollout.masks[:1]:
            checks.check_samples_differ(masks)
        with torch.no_grad():
            again = self.policy.logits(self.policy.decode(inputs, batch.keys), rollout.choice, inputs)
            _, figures = self._loss(again, rollout, reference)
            checks.check_first_ratio(figures["ratio_gap"], abs(figures["kl_ref"]))
            negative = self.policy.prepare([255 - image for image in batch.images])
            checks.check_seg_embedding(
                self.policy.model.seg_prompts(inputs), self.policy.model.seg_prompts(negative)
            )


def region_rng(seed: int, num_spawned: int = 0) -> np.random.Generator:
    """The generator whose children choose regions, one child per image, after so many of them."""
    return np.random.default_rng(np.random.SeedSequence([seed, 2], n_children_spawned=num_spawned))


def rollout_figures(credits: list[Credit]) -> dict[str, float]:
    """Log figures of a rollout: reward, its terms, their spread within an image and groups without spread."""
    figures = {
        "train/reward": float(np.mean([c.rewards.mean() for c in credits])),
        "train/greedy_reward": float(np.mean([c.greedy_reward for c in credits])),
        "train/reward_std": float(np.mean([c.rewards.std() for c in credits])),
        "train/zero_variance_groups": float(np.mean([c.rewards.std() < 1e-8 for c in credits])),
        "train/regions_scored": float(np.mean([c.num_regions for c in credits])),
        "train/dice": float(np.mean([dice_from_counts(*c.greedy_counts) for c in credits])),
        "train/foreground": foreground_ratio([c.greedy_counts for c in credits]),
    }
    for name in credits[0].terms:
        figures[f"train/reward/{name}"] = float(np.mean([c.terms[name].mean() for c in credits]))
        figures[f"train/reward_std/{name}"] = float(np.mean([c.terms[name].std() for c in credits]))
    return figures


def foreground_ratio(counts: list[tuple[int, int, int]]) -> float:
    """Predicted over true vessel pixels of a batch, from tp, fp, fn of its images; 1 where both are 0."""
    tp, fp, fn = np.sum(counts, axis=0)
    if tp + fn == 0:
        return 1.0 if fp == 0 else float("inf")
    return float((tp + fp) / (tp + fn))
