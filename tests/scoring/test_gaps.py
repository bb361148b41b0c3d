"""Closing gaps: a drawn vessel by hand, random fields against SciPy's components, the order of the steps."""

import numpy as np
import pytest
from scipy import ndimage

from vesselrl.scoring.gaps import FainterMask
from vesselrl.scoring.postprocessing import PostProcessing

EIGHT = np.ones((3, 3), bool)


def pieces(mask: np.ndarray) -> int:
    return ndimage.label(mask, EIGHT)[1]


@pytest.fixture
def faint() -> np.ndarray:
    """Probabilities of a bar 3 px wide with a faint stretch of 4 px, a wide faint rim and a faint twig."""
    values = np.full((30, 50), 0.001)
    values[11:18, 3:47] = 0.15  # the rim, 7 px wide
    values[18:28, 35:38] = 0.15  # the twig, which leads nowhere
    values[13:16, 3:47] = 0.9
    values[13:16, 22:26] = 0.3
    return values


def test_a_gap_is_closed_and_nothing_else(faint: np.ndarray) -> None:
    mask = faint > 0.5
    assert pieces(mask) == 2
    closed = FainterMask(faint, 0.2).close(mask)
    assert np.array_equal(closed, faint > 0.2)  # above 0.2 there is the bar alone, with its gap
    wider = FainterMask(faint, 0.1).close(mask)
    assert pieces(wider) == 1
    assert wider[11:18, 23:25].all()  # as wide as the fainter mask
    added = wider & ~mask
    assert not added[:, :18].any()  # the half width of the rim, 4 px, beyond the gap
    assert not added[:, 30:].any()  # neither the rest of the rim nor the twig


def test_a_gap_below_the_level_stays_open(faint: np.ndarray) -> None:
    mask = faint > 0.5
    assert np.array_equal(FainterMask(faint, 0.4).close(mask), mask)
    assert np.array_equal(PostProcessing(close_gaps=0.4).mask(faint), mask)
    assert np.array_equal(PostProcessing().mask(faint), mask)


def test_an_end_is_not_prolonged(faint: np.ndarray) -> None:
    """One component and a twig: there is a link, but no gap."""
    faint[13:16, 22:26] = 0.9
    mask = faint > 0.5
    fainter = FainterMask(faint, 0.1)
    labels, count = fainter.links(mask)
    assert count == 1
    assert (labels == 1)[20:26, 35:38].all()
    assert np.array_equal(fainter.close(mask), mask)
    nothing = np.zeros_like(mask)
    assert not FainterMask(np.zeros(mask.shape), 0.1).close(nothing).any()


@pytest.mark.parametrize("seed", range(8))
def test_every_link_that_is_added_lies_in_the_fainter_mask_and_touches_two_components(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = ndimage.gaussian_filter(rng.random((80, 90)), 2)
    values = ((values - values.min()) / np.ptp(values)).astype(np.float32)
    mask = values > 0.6
    fainter = FainterMask(values, 0.45)
    closed = fainter.close(mask)
    assert (closed >= mask).all()
    assert (values[closed] > 0.45).all()
    assert pieces(closed) < pieces(mask)
    components, (links, count) = ndimage.label(mask, EIGHT)[0], fainter.links(mask)
    bridging = []
    for k in range(1, count + 1):
        touched = set(components[ndimage.binary_dilation(links == k, EIGHT)]) - {0}
        bridging.append(len(touched) >= 2)
    assert 0 < sum(bridging) < count
    assert np.array_equal(closed, mask | np.isin(links, 1 + np.flatnonzero(bridging)))


def test_small_components_go_before_gaps_are_closed(faint: np.ndarray) -> None:
    """The piece right of the gap has 63 px, the bar left of it 57 px."""
    kept = PostProcessing(min_component_px=60, close_gaps=0.2).mask(faint)
    assert np.array_equal(kept, (faint > 0.5) & (np.arange(50) > 25))
    both = PostProcessing(min_component_px=57, close_gaps=0.2).mask(faint)
    assert np.array_equal(both, faint > 0.2)


def test_all_thresholds_of_one_image_are_those_alone(faint: np.ndarray) -> None:
    post = PostProcessing(0.5, 10, 0.05)
    thresholds = (0.1, 0.2, 0.5, 0.95)
    for threshold, mask in zip(thresholds, post.masks(faint, thresholds), strict=True):
        assert np.array_equal(mask, PostProcessing(threshold, 10, 0.05).mask(faint))
    assert np.array_equal(post.finisher(faint)(faint > 0.5), post.mask(faint))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "The threshold is 0.0; give a probability between 0 and 1"),
        ({"threshold": 85}, "The threshold is 85"),
        ({"min_component_px": -3}, "min_component_px is -3; give 0 or more"),
        ({"close_gaps": -0.1}, "close_gaps is -0.1; give 0, or a probability below 1"),
        ({"close_gaps": 1.0}, "close_gaps is 1.0"),
        ({"close_gaps": float("nan")}, "close_gaps is nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PostProcessing(**settings)
