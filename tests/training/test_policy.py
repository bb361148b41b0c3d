"""Sampled masks keep every pixel's probability; kept outputs of frozen parts are the computed ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.lora import LORA_PRESETS, SCOPES, attach_lora
from vesselrl.models.sa2va import ImageFeatures
from vesselrl.training import policy as policy_module
from vesselrl.training.checkpoint import tensor_hash, with_values
from vesselrl.training.policy import FeatureStore, MaskPolicy, gaussian_field, sample_masks, weights_hash

# ---- Sampling


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
    same = sample_masks(logits, 4000, correlation_px, temperature, generator())
    assert torch.equal(masks, same)
    assert not torch.equal(masks, sample_masks(logits, 4000, correlation_px, temperature, generator(1)))


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


# ---- The policy


@pytest.fixture
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8))


def make_policy(tiny_checkpoint, scope=("projector", "mask_decoder")) -> MaskPolicy:
    model, processor = load_sa2va(tiny_checkpoint)
    peft_model = attach_lora(model, scope, LORA_PRESETS["medium"].projections, 4, 8)
    return MaskPolicy(peft_model, processor, "Segment.")


@torch.no_grad()
def test_the_reference_is_the_starting_policy(tiny_checkpoint, images) -> None:
    policy = make_policy(tiny_checkpoint)
    inputs = policy.prepare(images)
    decoded = policy.decode(inputs, ["a", "b"])
    start = policy.logits(decoded, decoded.best(), inputs)
    for parameter in policy.trainable.values():
        parameter.add_(0.2)
    reference = policy.reference_logits(inputs, ["a", "b"], decoded.best())
    now = policy.logits(policy.decode(inputs, ["a", "b"]), decoded.best(), inputs)
    for first, ref, moved in zip(start, reference, now, strict=True):
        assert torch.equal(first, ref)
        assert float((first - moved).norm() / first.norm()) > 0.1
    before = policy.values()

    def interrupted() -> None:
        with with_values(policy, policy.start):
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
    policy.keys_repeat = False  # with augmentation the same key has other pixels in the next epoch
    second = policy.seg_prompts(policy.prepare(images[::-1]), ["a", "b"])
    assert float((first - second).norm() / first.norm()) > 1e-3


def test_a_trainable_language_model_is_never_cached_and_sees_the_image(tiny_checkpoint, images) -> None:
    """The prototype's models were blind: the image tokens never reached the language model."""
    policy = make_policy(tiny_checkpoint, SCOPES)
    inputs = policy.prepare(images)
    straight = policy.seg_prompts(inputs, ["a", "b"])
    straight.sum().backward()
    assert any(".lm." in n and p.grad is not None and p.grad.any() for n, p in policy.trainable.items())
    swapped = policy.seg_prompts(policy.prepare(images[::-1]), ["a", "b"])
    assert float((straight - swapped).detach().norm() / straight.detach().norm()) > 1e-3
    assert torch.allclose(straight.flip(0), swapped, atol=1e-6)


@torch.no_grad()
def test_a_frozen_part_does_not_feel_its_neighbours(tiny_checkpoint, images) -> None:
    alone, together = make_policy(tiny_checkpoint), make_policy(tiny_checkpoint)
    one, both = alone.prepare(images[1:]), together.prepare(images)
    for level, pair in zip(alone.features(one, ["b"]), together.features(both, ["a", "b"]), strict=True):
        assert torch.equal(level[0], pair[1])
    assert torch.equal(alone.seg_states(one, ["b"])[0], together.seg_states(both, ["a", "b"])[1])


# ---- Kept features

PIXELS = torch.arange(12.0).view(1, 3, 2, 2)


class Encoder:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, pixels: Tensor = PIXELS) -> ImageFeatures:
        self.calls += 1
        return ImageFeatures(pixels + 1, (pixels * 2).to(memory_format=torch.channels_last), pixels**2)


def equal(one: ImageFeatures, other: ImageFeatures) -> bool:
    """The same values in the same memory layout, which decides how a convolution rounds."""
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs)


