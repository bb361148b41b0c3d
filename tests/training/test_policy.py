"""Sampled masks keep every pixel's probability; kept outputs of frozen parts are the computed ones."""

import contextlib
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.lora import LORA_PRESETS, attach_lora
from vesselrl.models.sa2va import ImageFeatures
from vesselrl.training import features as features_module
from vesselrl.training.checkpoint import tensor_hash, with_values
from vesselrl.training.features import FeatureStore, language_hash
from vesselrl.training.policy import MaskPolicy
from vesselrl.training.ppo_math import gaussian_field, sample_masks


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("correlation_px", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_pixel_keeps_its_probability(correlation_px: float, temperature: float) -> None:
    """Borders included: 4,000 samples, five standard errors."""
    logits = torch.linspace(-4, 4, 64).view(8, 8)
    masks = sample_masks(logits, 4000, correlation_px, temperature, generator())
    wanted = torch.sigmoid(logits / temperature)
    error = (wanted * (1 - wanted) / 4000).sqrt()
    assert bool(((masks.float().mean(0) - wanted).abs() < 5 * error).all())
    assert torch.equal(masks, sample_masks(logits, 4000, correlation_px, temperature, generator()))


def test_neighbours_move_together_and_strangers_do_not() -> None:
    def correlation(field: torch.Tensor, *pixels: tuple[int, int]) -> float:
        return float(torch.corrcoef(torch.stack([field[:, y, x] for y, x in pixels]))[0, 1])

    field = gaussian_field(3000, (24, 24), 2.0, generator())
    # Correlation of a Gaussian filter at distance d: exp(-d^2 / (4 s^2)).
    assert correlation(field, (12, 12), (12, 13)) == pytest.approx(np.exp(-1 / 16), abs=0.02)
    assert abs(correlation(field, (12, 12), (0, 0))) < 0.08
    assert abs(correlation(gaussian_field(3000, (4, 4), 0.0, generator()), (0, 0), (0, 1))) < 0.08


@pytest.fixture
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8))


def make_policy(tiny_checkpoint) -> MaskPolicy:
    model, processor = load_sa2va(tiny_checkpoint)
    size = LORA_PRESETS["medium"]._replace(rank=4, alpha=8)
    peft_model = attach_lora(model, ("projector", "mask_decoder"), size)
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
    with contextlib.suppress(RuntimeError), with_values(policy, policy.start):
        assert all(torch.equal(p, policy.start[name]) for name, p in policy.trainable.items())
        raise RuntimeError
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable.items())


def test_states_are_kept_by_content(tiny_checkpoint, images, tmp_path) -> None:
    """Computed together, as on a GPU, they are those computed alone, up to rounding; sizes may differ."""
    policies = [make_policy(tiny_checkpoint) for _ in range(2)]
    images = [images[0], images[1][:40], images[1]]
    for policy, size in zip(policies, (1, 8), strict=True):
        policy.images_per_pass = size
        policy.states = FeatureStore(tmp_path / str(size))
        assert policy.keep_states((str(k), image) for k, image in enumerate([*images, images[0]])) == 3
        policy.drop_language()
    alone, together = ([policy.seg_prompts(None, [str(k)]).detach() for k in range(4)] for policy in policies)
    for one, other in zip(alone, together, strict=True):
        assert float((one - other).abs().max()) < 1e-5
    assert torch.equal(alone[0], alone[3])
    assert not torch.allclose(alone[0], alone[2])
    policies[0].load_language = Mock(return_value=policies[0].model)
    for _ in range(2):  # an unknown image needs the language model, once
        policies[0].predict(images[0])
        policies[0].predict(255 - images[0])
    policies[0].load_language.assert_called_once()
    again = make_policy(tiny_checkpoint)
    again.states = FeatureStore(tmp_path / "1")
    assert again.keep_states([("x", images[2])]) == 0
    assert torch.equal(again.seg_prompts(None, ["x"]), alone[2])


