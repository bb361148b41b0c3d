"""Rows by hand, several masks of one prediction, a second observer."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vesselrl.data.samples import find_samples, load_mask
from vesselrl.errors import DataError, NotFiniteError
from vesselrl.evaluation import evaluate as evaluation
from vesselrl.evaluation.evaluate import describe_reward, evaluate, second_observer
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import MultiObjectiveReward


def picture(number, patient, truth, image=None):
    """A sample with an image of one brightness, its number, unless another is given."""
    image = np.full((6, 8, 3), number, np.uint8) if image is None else image
    names = {"key": f"{patient}_S1_F{number:04d}", "patient": patient, "sequence": f"{patient}_S1"}
    return SimpleNamespace(**names, image=image, truth=truth)


def load(sample):
    return sample.image, sample.truth


def bar(*columns, width=8):
    mask = np.zeros((6, width), bool)
    mask[2:4, list(columns)] = True
    return mask


EMPTY = bar()
ANSWERS = {0: bar(0, 1, 2, 3), 1: bar(0, 1), 2: None, 3: EMPTY}
TRUTHS = (("P001", bar(0, 1, 2, 3)), ("P001", bar(0, 1, 2, 3)), ("P002", bar(4, 5)), ("P003", EMPTY))
PICTURES = [picture(number, *truth) for number, truth in enumerate(TRUTHS)]


def predict(image):
    mask = ANSWERS[int(image[0, 0, 0])]
    return None if mask is None else SimpleNamespace(mask=mask)


def test_a_prediction_that_is_not_finite_has_failed_and_the_log_says_so(caplog):
    def overflow(image):
        if image[0, 0, 0] == 3:  # an empty mask would be right
            raise NotFiniteError("The model gives no numbers.")
        return SimpleNamespace(mask=predict(image).mask, probabilities=predict(image).mask.astype(np.float32))

    result = evaluate(overflow, [PICTURES[0], PICTURES[3]], load=load)
    assert [row["failed"] for row in result.rows] == [False, True]
    assert (result.summary["n_failed"], result.too_many_failed) == (1, True)
    assert "P003_S1_F0003: failed, and counted as an empty mask. The model gives no numbers" in caplog.text


def test_scores_by_hand():
    result = evaluate(predict, PICTURES, load=load)
    # Perfect; half of the vessel: 2*4/(4+8); failed: 0; both empty: 1.
    assert [row["dice"] for row in result.rows] == pytest.approx([1, 2 / 3, 0, 1])
    assert [row["recall"] for row in result.rows] == pytest.approx([1, 0.5, 0, math.nan], nan_ok=True)
    dice, recall = (result.summary["metrics"][name] for name in ("dice", "recall"))
    assert dice["image_mean"] == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert dice["patient_mean"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert 0 <= dice["low"] < dice["patient_mean"] < dice["high"] <= 1
    assert recall["patient_mean"] == pytest.approx((0.75 + 0) / 2)
    assert (recall["n_images"], recall["n_undefined"], recall["n_patients"]) == (3, 1, 2)
    assert (result.summary["n_failed"], result.too_many_failed) == (1, True)
    empty = evaluate(lambda image: predict(image) or SimpleNamespace(mask=EMPTY), PICTURES, load=load)
    assert str(empty.rows) == str(result.rows).replace("True", "False")


@pytest.mark.parametrize("batch_size", [2, 3, 9])
def test_predicted_in_batches_only_what_is_not_finite_has_failed(batch_size):
    sizes, told = [], []

    def predict_batch(images):
        sizes.append(len(images))
        if any(image[0, 0, 0] == 2 for image in images):
            raise NotFiniteError("The model gives no numbers.")
        return [*map(predict, images)]

    options = {"progress": lambda *done: told.append(done), "batch_size": batch_size}
    result = evaluate(predict_batch, PICTURES, load=load, **options)
    assert str(result.rows) == str(evaluate(predict, PICTURES, load=load).rows)  # nan too
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # The batch with the third image is taken apart.
    assert sizes == {2: [2, 2, 1, 1], 3: [3, 1, 1, 1, 1], 9: [4, 1, 1, 1, 1]}[batch_size]


def test_the_hashes_follow_images_and_labels():
    sets = (PICTURES, PICTURES[::-1], PICTURES[:3])
    result, shuffled, fewer = (evaluate(predict, one, load=load) for one in sets)
    relabelled = evaluate(predict, PICTURES, load=lambda sample: (sample.image, ~sample.truth))
    assert relabelled.image_list_hash == shuffled.image_list_hash == result.image_list_hash
    assert relabelled.label_hash != shuffled.label_hash == result.label_hash
    assert fewer.image_list_hash != result.image_list_hash


def test_reward_is_a_column_and_described():
    def area(pred, gt):
        assert pred.dtype == gt.dtype == bool
        return 0.5 * float(pred.sum()), {"area": 1.0}

    result = evaluate(predict, PICTURES, area, load=load)
    assert [row["reward"] for row in result.rows] == [4.0, 2.0, 0.0, 0.0]
    assert result.reward_spec == {"class": "area"}
    used, fresh = MultiObjectiveReward(recall_target=0.9), MultiObjectiveReward(recall_target=0.9)
    used(bar(0, 1), bar(0, 1))  # its use leaves no trace in the description
    assert describe_reward(used) == describe_reward(fresh) != describe_reward(MultiObjectiveReward())


def answer(mask):
    return lambda image: SimpleNamespace(mask=mask, probabilities=np.zeros(mask.shape))


def test_what_is_wrong_is_an_error_that_names_the_image_and_no_failed_prediction():
    wide = bar(1, width=9)
    for function, samples, error, message in (
        (lambda image: {}["out of memory"], PICTURES, KeyError, "out of memory"),
        (None, [], ValueError, "nothing to evaluate"),
        (None, [*PICTURES, PICTURES[0]], ValueError, "P001_S1_F0000 occurs twice"),
        (None, [picture(0, "P1", wide)], ValueError, r"F0000: the true mask is \(6, 9\)"),
        (answer(wide), PICTURES, ValueError, r"F0000: the predicted mask is \(6, 9\), the image \(6, 8"),
        (answer(255 * bar(1).astype(np.uint8)), PICTURES, ValueError, "P001_S1_F0000: predicted mask"),
    ):
        with pytest.raises(error, match=message):
            evaluate(function, samples, load=load)
        predicted = evaluation.predict_each(function, samples, load)
        with pytest.raises(error, match=message):
            evaluation.evaluate_variants(samples, predicted, {})


SHAPE = (21, 13)
NOISE = np.random.default_rng(0).integers(0, 256, (5, *SHAPE, 3), dtype=np.uint8)
NOISE[3] = 0
NOISY = [picture(k, f"P{k}", image[:, :, 1] < 80, image) for k, image in enumerate(NOISE)]


def brightness(image, post=None):
    """Brightness is probability; a black picture fails."""
    if not image.any():
        return None
    probabilities = (image.mean(axis=2) / 255).astype(np.float32)
    return SimpleNamespace(mask=(post or PostProcessing()).mask(probabilities), probabilities=probabilities)


def test_one_pass_gives_what_several_evaluations_give(caplog):
    post, higher, reward = PostProcessing(0.5, 3), PostProcessing(0.6), MultiObjectiveReward()
    predicted = evaluation.predict_each(brightness, NOISY, load, post=post)
    done = evaluation.evaluate_variants(NOISY, predicted, {"higher": higher}, reward)
    for variant, used in (("", post), ("higher", higher)):
        direct = evaluate(lambda image, used=used: brightness(image, used), NOISY, reward, load=load)
        assert (str(done[variant].rows), done[variant].summary["n_failed"]) == (str(direct.rows), 1)
        counted = done[variant].calibration
        assert (counted["n_failed"], counted["n_pixels"]) == (1, 4 * SHAPE[0] * SHAPE[1])
    assert "1 of 5 predictions failed: P3_S1_F0003" in caplog.text


def test_agreement_of_two_observers_by_hand(tmp_path):
    """Images share a name; the second observer saw half of the vessel in the first, all in the others."""
    for number in (1, 2, 3):
        mask = np.arange(64).reshape(8, 8) // 8 == number
        half = mask & ((np.arange(8) < 4) | (number > 1))
        for folder, pixels in (("images", np.full((8, 8), 90, np.uint8)), ("masks", mask), ("second", half)):
            (tmp_path / folder / f"p{number}").mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"p{number}" / "001.png")
    samples, folder = find_samples(tmp_path, r"^(?P<patient>[^/]+)/"), tmp_path / "second"
    seconds = zip(second_observer(samples, folder), samples, strict=True)
    found = evaluation.evaluate_masks(samples, ((load_mask(other), load_mask(one)) for other, one in seconds))
    scores = sorted((row["dice"], row["recall"], row["precision"]) for row in found.rows)
    assert scores == [(pytest.approx(2 / 3), 0.5, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)]
    (folder / "p1" / "001.png").rename(folder / "001.png")
    with pytest.raises(DataError, match="the second observer has no mask of it"):
        second_observer(samples, folder)
