"""Images in, masks out: thresholds, sizes, batches, several [SEG], adapters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from vesselrl.errors import CheckpointError
from vesselrl.inference.predictor import Prediction, Predictor, adapter_folder
from vesselrl.models.processing import Sa2VAInputs
from vesselrl.models.sa2va import upsample
from vesselrl.scoring.postprocessing import PostProcessing


def largest_gap(one: Prediction, other: Prediction) -> float:
    return float(np.abs(one.logits - other.logits).max())


def test_result_has_the_image_size_and_the_promised_types(
    predictor: Predictor, images: list[np.ndarray]
) -> None:
    for image in images:
        result = predictor.predict(image)
        assert [part.shape for part in result] == [image.shape[:2]] * 3
        assert [part.dtype for part in result] == [np.bool_, np.float32, np.float32]
        assert result.probabilities.min() >= 0
        assert result.probabilities.max() <= 1


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.71])
def test_the_mask_is_where_probability_and_logit_pass_the_threshold(
    predictor: Predictor, image: np.ndarray, threshold: float
) -> None:
    # The logits are shifted so that the threshold cuts through them.
    shift = float(np.median(predictor.predict(image).logits)) - np.log(threshold / (1 - threshold))
    shifted = ShiftedModel(predictor.model, shift)
    result = Predictor(shifted, predictor.processor, post=PostProcessing(threshold)).predict(image)
    assert 0.1 < result.mask.mean() < 0.9
    assert (result.mask == (result.probabilities > np.float32(threshold))).mean() > 0.999  # but for rounding
    clear = np.abs(result.probabilities - threshold) > 1e-6
    assert ((result.probabilities > threshold) == result.mask)[clear].all()
    assert (result.mask == (result.logits > np.log(threshold / (1 - threshold)))).all()


def test_probabilities_are_the_sigmoid_of_the_logits_without_overflow(
    predictor: Predictor, image: np.ndarray
) -> None:
    result = predictor.predict(image)
    expected = torch.sigmoid(torch.from_numpy(result.logits)).numpy()
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-6)
    with np.errstate(all="raise", under="ignore"):
        far = Predictor(ShiftedModel(predictor.model, 1e4), predictor.processor).predict(image)
    assert not far.probabilities.any()
    assert not far.mask.any()


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 85])
def test_a_threshold_outside_0_to_1_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        PostProcessing(threshold)


def test_small_components_are_removed_from_the_mask_alone(predictor: Predictor, image: np.ndarray) -> None:
    whole = predictor.predict(image)
    labels, count = ndimage.label(whole.mask, np.ones((3, 3)))
    areas = ndimage.sum(whole.mask, labels, range(1, count + 1))
    least = int(areas.min()) + 1
    smaller = Predictor(
        predictor.model, predictor.processor, post=PostProcessing(min_component_px=least)
    ).predict(image)
    assert not np.array_equal(smaller.mask, whole.mask)
    assert np.array_equal(smaller.mask, np.isin(labels, 1 + np.flatnonzero(areas >= least)))
    assert np.array_equal(smaller.probabilities, whole.probabilities)


def test_a_batch_of_different_sizes_gives_what_single_images_give(
    predictor: Predictor, images: list[np.ndarray]
) -> None:
    tiles = [len(predictor.processor([image]).tiles) for image in images]
    assert len(set(tiles)) > 1  # else padding of the text is not tested
    together = predictor.predict_batch(images)
    alone = [predictor.predict(image) for image in images]
    assert max(map(largest_gap, together, alone)) < 1e-4
    assert min(np.ptp(result.logits) for result in alone) > 1e-2  # far above the tolerance
    assert largest_gap(predictor.predict(images[0]), predictor.predict(images[0][::-1])) > 1e-2


def test_a_batch_of_one_size_gives_what_single_images_give(predictor: Predictor) -> None:
    images = [np.full((48, 64, 3), value, np.uint8) for value in (10, 120, 240)]
    together = predictor.predict_batch(images)
    assert (
        max(
            largest_gap(result, predictor.predict(image))
            for result, image in zip(together, images, strict=True)
        )
        < 1e-4
    )


def test_the_orientation_is_kept(predictor: Predictor) -> None:
    """A bright corner moves the logits there more than in the opposite corner: rows are not columns."""
    dark = np.full((64, 96, 3), 30, np.uint8)
    lit = dark.copy()
    lit[:24, -36:] = 255
    change = np.abs(predictor.predict(lit).logits - predictor.predict(dark).logits)
    corners = {
        "top right": change[:16, -24:],
        "top left": change[:16, :24],
        "bottom right": change[-16:, -24:],
    }
    means = {name: float(part.mean()) for name, part in corners.items()}
    assert max(means, key=means.get) == "top right", means


BAD_IMAGES = {
    "grey": np.zeros((64, 64), np.uint8),
    "one channel": np.zeros((64, 64, 1), np.uint8),
    "with alpha": np.zeros((64, 64, 4), np.uint8),
    "float": np.zeros((64, 64, 3), np.float32),
    "bool": np.zeros((64, 64, 3), bool),
    "channels first": np.zeros((3, 64, 64), np.uint8),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_other_images_are_refused(predictor: Predictor, image: np.ndarray, kind: str) -> None:
    bad = BAD_IMAGES[kind]
    with pytest.raises(ValueError, match=r"Image 1 is .*uint8 RGB \(H, W, 3\) is needed") as raised:
        predictor.predict_batch([image, bad])
    assert str(bad.shape) in str(raised.value)


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
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in zip(*parts, strict=True))
    for union, first, second in zip(model(inputs), *parts, strict=True):
        assert float((union - torch.maximum(first, second)).abs().max()) < 1e-4
        cut = first.median()
        assert ((union > cut) == ((first > cut) | (second > cut))).float().mean() > 0.999


@torch.inference_mode()
def test_the_state_is_read_at_the_seg_token_itself(predictor: Predictor, image: np.ndarray) -> None:
    """Causal attention tells where: later words change nothing, [SEG]'s own embedding does."""
    model, processor = predictor.model, predictor.processor
    short, long = (processor([image], answer=answer) for answer in ("Sure, [SEG].", "Sure, [SEG]! And more."))
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


