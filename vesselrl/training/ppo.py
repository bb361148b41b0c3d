"""One PPO update on a batch of images: sample masks, score them, credit pixels, clipped passes.

Left out on purpose, because an episode is a single mask: returns over time, a value network and generalised
advantage estimation. The order of a step:

1. encode the images and decode their mask logits (this pass also serves the first update);
2. draw K correlated masks per image, keep their per-pixel log-probabilities;
3. score them: exact credit for overlap, region credit for topology, length and a user's reward;
4. scale each term's credit on its own, add them up: the advantages;
5. at least two passes of the clipped loss, with a KL term to the frozen starting policy.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vesselrl.experiment.config import TrainConfig
from vesselrl.models.lora import adapter_delta_norm
from vesselrl.models.processing import Sa2VAInputs
from vesselrl.scoring.rewards import Reward
from vesselrl.training import checks
from vesselrl.training.batches import TrainBatch
from vesselrl.training.credit import Credit, assign_credit
from vesselrl.training.policy import MaskPolicy, log_probs, sample_masks
from vesselrl.training.ppo_math import bernoulli_entropy, bernoulli_kl, clipped_policy_loss, undecided_weight


@dataclass
class Rollout:
    """What one batch of sampled masks leaves behind; lists have one entry per image.

    Attributes:
        choice: (B, P) candidate mask that was used, kept for all passes.
        masks: (K, H, W) bool. old_logprob, advantage: (K, H, W) float. weight: (H, W) float.
        metrics: flat figures for the log.
        reward_varies: whether any pixel earned anything.
    """

    choice: Tensor
    masks: list[Tensor] = field(default_factory=list)
    old_logprob: list[Tensor] = field(default_factory=list)
    advantage: list[Tensor] = field(default_factory=list)
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
        self.rng = np.random.default_rng([config.seed, 2])
        self.pool = ThreadPoolExecutor(max_workers=config.num_workers)
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
                rollout.old_logprob.append(log_probs(image_logits, masks, s.temperature))
                rollout.weight.append(undecided_weight(image_logits, s.temperature))
            started = time.perf_counter()
            greedy = [(image_logits > 0).cpu().numpy() for image_logits in logits]
            samples = [masks.cpu().numpy() for masks in rollout.masks]
            seeds = self.rng.spawn(len(samples))
            jobs = [
                self.pool.submit(assign_credit, m, g, t, top, self.reward, s.num_regions, seed)
                for m, g, t, top, seed in zip(
                    samples, greedy, batch.truths, batch.topologies, seeds, strict=True
                )
            ]
            credits = [job.result() for job in jobs]
            rollout.metrics["time/reward"] = time.perf_counter() - started
            rollout.metrics.update(reward_figures(credits))
            scales = credit_scales(credits, [w.cpu().numpy() for w in rollout.weight])
            rollout.reward_varies = any(scale > 0 for scale in scales)
            for credit, masks, image_logits in zip(credits, rollout.masks, logits, strict=True):
                total = scaled_credit(credit, scales, self.reward.structure_share, s.structure_weight)
                probability = torch.sigmoid(image_logits.float() / s.temperature)
                # The action minus its expectation: each pixel is its own baseline.
                surprise = masks.float() - probability
                rollout.advantage.append(surprise * torch.from_numpy(total).to(surprise.device))
        return rollout

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
            logprob = log_probs(image_logits, rollout.masks[k], s.temperature)
            policy = clipped_policy_loss(
                logprob, rollout.old_logprob[k], rollout.advantage[k], weight, s.clip
            )
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
            swapped = self.policy.prepare(batch.images[::-1])
            checks.check_seg_embedding(
                self.policy.model.seg_prompts(inputs), self.policy.model.seg_prompts(swapped)
            )


def credit_scales(credits: list[Credit], weights: list[np.ndarray]) -> tuple[float, float]:
    """Root mean square of overlap and structure credit over the batch: what one typical pixel earns.

    Overlap is weighted by the undecidedness of the pixel, structure averaged over the credited pixels; 0 when
    a term earned nothing anywhere.
    """
    squares = sum(float((c.overlap**2 * w).sum()) for c, w in zip(credits, weights, strict=True))
    mass = sum(float(w.sum()) * len(c.overlap) for c, w in zip(credits, weights, strict=True))
    overlap = (squares / mass) ** 0.5 if mass > 0 else 0.0
    credited = sum(int(np.count_nonzero(c.structure)) for c in credits)
    structure = (sum(float((c.structure**2).sum()) for c in credits) / credited) ** 0.5 if credited else 0.0
    return overlap, structure


def scaled_credit(
    credit: Credit, scales: tuple[float, float], structure_share: float, structure_weight: float
) -> np.ndarray:
    """(K, H, W) overlap and structure credit, each divided by its own scale, weighted and added.

    (1 - share) * overlap + structure_weight * share * structure, so that the reward's weights act on the
    gradient.
    """
    total = np.zeros_like(credit.overlap)
    overlap, structure = scales
    if overlap > 0:
        total += (1 - structure_share) / overlap * credit.overlap
    if structure > 0:
        total += structure_weight * structure_share / structure * credit.structure
    return total


def reward_figures(credits: list[Credit]) -> dict[str, float]:
    """Log figures of a rollout: reward, its terms, their spread within an image and groups without spread."""
    figures = {
        "train/reward": float(np.mean([c.rewards.mean() for c in credits])),
        "train/greedy_reward": float(np.mean([c.greedy_reward for c in credits])),
        "train/reward_std": float(np.mean([c.rewards.std() for c in credits])),
        "train/zero_variance_groups": float(np.mean([c.rewards.std() < 1e-8 for c in credits])),
        "train/regions_scored": float(np.mean([c.num_regions for c in credits])),
    }
    for name in credits[0].terms:
        figures[f"train/reward/{name}"] = float(np.mean([c.terms[name].mean() for c in credits]))
        figures[f"train/reward_std/{name}"] = float(np.mean([c.terms[name].std() for c in credits]))
    return figures
