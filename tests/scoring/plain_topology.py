"""The topology of a mask from NumPy and scikit-image alone: the oracle for the compiled kernels."""

import numpy as np
from skimage.measure import euler_number, label
from skimage.morphology import thin

CIRCLE = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def plain_topology(mask: np.ndarray) -> dict:
    """The values of `vars(topology(mask))`, the skeleton as bytes."""
    skeleton = thin(mask)
    framed = np.pad(skeleton, 1)
    around = np.stack([np.roll(framed, (-row, -column), (0, 1)) for row, column in CIRCLE])[:, 1:-1, 1:-1]
    crossings = (np.roll(around, -1, axis=0) & ~around).sum(axis=0)
    north_west, north_east, south_west, south_east = (framed[:-1, :-1], framed[:-1, 1:],
                                                      framed[1:, :-1], framed[1:, 1:])  # fmt: skip
    falling = north_west & south_east & ~north_east & ~south_west
    rising = north_east & south_west & ~north_west & ~south_east
    side_steps = (framed[1:] & framed[:-1]).sum() + (framed[:, 1:] & framed[:, :-1]).sum()
    num_components = label(mask, connectivity=2).max()
    return {
        "skeleton": skeleton.tobytes(),
        "length_px": skeleton.sum(),
        "num_components": num_components,
        "num_loops": num_components - euler_number(mask, connectivity=2),
        "num_ends": (skeleton & (around.sum(axis=0) == 1)).sum(),
        "num_junctions": label(skeleton & (crossings >= 3), connectivity=2).max(),
        "path_length_px": side_steps + 2**0.5 * (falling.sum() + rising.sum()),
        "thinning": "guo_hall",
    }
