"""Pure tensor maths of the PPO update; H x W pixels, K sampled masks.

One episode is one step (an image, a mask, a reward), so there are no returns to discount and no value head:
the counterfactual credit of `credit.py` is its own baseline. Sums over pixels are divided by the number of
undecided pixels, because confident ones carry no gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class PolicyLoss(NamedTuple):
    """One image's clipped loss and its diagnostics, all scalars.

    Attributes:
        loss: to minimise.
        approx_kl: mean of (ratio - 1) - log ratio over undecided pixels, at least 0.
        clipfrac: share of credited pixels whose ratio left [1 - clip, 1 + clip].
        ratio_gap: largest |ratio - 1|.
    """

    loss: Tensor
    approx_kl: Tensor
    clipfrac: Tensor
    ratio_gap: Tensor


def undecided_weight(logits: Tensor, temperature: float) -> Tensor:
    """(H, W) weight 4 p (1 - p) in [0, 1]: 1 where the policy is undecided, 0 where it is sure."""
    probability = torch.sigmoid(logits.detach().float() / temperature)
    return 4 * probability * (1 - probability)


def clipped_policy_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, weight: Tensor, clip: float
) -> PolicyLoss:
    """PPO's clipped surrogate per pixel: -min(ratio A, clip(ratio, 1 +- clip) A), summed over pixels.

    Args:
        logprob: (K, H, W) under the current policy, with gradient.
        old_logprob: (K, H, W) stored when the masks were drawn.
        advantage: (K, H, W) credit of each pixel's action.
        weight: (H, W) undecidedness under the old policy; its sum normalises the loss.
        clip: half-width of the trust interval.
    """
    log_ratio = logprob - old_logprob
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    count = weight.sum() + 1
    with torch.no_grad():
        credited = advantage != 0
        outside = ((ratio - 1).abs() > clip) & credited
        approx_kl = (((ratio - 1) - log_ratio) * weight).sum((1, 2)).mean() / count
        clipfrac = outside.sum() / credited.sum().clamp(min=1)
        ratio_gap = (ratio - 1).abs().max()
    return PolicyLoss(-surrogate.sum((1, 2)).mean() / count, approx_kl, clipfrac, ratio_gap)


def bernoulli_kl(logits: Tensor, ref_logits: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """KL(policy || reference) over pixels in closed form, per undecided pixel; scalar, at least 0.

    Per pixel p (log p - log q) + (1 - p)(log(1 - p) - log(1 - q)).
    """
    now, ref = logits.float() / temperature, ref_logits.float() / temperature
    on = torch.sigmoid(now)
    divergence = on * (functional.logsigmoid(now) - functional.logsigmoid(ref))
    divergence = divergence + (1 - on) * (functional.logsigmoid(-now) - functional.logsigmoid(-ref))
    return divergence.sum() / (weight.sum() + 1)


def bernoulli_entropy(logits: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Entropy of the policy in nats, per undecided pixel; scalar, at least 0."""
    scaled = logits.float() / temperature
    on = torch.sigmoid(scaled)
    entropy = -(on * functional.logsigmoid(scaled) + (1 - on) * functional.logsigmoid(-scaled))
    return entropy.sum() / (weight.sum() + 1)
