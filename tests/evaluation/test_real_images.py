"""An evaluation of real angiograms, file by file, against MONAI and scikit-learn."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric, SurfaceDiceMetric
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from vesselrl.data.annotations import find_samples, load_image, load_mask
from vesselrl.evaluation.evaluate import evaluate
from vesselrl.evaluation.predictions import evaluate_masks, predict_once, unpacked
from vesselrl.evaluation.results import write_evaluation
from vesselrl.evaluation.thresholds import sweep_thresholds
from vesselrl.scoring.postprocessing import PostProcessing

NUM_TEST, NUM_VALIDATION = 8, 6


def darker_than_around(image: np.ndarray) -> SimpleNamespace:
    """A plain rule instead of a model: how much darker a pixel is than its surroundings."""
    grey = cv2.GaussianBlur(image[:, :, 0].astype(np.float32), (0, 0), 1.5)
    contrast = cv2.GaussianBlur(grey, (0, 0), 12) - grey
    probabilities = 1 / (1 + np.exp(4 - contrast / 4))
    return SimpleNamespace(mask=probabilities > np.float32(0.5), probabilities=probabilities)


@pytest.fixture(scope="module")
def angiograms(shared_folder):
    """(validation, test): a few images of the training half and of the test half."""
    root = shared_folder / "data" / "coronary80"
    if not root.is_dir():
        pytest.skip("needs ../shared")
    samples = sorted(find_samples(root), key=lambda sample: sample.image_path.name)
    halves = ([s for s in samples if s.image_path.name.startswith(half)] for half in ("train", "test"))
    return tuple(half[:number] for half, number in zip(halves, (NUM_VALIDATION, NUM_TEST), strict=True))


def load(sample):
    return load_image(sample), load_mask(sample)


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


def test_the_written_numbers_are_those_of_other_libraries(angiograms, tmp_path):
    _, test = angiograms
    path, _ = write_evaluation(tmp_path, "test_rule", evaluate(darker_than_around, test, load))
    document = json.loads(path.read_text())
    expected = []
    for sample, row in zip(test, document["rows"], strict=True):
        image, truth = load(sample)
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


def test_the_tuned_threshold_is_better_where_it_was_chosen(angiograms):
    validation, test = angiograms
    curve = sweep_thresholds(darker_than_around, validation, load)

    def score(samples, threshold):
        masks = [darker_than_around(load_image(s)).probabilities > np.float32(threshold) for s in samples]
        return np.mean(
            [f1_score(load_mask(s).ravel(), m.ravel()) for s, m in zip(samples, masks, strict=True)]
        )

    assert curve.default.dice == pytest.approx(score(validation, 0.5))
    assert curve.best.dice == pytest.approx(score(validation, curve.best.threshold))
    assert curve.best.dice > curve.default.dice
    best = PostProcessing(curve.best.threshold)
    done = predict_once(darker_than_around, test, load, variants={"tuned": best})
    tuned = evaluate_masks(test, unpacked(done.variants["tuned"]), unpacked(done.truths))
    assert tuned.summary["metrics"]["dice"]["image_mean"] == pytest.approx(score(test, curve.best.threshold))
