"""An evaluation of real angiograms, file by file, against MONAI and scikit-learn."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric, SurfaceDiceMetric
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from vesselrl.data.samples import find_samples, load_mask
from vesselrl.evaluation.evaluate import evaluate, evaluate_masks, load_pixels, second_observer
from vesselrl.evaluation.results import write_evaluation

NUM_TEST = 8


def darker_than_around(image: np.ndarray) -> SimpleNamespace:
    """A plain rule instead of a model: how much darker a pixel is than its surroundings."""
    grey = cv2.GaussianBlur(image[:, :, 0].astype(np.float32), (0, 0), 1.5)
    contrast = cv2.GaussianBlur(grey, (0, 0), 12) - grey
    return SimpleNamespace(mask=1 / (1 + np.exp(4 - contrast / 4)) > np.float32(0.5))


def by_libraries(mask: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """One image's scores by scikit-learn; HD95 and NSD at 2 px by MONAI."""
    flat = truth.ravel(), mask.ravel()
    one_hot = [torch.from_numpy(m)[None, None].float() for m in (mask, truth)]
    monai_dice, hd95 = DiceMetric(ignore_empty=False), HausdorffDistanceMetric(percentile=95)
    nsd = SurfaceDiceMetric(class_thresholds=[2.0], include_background=True)
    assert monai_dice(*one_hot).item() == pytest.approx(f1_score(*flat))
    return {
        "dice": f1_score(*flat),
        "iou": jaccard_score(*flat),
        "recall": recall_score(*flat),
        "precision": precision_score(*flat),
        "specificity": recall_score(~truth.ravel(), ~mask.ravel()),
        "foreground": mask.mean(),
        "hd95": hd95(*one_hot).item(),
        "nsd": nsd(*one_hot).item(),
    }


def test_the_written_numbers_are_those_of_other_libraries(shared_folder, tmp_path):
    root = shared_folder / "data" / "coronary80"
    if not root.is_dir():
        pytest.skip("needs ../shared")
    samples = sorted(find_samples(root), key=lambda sample: sample.image_path.name)
    test = [sample for sample in samples if sample.image_path.name.startswith("test")][:NUM_TEST]
    path, _ = write_evaluation(tmp_path, "test_rule", evaluate(darker_than_around, test))
    document = json.loads(path.read_text())
    expected = []
    for sample, row in zip(test, document["rows"], strict=True):
        image, truth = load_pixels(sample)
        expected.append(by_libraries(darker_than_around(image).mask, truth))
        assert row["key"] == sample.key
        for name, value in expected[-1].items():
            assert row[name] == pytest.approx(value, abs=1e-4), name
    # Every image is of another patient here: the mean over patients is the mean over images.
    assert document["summary"]["n_patients"] == NUM_TEST
    for name in expected[0]:
        values = [scores[name] for scores in expected]
        summary = document["summary"]["metrics"][name]
        assert summary["patient_mean"] == pytest.approx(np.mean(values), abs=1e-4)
        assert summary["low"] < summary["patient_mean"] < summary["high"]
    assert 0.3 < document["summary"]["metrics"]["dice"]["patient_mean"] < 0.9  # the rule is no nonsense


def test_human_agreement_on_chase_db1(shared_folder):
    data = shared_folder / "data" / "chase_db1"
    if not data.is_dir():
        pytest.skip("needs ../shared")
    first = find_samples(data, r"(?:train|test)_(?P<patient>\d+)(?P<sequence>[LR])")  # the eyes of a child
    masks = [
        [load_mask(one) for one in samples] for samples in (second_observer(first, data / "masks_2nd"), first)
    ]
    found = evaluate_masks(first, zip(*masks, strict=True))
    assert (found.summary["n_images"], found.summary["n_patients"]) == (28, 14)
    scores = found.summary["metrics"]["dice"]
    assert scores["image_mean"] == pytest.approx(0.777, abs=0.002)
    assert scores["low"] < 0.777 < scores["high"]
    assert found.rows[27]["dice"] == pytest.approx(f1_score(masks[1][27].ravel(), masks[0][27].ravel()))
