"""Vessels as pixels: the exact lumen, and the attenuation of X-rays by the contrast agent inside it.

Both are drawn from the same centrelines and radii, which are real numbers: a width of 2.3 px is not
rounded. Vessels may cross the border of the image.
"""

from collections.abc import Iterator

import numpy as np

from vesselrl.data.vessel_tree import CANVAS_PX, Vessel

_LAYERS = 4  # vessels in different layers add up where they cross
_REFERENCE_PX = 8.0  # path through a vessel at which its attenuation is 1


def render_mask(tree: list[Vessel], size: int, shrink_px: float = 0.0) -> np.ndarray:
    """Lumen of all vessels, bool (size, size): the pixels whose centre lies inside.

    For an edge that is straight over one pixel these are the pixels that are at least half covered.

    Args:
        tree: projected vessels, in px of a 256-px image whatever `size` is.
        size: side of the square image.
        shrink_px: how much narrower the annotator draws on either side, in px of a 256-px image; a radius
            of half a pixel always remains.
    """
    scale = size / CANVAS_PX
    points, radius, _, _ = _sample(tree, [np.ones(len(vessel.radius)) for vessel in tree], scale)
    radius = np.maximum(radius - shrink_px * scale, 0.5)
    side = size + 2 * _margin(size)
    mask = np.zeros(side * side, bool)
    for index, distance, chosen in _stamps(points, radius, size):
        mask[index[distance <= radius[chosen, None]]] = True
    return _crop(mask.reshape(side, side), size)


def render_attenuation(
    tree: list[Vessel], concentration: list[np.ndarray], size: int, power: float
) -> np.ndarray:
    """Attenuation by vessels of unit contrast, float32 (size, size).

    Each pixel takes concentration · (chord / 8 px)**power of the vessel of its layer where this is largest;
    the layers add up. The chord is averaged over the width of a pixel, so that thin twigs are not lost.

    Args:
        tree: projected vessels.
        concentration: contrast agent at each centreline point of each vessel, 0 to 1.
        size: side of the square image.
        power: see `Domain.thickness_power`.
    """
    scale = size / CANVAS_PX
    points, radius, agent, layer = _sample(tree, concentration, scale)
    side = size + 2 * _margin(size)
    layers = np.zeros(_LAYERS * side * side, np.float32)
    for index, distance, chosen in _stamps(points, radius, size):
        chord = _mean_chord(distance, radius[chosen, None]) / (scale * _REFERENCE_PX)
        value = agent[chosen, None] * chord**power
        np.maximum.at(layers, index + (layer[chosen] * side * side)[:, None], value)
    return _crop(layers.reshape(_LAYERS, side, side).sum(axis=0), size)


def _sample(
    tree: list[Vessel], values: list[np.ndarray], scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centrelines resampled every 0.6 px: points (N, 2), radius, value and layer (N,), in px of the image."""
    points, radii, sampled, layers = [], [], [], []
    for number, (vessel, value) in enumerate(zip(tree, values, strict=True)):
        flat = vessel.points[:, :2] * scale - 0.5 * (1 - scale)
        along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(flat, axis=0).T))])
        at = np.linspace(0, along[-1], max(2, int(along[-1] / 0.6)))
        points.append(np.column_stack([np.interp(at, along, flat[:, 0]), np.interp(at, along, flat[:, 1])]))
        radii.append(np.interp(at, along, vessel.radius * scale))
        sampled.append(np.interp(at, along, value))
        layers.append(np.full(len(at), number % _LAYERS))
    return (
        np.concatenate(points).astype(np.float32),
        np.concatenate(radii).astype(np.float32),
        np.concatenate(sampled).astype(np.float32),
        np.concatenate(layers),
    )


def _stamps(
    points: np.ndarray, radius: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pixels round each point, in groups of points with one window width w.

    Yields:
        Flat indices into the padded image (n, w²), distances to the point (n, w²), numbers of points (n,).
    """
    side = size + 2 * _margin(size)
    points = points + _margin(size)
    corner = np.floor(points).astype(np.int64)
    reach = np.ceil(radius + 0.5).astype(np.int64)
    inside = ((corner - reach[:, None] >= 0) & (corner + reach[:, None] + 1 < side)).all(axis=1)
    for half in np.unique(reach[inside]):
        chosen = np.flatnonzero(inside & (reach == half))
        span = np.arange(-half, half + 2)
        dy, dx = (grid.ravel() for grid in np.meshgrid(span, span, indexing="ij"))
        x, y = corner[chosen, 0, None] + dx, corner[chosen, 1, None] + dy
        distance = np.hypot(x - points[chosen, :1], y - points[chosen, 1:], dtype=np.float32)
        yield y * side + x, distance, chosen


def _mean_chord(distance: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Chord of a circle at distance d, averaged over a pixel: integral of 2·√(r² − t²), d − ½ to d + ½."""

    def area(t: np.ndarray) -> np.ndarray:
        t = np.clip(t / radius, -1, 1)
        return radius**2 * (t * np.sqrt(1 - t**2) + np.arcsin(t))

    return np.maximum(area(distance + 0.5) - area(distance - 0.5), 0)


def _margin(size: int) -> int:
    """Pixels drawn around the image and cut off at the end, so that vessels may cross its border."""
    return int(np.ceil(12 * max(1.0, size / CANVAS_PX)))


def _crop(padded: np.ndarray, size: int) -> np.ndarray:
    margin = _margin(size)
    return np.ascontiguousarray(padded[margin : margin + size, margin : margin + size])
