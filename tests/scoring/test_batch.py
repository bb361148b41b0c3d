"""A batch is its masks one by one, whatever the number of threads."""

import threading
import time

import numpy as np
import pytest
import torch

from vesselrl.scoring.batch import in_threads, score_masks, topologies
from vesselrl.scoring.metrics import score_mask
from vesselrl.scoring.topology import topology
from vesselrl.scoring.truth import evaluation_scores


def pairs(number=12):
    """Masks of different odd sizes, one of them as wide as a fundus photograph."""
    rng = np.random.default_rng(0)
    preds, truths = [], []
    for i in range(number):
        shape = (565, 584) if i == 0 else tuple(2 * rng.integers(10, 40, size=2) + 1)
        truth = np.zeros(shape, bool)
        truth[shape[0] // 3 : shape[0] // 2, 2:-2] = truth[2:-2, 4:8] = True
        preds.append(truth ^ (rng.random(shape) < 0.05))
        truths.append(truth)
    return preds, truths


@pytest.mark.parametrize("num_threads", [1, 2, 5, None])
def test_a_batch_is_its_masks_one_by_one(num_threads):
    preds, truths = pairs()
    expected = [score_mask(pred, truth) for pred, truth in zip(preds, truths, strict=True)]
    assert score_masks(preds, truths, num_threads=num_threads) == expected
    skeletons = [shape.skeleton for shape in topologies(preds, num_threads=num_threads)]
    for pred, skeleton in zip(preds, skeletons, strict=True):
        np.testing.assert_array_equal(skeleton, topology(pred).skeleton)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_evaluation_adds_its_scores(num_threads):
    preds, truths = pairs(5)
    expected = [evaluation_scores(pred, truth) for pred, truth in zip(preds, truths, strict=True)]
    scored = score_masks(preds, truths, evaluation=True, num_threads=num_threads)
    assert str(scored) == str(expected)  # as text, so that nan equals nan


def test_every_form_of_a_mask_gives_the_same_scores():
    (pred, *_), (truth, *_) = pairs(1)
    forms = [pred, pred.astype(np.uint8), pred.astype(np.float32), np.asfortranarray(pred),
             np.repeat(pred, 2, axis=1)[:, ::2], torch.from_numpy(pred), pred.tolist()]  # fmt: skip
    scored = score_masks(forms, [truth] * len(forms))
    assert all(scores == scored[0] for scores in scored)


def test_wrong_masks_are_named_before_anything_is_scored():
    preds, truths = pairs(3)
    with pytest.raises(ValueError, match="got 2 predictions for 3 truths"):
        score_masks(preds[:2], truths)
    with pytest.raises(ValueError, match=r"pred 2 is \(\d+, \d+\), truth 2 is"):
        score_masks([*preds[:2], preds[2][:-1]], truths)
    with pytest.raises(ValueError, match="pred 1 holds values from 0 to 255"):
        score_masks([preds[0], preds[1] * np.uint8(255), preds[2]], truths)
    with pytest.raises(ValueError, match="truth 0 must be two-dimensional"):
        score_masks(preds, [truths[0][None], *truths[1:]])


def test_an_empty_batch_has_no_scores():
    assert score_masks([], []) == []
    assert topologies([]) == []


def test_threads_work_at_the_same_time_and_keep_the_order():
    both_here = threading.Barrier(2, timeout=20)

    def slow_first(number):
        both_here.wait()
        time.sleep(0.05 if number == 0 else 0)
        return number

    assert in_threads(slow_first, [0, 1], num_threads=2) == [0, 1]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_an_error_in_a_thread_is_raised(num_threads):
    def fail_on_two(number):
        if number == 2:
            raise KeyError("mask 2")
        return number

    with pytest.raises(KeyError, match="mask 2"):
        in_threads(fail_on_two, range(5), num_threads=num_threads)


def test_no_threads_are_refused():
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        score_masks(*pairs(2), num_threads=0)
