"""Easy pictures first: how hard each sample is, and which samples are open in which epoch.

Three things make a vessel tree hard to segment, and all three are measured on the truth: thin vessels
(calibre), faint ones (contrast) and winding ones (tortuosity). Each becomes a rank over the data set, and

    difficulty = rank of faintness / 2 + rank of thinness / 4 + rank of tortuosity / 4

with ranks from 0 (the easiest sample) to 1 (the hardest); ties share their mean rank. Contrast counts twice,
because of the three it says by far the most about how well a model segments a picture. A sample without any
vessel has the difficulty 1: shown early, it would teach to find nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import cv2
import numpy as np

from vesselrl.data.annotations import Sample
from vesselrl.scoring.masks import as_mask
from vesselrl.scoring.topology import topology

UNIT_PX = 512  # shorter side of the picture in whose pixels lengths are given
_GAP_PX, _RING_PX = 1.0, 8.0  # the surroundings of a vessel lie between these distances from it
_NEAR_PX = 24.0  # half the side of the square in which a vessel pixel looks for its surroundings
_SHORTEST_BRANCH_PX = 16.0  # shorter ones have no shape to speak of
_STEP_PX = 4.0  # a branch is measured by points so far apart, so that its pixel staircase does not count


@dataclass(frozen=True)
class Measures:
    """What makes one sample hard; all None where the mask is empty.

    Attributes:
        calibre_px: median width of the vessels along their centreline, in px of a picture whose shorter side
            has 512 px.
        contrast: how much darker (or brighter) the vessels are than what surrounds them, in [0, 1].
        tortuosity: arc over chord of the branches of the centreline; 1 is straight.
    """

    calibre_px: float | None = None
    contrast: float | None = None
    tortuosity: float | None = None


def measure(image: np.ndarray, mask: np.ndarray) -> Measures:
    """Calibre, contrast and tortuosity of the vessels that the mask marks.

    - Width at a centreline pixel: 2 · d − 1 with d the largest distance to the background among the pixel and
      its eight neighbours; outside the image is background.
    - Contrast: |mean over the vessel pixels of (mean grey of the surroundings − own grey)| / 255. The
      surroundings of a pixel are the background 1 to 8 px beside any vessel and at most 24 px from the pixel;
      0 without any.
    - Tortuosity: Σ arc / Σ chord over the branches between junctions, of those with 16 px or more; 1 without
      any. Of a closed branch one half counts.

    All lengths are in px of a picture whose shorter side has 512 px.

    Args:
        image: uint8 (H, W, 3).
        mask: bool (H, W).

    Raises:
        ValueError: image and mask differ in size.

    >>> mask = np.zeros((512, 512), bool)
    >>> mask[100:105, 50:450] = True
    >>> image = np.where(mask[:, :, None], 60, 162).astype(np.uint8).repeat(3, axis=2)
    >>> measure(image, mask)
    Measures(calibre_px=5.0, contrast=0.4, tortuosity=1.0)
    """
    mask = as_mask(mask)
    if image.shape != (*mask.shape, 3):
        raise ValueError(f"The image has the shape {image.shape}, its mask {mask.shape}. Load both together.")
    if not mask.any():
        return Measures()
    unit = min(mask.shape) / UNIT_PX
    skeleton = topology(mask).skeleton
    inside = cv2.distanceTransform(np.pad(mask, 1).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    ridge = cv2.dilate(inside, np.ones((3, 3)))[1:-1, 1:-1]
    width_px = float(np.median(2 * ridge[skeleton] - 1)) / unit
    contrast = _contrast(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), mask, unit)
    tortuosity = _tortuosity(skeleton, unit)
    return Measures(round(width_px, 3), round(contrast, 5), round(tortuosity, 5))


def _contrast(grey: np.ndarray, mask: np.ndarray, unit: float) -> float:
    """|mean over the mask of (surroundings near by − grey)| / 255, see `measure`."""
    distance = cv2.distanceTransform((~mask).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    ring = (distance > _GAP_PX * unit) & (distance <= max(_RING_PX * unit, 2))
    side = 2 * math.ceil(_NEAR_PX * unit) + 1
    share = cv2.blur(ring.astype(np.float32), (side, side), borderType=cv2.BORDER_CONSTANT)
    total = cv2.blur(np.where(ring, grey, 0).astype(np.float32), (side, side), borderType=cv2.BORDER_CONSTANT)
    known = mask & (share > 0.5 / side**2)
    if not known.any():
        return 0.0
    return float(abs((total[known] / share[known] - grey[known]).mean())) / 255


def _tortuosity(skeleton: np.ndarray, unit: float) -> float:
    """Σ arc / Σ chord over the branches, see `measure`."""
    step = max(1, round(_STEP_PX * unit))
    total_arc = total_chord = 0.0
    for path in _branches(skeleton, math.ceil(_SHORTEST_BRANCH_PX * unit)):
        corners = np.concatenate([path[:-1:step], path[-1:]])
        total_arc += np.hypot(*np.diff(corners, axis=0).T).sum()
        total_chord += np.hypot(*(path[-1] - path[0]))
    return float(total_arc / total_chord) if total_chord > 0 else 1.0


def _branches(skeleton: np.ndarray, shortest: int) -> Iterator[np.ndarray]:
    """The pixels (row, column) of each branch from end to end, of a ring one half: (N, 2).

    Pixels with more than two neighbours separate the branches; those of fewer than `shortest` pixels are
    left out.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import breadth_first_order, connected_components
    from scipy.spatial import KDTree

    pixels = skeleton.astype(np.uint8)
    num_neighbours = cv2.filter2D(pixels, -1, np.ones((3, 3)), borderType=cv2.BORDER_CONSTANT) - pixels
    places = np.argwhere(skeleton & (num_neighbours <= 2))
    if len(places) == 0:
        return
    pairs = KDTree(places).query_pairs(1.5, output_type="ndarray")  # neighbours are 1 or 1.41 px apart
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(places), len(places))).tocsr()
    _, numbers = connected_components(graph, directed=False)
    _, firsts, sizes = np.unique(numbers, return_index=True, return_counts=True)
    for first in firsts[sizes >= shortest]:
        end = breadth_first_order(graph, first, return_predecessors=False)[-1]
        order, previous = breadth_first_order(graph, end)
        path = [order[-1]]
        while path[-1] != end:
            path.append(previous[path[-1]])
        yield places[path]