def test_several_images_are_predicted_in_one_pass_or_where_memory_ends_alone(
    tiny_checkpoint, images, caplog
) -> None:
    policy, images, sizes, room = make_policy(tiny_checkpoint), [*images, images[0][:40]], [], []
    alone = [policy.predict(image).logits for image in images]
    encode = policy.model.encode_image

    def limited(pixels: torch.Tensor) -> ImageFeatures:
        sizes.append(len(pixels))
        if len(pixels) > room[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(pixels)

    policy.model.encode_image, policy.encoder_is_frozen = limited, False
    for limit, wanted, per_pass in ((3, [3], 8), (2, [3, 1, 1, 1], 1)):
        sizes.clear()
        room.append(limit)
        policy.images_per_pass = 8
        for one, other in zip(alone, policy.predict_batch(images), strict=True):
            assert float(np.abs(one - other.logits).max()) < 1e-4
        assert (sizes, policy.images_per_pass) == (wanted, per_pass)
    assert caplog.text.count("from now on one image at a time") == 1
    room.append(0)
    with pytest.raises(torch.OutOfMemoryError):
        policy.predict(images[0])


def test_the_hash_of_the_language_model_is_noted_until_a_file_changes(tiny_checkpoint, tmp_path) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    first = language_hash(model, tmp_path / "notes")
    assert first == language_hash(model) == language_hash(model, tmp_path / "notes")
    (note,) = (tmp_path / "notes").iterdir()
    note.write_text("0" * 64)
    assert language_hash(model, tmp_path / "notes") == "0" * 64
    tensors = load_file(model / "model.safetensors")
    for name, is_seen in (("language_model.lm_head.weight", False), ("mlp1.1.weight", True)):
        tensors[name] += 1
        save_file(tensors, model / "model.safetensors")
        assert (language_hash(model, tmp_path / "notes") != first) == is_seen


PIXELS = torch.arange(12.0).view(1, 3, 2, 2)


@pytest.fixture
def encoder() -> Mock:
    """Counts how often it is asked."""
    layout = {"memory_format": torch.channels_last}
    return Mock(side_effect=lambda x=PIXELS: ImageFeatures(x + 1, (x * 2).to(**layout), x**2))


def equal(one: ImageFeatures, other: ImageFeatures) -> bool:
    """The same values in the same memory layout, which decides how a convolution rounds."""
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs)


def test_memory_answers_the_second_time_and_a_file_the_next_run(tmp_path: Path, encoder: Mock) -> None:
    store = FeatureStore(tmp_path, "model")
    first = store.fetch("a", PIXELS, encoder)
    assert store.fetch("a", PIXELS, encoder) is first
    assert equal(FeatureStore(tmp_path, "model").fetch("another key", PIXELS, encoder), first)
    assert encoder.call_count == 1
    FeatureStore(tmp_path, "other model").fetch("a", PIXELS, encoder)
    FeatureStore(tmp_path, "model").fetch("a", PIXELS + 1, encoder)
    full = FeatureStore(memory_bytes=10)
    assert [full.fetch("a", PIXELS, encoder) for _ in range(2)]
    assert encoder.call_count == 1 + 2 + 2
    # Without a key, as in validation, in files alone; what comes next is read in a thread.
    assert equal(store.fetch(None, PIXELS, encoder), first)
    assert not equal(store.fetch(None, PIXELS + 7, lambda: encoder(PIXELS + 7)), first)
    small = FeatureStore(tmp_path, "model", memory_bytes=0)
    assert equal(small.fetch("a", PIXELS, encoder), first)
    small.fetch_ahead(["a", "unknown"])
    assert list(small._coming) == ["a"]
    assert equal(small.fetch("a", PIXELS, encoder), first)
    assert encoder.call_count == 1 + 2 + 2 + 1


def test_a_limit_a_damaged_file_and_a_full_disk_are_said(tmp_path, encoder, monkeypatch, caplog) -> None:
    store = FeatureStore(tmp_path, "model", disk_bytes=200)
    expected, *_ = (store.fetch(str(key), PIXELS + key, encoder) for key in range(3))  # 144 bytes each
    assert caplog.text.count("its limit") == 1
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    for _ in range(2):  # computed and written anew, then read
        assert equal(FeatureStore(tmp_path, "model").fetch("a", PIXELS, encoder), expected)
    assert encoder.call_count == 3 + 1
    assert "computed again" in caplog.text
    monkeypatch.setattr(features_module, "save_file", Mock(side_effect=OSError("No space left on device")))
    store = FeatureStore(tmp_path, "other")
    assert store.fetch("a", PIXELS, encoder) is store.fetch("a", PIXELS, encoder)
    assert "No space left" in caplog.text
    assert list((tmp_path / "other").iterdir()) == []


def test_a_flipped_bit_in_a_kept_file_is_noticed(tmp_path: Path, encoder: Mock) -> None:
    rng = np.random.default_rng(0)
    expected = FeatureStore(tmp_path, "model").fetch("a", PIXELS, encoder)
    (file,) = (tmp_path / "model").iterdir()
    for number in range(100):
        whole = bytearray(file.read_bytes())
        whole[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(whole)
        assert equal(FeatureStore(tmp_path, "model").fetch("a", PIXELS, encoder), expected), number
    assert encoder.call_count == 101


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
