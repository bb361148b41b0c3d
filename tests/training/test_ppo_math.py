"""PPO's tensor maths: expectations by hand, from torch.distributions and from autograd."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from vesselrl.training import ppo_math
from vesselrl.training.ppo_math import REWARD_SCALE, action_logprobs, bernoulli_kl, clipped_policy_loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "by_hand", "flows"),
    [
        (1.0, 2.0, -2.0, True),
        (1.1, 2.0, -2.2, True),  # inside the interval: ratio * A
        (1.5, 2.0, -2.4, False),  # too far up with a gain: held at 1.2 * A, and no gradient
        (0.5, 2.0, -1.0, True),  # the pessimistic side is not clipped
        (0.5, -2.0, 1.6, False),  # too far down with a loss: held at 0.8 * A
        (1.5, -2.0, 3.0, True),
    ],
)
def test_clipped_loss_by_hand(ratio: float, advantage: float, by_hand: float, flows: bool) -> None:
    """One pixel that was sampled on at p = 1/2; its difference reward is 2 A."""
    logprobs = torch.log(torch.tensor([1 - 0.5 * ratio, 0.5 * ratio])).view(2, 1, 1).requires_grad_(True)
    old, difference = torch.full((2, 1, 1), math.log(0.5)), torch.full((1, 1, 1), 2 * advantage)
    loss = clipped_policy_loss(logprobs, old, difference, torch.ones(1, 1, 1), torch.ones(1, 1), 0.2).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(by_hand / REWARD_SCALE, abs=1e-6)
    assert bool(logprobs.grad.any()) == flows


def gradient(logits: torch.Tensor, difference: torch.Tensor, action_weight: torch.Tensor) -> torch.Tensor:
    """Of the loss at ratio 1."""
    free = logits.detach().clone().requires_grad_(True)
    now = action_logprobs(free, 1.0)
    variance = torch.ones_like(logits)
    clipped_policy_loss(now, now.detach(), difference, action_weight, variance, 0.2).loss.backward()
    return free.grad


def test_all_actions_give_the_mean_over_many_samples() -> None:
    """The gradient with p in place of the sample is that of sampled masks on average: 200,000 samples."""
    logits, difference = torch.tensor([[-2.0, -0.3, 1.2]]), torch.tensor([[[1.5, -0.7, 0.4]]])
    p = logits.sigmoid()
    samples = torch.bernoulli(p.expand(200_000, 1, 3), generator=torch.Generator().manual_seed(0))
    expected = gradient(logits, difference, p[None])
    assert torch.allclose(expected, gradient(logits, difference.expand_as(samples), samples), atol=2e-4)
    assert torch.allclose(expected, -(p * (1 - p) * difference[0]) / REWARD_SCALE, atol=1e-6)


def test_inverse_probability_weighting_gives_the_gradient_of_cross_entropy() -> None:
    """Difference +1 on vessel and -1 elsewhere: the update of binary cross-entropy, summed over pixels."""
    logits = torch.tensor([[-3.0, -0.5, 0.5, 3.0], [2.0, 1.0, -1.0, -3.5]], requires_grad=True)
    truth = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    on = logits.detach().sigmoid()
    update = gradient(logits, ppo_math.inverse_probability_weighted((2 * truth - 1)[None], on), on[None])
    torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum").backward()
    assert torch.allclose(update, logits.grad / REWARD_SCALE, atol=1e-6)
    given = torch.tensor([[2.0, 2.0, -2.0]]), torch.tensor([[1e-6, 0.5, 1.0]])
    bounded = ppo_math.inverse_probability_weighted(*given)
    assert bounded.flatten().tolist() == pytest.approx([100.0, 4.0, -100.0])


def test_diagnostics_by_hand() -> None:
    """Two pixels at p = 1/2 that move to 3/5 and 11/20; the second earns nothing."""
    now = torch.log(torch.tensor([[0.4, 0.45], [0.6, 0.55]])).view(2, 1, 2)
    old = torch.full((2, 1, 2), math.log(0.5))
    difference = torch.tensor([[[1.0, 0.0]]])
    result = clipped_policy_loss(now, old, difference, old[1].exp()[None], torch.ones(1, 2), 0.15)
    assert float(result.ratio_gap) == pytest.approx(0.2)
    assert float(result.clipfrac) == pytest.approx(1.0)  # ratios 1.2 and 0.8 of the one credited pixel
    kl = -0.5 * sum(math.log(2 * p) for p in (0.4, 0.6, 0.45, 0.55))
    assert float(result.approx_kl) == pytest.approx(kl / 3, abs=1e-6)
    variance = ppo_math.bernoulli_variance(torch.tensor([[0.0, math.log(3)]]), 1.0)
    assert variance.tolist() == [[1.0, pytest.approx(4 * 0.75 * 0.25)]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_log_probabilities_kl_and_entropy_agree_with_torch_distributions(temperature: float) -> None:
    now, ref = torch.randn(2, 6, 6) * 3
    variance = torch.full((6, 6), 0.25)
    # In 64 bits, because torch's own KL may be infinite in 32.
    p, q = (Bernoulli(logits=logits.double() / temperature) for logits in (now, ref))
    wanted = torch.stack([p.log_prob(torch.full((6, 6), action).double()) for action in (0.0, 1.0)])
    assert torch.allclose(action_logprobs(now, temperature).double(), wanted, atol=1e-5)
    kl = bernoulli_kl(now, ref, variance, temperature)
    entropy = ppo_math.bernoulli_entropy(now, variance, temperature)
    assert float(kl) == pytest.approx(float(kl_divergence(p, q).sum() / 10), rel=1e-4)
    assert float(entropy) == pytest.approx(float(p.entropy().sum() / 10), rel=1e-4)
    kl = bernoulli_kl(now.requires_grad_(), now.detach(), variance, temperature)
    kl.backward()
    assert float(kl.detach()) == pytest.approx(0, abs=1e-7)
    assert float(now.grad.abs().max()) < 1e-7


def test_a_policy_that_turned_around_stays_finite() -> None:
    """Old probability 1e-87 of on, now 1: the ratio overflows; loss, KL, entropy and gradient must not."""
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    now, old = action_logprobs(logits, 1.0), action_logprobs(-logits.detach(), 1.0)
    difference, ones = torch.tensor([[[1.0, 1.0]], [[-1.0, -1.0]]]), torch.ones(1, 2)
    result = clipped_policy_loss(now, old, difference, old[1].exp()[None], ones, 0.2)
    total = result.loss + bernoulli_kl(logits, -logits.detach(), ones, 1.0)
    total += ppo_math.bernoulli_entropy(logits, ones, 1.0)
    total.backward()
    assert all(bool(torch.isfinite(one).all()) for one in (total, result.approx_kl, logits.grad))
