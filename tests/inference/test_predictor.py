"""Images in, masks out: thresholds, batches, several [SEG], adapters; image files in, PNG files out."""

import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.golden.broken_input import cut
from vesselrl.errors import DataError, NotFiniteError, RunError
from vesselrl.inference import predictor as module
from vesselrl.inference.predictor import Prediction, Predictor, predict_files
from vesselrl.models.processing import Sa2VAInputs
from vesselrl.models.sa2va import upsample
from vesselrl.scoring.postprocessing import PostProcessing, drop_small_components

PERSON = "ZHANG_SAN(1234567890)_1-2_3_0A1B2C3D_frame_000011"


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
        assert [part.shape for part in result] == [image.shape[:2]] * 3
        assert [part.dtype for part in result] == [np.bool_, np.float32, np.float32]
        expected = torch.sigmoid(torch.from_numpy(result.logits)).numpy()
        np.testing.assert_allclose(result.probabilities, expected, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in predictor.model.parameters())
    with np.errstate(all="raise", under="ignore"):  # no overflow
        far = Predictor(ShiftedModel(predictor.model, 1e4), predictor.processor).predict(images[0])
    assert not far.probabilities.any()
    assert not far.mask.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_output_that_is_no_number_is_no_empty_mask(
    predictor: Predictor, images: list[np.ndarray], value: float
) -> None:
    broken = Predictor(ShiftedModel(predictor.model, value), predictor.processor)
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
    for bad in (np.zeros((64, 64), np.uint8), np.zeros((64, 64, 4), np.uint8), np.zeros((3, 64, 64))):
        found = rf"Image 1 is {bad.dtype} \({bad.shape[0]}, .*uint8 RGB \(H, W, 3\)"
        with pytest.raises(ValueError, match=found):
            predictor.predict_batch([images[0], bad])


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


def save_picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8)).save(path)
    return path


def test_pixel_values_of_the_three_files(tmp_path: Path) -> None:
    grey = np.full((2, 3, 3), 100, np.uint8)
    probabilities = np.array([[0, 0.25, 0.5], [0.75, 1, 1e-5]], np.float32)
    prediction = Prediction(probabilities > 0.5, probabilities, np.zeros((2, 3), np.float32))
    row = module.write_prediction(grey, prediction, tmp_path, "heart")
    assert row == {"mask": str(tmp_path / "heart_mask.png"), "foreground": 2 / 6}
    names = ("mask", "probability", "overlay")
    mask, probability, overlay = (np.asarray(Image.open(tmp_path / f"heart_{name}.png")) for name in names)
    assert (mask.dtype, mask.tolist()) == (np.uint8, [[0, 0, 0], [255, 255, 0]])
    assert (probability.dtype, probability.tolist()) == (np.uint16, [[0, 16384, 32768], [49151, 65535, 1]])
    assert overlay.shape == (2, 3, 3)
    assert (overlay[1, 0] != 100).any()


def test_results_do_not_carry_the_name_of_a_person(predictor: Predictor, tmp_path: Path) -> None:
    for name in (f"{PERSON}.png", "left heart.png"):
        save_picture(tmp_path / "in" / name)
    rows = list(predict_files(predictor, tmp_path / "in", tmp_path / "out"))
    names = sorted(path.name for path in (tmp_path / "out").glob("*_mask.png"))
    assert names == ["P001_S1_F0011_mask.png", "left heart_mask.png"]
    assert sorted(Path(row["mask"]).name for row in rows) == names
    mapping = tmp_path / "out" / "patients.mapping.json"
    assert stat.S_IMODE(mapping.stat().st_mode) == 0o600
    assert PERSON in mapping.read_text()  # the only place that knows


def test_a_folder_in_name_order_with_progress(predictor: Predictor, tmp_path: Path) -> None:
    folder, out, calls = tmp_path / "in", tmp_path / "out" / "deep", []
    for name in ("b.PNG", "a.png", "c.tiff", ".hidden.png", "sub/d.png"):
        save_picture(folder / name)
    (folder / "notes.txt").write_text("no picture")
    save_picture(out / "a_mask.png")  # an older one
    rows = list(predict_files(predictor, folder, out, lambda *numbers: calls.append(numbers)))
    assert [row["image"] for row in rows] == ["a.png", "b.PNG", "c.tiff"]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert len(list(out.iterdir())) == 9
    expected = predictor.predict(np.asarray(Image.open(folder / "a.png"))).mask
    assert (np.asarray(Image.open(out / "a_mask.png")) == 255 * expected).all()
    assert rows[0]["foreground"] == pytest.approx(expected.mean())


def test_an_unreadable_file_is_named_but_not_the_person(predictor: Predictor, tmp_path: Path) -> None:
    for name, shown in (("img_002", "img_002.png"), (PERSON, "image 2 of 2 in name order")):
        save_picture(tmp_path / name / "001.png")
        cut(save_picture(tmp_path / name / f"{name}.png"))
        rows = predict_files(predictor, tmp_path / name, tmp_path / f"out of {shown}")
        assert next(rows)["image"] == "001.png"
        with pytest.raises(DataError, match=f"^{shown}: the file is damaged(?!.*ZHANG)"):
            next(rows)
        assert len(list((tmp_path / f"out of {shown}").glob("*.png"))) == 3  # the first image's, complete


def test_unusable_folders_are_refused_before_anything_is_written(
    predictor: Predictor, tmp_path: Path
) -> None:
    for name in ("001.png", "002.png", "002.jpg"):
        file = save_picture(tmp_path / "in" / name)
    for path, out, message in (
        (tmp_path / "nowhere", "out", "nowhere does not exist"),
        (tmp_path, "out", r"holds no image; known endings are \.png"),
        (file.parent, "out", r"1 file names differ only by their ending: 002\.jpg and the next"),
        (file, "in/002.jpg", r"Cannot write to .*002\.jpg.*[Gg]ive another --output_dir"),
    ):
        with pytest.raises((DataError, RunError), match=message):
            list(predict_files(predictor, path, tmp_path / out))
        assert not (tmp_path / "out").exists()


def test_what_is_odd_about_a_file_is_logged(predictor: Predictor, tmp_path: Path, caplog) -> None:
    """The same twelve bits in 16 and in 8 give the same mask; of frames the first is used."""
    grey = np.asarray(Image.open(save_picture(tmp_path / "in" / "001.png")).convert("L")) // 2
    masks = {}
    for name, values in (("001", grey.astype(np.uint16) * 16), ("002", grey)):
        picture = Image.fromarray(values)
        frames = {"save_all": True, "append_images": [Image.new("L", picture.size)]} if name == "002" else {}
        picture.save(tmp_path / "in" / f"{name}.tif", **frames)
    (tmp_path / "in" / "001.png").unlink()
    for row in predict_files(predictor, tmp_path / "in", tmp_path / "out"):
        masks[row["image"]] = np.asarray(Image.open(row["mask"]))
    assert (masks["001.tif"] == masks["002.tif"]).all()
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("001.tif: 16-bit image")
    assert second.startswith("002.tif: file with several frames: 2.")
