"""PPO's tensor maths: expectations by hand, from torch.distributions and from autograd."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from vesselrl.models.sa2va import POINTS
from vesselrl.training.ppo_math import (
    action_logprobs,
    bernoulli_entropy,
    bernoulli_kl,
    bernoulli_variance,
    clipped_policy_loss,
    inverse_probability_weighted,
)

ONE = torch.ones(1, 1)  # weight of a single, fully undecided pixel
HALF = torch.full((2, 1, 1), math.log(0.5))  # old log-probabilities of off and on


def loss_of(ratio: float, advantage: float, clip: float = 0.2) -> float:
    """Loss of one pixel that was drawn on, at p = 1/2, with a given ratio; its credit is 2 A."""
    logprobs = torch.log(torch.tensor([1 - 0.5 * ratio, 0.5 * ratio])).view(2, 1, 1)
    credit, drawn_on = torch.tensor([[[2 * advantage]]]), torch.ones(1, 1, 1)
    return float(clipped_policy_loss(logprobs, HALF, credit, drawn_on, ONE, clip).loss)


@pytest.mark.parametrize(
    ("ratio", "advantage", "by_hand"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),  # inside the interval: ratio * A
        (1.5, 2.0, -2.4),  # too far up with a gain: held at 1.2 * A
        (0.5, 2.0, -1.0),  # the pessimistic side is not clipped
        (0.5, -2.0, 1.6),  # too far down with a loss: held at 0.8 * A
        (1.5, -2.0, 3.0),
    ],
)
def test_clipped_loss_by_hand(ratio: float, advantage: float, by_hand: float) -> None:
    assert loss_of(ratio, advantage) == pytest.approx(by_hand / POINTS, abs=1e-6)


def test_no_gradient_beyond_the_clip() -> None:
    for start, advantage, flows in (
        (1.5, 1.0, False),
        (1.5, -1.0, True),
        (0.5, -1.0, False),
        (1.0, 1.0, True),
    ):
        logprobs = HALF + torch.tensor([0.0, math.log(start)]).view(2, 1, 1)
        logprobs.requires_grad_(True)
        drawn_on = torch.ones(1, 1, 1)
        clipped_policy_loss(
            logprobs, HALF, torch.full((1, 1, 1), 2 * advantage), drawn_on, ONE, 0.2
        ).loss.backward()
        assert bool(logprobs.grad.abs().sum() > 0) == flows, (start, advantage)


def test_gradient_of_drawn_masks_is_the_policy_gradient() -> None:
    """At ratio 1 the gradient is REINFORCE's with advantage (a - p) credit."""
    logits = torch.randn(5, 7, requires_grad=True)
    masks = (torch.rand(3, 5, 7) < 0.5).float()
    credit = torch.randn(3, 5, 7)
    now = action_logprobs(logits, 1.0)
    clipped_policy_loss(
        now, now.detach(), credit, masks, bernoulli_variance(logits, 1.0), 0.2
    ).loss.backward()
    surprise = masks - logits.detach().sigmoid()
    logprob = Bernoulli(logits=logits.detach().requires_grad_(True))
    reinforce = (logprob.log_prob(masks) * surprise * credit).mean(0).sum()
    wanted = torch.autograd.grad(-reinforce / POINTS, logprob.logits)[0]
    assert torch.allclose(logits.grad, wanted, atol=1e-6)


def test_both_actions_give_the_mean_over_many_draws() -> None:
    """The gradient with p in place of the draw is that of drawn masks on average: 200,000 draws."""
    logits = torch.tensor([[-2.0, -0.3, 1.2]])
    credit = torch.tensor([[[1.5, -0.7, 0.4]]])

    def gradient(action_weight: torch.Tensor) -> torch.Tensor:
        free = logits.clone().requires_grad_(True)
        now = action_logprobs(free, 1.0)
        clipped_policy_loss(now, now.detach(), credit.expand(len(action_weight), 1, 3), action_weight,
                            torch.ones(1, 3), 0.2).loss.backward()  # fmt: skip
        return free.grad

    draws = torch.bernoulli(
        logits.sigmoid().expand(200_000, 1, 3), generator=torch.Generator().manual_seed(0)
    )
    expected = gradient(logits.sigmoid()[None])
    assert torch.allclose(expected, gradient(draws), atol=2e-4)
    p = logits.sigmoid()
    assert torch.allclose(expected, -(p * (1 - p) * credit[0]) / POINTS, atol=1e-6)


