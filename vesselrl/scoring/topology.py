"""The shape of a mask in a few numbers: centreline length, pieces, loops, ends and junctions.

Two implementations give the same answers, bit for bit:

- `numba` (kernels.py) visits only the foreground pixels; compiled on first use, releases the GIL;
- `plain` (plain.py) composes NumPy and OpenCV, for machines where numba cannot be imported.

The definitions are fixed in `METRIC_SPEC`, which is stored with every result. Nothing heavy is imported until
the first mask is measured. Callers that run many threads should limit OpenCV's own: `cv2.setNumThreads(1)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from vesselrl.scoring import plain
from vesselrl.scoring.backend import compiled_kernels
from vesselrl.scoring.masks import as_mask
from vesselrl.scoring.neighbourhood import node_tables, thinning_table, touch_table
from vesselrl.scoring.spec import METRIC_SPEC

__all__ = ["BACKENDS", "METRIC_SPEC", "Topology", "prototype_topology", "topology"]

BACKENDS = ("auto", "numba", "plain")


@dataclass(frozen=True, eq=False)
class Topology:
    """Centreline and shape counts of one mask.

    All counts and lengths of an empty mask are 0.
    """

    # bool (H, W), one pixel wide; a subset of the mask with the same pieces and loops
    skeleton: np.ndarray
    # number of skeleton pixels, in pixels
    length_px: int
    # 8-connected pieces (Betti number 0)
    num_components: int
    # holes of background, 4-connected, that the foreground encloses (Betti number 1)
    num_loops: int
    # skeleton pixels with exactly one 8-neighbour
    num_ends: int
    # clusters of skeleton pixels where three or more branches meet
    num_junctions: int
    # length along the skeleton from pixel centre to pixel centre, a diagonal step counts sqrt(2), in pixels
    path_length_px: float = math.nan
    # thinning algorithm: "guo_hall", or "zhang" from `prototype_topology`
    thinning: str = "guo_hall"


def topology(mask: Any, backend: str = "auto") -> Topology:
    """Measure centreline, pieces, loops, ends and junctions of a mask.

    Args:
        mask: bool or 0/1 (H, W).
        backend: "auto" takes numba where it can be imported, else the plain implementation (logged once);
            "numba" and "plain" insist.

    Raises:
        ValueError: not a mask, or an unknown backend.
        ImportError: backend "numba" was asked for and numba is missing.

    An empty mask has an empty skeleton and all counts 0.

    >>> ring = np.ones((5, 5), bool)
    >>> ring[1:4, 1:4] = False
    >>> shape = topology(ring, backend="plain")
    >>> shape.num_components, shape.num_loops, shape.num_ends
    (1, 1, 0)
    """
    mask = as_mask(mask)
    if backend not in BACKENDS:
        raise ValueError(f"unknown topology backend {backend!r}. Choose one of: {', '.join(BACKENDS)}.")
    kernels = None if backend == "plain" else compiled_kernels()
    if kernels is None and backend == "numba":
        raise ImportError('topology backend "numba": numba cannot be imported. Install it, or use "auto".')
    measured = plain.measure(mask) if kernels is None else _measure_compiled(mask, kernels)
    skeleton, lengths, num_components, num_loops, num_ends, num_junctions = measured
    length_px, num_side_steps, num_diagonal_steps = lengths
    return Topology(
        skeleton=skeleton,
        length_px=length_px,
        num_components=num_components,
        num_loops=num_loops,
        num_ends=num_ends,
        num_junctions=num_junctions,
        path_length_px=num_side_steps + math.sqrt(2) * num_diagonal_steps,
    )


def prototype_topology(mask: Any) -> Topology:
    """Measure a mask the way the prototype's reward did; for reward spec "seed" only.

    Zhang-Suen skeleton of scikit-image, pieces of the skeleton, and as junction every single skeleton pixel
    with three or more neighbours, so one crossing counts several times. The border mirrors the image.

    An empty mask has an empty skeleton and all counts 0.

    >>> line = np.zeros((5, 9), bool)
    >>> line[2, 2:7] = True
    >>> prototype_topology(line).num_ends
    2
    """
    import cv2
    from skimage.morphology import skeletonize

    skeleton = skeletonize(as_mask(mask))
    pixels = skeleton.astype(np.uint8)
    num_neighbours = cv2.filter2D(pixels, -1, np.ones((3, 3), np.uint8)) - pixels
    num_components = cv2.connectedComponents(pixels, connectivity=8)[0] - 1
    return Topology(
        skeleton=skeleton,
        length_px=int(pixels.sum()),
        num_components=num_components,
        num_loops=num_components - plain.euler_characteristic(skeleton),
        num_ends=int(np.count_nonzero(skeleton & (num_neighbours == 1))),
        num_junctions=int(np.count_nonzero(skeleton & (num_neighbours >= 3))),
        thinning="zhang",
    )


def _measure_compiled(mask: np.ndarray, kernels: ModuleType) -> tuple:
    tables = thinning_table(), touch_table(), node_tables()
    return kernels.measure(kernels.framed(mask), np.count_nonzero(mask), mask.shape, *tables)
