"""Rows by hand, several masks of one prediction, test-time flips, a second observer, caveats."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vesselrl.data.samples import find_samples, load_mask
from vesselrl.data.splits import split_by_patient
from vesselrl.errors import DataError, NotFiniteError
from vesselrl.evaluation.evaluate import (
    caveats_of,
    describe_reward,
    evaluate,
    evaluate_masks,
    evaluate_variants,
    second_observer,
    with_flips,
)
from vesselrl.evaluation.results import Caveat
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import MultiObjectiveReward


def picture(number, patient, truth, image=None):
    """A sample with an image of one brightness, its number, unless another is given."""
    image = np.full((*truth.shape, 3), number, np.uint8) if image is None else image
    names = {"key": f"{patient}_S1_F{number:04d}", "patient": patient, "sequence": f"{patient}_S1"}
    return SimpleNamespace(**names, image=image, truth=truth)


def load(sample):
    return sample.image, sample.truth


def bar(*columns, width=8):
    mask = np.zeros((6, width), bool)
    mask[2:4, list(columns)] = True
    return mask


EMPTY = np.zeros((6, 8), bool)
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

    pictures = [PICTURES[0], PICTURES[3]]
    for given in (overflow, with_flips(overflow)):
        result = evaluate(given, pictures, load=load)
        assert [row["failed"] for row in result.rows] == [False, True]
        assert result.summary["n_failed"] == 1
        assert result.too_many_failed
    assert (
        caplog.text.count("P003_S1_F0003: failed, and counted as an empty mask. The model gives no numbers")
        == 2
    )


def test_scores_by_hand():
    told = []
    result = evaluate(predict, PICTURES, load=load, progress=lambda *numbers: told.append(numbers))
    # Perfect; half of the vessel: 2*4/(4+8); failed: 0; both empty: 1.
    assert [row["dice"] for row in result.rows] == pytest.approx([1, 2 / 3, 0, 1])
    assert [row["recall"] for row in result.rows] == pytest.approx([1, 0.5, 0, math.nan], nan_ok=True)
    dice, recall = (result.summary["metrics"][name] for name in ("dice", "recall"))
    assert dice["image_mean"] == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert dice["patient_mean"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert 0 <= dice["low"] < dice["patient_mean"] < dice["high"] <= 1
    assert recall["patient_mean"] == pytest.approx((0.75 + 0) / 2)
    assert (recall["n_images"], recall["n_undefined"], recall["n_patients"]) == (3, 1, 2)
    assert math.isnan(recall["low"])
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # A failed prediction is an empty mask and counted.
    assert [row["failed"] for row in result.rows] == [False, False, True, False]
    assert (result.summary["n_failed"], result.too_many_failed) == (1, True)
    empty = evaluate(lambda image: predict(image) or SimpleNamespace(mask=EMPTY), PICTURES, load=load)
    assert not empty.too_many_failed
    assert str(empty.rows) == str(result.rows).replace("True", "False")


def test_the_predictor_sees_the_image_alone_and_the_hashes_follow_images_and_labels():
    seen = []

    def watch(image):
        seen.append(image.copy())
        return SimpleNamespace(mask=bar(0, 1))

    noise = np.random.default_rng(0).random((6, 8)) > 0.5
    result = evaluate(watch, PICTURES, load=load)
    relabelled = evaluate(watch, PICTURES, load=lambda sample: (sample.image, noise))
    assert np.array_equal(seen[:4], seen[4:])
    assert relabelled.image_list_hash == result.image_list_hash
    assert relabelled.label_hash != result.label_hash
    shuffled = evaluate(watch, PICTURES[::-1], load=load)
    assert (shuffled.image_list_hash, shuffled.label_hash) == (result.image_list_hash, result.label_hash)
    assert evaluate(watch, PICTURES[:3], load=load).image_list_hash != result.image_list_hash


def test_reward_is_a_column_and_described():
    class AreaReward:
        def __init__(self):
            self.weight, self.custom = 0.5, max

        def __call__(self, pred, gt):
            assert pred.dtype == gt.dtype == bool
            return self.weight * float(pred.sum()), {"area": 1.0}

    result = evaluate(predict, PICTURES, AreaReward(), load=load)
    assert [row["reward"] for row in result.rows] == [4.0, 2.0, 0.0, 0.0]
    assert result.summary["metrics"]["reward"]["image_mean"] == 1.5
    assert result.reward_spec == {"class": "AreaReward", "weight": 0.5, "custom": "max"}
    assert evaluate(predict, PICTURES, load=load).reward_spec is None
    used, fresh = MultiObjectiveReward(recall_target=0.9), MultiObjectiveReward(recall_target=0.9)
    used(bar(0, 1), bar(0, 1))  # its use leaves no trace in the description
    assert describe_reward(used) == describe_reward(fresh) != describe_reward(MultiObjectiveReward())
    assert describe_reward(used)["recall_target"] == 0.9


def test_what_is_wrong_is_an_error_that_names_the_image_and_no_failed_prediction():
    def crash(image):
        raise RuntimeError("out of memory")

    def answer(mask):
        return lambda image: SimpleNamespace(mask=mask, probabilities=np.zeros(mask.shape))

    wide = bar(1, width=9)
    for function, samples, loaded, error, message in (
        (crash, PICTURES, load, RuntimeError, "out of memory"),
        (None, [], load, ValueError, "nothing to evaluate"),
        (None, [*PICTURES, PICTURES[0]], load, ValueError, "P001_S1_F0000 occurs twice"),
        (None, PICTURES, lambda one: (one.image, wide), ValueError, r"F0000: the true mask is \(6, 9\)"),
        (
            answer(wide),
            PICTURES,
            load,
            ValueError,
            r"F0000: the predicted mask is \(6, 9\), the image \(6, 8",
        ),
        (answer(255 * bar(1).astype(np.uint8)), PICTURES, load, ValueError, "P001_S1_F0000: predicted mask"),
    ):
        with pytest.raises(error, match=message):
            evaluate(function, samples, load=loaded)
        with pytest.raises(error, match=message):
            evaluate_variants(function, samples, PostProcessing(), {}, load=loaded)


SHAPE = (21, 13)


def noisy(number):
    """A sample of noise; number 3 is black."""
    generator = np.random.default_rng(number)
    image = generator.integers(0, 1 if number == 3 else 256, (*SHAPE, 3), dtype=np.uint8)
    return picture(number, f"P{number}", generator.random(SHAPE) < 0.3, image)


NOISY = [noisy(number) for number in range(5)]


def brightness(image, post=None):
    """Brightness is probability; a black picture fails."""
    if not image.any():
        return None
    probabilities = (image.mean(axis=2) / 255).astype(np.float32)
    return SimpleNamespace(mask=(post or PostProcessing()).mask(probabilities), probabilities=probabilities)


def test_one_pass_gives_what_several_evaluations_give(caplog):
    asked = []
    post, higher, reward = PostProcessing(0.5, 3), PostProcessing(0.6), MultiObjectiveReward()
    done = evaluate_variants(
        lambda image: asked.append(1) or brightness(image), NOISY, post, {"higher": higher}, reward, load=load
    )
    assert len(asked) == len(NOISY)
    for variant, used in (("", post), ("higher", higher)):
        direct = evaluate(lambda image, used=used: brightness(image, used), NOISY, reward, load=load)
        assert (str(done[variant].rows), done[variant].summary["n_failed"]) == (str(direct.rows), 1)
        assert done[variant].calibration["n_failed"] == 1
        assert done[variant].calibration["n_pixels"] == 4 * SHAPE[0] * SHAPE[1]
    assert "1 of 5 predictions failed: P3_S1_F0003" in caplog.text
    nothing = evaluate_variants(lambda _: None, NOISY, post, {"more": higher}, load=load)["more"]
    assert (nothing.calibration, nothing.summary["n_failed"]) == (None, 5)


def test_flips_are_turned_back_and_averaged():
    image = NOISY[1].image
    assert np.allclose(with_flips(brightness)(image).probabilities, brightness(image).probabilities)
    seen = []

    def left_blind(picture):  # sees nothing in the left column and the upper row
        seen.append(picture)
        probabilities = np.ones(picture.shape[:2], np.float32)
        probabilities[:, 0] = probabilities[0] = 0
        return SimpleNamespace(probabilities=probabilities) if len(seen) != 8 else None

    flipped = with_flips(left_blind, threshold=0.4)(image)
    expected = np.ones(SHAPE)
    expected[:, [0, -1]] = expected[[0, -1]] = 0.5
    expected[[0, 0, -1, -1], [0, -1, 0, -1]] = 0.25
    assert np.array_equal(flipped.probabilities, expected)
    assert np.array_equal(flipped.mask, expected > 0.4)
    assert np.array_equal(seen, [image, np.fliplr(image), np.flipud(image), np.rot90(image, 2)])
    assert with_flips(left_blind)(image) is None  # the fourth of these four failed


def write_masks(root, name, **masks):
    """`folder -> mask`, each as `folder/name.png`, beside a grey image."""
    for folder, mask in {"images": np.full((8, 8), 90, np.uint8), **masks}.items():
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(root / folder / f"{name}.png")


def agreement(samples, folder):
    seconds = zip(second_observer(samples, folder), samples, strict=True)
    return evaluate_masks(samples, ((load_mask(other), load_mask(one)) for other, one in seconds))


def test_agreement_of_two_observers_by_hand(tmp_path):
    """The second observer saw half of the vessel in the first image, and the same in the second."""
    rows = np.zeros((8, 8), bool)
    rows[3:5] = True
    second = tmp_path / "second"
    write_masks(tmp_path, "train_01L", masks=rows, second=rows & (np.arange(8) < 4))
    write_masks(tmp_path, "train_02L", masks=rows, second=rows)
    first = find_samples(tmp_path)
    scores = sorted((row["dice"], row["recall"], row["precision"]) for row in agreement(first, second).rows)
    assert scores == [(pytest.approx(2 / 3), 0.5, 1.0), (1.0, 1.0, 1.0)]
    write_masks(tmp_path, "train_02L", second=np.zeros((4, 8), bool))
    with pytest.raises(DataError, match="the mask has 8×4 px, its image 8×8 px"):
        second_observer(first, second)
    (second / "train_02L.png").unlink()
    with pytest.raises(DataError, match="the second observer has no mask of it"):
        second_observer(first, second)
    with pytest.raises(DataError, match="There is no folder"):
        second_observer(first, tmp_path / "nowhere")


def test_equal_names_in_a_folder_for_each_patient(tmp_path):
    """p1/001.png is another image than p2/001.png, and so are its second mask and that of the other."""
    for number in (1, 2, 3):
        mask = np.zeros((8, 8), bool)
        mask[number, :] = True
        write_masks(tmp_path, f"p{number}/001", masks=mask, second=mask)
    first = find_samples(tmp_path, r"^(?P<patient>[^/]+)/")
    assert [row["dice"] for row in agreement(first, tmp_path / "second").rows] == [1.0] * 3
    (tmp_path / "second" / "p1" / "001.png").rename(tmp_path / "second" / "001.png")
    with pytest.raises(DataError, match="the second observer has no mask of it"):
        second_observer(first, tmp_path / "second")


def test_caveats_of_a_split_and_of_a_base_that_has_seen_the_patients(angiograms):
    samples = find_samples(angiograms)
    assert caveats_of(split_by_patient(samples), samples) == {}
    assert caveats_of(None, [], {"P001_S1_F0001"}) == {}
    caveats = caveats_of(split_by_patient(samples, unit="frame"), samples, {samples[0].key, "other"})
    assert list(caveats) == [Caveat.PATIENT_LEAKAGE, Caveat.PRETRAINING_OVERLAP]
    assert "patients of 1 of 20 images" in caveats[Caveat.PRETRAINING_OVERLAP]
