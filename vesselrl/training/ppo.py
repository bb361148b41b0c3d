"""One PPO update on a batch of images, without value network and GAE: an episode is a single mask.

1. encode the images and decode their mask logits (this pass also serves the first update);
2. sample K correlated masks per image, keep the per-pixel log-probabilities of both actions;
3. score them; difference rewards: exact for overlap, by flipped regions for topology, length, own terms;
4. at least two passes of the clipped loss, with a KL term to the frozen starting policy.
"""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from vesselrl.data.dataset import TrainBatch
from vesselrl.errors import LearningError
from vesselrl.experiment.config import TrainConfig
from vesselrl.scoring.overlap import dice_from_counts, precision_from_counts, recall_from_counts
from vesselrl.scoring.postprocessing import post_processing
from vesselrl.scoring.rewards import Reward
from vesselrl.training import ppo_math, processes
from vesselrl.training.credit import ConstrainedReward, Credit, RolloutImage, assign_credit
from vesselrl.training.health import check_moved, not_finite, take_step
from vesselrl.training.policy import MaskPolicy

# Fields of PolicyLoss, then the two other terms of the loss.
LOSS_METRICS = ("policy_loss", "approx_kl", "clipfrac", "ratio_gap", "kl_ref", "entropy")
BACKTRACKS = 6  # of a step that is too long; the last is all the way
TOLERANCE = 1e-4  # of the ratio and the KL before the first update, and of what must not be 0


class Sampled(NamedTuple):
    """The sampled masks of one image, and the constants of the passes over them."""

    masks: Tensor  # (K, H, W) bool
    old_logprobs: Tensor  # (2, H, W), of off and on
    difference: Tensor  # (H, W), R(on) - R(off), inverse-probability weighted where that is asked for
    action_weight: Tensor  # (K, H, W) sampled actions, or (1, H, W) the probability of on
    variance: Tensor  # (H, W)