def rate_difficulty(measures: Sequence[Measures]) -> list[float]:
    """The difficulty of each sample in [0, 1], by ranks over all of them; see the module's docstring.

    A sample without vessels has 1.0 and does not count in the ranks of the others. A single sample with
    vessels has 0.0.

    >>> wide, thin = Measures(8, 0.4, 1.1), Measures(3, 0.2, 1.3)
    >>> rate_difficulty([thin, wide, Measures()])
    [1.0, 0.0, 1.0]
    """
    with_vessels = [one for one in measures if one.calibre_px is not None]
    ranks = (
        2 * _ranks([-one.contrast for one in with_vessels])
        + _ranks([-one.calibre_px for one in with_vessels])
        + _ranks([one.tortuosity for one in with_vessels])
    ) / 4
    known = iter(ranks.tolist())
    return [1.0 if one.calibre_px is None else round(next(known), 6) for one in measures]


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0 (smallest) to 1 (largest); equal values share their mean rank."""
    from scipy.stats import rankdata

    return (rankdata(values) - 1) / max(1, len(values) - 1)


def difficulty_table(
    samples: Sequence[Sample], load: Callable[[Sample], tuple[np.ndarray, np.ndarray]]
) -> dict[str, dict[str, float | None]]:
    """Difficulty and measures of every sample by its key, in the order of the samples, ready for JSON.

    Args:
        samples: the training samples; ranks are over these.
        load: gives image uint8 (H, W, 3) and mask bool (H, W) of a sample, not augmented.

    Returns:
        `{"P001_S1_F0011": {"difficulty": 0.25, "calibre_px": 5.1, "contrast": 0.2, "tortuosity": 1.1}, …}`;
        the three measures are None where the mask is empty.
    """
    measures = [measure(*load(sample)) for sample in samples]
    return {
        sample.key: {"difficulty": difficulty, **asdict(one)}
        for sample, one, difficulty in zip(samples, measures, rate_difficulty(measures), strict=True)
    }


def open_samples(
    difficulties: Sequence[float],
    epoch: int,
    num_epochs: int,
    all_open: int | None = None,
    first_share: float = 0.4,
) -> list[int]:
    """The samples that an epoch may use: the easiest share, which grows evenly until all are open.

    share(epoch) = first_share + (1 − first_share) · (epoch − 1) / (all_open − 1), at most 1; the number of
    samples is rounded up. Equal difficulties open in the order of their indices. Nothing is random here.

    Args:
        difficulties: of all samples, in [0, 1].
        epoch: from 1.
        num_epochs: of the whole training.
        all_open: the first epoch with all samples; default: the first after half of the epochs,
            num_epochs // 2 + 1.
        first_share: share that is open in epoch 1, above 0, at most 1.

    Returns:
        Indices into `difficulties`, ascending.

    Raises:
        ValueError: an epoch or a share outside its range; the message names it.

    >>> [open_samples([0.9, 0.1, 0.5, 0.3], epoch, num_epochs=4) for epoch in (1, 2, 3)]
    [[1, 3], [1, 2, 3], [0, 1, 2, 3]]
    """
    if all_open is None:
        all_open = num_epochs // 2 + 1
    for name, number in (("epoch", epoch), ("num_epochs", num_epochs), ("all_open", all_open)):
        if number < 1:
            raise ValueError(f"{name} is {number}. Epochs are counted from 1.")
    if not 0 < first_share <= 1:
        raise ValueError(f"first_share is {first_share}. Give a share above 0, at most 1.")
    share = 1.0 if epoch >= all_open else first_share + (1 - first_share) * (epoch - 1) / (all_open - 1)
    num_open = math.ceil(round(share * len(difficulties), 6))
    easiest = sorted(range(len(difficulties)), key=lambda index: (difficulties[index], index))
    return sorted(easiest[:num_open])
