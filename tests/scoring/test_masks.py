"""The gate for masks: what passes, what is refused, and whether the refusal helps."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from vesselrl.scoring.masks import as_mask, as_mask_pair, check_same_shape, drop_small_components

EXPECTED = np.array([[False, True, True], [True, False, False]])


@pytest.mark.parametrize(
    "mask",
    [
        EXPECTED,
        EXPECTED.astype(np.uint8),
        EXPECTED.astype(np.int64),
        EXPECTED.astype(np.float32),
        EXPECTED.tolist(),
        np.asfortranarray(EXPECTED),
        np.repeat(EXPECTED, 2, axis=1)[:, ::2],
        torch.from_numpy(EXPECTED),
        torch.from_numpy(EXPECTED).to(torch.bfloat16),
        torch.from_numpy(EXPECTED).float().requires_grad_(),
    ],
)
def test_every_spelling_of_a_mask_gives_the_same_bool_array(mask):
    result = as_mask(mask)
    assert result.dtype == np.bool_
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, EXPECTED)


def test_a_contiguous_bool_mask_is_not_copied():
    mask = EXPECTED.copy()
    assert as_mask(mask) is mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (EXPECTED.astype(np.uint8) * 255, r"truth holds values from 0 to 255.*pass truth > 127"),
        (EXPECTED * 0.7, r"truth holds values from 0\.0 to 0\.7.*truth > 0\.5 for probabilities"),
        (np.full((2, 3), np.nan), "truth holds values from nan"),
        (EXPECTED.astype(int) * -1, "truth holds values from -1 to 0"),
        (EXPECTED[None], r"two-dimensional \(H, W\), got shape \(1, 2, 3\)"),
        (np.zeros((0, 4), bool), r"truth has no pixels, got shape \(0, 4\)"),
        (np.array([["a", "b"]]), "must be bool or 0/1, got dtype <U1"),
    ],
)
def test_what_is_not_a_mask_is_refused_with_a_way_out(mask, message):
    with pytest.raises(ValueError, match=message):
        as_mask(mask, "truth")


def test_two_sizes_are_refused_and_both_are_named():
    with pytest.raises(ValueError, match=r"prediction \(2, 3\), truth \(3, 2\).*Resize the prediction"):
        check_same_shape(EXPECTED, EXPECTED.T)
    with pytest.raises(ValueError, match="differ in size"):
        as_mask_pair(EXPECTED, EXPECTED[:, :2])


@pytest.mark.parametrize("min_px", [0, 1, 2, 5, 12, 5000])
@pytest.mark.parametrize("density", [0.0, 0.15, 0.4, 1.0])
def test_small_components_are_those_of_scipy(density, min_px):
    mask = np.random.default_rng(7).random((61, 47)) < density
    labels, num = ndimage.label(mask, np.ones((3, 3)))
    areas = ndimage.sum_labels(mask, labels, range(num + 1))
    expected = mask & (areas[labels] >= min_px)
    np.testing.assert_array_equal(drop_small_components(mask, min_px), expected)


def test_a_diagonal_holds_a_component_together():
    mask = np.zeros((6, 6), bool)
    mask[0, 0] = mask[1, 1] = mask[2, 2] = mask[5, 0] = True
    kept = drop_small_components(mask, 3)
    assert kept.sum() == 3
    assert not kept[5, 0]
    with pytest.raises(ValueError, match="min_px is -1"):
        drop_small_components(mask, -1)