def test_an_answer_without_seg_is_refused(predictor: Predictor, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"has no \[SEG\]"):
        predictor.processor([image], answer="Sure.")


def test_the_prompt_reaches_the_model(predictor: Predictor, image: np.ndarray) -> None:
    other = Predictor(predictor.model, predictor.processor, prompt="Where is the catheter?")
    assert largest_gap(predictor.predict(image), other.predict(image)) > 1e-4


def test_an_adapter_changes_the_masks_and_a_run_folder_means_its_best(
    predictor: Predictor, lively_checkpoint: Path, adapter: Path, image: np.ndarray
) -> None:
    adapted = Predictor.from_pretrained(lively_checkpoint, adapter, "cpu")
    from_run = Predictor.from_pretrained(lively_checkpoint, adapter.parent, "cpu")
    assert largest_gap(adapted.predict(image), predictor.predict(image)) > 1e-2
    assert largest_gap(adapted.predict(image), from_run.predict(image)) == 0
    assert adapter_folder(adapter) == adapter


def test_bfloat16_leaves_sam2_alone_and_moves_the_masks_little(
    predictor: Predictor, lively_checkpoint: Path, image: np.ndarray
) -> None:
    half = Predictor.from_pretrained(lively_checkpoint, device="cpu", use_bf16=True)
    dtypes = {name.split(".")[0]: parameter.dtype for name, parameter in half.model.named_parameters()}
    assert dtypes["lm"] == dtypes["vision"] == dtypes["projector"] == torch.bfloat16
    assert dtypes["sam"] == dtypes["text_hidden_fcs"] == torch.float32
    assert 0 < largest_gap(half.predict(image), predictor.predict(image)) < 0.1


def test_no_gradient_is_kept(predictor: Predictor, image: np.ndarray) -> None:
    predictor.predict(image)
    assert not any(parameter.requires_grad for parameter in predictor.model.parameters())


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path / "nowhere")):
        Predictor.from_pretrained(tmp_path / "nowhere")


class ShiftedModel:
    """A model whose logits are lower by a constant."""

    def __init__(self, model: torch.nn.Module, shift: float) -> None:
        self.model = model
        self.shift = shift
        self.device = model.device

    def __call__(self, inputs: Sa2VAInputs) -> list[torch.Tensor]:
        return [logits - self.shift for logits in self.model(inputs)]
