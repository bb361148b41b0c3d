"""The truth's part is computed once per content, and never mixed up."""

import json

import numpy as np
import pytest

from vesselrl.scoring import truth as module
from vesselrl.scoring.calibre import calibre_map, recall_by_calibre
from vesselrl.scoring.metrics import score_mask
from vesselrl.scoring.surface import hd95, nsd
from vesselrl.scoring.truth import EVALUATION_ONLY, Truth, evaluation_scores, forget_truths, known_truth

NAMES = ("hd95", "nsd", "recall_thin", "recall_medium", "recall_thick")


def drawn(seed, shape=(45, 53)):
    mask = np.zeros(shape, bool)
    column = 3 + seed % 20
    mask[5:40, column : column + 4] = mask[20:30, 5:50] = True
    return mask


@pytest.fixture(autouse=True)
def fresh():
    forget_truths()


def test_equal_content_shares_one_truth_and_other_content_does_not():
    mask = drawn(0)
    known = known_truth(mask)
    assert known_truth(mask.astype(np.uint8)) is known
    assert known_truth(np.asfortranarray(mask)) is known
    assert known_truth(drawn(1)) is not known
    one_pixel_more = mask.copy()
    one_pixel_more[0, 0] = True
    assert known_truth(one_pixel_more) is not known


def test_equal_bits_of_another_shape_are_another_truth():
    mask = np.ones((4, 6), bool)
    assert known_truth(mask).mask.shape == (4, 6)
    assert known_truth(mask.reshape(6, 4)).mask.shape == (6, 4)


def test_the_specification_is_part_of_the_key(monkeypatch):
    before = known_truth(drawn(0))
    monkeypatch.setitem(module.METRIC_SPEC, "version", -1)
    assert known_truth(drawn(0)) is not before


def test_a_truth_holds_its_own_copy():
    mask = drawn(0)
    known = known_truth(mask)
    mask[:] = False
    np.testing.assert_array_equal(known.mask, drawn(0))
    assert known_truth(drawn(0)) is known


def test_parts_are_computed_once_and_only_when_asked_for(monkeypatch):
    measured = []
    real = {name: getattr(module, name) for name in ("topology", "surface", "calibre_map")}
    for name, function in real.items():
        monkeypatch.setattr(module, name, lambda *given, n=name, f=function: measured.append(n) or f(*given))
    known_truth(drawn(0))
    assert measured == []
    for pred in (drawn(0), drawn(1), drawn(2)):
        evaluation_scores(pred, drawn(0))
    assert sorted(measured) == ["calibre_map", "surface", "topology"]


def test_the_oldest_truth_is_forgotten_first():
    first = known_truth(np.ones((1, 1), bool))
    for width in range(2, module.NUM_KEPT + 1):
        known_truth(np.ones((1, width), bool))
    assert known_truth(np.ones((1, 1), bool)) is first
    known_truth(np.ones((2, 2), bool))  # pushes out the one of width 2
    assert known_truth(np.ones((1, 1), bool)) is first


def test_evaluation_scores_are_the_single_functions():
    pred, truth = drawn(3), drawn(0)
    scores = evaluation_scores(pred, truth)
    assert tuple(scores)[-5:] == EVALUATION_ONLY == NAMES
    assert {name: scores[name] for name in score_mask(pred, truth)} == score_mask(pred, truth)
    assert (scores["hd95"], scores["nsd"]) == (hd95(pred, truth), nsd(pred, truth))
    by_width = recall_by_calibre(pred, calibre_map(truth))
    assert {name: scores[name] for name in NAMES[2:]} == pytest.approx(by_width, nan_ok=True)
    assert all(type(score) is float for score in scores.values())
    assert evaluation_scores(pred, truth, Truth(truth)) == pytest.approx(scores, nan_ok=True)
    json.dumps({name: score for name, score in scores.items() if score == score}, allow_nan=False)


@pytest.mark.parametrize(
    ("pred", "truth", "hd95_expected", "nsd_expected", "dice_expected"),
    [(False, False, 0, 1, 1), (False, True, 50, 0, 0), (True, False, 50, 0, 0), (True, True, 0, 1, 1)],
)
def test_empty_masks(pred, truth, hd95_expected, nsd_expected, dice_expected):
    bar = np.zeros((30, 40), bool)
    bar[4:7, 5:35] = True
    scores = evaluation_scores(bar & pred, bar & truth)
    assert (scores["hd95"], scores["nsd"]) == (hd95_expected, nsd_expected)
    assert scores["dice"] == dice_expected
    assert np.isnan(scores["recall_thin"]) == (not truth)
    assert np.isnan(scores["recall_thick"])


def test_a_known_truth_of_another_mask_is_refused():
    with pytest.raises(ValueError, match="of another mask"):
        evaluation_scores(drawn(0), drawn(0), known_truth(drawn(1)))
    with pytest.raises(ValueError, match="differ in size"):
        evaluation_scores(drawn(0)[1:], drawn(0))
    with pytest.raises(ValueError, match="truth holds values from 0 to 255"):
        known_truth(drawn(0).astype(np.uint8) * 255)
