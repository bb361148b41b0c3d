"""What an action is: sampled masks keep every pixel's probability, and neighbours move together."""

import numpy as np
import pytest
import torch

from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.lora import LORA_PRESETS, SCOPES, attach_lora
from vesselrl.training.policy import MaskPolicy, gaussian_field, sample_masks

QKVO = LORA_PRESETS["medium"].projections


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("correlation_px", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_pixel_keeps_its_probability(correlation_px: float, temperature: float) -> None:
    """Borders included: 4,000 samples, five standard errors."""
    logits = torch.linspace(-4, 4, 64).view(8, 8)
    masks = sample_masks(logits, 4000, correlation_px, temperature, generator())
    wanted = torch.sigmoid(logits / temperature)
    error = (wanted * (1 - wanted) / 4000).sqrt()
    assert bool(((masks.float().mean(0) - wanted).abs() < 5 * error).all())


def test_neighbours_move_together_and_strangers_do_not() -> None:
    field = gaussian_field(3000, (24, 24), 2.0, generator())
    centre = field[:, 12, 12]
    next_to, far = field[:, 12, 13], field[:, 0, 0]
    # Correlation of a Gaussian filter at distance d: exp(-d^2 / (4 s^2)).
    assert float(torch.corrcoef(torch.stack([centre, next_to]))[0, 1]) == pytest.approx(
        np.exp(-1 / 16), abs=0.02
    )
    assert abs(float(torch.corrcoef(torch.stack([centre, far]))[0, 1])) < 0.08
    independent = gaussian_field(3000, (4, 4), 0.0, generator())
    assert abs(float(torch.corrcoef(independent[:, 0, :2].T)[0, 1])) < 0.08


def test_field_is_standard_normal_at_borders_too() -> None:
    field = gaussian_field(6000, (6, 6), 3.0, generator())
    assert float(field.mean(0).abs().max()) < 0.08
    assert bool(((field.std(0) - 1).abs() < 0.06).all())


def test_same_seed_same_masks() -> None:
    logits = torch.randn(16, 16)
    first, again, other = (sample_masks(logits, 4, 2.0, 1.0, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.fixture
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8))


def make_policy(tiny_checkpoint, scope=("projector", "mask_decoder")) -> MaskPolicy:
    model, processor = load_sa2va(tiny_checkpoint)
    return MaskPolicy(attach_lora(model, scope, QKVO, 4, 8), processor, "Segment.")


def move(policy: MaskPolicy) -> None:
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.2)


@torch.no_grad()
def test_the_reference_is_the_starting_policy(tiny_checkpoint, images) -> None:
    policy = make_policy(tiny_checkpoint)
    inputs = policy.prepare(images)
    decoded = policy.decode(inputs, ["a", "b"])
    start = policy.logits(decoded, decoded.best(), inputs)
    move(policy)
    reference = policy.reference_logits(inputs, ["a", "b"], decoded.best())
    now = policy.logits(policy.decode(inputs, ["a", "b"]), decoded.best(), inputs)
    for first, ref, moved in zip(start, reference, now, strict=True):
        assert torch.equal(first, ref)
        assert float((first - moved).norm() / first.norm()) > 0.1


@torch.no_grad()
def test_looking_at_the_start_puts_everything_back(tiny_checkpoint, images) -> None:
    policy = make_policy(tiny_checkpoint)
    move(policy)
    before = {name: p.clone() for name, p in policy.trainable.items()}

    def interrupted() -> None:
        with policy.at_start():
            assert all(torch.equal(p, policy.start[name]) for name, p in policy.trainable.items())
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable.items())


@torch.no_grad()
def test_a_frozen_language_model_runs_once_per_image(tiny_checkpoint, images, monkeypatch) -> None:
    policy = make_policy(tiny_checkpoint)
    inputs = policy.prepare(images)
    calls = []
    original = policy.model.seg_states
    monkeypatch.setattr(policy.model, "seg_states", lambda i: calls.append(1) or original(i))
    first = policy.seg_prompts(inputs, ["a", "b"])
    again = policy.seg_prompts(inputs, ["a", "b"])
    assert calls == [1, 1]  # two images, once each
    assert torch.equal(first, again)
    assert torch.allclose(first, policy.model.seg_prompts(inputs), atol=1e-6)


def test_a_trainable_language_model_is_never_cached(tiny_checkpoint, images) -> None:
    policy = make_policy(tiny_checkpoint, SCOPES)
    assert not policy.language_is_frozen
    inputs = policy.prepare(images)
    policy.seg_prompts(inputs, ["a", "b"]).sum().backward()
    touched = [n for n, p in policy.trainable.items() if ".lm." in n and p.grad is not None and p.grad.any()]
    assert touched


@torch.no_grad()
def test_swapped_images_change_the_seg_embedding(tiny_checkpoint, images) -> None:
    """The prototype's models were blind: the image tokens never reached the language model."""
    policy = make_policy(tiny_checkpoint, SCOPES)
    straight = policy.model.seg_prompts(policy.prepare(images))
    swapped = policy.model.seg_prompts(policy.prepare(images[::-1]))
    assert float((straight - swapped).norm() / straight.norm()) > 1e-3
    assert torch.allclose(straight.flip(0), swapped, atol=1e-6)


@torch.no_grad()
def test_nothing_outlives_a_batch_where_keys_do_not_repeat(tiny_checkpoint, images) -> None:
    """With augmentation the same key has other pixels in the next epoch."""
    policy = make_policy(tiny_checkpoint)
    policy.keys_repeat = False
    first = policy.seg_prompts(policy.prepare(images[:1]), ["a"])
    second = policy.seg_prompts(policy.prepare(images[1:]), ["a"])
    assert float((first - second).norm() / first.norm()) > 1e-3


@torch.no_grad()
def test_a_frozen_part_does_not_feel_its_neighbours(tiny_checkpoint, images) -> None:
    alone, together = make_policy(tiny_checkpoint), make_policy(tiny_checkpoint)
    one = alone.prepare(images[1:])
    both = together.prepare(images)
    for level, pair in zip(alone.features(one, ["b"]), together.features(both, ["a", "b"]), strict=True):
        assert torch.equal(level[0], pair[1])
    assert torch.equal(alone.seg_states(one, ["b"])[0], together.seg_states(both, ["a", "b"])[1])
