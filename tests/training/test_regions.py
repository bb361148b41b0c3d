"""Which regions are flipped: links across gaps, pieces of the mask, departures of the samples."""

import cv2
import numpy as np
import pytest
from vesselrl.training.regions import find_links, spread

from vesselrl.training.credit import choose_regions


def chosen(samples: np.ndarray, greedy: np.ndarray, count: int, seed: int = 0, on: np.ndarray | None = None):
    on = greedy.astype(np.float32) if on is None else on
    return choose_regions(samples, greedy, on, count, np.random.default_rng(seed))


def test_regions_are_connected_and_shared_between_components_and_departures() -> None:
    greedy = np.zeros((20, 20), bool)
    greedy[0:10, 0:10] = True  # the tree: more than half of the mask
    greedy[15, 15] = greedy[16, 16] = True  # 8-connected pair
    greedy[19, 0] = True
    sample = greedy.copy()
    sample[12, 2:6] = sample[5, 12] = True
    assert sorted(int(region.sum()) for region in chosen(sample[None], greedy, 9)) == [1, 1, 2, 4]
    pairs = [chosen(sample[None], greedy, 2, seed) for seed in range(20)]
    assert all([bool(greedy[region].all()) for region in pair] == [True, False] for pair in pairs)
    assert len(chosen(greedy[None], greedy, 2)) == 2  # no departures
    assert chosen(sample[None], greedy, 0) == []
    assert chosen(np.zeros((1, 3, 3), bool), np.zeros((3, 3), bool), 5) == []


def vessel_with_gap() -> tuple[np.ndarray, np.ndarray]:
    """A bar 5 px wide with a faint stretch of 6 px, and faint rims all along: (greedy, probability)."""
    on = np.full((40, 60), 0.01, np.float32)
    on[17:24, 5:55] = 0.3  # 7 px wide at a low threshold
    on[18:23, 5:25] = on[18:23, 31:55] = 0.9
    return on > 0.5, on


def test_a_link_crosses_a_gap_as_wide_as_the_fainter_mask_and_leaves_the_rims() -> None:
    greedy, on = vessel_with_gap()
    links = find_links(greedy, on)
    assert len(links) == 2  # the same one at both levels: 0.3 lies above 0.1 and 0.25
    for labels, label in links:
        link = labels == label
        assert not (link & greedy).any()
        assert link[17:24, 26:30].all()  # the whole gap but for its ends, with the rims
        assert not link[:, :22].any()
        assert not link[:, 34:].any()
        before, after = (cv2.connectedComponents(m.astype(np.uint8))[0] - 1 for m in (greedy, greedy | link))
        assert (before, after) == (2, 1)


def test_no_link_where_a_lower_threshold_only_widens() -> None:
    greedy, on = vessel_with_gap()
    on[18:23, 25:31] = 0.9
    assert find_links(on > 0.5, on) == []
    assert find_links(np.zeros((5, 5), bool), np.zeros((5, 5), np.float32)) == []
    assert greedy.any()


def test_links_come_first_up_to_half() -> None:
    greedy, on = vessel_with_gap()
    sample = greedy.copy()
    sample[2, 2:6] = sample[35, 8] = True
    four = chosen(sample[None], greedy, 4, on=on)
    assert [bool(region[20, 28]) for region in four] == [True, True, False, False]
    assert [bool(greedy[region].any()) for region in four] == [False, False, True, False]
    assert [bool(region[20, 28]) for region in chosen(sample[None], greedy, 2, on=on)] == [True, False]
    everything = chosen(sample[None], greedy, 20, on=on)
    assert len(everything) == 2 + 1 + 2  # two links, the smaller piece, two bumps


def test_regions_that_overlap_share_their_mean() -> None:
    left, both = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    left[:, :1], both[:, :2] = True, True
    credit = spread([left, both], np.array([6.0, 1.0]), (2, 4))
    assert credit.tolist() == [[3.5, 1.0, 0.0, 0.0]] * 2


@pytest.mark.parametrize("seed", range(5))
def test_every_region_is_wholly_on_or_wholly_off(seed: int) -> None:
    rng = np.random.default_rng(seed)
    on = cv2.GaussianBlur(rng.random((48, 48)).astype(np.float32), (0, 0), 2)
    on = (on - on.min()) / (on.max() - on.min())
    greedy = on > 0.5
    samples = rng.random((3, 48, 48)) < on
    regions = chosen(samples, greedy, 60, seed, on)
    assert len(regions) == 60
    assert all(greedy[region].all() or not greedy[region].any() for region in regions)
    assert all(region.any() for region in regions)
