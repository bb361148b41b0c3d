"""The shape of a mask in a few numbers, as defined in `METRIC_SPEC`."""

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from vesselrl.scoring.overlap import METRIC_SPEC, as_mask


@dataclass(frozen=True, eq=False)
class Topology:
    """Centreline and shape counts of one mask; all counts and lengths of an empty mask are 0."""

    skeleton: np.ndarray  # bool (H, W), one pixel wide, with the components and loops of the mask
    length_px: int  # number of skeleton pixels
    num_components: int  # 8-connected components (Betti number 0)
    num_loops: int  # holes of background, 4-connected, that the foreground encloses (Betti number 1)
    num_ends: int  # skeleton pixels with exactly one 8-neighbour
    num_junctions: int  # clusters of skeleton pixels where three or more branches meet
    thinning: str = "guo_hall"  # algorithm; "zhang" from `prototype_topology`


def topology(mask: Any) -> Topology:
    """Measure centreline, components, loops, ends and junctions of a mask, bool or 0/1 (H, W)."""
    from vesselrl.scoring import kernels  # numba takes 0.3 s to import

    mask = as_mask(mask)
    return Topology(*kernels.measure(kernels.framed(mask), np.count_nonzero(mask), mask.shape))


def prototype_topology(mask: Any) -> Topology:
    """Measure a mask the way the prototype's reward did (spec "seed").

    Zhang-Suen skeleton, its components, each pixel of three or more neighbours a junction; mirrored border.
    """
    from skimage.morphology import skeletonize

    skeleton = skeletonize(as_mask(mask))
    pixels = skeleton.astype(np.uint8)
    num_neighbours = cv2.filter2D(pixels, -1, np.ones((3, 3), np.uint8)) - pixels
    return replace(
        topology(skeleton),  # its components and loops
        skeleton=skeleton,
        length_px=int(pixels.sum()),
        num_ends=int(np.count_nonzero(skeleton & (num_neighbours == 1))),
        num_junctions=int(np.count_nonzero(skeleton & (num_neighbours >= 3))),
        thinning="zhang",
    )


def check_topology(shape: Topology, mask: np.ndarray) -> None:
    """Refuse a topology of another size than this mask, or by other definitions than `METRIC_SPEC`."""
    if shape.skeleton.shape != mask.shape:
        sizes = f"{shape.skeleton.shape}, the mask has {mask.shape} (H, W)"
        raise ValueError(f"the given topology has size {sizes}. Pass topology(truth) of the same image.")
    if shape.thinning != METRIC_SPEC["skeleton"]:
        names = f"{shape.thinning!r} thinning, not {METRIC_SPEC['skeleton']!r}"
        raise ValueError(f"the given topology comes from {names}. Pass topology(truth).")
