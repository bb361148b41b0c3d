import math
from dataclasses import dataclass

import numpy as np
import pytest

from vesselrl.evaluation.evaluate import describe_reward, evaluate
from vesselrl.scoring.rewards import MultiObjectiveReward


@dataclass(frozen=True)
class Picture:
    key: str
    patient: str
    sequence: str
    image: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class Answer:
    mask: np.ndarray


def picture(number, patient, truth):
    image = np.full((*truth.shape, 3), number, np.uint8)
    return Picture(f"{patient}_S1_F{number:04d}", patient, f"{patient}_S1", image, truth)


def load(sample):
    return sample.image, sample.truth


def bar(*columns, width=8):
    mask = np.zeros((6, width), bool)
    mask[2:4, list(columns)] = True
    return mask


@pytest.fixture
def pictures():
    return [
        picture(0, "P001", bar(0, 1, 2, 3)),
        picture(1, "P001", bar(0, 1, 2, 3)),
        picture(2, "P002", bar(4, 5)),
        picture(3, "P003", np.zeros((6, 8), bool)),
    ]


ANSWERS = {0: bar(0, 1, 2, 3), 1: bar(0, 1), 2: None, 3: np.zeros((6, 8), bool)}


def predict(image):
    mask = ANSWERS[int(image[0, 0, 0])]
    return None if mask is None else Answer(mask)


def test_scores_by_hand(pictures):
    result = evaluate(predict, pictures, load)
    # Perfect; half of the vessel: 2*4/(4+8); failed: 0; both empty: 1.
    assert [row["dice"] for row in result.rows] == pytest.approx([1, 2 / 3, 0, 1])
    assert [row["recall"] for row in result.rows] == pytest.approx([1, 0.5, 0, math.nan], nan_ok=True)
    dice = result.summary["metrics"]["dice"]
    assert dice["image_mean"] == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert dice["patient_mean"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert 0 <= dice["low"] < dice["patient_mean"] < dice["high"] <= 1
    recall = result.summary["metrics"]["recall"]
    assert recall["patient_mean"] == pytest.approx((0.75 + 0) / 2)
    assert (recall["n_images"], recall["n_undefined"], recall["n_patients"]) == (3, 1, 2)
    assert math.isnan(recall["low"])


def test_failed_prediction_is_an_empty_mask_and_counted(pictures):
    result = evaluate(predict, pictures, load)
    assert [row["failed"] for row in result.rows] == [False, False, True, False]
    assert result.summary["n_failed"] == 1
    assert result.summary["n_images"] == 4
    assert result.too_many_failed
    empty = evaluate(lambda image: predict(image) or Answer(np.zeros((6, 8), bool)), pictures, load)
    assert not empty.too_many_failed
    without = [{k: v for k, v in row.items() if k != "failed"} for row in result.rows]
    assert str(without) == str([{k: v for k, v in row.items() if k != "failed"} for row in empty.rows])


def test_predictor_never_sees_the_truth(pictures):
    seen = []

    def watch(image):
        seen.append(image.copy())
        return Answer(bar(0, 1))

    evaluate(watch, pictures, load)
    noise = np.random.default_rng(0).random((6, 8)) > 0.5
    evaluate(watch, pictures, lambda sample: (sample.image, noise))
    assert all(np.array_equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))


def test_reward_is_a_column_and_described(pictures):
    class AreaReward:
        def __init__(self):
            self.weight = 0.5
            self.custom = max

        def __call__(self, pred, gt):
            assert pred.dtype == bool
            assert gt.dtype == bool
            return self.weight * float(pred.sum()), {"area": 1.0}

    result = evaluate(predict, pictures, load, reward=AreaReward())
    assert [row["reward"] for row in result.rows] == [4.0, 2.0, 0.0, 0.0]
    assert result.summary["metrics"]["reward"]["image_mean"] == 1.5
    assert result.reward_spec == {"class": "AreaReward", "weight": 0.5, "custom": "max"}
    assert describe_reward(max) == {"class": "max"}
    assert evaluate(predict, pictures, load).reward_spec is None


def test_describing_a_reward_does_not_depend_on_its_use():
    used, fresh = MultiObjectiveReward(recall_target=0.9), MultiObjectiveReward(recall_target=0.9)
    used(bar(0, 1), bar(0, 1))
    assert describe_reward(used) == describe_reward(fresh)
    assert describe_reward(used)["recall_target"] == 0.9
    assert describe_reward(used) != describe_reward(MultiObjectiveReward())


def test_wrong_shapes_are_errors(pictures):
    with pytest.raises(
        ValueError, match=r"P001_S1_F0000: the predicted mask is \(6, 9\), the image \(6, 8\)"
    ):
        evaluate(lambda _: Answer(bar(1, width=9)), pictures, load)
    with pytest.raises(ValueError, match=r"P001_S1_F0000: the true mask is \(6, 9\)"):
        evaluate(predict, pictures, lambda sample: (sample.image, bar(1, width=9)))
    with pytest.raises(ValueError, match="P001_S1_F0000: predicted mask"):
        evaluate(lambda _: Answer(255 * bar(1).astype(np.uint8)), pictures, load)


def test_a_crash_is_not_a_failed_prediction(pictures):
    def crash(image):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(crash, pictures, load)


def test_nothing_and_repeated_images_are_refused_before_predicting(pictures):
    def never(image):
        pytest.fail("predicted")

    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(never, [], load)
    with pytest.raises(ValueError, match="P001_S1_F0000 occurs twice"):
        evaluate(never, [*pictures, pictures[0]], load)


def test_progress_is_told(pictures):
    told = []
    evaluate(predict, pictures, load, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_hashes_follow_images_and_labels_not_order(pictures):
    result = evaluate(predict, pictures, load)
    shuffled = evaluate(predict, pictures[::-1], load)
    assert (shuffled.image_list_hash, shuffled.label_hash) == (result.image_list_hash, result.label_hash)
    fewer = evaluate(predict, pictures[:3], load)
    assert fewer.image_list_hash != result.image_list_hash

    def one_pixel_more(sample):
        truth = sample.truth.copy()
        truth[0, 0] = True
        return sample.image, truth

    relabelled = evaluate(predict, pictures, one_pixel_more)
    assert relabelled.image_list_hash == result.image_list_hash
    assert relabelled.label_hash != result.label_hash
