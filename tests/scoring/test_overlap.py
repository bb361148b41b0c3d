"""The gate for masks, and the scores of pixel counts against hand counts, and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from tests.scoring.mask_edits import random_pairs
from vesselrl.scoring.overlap import Counts, as_mask, as_mask_pair, counts, dice, overlap_scores

NAN = math.nan
MASK = np.array([[False, True, True], [True, False, False]])


def test_every_form_of_a_mask_gives_the_same_bool_array():
    arrays = MASK.astype(np.uint8), MASK.astype(np.int64), MASK.astype(np.float32), MASK.tolist()
    views = np.asfortranarray(MASK), np.repeat(MASK, 2, axis=1)[:, ::2]
    tensor = torch.from_numpy(MASK)
    for mask in (MASK, *arrays, *views, tensor, tensor.to(torch.bfloat16), tensor.float().requires_grad_()):
        result = as_mask(mask)
        assert result.dtype == np.bool_
        assert result.flags.c_contiguous
        np.testing.assert_array_equal(result, MASK)
        assert as_mask(result) is result


REFUSED = [
    (MASK.astype(np.uint8) * 255, r"truth holds values from 0 to 255.*truth > 127"),
    (MASK * 0.7, r"truth holds values from 0\.0 to 0\.7.*truth > 0\.5 for probabilities"),
    (np.full((2, 3), np.nan), "truth holds values from nan"),
    (MASK.astype(int) * -1, "truth holds values from -1 to 0"),
    (MASK[None], r"two-dimensional \(H, W\) mask, got shape \(1, 2, 3\)"),
    (np.zeros((0, 4), bool), r"truth has no pixels, got shape \(0, 4\)"),
    (np.array([["a", "b"]]), "must be bool or 0/1, got dtype <U1"),
    (MASK.T, r"prediction \(2, 3\), truth \(3, 2\).*Resize the prediction"),
]


@pytest.mark.parametrize(("mask", "message"), REFUSED)
@pytest.mark.parametrize("function", [as_mask_pair, counts, dice])
def test_what_is_not_a_mask_of_the_same_size_is_refused_with_a_way_out(function, mask, message):
    with pytest.raises(ValueError, match=message):
        function(MASK, mask)


def test_scores_by_hand():
    """Prediction 3 px, truth 4 px, 2 in common, 20 px in all; random masks by scikit-learn."""
    pred, truth = np.zeros((2, 4, 5), bool)
    pred[0, :3] = truth[0, 1:5] = True
    assert counts(pred, truth) == Counts(tp=2, fp=1, fn=2, tn=15)
    expected = {"dice": 4 / 7, "iou": 2 / 5, "recall": 2 / 4, "precision": 2 / 3, "specificity": 15 / 16}
    assert overlap_scores(counts(pred, truth)) == pytest.approx(expected)
    for pred, truth in random_pairs():
        flat, scores = (truth.ravel(), pred.ravel()), overlap_scores(counts(pred, truth))
        theirs = f1_score(*flat), jaccard_score(*flat), recall_score(*flat), precision_score(*flat)
        assert [*scores.values()] == pytest.approx([*theirs, recall_score(*flat, pos_label=0)], abs=1e-12)
        assert dice(pred, truth) == dice(torch.from_numpy(pred), truth) == scores["dice"]