def test_memory_answers_the_second_time_and_a_file_the_next_run(tmp_path: Path) -> None:
    encoder, store = Encoder(), FeatureStore(tmp_path, "model")
    first = store.fetch("a", PIXELS, encoder)
    assert store.fetch("a", PIXELS, encoder) is first
    assert equal(FeatureStore(tmp_path, "model").fetch("another key", PIXELS, encoder), first)
    assert encoder.calls == 1
    assert [file.suffix for file in (tmp_path / "model").iterdir()] == [".safetensors"]
    FeatureStore(tmp_path, "other model").fetch("a", PIXELS, encoder)
    FeatureStore(tmp_path, "model").fetch("a", PIXELS + 1, encoder)
    full = FeatureStore(memory_bytes=10)
    assert [full.fetch("a", PIXELS, encoder) for _ in range(2)]
    assert encoder.calls == 1 + 2 + 2


def test_a_full_disk_limit_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder, store = Encoder(), FeatureStore(tmp_path, "model", disk_bytes=200)
    for key in range(3):  # 144 bytes each
        store.fetch(str(key), PIXELS + key, encoder)
    assert len(list((tmp_path / "model").iterdir())) == 1
    assert len([record for record in caplog.records if "limit" in record.message]) == 1
    # What lies there from another run counts as well.
    FeatureStore(tmp_path, "model 2", disk_bytes=200).fetch("a", PIXELS, encoder)
    assert not (tmp_path / "model 2").exists()


def test_a_damaged_file_or_a_full_disk_is_said_and_no_end(tmp_path: Path, monkeypatch, caplog) -> None:
    encoder = Encoder()
    expected = FeatureStore(tmp_path, "model").fetch("a", PIXELS, encoder)
    (file,) = (tmp_path / "model").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    for _ in range(2):  # computed and written anew, then read
        assert equal(FeatureStore(tmp_path, "model").fetch("a", PIXELS, encoder), expected)
    assert encoder.calls == 2
    assert "computed again" in caplog.text

    def full(tensors: dict, path: Path, header: dict) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(policy_module, "save_file", full)
    store = FeatureStore(tmp_path, "other")
    assert store.fetch("a", PIXELS, encoder) is store.fetch("a", PIXELS, encoder)
    assert "No space left" in caplog.text
    assert list((tmp_path / "other").iterdir()) == []


def test_a_flipped_bit_in_a_kept_file_is_noticed(tmp_path: Path) -> None:
    rng, encoder = np.random.default_rng(0), Encoder()
    expected = FeatureStore(tmp_path, "model").fetch("a", PIXELS, encoder)
    (file,) = (tmp_path / "model").iterdir()
    for number in range(100):
        whole = bytearray(file.read_bytes())
        whole[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(whole)
        assert equal(FeatureStore(tmp_path, "model").fetch("a", PIXELS, encoder), expected), number
    assert encoder.calls == 101


def test_the_identity_of_a_model_sees_weights_and_prompt(tiny_checkpoint) -> None:
    policies = []
    for _ in range(2):
        torch.manual_seed(0)  # of the adapters' start
        policies.append(make_policy(tiny_checkpoint))
    first, before = policies[0], policies[1].identity()
    assert first.identity() == before
    with torch.no_grad():
        next(p for p in first.model.parameters() if not p.requires_grad).view(-1)[0] += 1
    assert first.identity() != before
    half = torch.arange(3.0).bfloat16()
    assert tensor_hash(half) != tensor_hash(half + 1)


def test_hashes_see_values_shape_and_names() -> None:
    assert tensor_hash(PIXELS) == tensor_hash(PIXELS.clone())
    assert len({tensor_hash(PIXELS), tensor_hash(PIXELS + 1), tensor_hash(PIXELS.view(1, 3, 4, 1))}) == 3
    layer = torch.nn.Linear(2, 2)
    before = weights_hash(layer)
    assert before == weights_hash(layer)
    with torch.no_grad():
        layer.bias[0] += 1
    assert weights_hash(layer) != before
