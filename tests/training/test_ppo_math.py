"""PPO's tensor maths: expectations by hand, from torch.distributions and from autograd."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from vesselrl.training.ppo_math import (
    bernoulli_entropy,
    bernoulli_kl,
    clipped_policy_loss,
    undecided_weight,
)

ONE = torch.ones(1, 1)  # weight of a single, fully undecided pixel; the loss divides by weight + 1 = 2


def loss_of(ratio: float, advantage: float, clip: float = 0.2) -> float:
    """Loss of one pixel of one sample with a given ratio."""
    logprob = torch.tensor([[[math.log(ratio)]]])
    result = clipped_policy_loss(logprob, torch.zeros(1, 1, 1), torch.tensor([[[advantage]]]), ONE, clip)
    return float(result.loss)


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
    assert loss_of(ratio, advantage) == pytest.approx(by_hand / 2, abs=1e-6)


def test_no_gradient_beyond_the_clip() -> None:
    for start, advantage, flows in (
        (1.5, 1.0, False),
        (1.5, -1.0, True),
        (0.5, -1.0, False),
        (1.0, 1.0, True),
    ):
        logprob = torch.full((1, 1, 1), math.log(start), requires_grad=True)
        clipped_policy_loss(
            logprob, torch.zeros(1, 1, 1), torch.full((1, 1, 1), advantage), ONE, 0.2
        ).loss.backward()
        assert bool(logprob.grad.abs().sum() > 0) == flows, (start, advantage)


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    """d loss / d logit = -(a - p) A / count, the REINFORCE gradient of a Bernoulli."""
    logits = torch.randn(5, 7, requires_grad=True)
    masks = torch.rand(3, 5, 7) < 0.5
    advantage = torch.randn(3, 5, 7)
    logprob = Bernoulli(logits=logits).log_prob(masks.float())
    weight = undecided_weight(logits, 1.0)
    clipped_policy_loss(logprob, logprob.detach(), advantage, weight, 0.2).loss.backward()
    by_hand = -((masks.float() - logits.sigmoid()) * advantage).mean(0) / (weight.sum() + 1)
    assert torch.allclose(logits.grad, by_hand.detach(), atol=1e-6)


def test_diagnostics_by_hand() -> None:
    ratio = torch.tensor([[[1.0, 1.5], [0.7, 1.1]]])
    advantage = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    weight = torch.ones(2, 2)
    result = clipped_policy_loss(ratio.log(), torch.zeros(1, 2, 2), advantage, weight, 0.2)
    assert float(result.clipfrac) == pytest.approx(2 / 3)
    assert float(result.ratio_gap) == pytest.approx(0.5)
    k3 = (0.5 - math.log(1.5)) + (-0.3 - math.log(0.7)) + (0.1 - math.log(1.1))
    assert float(result.approx_kl) == pytest.approx(k3 / 5, abs=1e-6)


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


def test_undecided_weight_by_hand() -> None:
    weight = undecided_weight(torch.tensor([[0.0, math.log(3)]]), 1.0)
    assert weight.tolist() == [[1.0, pytest.approx(4 * 0.75 * 0.25)]]
