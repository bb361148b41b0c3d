"""Images in, masks out: thresholds, batches, several [SEG], adapters."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vesselrl.errors import NotFiniteError
from vesselrl.inference import predictor as module
from vesselrl.inference.predictor import Prediction, Predictor
from vesselrl.models.processing import Sa2VAInputs
from vesselrl.models.sa2va import upsample
from vesselrl.scoring.overlay import overlay
from vesselrl.scoring.postprocessing import PostProcessing, drop_small_components


class ShiftedModel:
    """A model whose logits are lower by a constant."""

    def __init__(self, model: torch.nn.Module, shift: float) -> None:
        self.model, self.shift, self.device = model, shift, model.device

    def __call__(self, inputs: Sa2VAInputs) -> list[torch.Tensor]:
        return [logits - self.shift for logits in self.model(inputs)]


def largest_gap(one: Prediction, other: Prediction) -> float:
    return float(np.abs(one.logits - other.logits).max())


def test_sizes_types_and_probabilities(predictor: Predictor, images: list[np.ndarray]) -> None:
    for image in images:
        result = predictor.predict(image)
        assert [part.shape for part in result[:3]] == [image.shape[:2]] * 3
        assert [part.dtype for part in result[:3]] == [np.bool_, np.float32, np.float32]
        expected = torch.sigmoid(torch.from_numpy(result.logits)).numpy()
        np.testing.assert_allclose(result.probabilities, expected, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in predictor.model.parameters())
    with np.errstate(all="raise", under="ignore"):  # no overflow
        far = Predictor(ShiftedModel(predictor.model, 1e4), predictor.processor).predict(images[0])
    assert not far.probabilities.any()
    assert not far.mask.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_output_that_is_no_number_is_no_empty_mask(predictor: Predictor, images, value: float) -> None:
    for flips in (False, True):
        broken = Predictor(ShiftedModel(predictor.model, value), predictor.processor, flips=flips)
        with pytest.raises(NotFiniteError, match="The model gives no numbers for 4096 of 4096 pixels"):
            broken.predict(images[0])


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.71])
def test_the_mask_is_where_probability_and_logit_pass_the_threshold(
    predictor: Predictor, images: list[np.ndarray], threshold: float
) -> None:
    """The threshold cuts through shifted logits; post-processing changes the mask alone."""
    cut = np.log(threshold / (1 - threshold))
    shift = float(np.median(predictor.predict(images[0]).logits)) - cut
    shifted = ShiftedModel(predictor.model, shift), predictor.processor
    result = Predictor(*shifted, post=PostProcessing(threshold)).predict(images[0])
    assert 0.1 < result.mask.mean() < 0.9
    clear = np.abs(result.probabilities - threshold) > 1e-6
    assert clear.mean() > 0.999
    assert ((result.probabilities > threshold) == result.mask)[clear].all()
    assert (result.mask == (result.logits > cut)).all()
    post = PostProcessing(threshold, min_component_px=20)
    smaller = Predictor(*shifted, post=post).predict(images[0])
    assert np.array_equal(smaller.mask, drop_small_components(result.mask, 20))
    assert 0 < smaller.mask.sum() < result.mask.sum()
    assert np.array_equal(smaller.probabilities, result.probabilities)


def test_a_batch_gives_what_single_images_give(predictor: Predictor, images: list[np.ndarray]) -> None:
    assert len({len(predictor.processor([image]).tiles) for image in images}) > 1  # else nothing is padded
    one_size = [np.full((48, 64, 3), value, np.uint8) for value in (10, 120, 240)]
    for batch in (images, one_size):
        alone = [predictor.predict(image) for image in batch]
        assert max(map(largest_gap, predictor.predict_batch(batch), alone)) < 1e-4
    assert largest_gap(predictor.predict(images[0]), predictor.predict(images[0][::-1])) > 1e-2
    for bad in (np.zeros((64, 64, 2, 1), np.uint8), np.zeros((64, 64, 3), np.uint16), np.zeros((3, 64, 64))):
        found = rf"Image 1 is {bad.dtype} \({bad.shape[0]}, .*uint8 RGB \(H, W, 3\)"
        with pytest.raises(ValueError, match=found):
            predictor.predict_batch([images[0], bad])


def test_flips_are_turned_back_and_averaged(predictor: Predictor) -> None:
    seen = []

    def left_blind(inputs: Sa2VAInputs, given: list[np.ndarray]) -> list[torch.Tensor]:
        seen.extend(given)
        seeing = [torch.full((len(one) - 1, len(one[0]) - 1), 30.0) for one in given]
        return [torch.nn.functional.pad(logits, (1, 0, 1, 0), value=-30.0) for logits in seeing]

    large = np.random.default_rng(1).integers(0, 256, (9, 40, 3), np.uint8)
    image = large[:5, :7].copy()
    single = replace(predictor, post=PostProcessing(0.4), forward=left_blind, tile_px=32)
    result, tiled = replace(single, flips=True).predict_batch([image, large])
    expected = np.outer([0.5, 1, 1, 1, 0.5], [0.5, 1, 1, 1, 1, 1, 0.5])
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-6)
    assert np.array_equal(result.mask, expected > 0.4)
    turns = (np.array, np.fliplr, np.flipud, lambda one: np.rot90(one, 2))
    assert np.array_equal([one for one in seen if one.shape == image.shape], [turn(image) for turn in turns])
    back = [turn(single.predict(turn(large)).probabilities) for turn in turns]
    np.testing.assert_allclose(tiled.probabilities, np.mean(back, 0), atol=1e-6)


def test_files_pillow_images_and_arrays_of_any_kind_are_one_image(predictor, tmp_path: Path) -> None:
    """A prediction shows itself as its overlay, and says how uncertain it is."""
    grey = np.random.default_rng(3).integers(0, 256, (64, 64), dtype=np.uint8)
    rgb, file = np.repeat(grey[..., None], 3, axis=2), tmp_path / "a.png"
    Image.fromarray(grey).save(file)
    expected = predictor.predict(rgb)
    others = [file, str(file), grey, np.dstack([rgb, grey]), grey * np.uint16(256)]
    others += [Image.fromarray(grey), Image.fromarray(rgb).quantize(256), Image.fromarray(grey).convert("LA")]
    for found in predictor.predict_batch(others):
        assert np.array_equal(found.image, rgb)
        assert largest_gap(found, expected) < 1e-4
    shown = np.asarray(Image.open(io.BytesIO(expected._repr_png_())))
    assert np.array_equal(shown, overlay(rgb, expected.mask))
    for probabilities, uncertainty in (
        ([[0.9, 0.1], [0.6, 0.2]], 1 - 3 / 3.8),
        ([[1, 0], [0, 0]], 0),
        ([[0, 0], [0, 0]], 0),
        ([[0.1, 0], [0, 0]], 1),  # nothing found, but not for sure
    ):
        values = np.array(probabilities, np.float32)
        assert Prediction(values > 0.5, values, values).uncertainty == pytest.approx(uncertainty)


@torch.inference_mode()
def test_two_seg_tokens_give_the_union_of_their_masks(predictor: Predictor, images: list[np.ndarray]) -> None:
    model, processor = predictor.model, predictor.processor
    inputs = processor(images, answer="Sure, [SEG] and, not the same, [SEG].")
    prompts = model.seg_prompts(inputs)
    assert prompts.shape[:2] == (3, 2)
    # One decoding per token and image, put together by hand.
    features = model.encode_image(inputs.sam_pixels)
    parts = []
    for k in (0, 1):
        decoded = model.decode(features, prompts[:, [k]])
        parts.append(upsample(decoded.select(decoded.best()), inputs.sizes, model.config.sam2.image_size))
    for union, first, second in zip(model(inputs), *parts, strict=True):
        assert float((first - second).abs().max()) > 1e-3
        assert float((union - torch.maximum(first, second)).abs().max()) < 1e-4
    with pytest.raises(ValueError, match=r"has no \[SEG\]"):
        processor(images, answer="Sure.")


@torch.inference_mode()
def test_the_state_is_read_at_the_seg_token_itself(predictor: Predictor, images: list[np.ndarray]) -> None:
    """Causal attention tells where: later words change nothing, [SEG]'s own embedding does."""
    model, processor = predictor.model, predictor.processor
    answers = "Sure, [SEG].", "Sure, [SEG]! And more."
    short, long = (processor(images[:1], answer=answer) for answer in answers)
    states = model.seg_states(short)
    assert float((states - model.seg_states(long)).abs().max()) < 1e-5
    row = model.lm.get_input_embeddings().weight[model.seg_token_id]
    saved = row.clone()
    row += 1
    try:
        assert float((states - model.seg_states(short)).abs().max()) > 1e-2
    finally:
        row.copy_(saved)
    assert torch.equal(model.seg_states(short), states)


