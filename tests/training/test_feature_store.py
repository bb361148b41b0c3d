"""Kept features are the computed ones, and nothing stale or half-written is ever used."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vesselrl.models.sa2va import ImageFeatures
from vesselrl.training.feature_store import FeatureStore, tensor_hash, weights_hash

PIXELS = torch.arange(12.0).view(1, 3, 2, 2)


class Encoder:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, pixels: Tensor = PIXELS) -> ImageFeatures:
        self.calls += 1
        return ImageFeatures(pixels + 1, pixels * 2, pixels**2)


def equal(one: ImageFeatures, other: ImageFeatures) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_memory_answers_the_second_time(tmp_path: Path) -> None:
    encoder, store = Encoder(), FeatureStore()
    first = store.fetch("a", PIXELS, encoder)
    assert equal(store.fetch("a", PIXELS, encoder), first)
    assert encoder.calls == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_answers_the_next_run(tmp_path: Path) -> None:
    encoder = Encoder()
    first = FeatureStore(tmp_path, "model").fetch("a", PIXELS, encoder)
    again = FeatureStore(tmp_path, "model").fetch("another key", PIXELS, encoder)
    assert encoder.calls == 1
    assert equal(first, again)
    assert [file.suffix for file in (tmp_path / "model").iterdir()] == [".safetensors"]


def test_another_model_or_image_is_computed(tmp_path: Path) -> None:
    encoder = Encoder()
    FeatureStore(tmp_path, "model").fetch("a", PIXELS, encoder)
    FeatureStore(tmp_path, "other model").fetch("a", PIXELS, encoder)
    FeatureStore(tmp_path, "model").fetch("a", PIXELS + 1, encoder)
    assert encoder.calls == 3


def test_full_memory_is_no_error(tmp_path: Path) -> None:
    encoder, store = Encoder(), FeatureStore(memory_bytes=10)
    store.fetch("a", PIXELS, encoder)
    store.fetch("a", PIXELS, encoder)
    assert encoder.calls == 2


def test_a_full_disk_limit_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder, store = Encoder(), FeatureStore(tmp_path, "model", disk_bytes=200)
    for key in range(3):  # 144 bytes each
        store.fetch(str(key), PIXELS + key, encoder)
    assert len(list((tmp_path / "model").iterdir())) == 1
    assert len([record for record in caplog.records if "limit" in record.message]) == 1
    # What lies there from another run counts as well.
    FeatureStore(tmp_path, "model 2", disk_bytes=200).fetch("a", PIXELS, encoder)
    assert list((tmp_path / "model 2").iterdir()) == []


def test_a_damaged_file_is_said_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder()
    expected = FeatureStore(tmp_path, "model").fetch("a", PIXELS, encoder)
    (file,) = (tmp_path / "model").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert equal(FeatureStore(tmp_path, "model").fetch("a", PIXELS, encoder), expected)
    assert "computed again" in caplog.text
    assert equal(FeatureStore(tmp_path, "model").fetch("a", PIXELS, encoder), expected)
    assert encoder.calls == 2


def test_hashes_see_values_shape_and_names() -> None:
    assert tensor_hash(PIXELS) == tensor_hash(PIXELS.clone())
    assert len({tensor_hash(PIXELS), tensor_hash(PIXELS + 1), tensor_hash(PIXELS.view(1, 3, 4, 1))}) == 3
    layer = torch.nn.Linear(2, 2)
    before = weights_hash(layer)
    assert before == weights_hash(layer)
    with torch.no_grad():
        layer.bias[0] += 1
    assert weights_hash(layer) != before


def test_a_disk_that_takes_no_more_is_no_end(tmp_path: Path, monkeypatch, caplog) -> None:
    def full(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("vesselrl.training.feature_store.save_file", full)
    encoder, store = Encoder(), FeatureStore(tmp_path, "model")
    store.fetch("a", PIXELS, encoder)
    store.fetch("a", PIXELS, encoder)
    assert encoder.calls == 1
    assert "No space left" in caplog.text
    assert list((tmp_path / "model").iterdir()) == []
