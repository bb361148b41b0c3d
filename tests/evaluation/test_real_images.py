"""Evaluations of real angiograms and of two observers, against scikit-learn."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from vesselrl.data.samples import find_samples, load_mask
from vesselrl.evaluation.evaluate import evaluate, evaluate_masks, load_pixels, second_observer
from vesselrl.evaluation.results import write_evaluation


def darker_than_around(image: np.ndarray) -> SimpleNamespace:
    """A plain rule instead of a model: how much darker a pixel is than its surroundings."""
    grey = cv2.GaussianBlur(image[:, :, 0].astype(np.float32), (0, 0), 1.5)
    contrast = cv2.GaussianBlur(grey, (0, 0), 12) - grey
    return SimpleNamespace(mask=1 / (1 + np.exp(4 - contrast / 4)) > np.float32(0.5))


LIBRARY = {"dice": f1_score, "iou": jaccard_score, "recall": recall_score, "precision": precision_score}


@pytest.fixture
def data(shared_folder):
    if not (shared_folder / "data").is_dir():
        pytest.skip("needs ../shared")
    return shared_folder / "data"


def test_the_written_numbers_are_those_of_scikit_learn(data, tmp_path):
    samples = sorted(find_samples(data / "coronary80"), key=lambda sample: sample.image_path.name)
    test = [sample for sample in samples if sample.image_path.name.startswith("test")][:8]
    path, _ = write_evaluation(tmp_path, "test_rule", evaluate(darker_than_around, test))
    document = json.loads(path.read_text())
    pairs = [
        (truth.ravel(), darker_than_around(image).mask.ravel()) for image, truth in map(load_pixels, test)
    ]
    assert [row["key"] for row in document["rows"]] == [sample.key for sample in test]
    # Every image is of another patient here: the mean over patients is the mean over images.
    assert document["summary"]["n_patients"] == 8
    for name, function in LIBRARY.items():
        values = [function(*pair) for pair in pairs]
        assert [row[name] for row in document["rows"]] == pytest.approx(values), name
        summary = document["summary"]["metrics"][name]
        assert summary["patient_mean"] == pytest.approx(np.mean(values))
        assert summary["low"] < summary["patient_mean"] < summary["high"]
    assert 0.3 < document["summary"]["metrics"]["dice"]["patient_mean"] < 0.9  # the rule is no nonsense


def test_human_agreement_on_chase_db1(data):
    eyes_of_a_child = r"(?:train|test)_(?P<patient>\d+)(?P<sequence>[LR])"
    first = find_samples(data / "chase_db1", eyes_of_a_child)
    second = second_observer(first, data / "chase_db1" / "masks_2nd")
    pairs = [(load_mask(other), load_mask(one)) for other, one in zip(second, first, strict=True)]
    found = evaluate_masks(first, pairs)
    assert (found.summary["n_images"], found.summary["n_patients"]) == (28, 14)
    scores = found.summary["metrics"]["dice"]
    assert scores["image_mean"] == pytest.approx(0.777, abs=0.002)
    assert scores["low"] < 0.777 < scores["high"]
    assert found.rows[27]["dice"] == pytest.approx(f1_score(pairs[27][1].ravel(), pairs[27][0].ravel()))