def test_success_normalised_credit_gives_the_gradient_of_cross_entropy() -> None:
    """Credit +1 on vessel and -1 elsewhere: the update of binary cross-entropy, summed over pixels."""
    logits = torch.tensor([[-3.0, -0.5, 0.5, 3.0], [2.0, 1.0, -1.0, -3.5]], requires_grad=True)
    truth = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    now = action_logprobs(logits, 1.0)
    on = now.detach()[1].exp()
    credit = inverse_probability_weighted((2 * truth - 1)[None], on)
    clipped_policy_loss(now, now.detach(), credit, on[None], torch.ones(2, 4), 0.2).loss.backward()
    other = logits.detach().requires_grad_(True)
    torch.nn.functional.binary_cross_entropy_with_logits(other, truth, reduction="sum").backward()
    assert torch.allclose(logits.grad, other.grad / POINTS, atol=1e-6)


def test_success_normalisation_is_bounded() -> None:
    normalised = inverse_probability_weighted(
        torch.tensor([[[2.0, 2.0, -2.0]]]), torch.tensor([[1e-6, 0.5, 1.0]])
    )
    assert normalised.flatten().tolist() == pytest.approx([100.0, 4.0, -100.0])


def test_diagnostics_by_hand() -> None:
    """Two pixels at p = 1/2 that move to 3/5 and 11/20; the second earns nothing."""
    now = torch.log(torch.tensor([[0.4, 0.45], [0.6, 0.55]])).view(2, 1, 2)
    old = torch.full((2, 1, 2), math.log(0.5))
    credit = torch.tensor([[[1.0, 0.0]]])
    result = clipped_policy_loss(now, old, credit, old[1].exp()[None], torch.ones(1, 2), 0.15)
    assert float(result.ratio_gap) == pytest.approx(0.2)
    assert float(result.clipfrac) == pytest.approx(1.0)  # ratios 1.2 and 0.8 of the one credited pixel
    kl = -0.5 * sum(math.log(2 * p) for p in (0.4, 0.6, 0.45, 0.55))
    assert float(result.approx_kl) == pytest.approx(kl / 3, abs=1e-6)


def test_action_log_probabilities_agree_with_torch_distributions() -> None:
    logits = torch.randn(5, 4) * 5
    off, on = action_logprobs(logits, 1.7)
    policy = Bernoulli(logits=logits / 1.7)
    assert torch.allclose(on, policy.log_prob(torch.ones(5, 4)), atol=1e-5)
    assert torch.allclose(off, policy.log_prob(torch.zeros(5, 4)), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_kl_and_entropy_agree_with_torch_distributions(temperature: float) -> None:
    now, ref = torch.randn(2, 6, 6)
    weight = torch.full((6, 6), 0.25)
    p, q = (Bernoulli(logits=logits / temperature) for logits in (now, ref))
    assert float(bernoulli_kl(now, ref, weight, temperature)) == pytest.approx(
        float(kl_divergence(p, q).sum() / 10), rel=1e-4
    )
    assert float(bernoulli_entropy(now, weight, temperature)) == pytest.approx(
        float(p.entropy().sum() / 10), rel=1e-4
    )


def test_kl_is_zero_with_zero_gradient_at_the_reference() -> None:
    logits = torch.randn(4, 4, requires_grad=True)
    kl = bernoulli_kl(logits, logits.detach(), torch.ones(4, 4), 1.0)
    kl.backward()
    assert float(kl.detach()) == pytest.approx(0, abs=1e-7)
    assert float(logits.grad.abs().max()) < 1e-7


def test_extreme_logits_stay_finite() -> None:
    far = torch.tensor([[200.0, -200.0]], requires_grad=True)
    total = bernoulli_kl(far, -far.detach(), torch.ones(1, 2), 1.0) + bernoulli_entropy(
        far, torch.ones(1, 2), 1.0
    )
    total.backward()
    assert math.isfinite(float(total.detach()))
    assert bool(torch.isfinite(far.grad).all())


def test_a_policy_that_turned_around_has_a_finite_loss() -> None:
    """Old probability 1e-87 of on, now 1: the ratio overflows, the loss and its gradient must not."""
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    old = action_logprobs(-logits.detach(), 1.0)
    credit = torch.tensor([[[1.0, 1.0]], [[-1.0, -1.0]]])
    result = clipped_policy_loss(
        action_logprobs(logits, 1.0), old, credit, old[1].exp()[None], torch.ones(1, 2), 0.2
    )
    result.loss.backward()
    assert math.isfinite(float(result.loss.detach()))
    assert math.isfinite(float(result.approx_kl))
    assert bool(torch.isfinite(logits.grad).all())


def test_undecided_weight_by_hand() -> None:
    weight = bernoulli_variance(torch.tensor([[0.0, math.log(3)]]), 1.0)
    assert weight.tolist() == [[1.0, pytest.approx(4 * 0.75 * 0.25)]]