def test_an_image_encoder_in_bfloat16_gives_nearly_the_same_masks(
    predictor: Predictor, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU with --use_bf16; the mask decoder stays in float32."""
    exact = predictor.predict_batch(images)
    monkeypatch.setattr(predictor.model, "autocasts", True)
    for one, other in zip(exact, predictor.predict_batch(images), strict=True):
        assert 1e-5 < largest_gap(one, other) < 0.1
        assert (one.mask & other.mask).sum() / (one.mask | other.mask).sum() > 0.98
        assert other.logits.dtype == np.float32


def test_prompt_adapter_and_bfloat16_change_what_they_should(
    predictor: Predictor, lively_checkpoint: Path, adapter: Path, images: list[np.ndarray]
) -> None:
    plain = predictor.predict(images[0])
    other = Predictor(predictor.model, predictor.processor, prompt="Where is the catheter?")
    assert largest_gap(plain, other.predict(images[0])) > 1e-4
    for folder in (adapter.parent, adapter):  # a run means its best_lora
        assert module.adapter_folder(folder) == adapter
    from_run = Predictor.from_pretrained(lively_checkpoint, adapter.parent, "cpu")
    assert largest_gap(plain, from_run.predict(images[0])) > 1e-2
    half = Predictor.from_pretrained(lively_checkpoint, device="cpu", use_bf16=True)
    dtypes = {name.split(".")[0]: parameter.dtype for name, parameter in half.model.named_parameters()}
    assert dtypes["lm"] == dtypes["vision"] == dtypes["projector"] == torch.bfloat16
    assert dtypes["sam"] == dtypes["text_hidden_fcs"] == torch.float32
    assert 0 < largest_gap(plain, half.predict(images[0])) < 0.1