class PPOUpdate:
    """PPO steps: policy, optimizer, reward, and the threads that score masks."""

    def __init__(self, policy: MaskPolicy, optimizer: Optimizer, reward: Reward, config: TrainConfig) -> None:
        self.policy = policy
        self.optimizer = optimizer
        is_constrained = config.ppo.objective == "constrained"
        self.constrained = ConstrainedReward(reward, config.lower_bounds) if is_constrained else None
        self.reward = self.constrained or reward
        self.settings = config.ppo
        self.max_grad_norm = config.optim.max_grad_norm
        self.seed = config.optim.seed
        self.num_rollouts = 0
        # Images wait for their masks, and so are in a pool of their own.
        self.pool, mask_pool = (ThreadPoolExecutor(config.run.num_workers) for _ in range(2))
        # How often a user's function is called must not depend on which thread fails first.
        self.map_masks = map if config.reward.reward_fn else mask_pool.map
        self.post = post_processing(config.to_dict())
        self.checked = False

    def step(self, batch: TrainBatch) -> dict[str, float]:
        """One rollout, its passes and their metrics; LearningError where a first self-check fails."""
        started = time.perf_counter()
        policy, is_first = self.policy, not self.checked
        self.num_rollouts += 1
        policy.peft_model.eval()  # no dropout: the ratio must be exactly 1 before the first update
        if is_first:
            policy.freeze_reference()
        inputs = policy.prepare(batch.images)
        decoded = policy.decode(inputs, batch.keys)
        choice = decoded.best()  # the candidate masks, kept for all passes
        logits = policy.logits(decoded, choice, inputs)
        # Of masks that are not, all would be empty; fetched from a GPU together.
        if processes.any_of(not bool(torch.stack([one.isfinite().all() for one in logits]).all())):
            raise not_finite("The logits are not finite", 0.0)
        logits = batch.inside(logits)
        sampled = self.sample(batch, logits)
        # While threads score the masks.
        reference = batch.inside(policy.reference_logits(inputs, batch.keys, choice))
        images, metrics, reward_varies = self.collect(batch, logits, *sampled)
        # The largest in size, with its sign.
        reward = max((metrics[f"train/{n}"] for n in ("reward", "greedy_reward", "reward_std")), key=abs)
        if reward_varies:
            measure = partial(self._measure, batch, inputs, choice, (images, reference))
            if is_first:
                with torch.no_grad():
                    self._check_rollout(batch, images[0].masks, measure()[1])
            loss, update = measure(logits)
            metrics["train/first_ratio_gap"] = update["ratio_gap"]
            for number in range(1, self.settings.num_passes + 1):
                start = policy.values()
                shared = policy, self.optimizer, loss, self.max_grad_norm
                value, norm = take_step(*shared, is_first=not self.checked, reward=reward)
                if not self.checked:
                    check_moved(policy.distance(policy.reference_values))
                    self.checked = True
                with torch.set_grad_enabled(number < self.settings.num_passes):
                    loss, update = measure()
                if not update["approx_kl"] <= self.settings.target_kl:  # nor where it is nan
                    update = self._shorten(start, update, measure)
                    break
            update |= {"loss": value, "grad_norm": norm}
            metrics |= {f"train/{name}": value for name, value in update.items()}
        else:
            # Nothing to learn from: an update would only add weight decay and noise.
            metrics["train/grad_norm"] = 0.0
        metrics["time/step"] = time.perf_counter() - started
        return metrics

    @torch.no_grad()
    def sample(self, batch: TrainBatch, logits: list[Tensor]) -> tuple[list[Tensor], list[Future[Credit]]]:
        """K masks per image, and what threads will have found of them, which begin to score and credit."""
        s = self.settings
        sampling = (s.num_samples, s.correlation_px, s.temperature)
        seeds = (int(one.generate_state(1, np.uint64)[0]) for one in self._seeds(batch, stream=1))
        noise = (torch.Generator().manual_seed(seed) for seed in seeds)
        masks = [ppo_math.sample_masks(one, *sampling, next(noise)) for one in logits]
        samples = [one.cpu().numpy() for one in masks]
        # Masks are used as the model gives them: the temperature is for sampling alone, not for closing gaps.
        probabilities = [torch.sigmoid(one.float()).cpu().numpy() for one in logits]
        generators = map(np.random.default_rng, self._seeds(batch, stream=2))
        images = map(RolloutImage, samples, probabilities, batch.truths, batch.topologies)
        shared = (self.reward, self.post, s.num_regions)
        return masks, [
            self.pool.submit(assign_credit, image, *shared, rng, self.map_masks)
            for image, rng in zip(images, generators, strict=True)
        ]

    @torch.no_grad()
    def collect(
        self, batch: TrainBatch, logits: list[Tensor], masks: list[Tensor], scoring: list[Future[Credit]]
    ) -> tuple[list[Sampled], dict[str, float], bool]:
        """Waits for the scores of `sample`; also gives their metrics, and whether any pixel earned."""
        started = time.perf_counter()
        credits = [job.result() for job in scoring]
        took = time.perf_counter() - started
        scored = [replace(one, overlap=None, structure=None) for one in credits]  # maps are large
        metrics = rollout_metrics(processes.gather(scored if batch.weight else [])) | {"time/reward": took}
        if self.constrained:
            metrics |= {f"train/price/{name}": value for name, value in self.constrained.multipliers.items()}
        images = [self._sampled(*one) for one in zip(logits, masks, credits, strict=True)]
        earned = any(c.overlap.any() or c.structure.any() for c in credits)
        return images, metrics, processes.any_of(earned)

    def _seeds(self, batch: TrainBatch, stream: int) -> list[np.random.SeedSequence]:
        """Random numbers of each image, by seed, rollout and place, however many processes share a step."""
        keys = ([self.seed, stream, self.num_rollouts, place] for place in batch.places)
        return [*map(np.random.SeedSequence, keys)]

    def _sampled(self, logits: Tensor, masks: Tensor, credit: Credit) -> Sampled:
        s = self.settings
        old_logprobs = ppo_math.action_logprobs(logits, s.temperature)
        on = old_logprobs[1].exp()
        difference = torch.from_numpy(credit.overlap + s.structure_weight * credit.structure).to(on.device)
        if s.advantage == "success":
            difference = ppo_math.inverse_probability_weighted(difference, on)
        action_weight = on[None] if s.pixel_action == "expected" else masks.float()
        variance = ppo_math.bernoulli_variance(logits, s.temperature)
        return Sampled(masks, old_logprobs, difference, action_weight, variance)

    def _loss(
        self, logits: list[Tensor], images: list[Sampled], reference: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Mean loss of the images, and of each the values of LOSS_METRICS."""
        s, total, rows = self.settings, 0.0, []
        for now, image, ref in zip(logits, images, reference, strict=True):
            logprobs = ppo_math.action_logprobs(now, s.temperature)
            policy = ppo_math.clipped_policy_loss(logprobs, *image[1:], s.clip)
            kl = ppo_math.bernoulli_kl(now, ref, image.variance, s.temperature)
            entropy = ppo_math.bernoulli_entropy(now, image.variance, s.temperature)
            total = total + policy.loss + s.kl_coef * kl - s.entropy_coef * entropy
            rows.append(torch.stack([*policy, kl, entropy]).detach())
        return total / len(logits), [*torch.stack(rows).cpu()]

    def _measure(
        self, batch: TrainBatch, inputs: Any, choice: Tensor, rollout: tuple, logits: list | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """This process's part of the loss by the present weights, and the means of LOSS_METRICS of all."""
        decode = self.policy.decode
        logits = logits or batch.inside(self.policy.logits(decode(inputs, batch.keys), choice, inputs))
        loss, rows = self._loss(logits, *rollout)
        table = torch.stack(processes.gather(rows if batch.weight else []))
        metrics = dict(zip(LOSS_METRICS, table.mean(0).tolist(), strict=True))
        metrics["ratio_gap"] = float(table[:, LOSS_METRICS.index("ratio_gap")].max())  # the largest
        return loss * batch.weight, metrics

    @torch.no_grad()
    def _shorten(self, start: dict, update: dict, measure: Callable[[], tuple]) -> dict[str, float]:
        """Shortens the step from `start` until the KL is at most `target_kl`; the metrics there.

        The backtracking line search of TRPO (Schulman et al. 2015); the optimizer's moments stay.
        """
        end, part, limit = self.policy.values(), 1.0, self.settings.target_kl
        for left in reversed(range(BACKTRACKS)):
            # The KL grows with the square of a step.
            part *= min(0.5, math.sqrt(limit / update["approx_kl"])) if left else 0
            self.policy.restore({name: one.lerp(end[name], part) for name, one in start.items()})
            update = measure()[1]
            if update["approx_kl"] <= limit:
                break
        return update

    def _check_rollout(self, batch: TrainBatch, masks: Tensor, metrics: dict[str, float]) -> None:
        """Before any update samples differ, a second pass has ratio 1 and KL 0, and the image matters."""
        policy = self.policy
        if batch.first == 0 and bool((masks[1:] == masks[:1]).all()):
            fault = f"All {len(masks)} sampled masks of the first image are equal"
            sure = "the policy is completely sure of every pixel. Raise --temperature or --num_samples."
            raise LearningError(f"{fault}: {sure}")
        if metrics["ratio_gap"] > TOLERANCE:
            raise LearningError(
                f"The ratio before the first update is off by {metrics['ratio_gap']:.2g} (allowed "
                f"{TOLERANCE:g}): two passes over the same image differ. Something random is active in the "
                "model (dropout, stochastic depth); turn it off."
            )
        if abs(metrics["kl_ref"]) > TOLERANCE:
            raise LearningError(
                f"The KL to the reference is {metrics['kl_ref']:.2g} before the first update, not 0: "
                "the reference is not the starting policy. Start the run again from a saved adapter."
            )
        change = policy.image_effect(batch.images)
        if not change > TOLERANCE:
            raise LearningError(
                f"The negative of an image changes the [SEG] embedding by only {change:.2g}: the "
                "language model does not see the image. Check that <image> is in --prompt and that the "
                "tokenizer belongs to the checkpoint."
            )

    def state_dict(self) -> dict[str, Any]:
        """Self-checks, reference policy, number of rollouts and multipliers."""
        return {
            "checked": self.checked,
            "reference": self.policy.reference_values,
            "num_rollouts": self.num_rollouts,
            "multipliers": self.constrained and self.constrained.multipliers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores self-checks, reference policy, number of rollouts and multipliers."""
        self.checked = state["checked"]
        self.policy.freeze_reference(state["reference"])
        self.num_rollouts = state["num_rollouts"]
        if self.constrained and state["multipliers"]:  # none where another objective had been set
            self.constrained.multipliers = dict(state["multipliers"])


def rollout_metrics(credits: list[Credit]) -> dict[str, float]:
    """Reward of a rollout, its terms, their spread within an image, and groups of masks without spread."""
    tp, fp, fn = np.transpose([c.greedy_counts for c in credits])
    empty_ratio = float("inf") if fp.any() else 1.0
    metrics = {
        "reward": [c.rewards.mean() for c in credits],
        "greedy_reward": [c.greedy_reward for c in credits],
        "reward_std": [c.rewards.std() for c in credits],
        "zero_variance_groups": [c.rewards.std() < 1e-8 for c in credits],
        "regions_scored": [c.num_regions for c in credits],
        "dice": dice_from_counts(tp, fp, fn),
        "recall": recall_from_counts(tp, fn, empty=1.0),
        "precision": precision_from_counts(tp, fp, fn),
        # Predicted over true vessel area.
        "foreground": (tp + fp).sum() / (tp + fn).sum() if (tp + fn).any() else empty_ratio,
    }
    for name in dict.fromkeys(name for credit in credits for name in credit.terms):
        having = [credit for credit in credits if name in credit.terms]  # the user's function may have failed
        metrics[f"reward/{name}"] = [c.terms[name].mean() for c in having]
        metrics[f"reward_std/{name}"] = [c.terms[name].std() for c in having]
    return {f"train/{name}": float(np.mean(values)) for name, values in metrics.items()}
