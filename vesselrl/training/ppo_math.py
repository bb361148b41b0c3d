"""Tensor maths of PPO for a policy of Bernoulli pixels, and how its masks are sampled; H x W px, K masks.

The policy loss is a sum over pixels in units of the reward, so that an image weighs as much as there is to
gain on it. Divergences and entropy are divided by the Bernoulli variance 4p(1-p) summed over pixels, because
confident pixels carry none.
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# The loss is divided by it: a perfect mask earns about ten points of reward more than an empty one.
REWARD_SCALE = 10.0
# Beyond it a ratio has left every clip range; exp overflows for actions that were all but impossible.
MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """One image's clipped loss and its diagnostics, all scalars."""

    loss: Tensor  # to minimise, in units of REWARD_SCALE
    approx_kl: Tensor  # KL(old policy || policy), at least 0
    clipfrac: Tensor  # share of the credited actions, by probability, whose ratio left [1 - clip, 1 + clip]
    ratio_gap: Tensor  # largest |ratio - 1|


def bernoulli_variance(logits: Tensor, temperature: float) -> Tensor:
    """(H, W) variance of a pixel, 4 p (1 - p), scaled to 1 at p = 1/2."""
    probability = torch.sigmoid(logits.detach().float() / temperature)
    return 4 * probability * (1 - probability)


def action_logprobs(logits: Tensor, temperature: float) -> Tensor:
    """(2, H, W) log-probabilities of a pixel's actions off and on, log sigmoid(-+ logit / temperature)."""
    scaled = logits.float() / temperature
    return functional.logsigmoid(torch.stack([-scaled, scaled]))


def inverse_probability_weighted(difference: Tensor, on: Tensor, floor: float = 0.02) -> Tensor:
    """Difference reward over the probability q of the action that it favours, p where positive, else 1 - p.

    A Bernoulli pixel's gradient, p (1 - p) (R(on) - R(off)), vanishes where the policy is sure and wrong.
    Weighted by 1 / q it becomes (1 - q) (R(on) - R(off)): the gradient of the log-likelihood of the better
    action. Both are (H, W), `on` is p under the old policy; `floor`, the smallest q, bounds the advantage.
    """
    return difference / torch.where(difference > 0, on, 1 - on).clamp(min=floor)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    difference: Tensor,
    action_weight: Tensor,
    variance: Tensor,
    clip: float,
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017) per pixel and action, -min(ratio A, clip(ratio) A).

    A is the counterfactual advantage (COMA, Foerster et al. 2018), what an action earns more than the old
    policy does on average: (1 - p) (R(on) - R(off)) for on, -p (R(on) - R(off)) for off. With p as
    `action_weight` this is the all-action policy gradient (Asadi et al. 2017; Ciosek & Whiteson 2018).

    The log-probabilities, now and when the masks were sampled, are (2, H, W), `difference` = R(on) - R(off)
    and `variance`, of the old policy, which normalises the divergence, (H, W), `action_weight`, of on, (K, H,
    W).
    """
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    on = old_logprobs[1].exp()
    advantages, weights = (-on * difference, (1 - on) * difference), (1 - action_weight, action_weight)
    surrogate, credited, outside = 0.0, 0.0, 0.0
    for action, (advantage, weight) in enumerate(zip(advantages, weights, strict=True)):
        gain = torch.minimum(ratio[action] * advantage, clipped[action] * advantage)
        surrogate = surrogate + (weight * gain).sum((1, 2)).mean()
        with torch.no_grad():
            counted = weight * (difference != 0)
            credited = credited + counted.sum()
            outside = outside + (counted * ((ratio[action] - 1).abs() > clip)).sum()
    with torch.no_grad():
        approx_kl = -(old_logprobs.exp() * log_ratio).sum() / (variance.sum() + 1)
        ratio_gap = (ratio - 1).abs().max()
    return PolicyLoss(-surrogate / REWARD_SCALE, approx_kl, outside / credited.clamp(min=1), ratio_gap)


def bernoulli_kl(logits: Tensor, ref_logits: Tensor, variance: Tensor, temperature: float) -> Tensor:
    """KL(policy || reference), per pixel p (log p - log q) + (1 - p)(log(1 - p) - log(1 - q)); scalar."""
    now, ref = logits.float() / temperature, ref_logits.float() / temperature
    on = torch.sigmoid(now)
    divergence = on * (functional.logsigmoid(now) - functional.logsigmoid(ref))
    divergence = divergence + (1 - on) * (functional.logsigmoid(-now) - functional.logsigmoid(-ref))
    return divergence.sum() / (variance.sum() + 1)


def bernoulli_entropy(logits: Tensor, variance: Tensor, temperature: float) -> Tensor:
    """Entropy of the policy in nats; scalar."""
    scaled = logits.float() / temperature
    on = torch.sigmoid(scaled)
    entropy = -(on * functional.logsigmoid(scaled) + (1 - on) * functional.logsigmoid(-scaled))
    return entropy.sum() / (variance.sum() + 1)


def sample_masks(
    logits: Tensor, num_samples: int, correlation_px: float, temperature: float, generator: torch.Generator
) -> Tensor:
    """Samples K masks of one image, each pixel Bernoulli(sigmoid(logit / temperature)), neighbours together.

    (H, W) logits give (K, H, W) bool masks, up to rounding the same on every device, as the field is made on
    the CPU. `correlation_px` is the deviation of the Gaussian that smooths the random field, 0: independent
    pixels.
    """
    field = gaussian_field(num_samples, logits.shape, correlation_px, generator).to(logits.device)
    # P(field < quantile of p) = p for a standard normal field.
    uniform = torch.special.ndtr(field)
    return uniform < torch.sigmoid(logits.detach().float() / temperature)


def gaussian_field(
    count: int, shape: tuple[int, int], correlation_px: float, generator: torch.Generator
) -> Tensor:
    """(count, H, W) smooth random fields, exactly standard normal at every pixel, also at the borders."""
    height, width = shape
    if correlation_px <= 0:
        return torch.randn(count, height, width, generator=generator)
    radius = max(1, round(3 * correlation_px))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / correlation_px) ** 2)
    kernel /= np.sqrt(np.square(kernel).sum())
    noise = torch.randn(count, height + 2 * radius, width + 2 * radius, generator=generator)
    # Several times as fast as two one-dimensional convolutions of torch on the same core.
    smooth = (cv2.sepFilter2D(one, cv2.CV_32F, kernel, kernel) for one in noise.numpy())
    return torch.from_numpy(np.stack([*smooth])[:, radius:-radius, radius:-radius])
