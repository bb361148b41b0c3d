"""One pass over the images, masks scored later, and test-time flips."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from vesselrl.evaluation.evaluate import evaluate
from vesselrl.evaluation.flips import with_flips
from vesselrl.evaluation.predictions import PackedMask, evaluate_masks, predict_once, unpacked
from vesselrl.scoring.postprocessing import PostProcessing


def sample(number):
    return SimpleNamespace(
        key=f"P{number}_S1_F1", patient=f"P{number}", sequence=f"P{number}_S1", number=number
    )


SAMPLES = [sample(number) for number in range(5)]
SHAPE = (21, 13)


def load(one):
    generator = np.random.default_rng(one.number)
    brightest = 1 if one.number == 3 else 256  # number 3 is black
    return generator.integers(0, brightest, (*SHAPE, 3), dtype=np.uint8), generator.random(SHAPE) < 0.3


def predict(image, threshold=0.5):
    """Brightness is probability; a black picture fails."""
    if not image.any():
        return None
    probabilities = (image.mean(axis=2) / 255).astype(np.float32)
    return SimpleNamespace(mask=probabilities > threshold, probabilities=probabilities)


def test_one_pass_gives_what_two_evaluations_give(caplog):
    asked = []

    def counted(image):
        asked.append(image)
        return predict(image)

    done = predict_once(counted, SAMPLES, load, variants={"higher": PostProcessing(0.6)})
    assert len(asked) == len(SAMPLES)
    for masks, threshold in ((done.masks, 0.5), (done.variants["higher"], 0.6)):
        stored = evaluate_masks(SAMPLES, unpacked(masks), unpacked(done.truths))
        direct = evaluate(lambda image, t=threshold: predict(image, t), SAMPLES, load)
        assert str(stored) == str(direct)
    assert direct.summary["n_failed"] == 1  # else nothing failed in this test
    with caplog.at_level(logging.WARNING):
        predict_once(predict, SAMPLES, load)
    assert "1 of 5 predictions failed: P3_S1_F1" in caplog.text
    assert done.calibration["n_failed"] == 1
    assert done.calibration["n_pixels"] == 4 * SHAPE[0] * SHAPE[1]


def test_if_all_fail_there_is_no_calibration():
    done = predict_once(lambda image: None, SAMPLES, load, variants={"higher": PostProcessing(0.6)})
    assert done.calibration is None
    assert set(done.variants["higher"].values()) == {None}


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (565, 584)])
def test_packed_masks_are_the_same_masks(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    assert np.array_equal(PackedMask.pack(mask).unpack(), mask)


def test_wrong_shapes_name_the_image():
    def small(image):
        return SimpleNamespace(mask=np.zeros((3, 3), bool), probabilities=np.zeros((3, 3)))

    with pytest.raises(ValueError, match=r"P0_S1_F1: the predicted mask is \(3, 3\)"):
        predict_once(small, SAMPLES, load)
    with pytest.raises(ValueError, match="got 0 samples"):
        predict_once(predict, [], load)
    with pytest.raises(ValueError, match="occurs twice"):
        predict_once(predict, [*SAMPLES, SAMPLES[0]], load)


def test_flips_are_turned_back_and_averaged():
    image = load(SAMPLES[1])[0]
    plain = predict(image)
    assert np.allclose(with_flips(predict)(image).probabilities, plain.probabilities)

    def left_blind(picture):  # sees nothing in the left column and the upper row
        probabilities = np.ones(picture.shape[:2], np.float32)
        probabilities[:, 0] = probabilities[0] = 0
        return SimpleNamespace(probabilities=probabilities)

    flipped = with_flips(left_blind, threshold=0.4)(image)
    expected = np.ones(SHAPE)
    expected[:, [0, -1]] = expected[[0, -1]] = 0.5
    expected[[0, 0, -1, -1], [0, -1, 0, -1]] = 0.25
    assert np.array_equal(flipped.probabilities, expected)
    assert np.array_equal(flipped.mask, expected > 0.4)


def test_flips_ask_about_the_four_mirror_images():
    image, seen = load(SAMPLES[1])[0], []

    def watch(picture):
        seen.append(picture)
        return SimpleNamespace(probabilities=np.zeros(SHAPE, np.float32)) if len(seen) < 4 else None

    assert with_flips(watch)(image) is None  # the fourth failed
    expected = [image, np.fliplr(image), np.flipud(image), np.rot90(image, 2)]
    assert all(np.array_equal(a, b) for a, b in zip(seen, expected, strict=True))
