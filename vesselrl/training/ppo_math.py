"""Pure tensor maths of the PPO update; H x W pixels, K sampled masks.

One episode is one step (an image, a mask, a reward), so there are no returns to discount and no value head:
the counterfactual credit of `credit.py` is its own baseline. The policy loss is a sum over pixels in units
of the reward, so that an image weighs as much as there is to gain on it. Divergences and entropy are per
undecided pixel, because confident ones carry none.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# A perfect mask earns about ten points more than an empty one; the loss counts in these.
POINTS = 10.0
# Beyond it a ratio has left every trust interval; exp overflows for actions that were all but impossible.
MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """One image's clipped loss and its diagnostics, all scalars.

    Attributes:
        loss: to minimise, in units of POINTS.
        approx_kl: KL(old policy || policy) over pixels, per undecided pixel, at least 0.
        clipfrac: share of the credited actions, by their probability, whose ratio left [1 - clip, 1 + clip].
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


def action_logprobs(logits: Tensor, temperature: float) -> Tensor:
    """(2, H, W) log-probabilities of a pixel's actions off and on, log sigmoid(-+ logit / temperature)."""
    scaled = logits.float() / temperature
    return functional.logsigmoid(torch.stack([-scaled, scaled]))


def success_normalised(credit: Tensor, on: Tensor, floor: float = 0.02) -> Tensor:
    """Credit divided by the probability of the action that it favours, q = p where credit > 0, else 1 - p.

    The policy gradient of a Bernoulli pixel, p (1 - p) credit, dies out where the policy is sure, and so
    exactly where it is sure and wrong. Divided by q it is (1 - q) credit: the gradient of the log-likelihood
    of the better action. What is right already still learns nothing.

    Args:
        credit: (H, W), R(on) - R(off).
        on: (H, W), probability of on under the old policy.
        floor: smallest q, so that one pixel's advantage stays bounded.
    """
    return credit / torch.where(credit > 0, on, 1 - on).clamp(min=floor)


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, credit: Tensor, share_on: Tensor, weight: Tensor, clip: float
) -> PolicyLoss:
    """PPO's clipped surrogate per pixel and action: -min(ratio A, clip(ratio, 1 +- clip) A).

    Advantages are A(on) = (1 - p) credit and A(off) = -p credit, with the old policy's p: what the action
    earns more than the policy does on average. Actions are weighted by `share_on`: a drawn mask counts the
    action that was drawn, the old policy's p counts both as often as they would be drawn, which has the same
    expectation and no variance from the pixel's own draw.

    Args:
        logprobs: (2, H, W) under the current policy, with gradient.
        old_logprobs: (2, H, W) stored when the masks were drawn.
        credit: (H, W), R(on) - R(off).
        share_on: (K, H, W), weight of the action on, in [0, 1]; off has the rest.
        weight: (H, W) undecidedness under the old policy; its sum normalises the divergence.
        clip: half-width of the trust interval.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    on = old_logprobs[1].exp()
    count = weight.sum() + 1
    advantages, shares = (-on * credit, (1 - on) * credit), (1 - share_on, share_on)
    surrogate, credited, outside = 0.0, 0.0, 0.0
    for action, (advantage, share) in enumerate(zip(advantages, shares, strict=True)):
        gain = torch.minimum(ratio[action] * advantage, clipped[action] * advantage)
        surrogate = surrogate + (share * gain).sum((1, 2)).mean()
        with torch.no_grad():
            counted = share * (credit != 0)
            credited = credited + counted.sum()
            outside = outside + (counted * ((ratio[action] - 1).abs() > clip)).sum()
    with torch.no_grad():
        approx_kl = -(old_logprobs.exp() * log_ratio).sum() / count
        ratio_gap = (ratio - 1).abs().max()
    return PolicyLoss(-surrogate / POINTS, approx_kl, outside / credited.clamp(min=1), ratio_gap)


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
