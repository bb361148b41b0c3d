"""What surrounds the vessels in a synthetic angiogram: anatomy, look-alikes of vessels, the round aperture.

Everything but the aperture is an attenuation, float32 (size, size), to be added to that of the vessels.
Lengths inside are in px of a 256-px image.
"""

import cv2
import numpy as np

from vesselrl.data.vessel_drawing import render_attenuation
from vesselrl.data.vessel_tree import CANVAS_PX, Vessel


def draw_aperture(rng: np.random.Generator, probability: float, size: int) -> np.ndarray:
    """The round field of view of an image intensifier, bool (size, size); all True without one.

    Args:
        rng: generator of the sequence.
        probability: how likely the image has one.
        size: side of the image in px.
    """
    if rng.random() >= probability:
        return np.ones((size, size), bool)
    y, x = np.mgrid[:size, :size] / size - 0.5
    radius, angle = rng.uniform(0.55, 0.75), rng.uniform(0, 2 * np.pi)
    reach = rng.uniform(0.4, 1.2) * (radius - 0.5)
    return np.hypot(x - reach * np.cos(angle), y - reach * np.sin(angle)) < radius


def draw_anatomy(rng: np.random.Generator, size: int) -> np.ndarray:
    """Attenuation by everything behind the vessels, of unit strength, about 0 to 2.

    Gradient, heart shadow, bright lung, diaphragm with its sharp edge, spine, soft clutter, lung marking.
    """
    small = size // 4
    y, x = np.mgrid[:small, :small] / small - 0.5
    slope = rng.normal(0, 0.5, 2)
    smooth = slope[0] * x + slope[1] * y
    angle, reach, spread = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.5), rng.uniform(0.35, 0.7, 2)
    heart = ((x - reach * np.cos(angle)) / spread[0]) ** 2 + ((y - reach * np.sin(angle)) / spread[1]) ** 2
    smooth += rng.uniform(0.3, 0.9) / (1 + np.exp(np.clip((heart - 1) * rng.uniform(2, 12), -30, 30)))
    if rng.random() < 0.4:
        smooth += _spine(rng, x, y)
    for cells, amount in ((3, 0.2), (7, 0.08), (18, 0.035)):
        smooth += _clutter(rng, small, cells, amount)
    full = cv2.resize(smooth.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(int(rng.integers(0, 3))):
        full += rng.uniform(0.25, 0.8) * _sharp_edge(rng, size)
    marking = _streaks(rng, size) * np.clip(_clutter(rng, size, 5, 0.6) + 0.3, 0, 1.5)
    return (
        full + 0.035 * marking + _clutter(rng, size, size // 8, 0.025) + _clutter(rng, size, size // 3, 0.02)
    )


def subtract(rng: np.random.Generator, anatomy: np.ndarray) -> np.ndarray:
    """What digital subtraction leaves of the anatomy: hardly anything, but a relief where it has moved."""
    size = anatomy.shape[0]
    right, down = rng.normal(0, 1.2, 2) * size / CANVAS_PX
    shift = np.float32([[1, 0, right], [0, 1, down]])
    moved = cv2.warpAffine(anatomy, shift, (size, size), borderMode=cv2.BORDER_REFLECT_101)
    return 0.12 * anatomy + 0.8 * (anatomy - moved)


def draw_catheter(rng: np.random.Generator, root: Vessel, size: int) -> np.ndarray:
    """A tube of constant width that runs from the upper border of the image to the ostium."""
    ostium = root.points[0, :2]
    away = ostium - root.points[min(6, len(root.points) - 1), :2]
    away = away / max(float(np.hypot(*away)), 1e-6)
    bend = ostium + away * rng.uniform(20, 60)
    entry = np.array([ostium[0] + rng.uniform(-60, 60), -40.0])
    return rng.uniform(0.2, 0.5) * _bent_tube(ostium, bend, entry, rng.uniform(1.8, 2.6), size)


def draw_reflux(rng: np.random.Generator, root: Vessel, size: int) -> np.ndarray:
    """A blurred cloud of contrast agent beside the ostium."""
    scale = size / CANVAS_PX
    centre = (root.points[0, :2] + rng.normal(0, 7, 2)) * scale
    y, x = np.mgrid[:size, :size].astype(np.float32)
    spread = rng.uniform(6, 14, 2) * scale
    cloud = np.exp(-(((x - centre[0]) / spread[0]) ** 2 + ((y - centre[1]) / spread[1]) ** 2))
    uneven = np.clip(1 + _clutter(rng, size, 24, 0.5), 0, 2)
    return (rng.uniform(0.1, 0.3) * cloud * uneven).astype(np.float32)


def draw_rib(rng: np.random.Generator, size: int) -> np.ndarray:
    """A wide faint band with two denser borders."""
    half = rng.uniform(5, 9)
    angle, bend, at = rng.uniform(-0.7, 0.7), rng.uniform(-0.5, 0.5), rng.uniform(0, size)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    u = (x - size / 2) * np.cos(angle) + (y - at) * np.sin(angle)
    v = -(x - size / 2) * np.sin(angle) + (y - at) * np.cos(angle) + bend * u**2 / size
    scale = size / CANVAS_PX
    across = np.abs(v) / scale
    band = 1 / (1 + np.exp((across - half) / 0.7)) + 0.9 * np.exp(-(((across - half) / 1.3) ** 2))
    return (rng.uniform(0.02, 0.07) * band).astype(np.float32)


def draw_wire(rng: np.random.Generator, size: int) -> np.ndarray:
    """A thin bent line across the image, as the lead of an electrode."""
    start, end = rng.uniform(-20, CANVAS_PX + 20, (2, 2))
    start[int(rng.integers(2))] = -10
    bend = (start + end) / 2 + rng.normal(0, 45, 2)
    return rng.uniform(0.08, 0.2) * _bent_tube(start, bend, end, rng.uniform(0.4, 0.8), size)


def _bent_tube(
    start: np.ndarray, bend: np.ndarray, end: np.ndarray, radius_px: float, size: int
) -> np.ndarray:
    """A tube of constant width along a quadratic Bézier curve, of unit attenuation at 8 px."""
    part = np.linspace(0, 1, 80)[:, None]
    flat = (1 - part) ** 2 * start + 2 * part * (1 - part) * bend + part**2 * end
    points = np.column_stack([flat, np.zeros(80)])
    tube = Vessel(points, np.full(80, radius_px), path=np.arange(80.0))
    return render_attenuation([tube], [np.ones(80)], size, power=0.6)


def _clutter(rng: np.random.Generator, size: int, cells: int, amount: float) -> np.ndarray:
    """Smooth noise with about `cells` bumps across the image and standard deviation near `amount`."""
    noise = rng.standard_normal((cells, cells), dtype=np.float32) * np.float32(amount)
    return cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)


def _spine(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A vertical band of vertebrae."""
    middle, lean, half = rng.uniform(-0.45, 0.45), rng.uniform(-0.3, 0.3), rng.uniform(0.09, 0.15)
    across = np.abs(x - middle - lean * y)
    band = 1 / (1 + np.exp((across - half) / 0.015))
    discs = np.cos(2 * np.pi * (y + lean * x) / rng.uniform(0.2, 0.3) + rng.uniform(0, 6)) > 0.75
    return rng.uniform(0.2, 0.5) * band * (1 - 0.25 * cv2.GaussianBlur(discs.astype(np.float32), (0, 0), 1.5))


def _sharp_edge(rng: np.random.Generator, size: int) -> np.ndarray:
    """The region beyond a large arc, 0 to 1, with an edge of about 2 px: diaphragm or border of the heart."""
    angle = rng.choice([np.pi / 2, np.pi / 2, 0.0, -0.8, np.pi]) + rng.normal(0, 0.25)
    radius = rng.uniform(0.5, 1.6)
    reach = rng.uniform(0.15, 0.4) + radius
    y, x = np.mgrid[:size, :size] / size - 0.5
    distance = np.hypot(x - reach * np.cos(angle), y - reach * np.sin(angle)) - radius
    return (1 / (1 + np.exp(np.clip(distance * size / rng.uniform(1.0, 4.0), -30, 30)))).astype(np.float32)


def _streaks(rng: np.random.Generator, size: int) -> np.ndarray:
    """Fibrous lung marking: noise drawn out along one direction, standard deviation 1."""
    noise = rng.standard_normal((size, size), dtype=np.float32)
    angle = rng.uniform(0, 180)
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), angle, 1.0)
    long = cv2.GaussianBlur(noise, (0, 0), sigmaX=size * 0.035, sigmaY=size * 0.006)
    turned = cv2.warpAffine(long, turn, (size, size), borderMode=cv2.BORDER_REFLECT_101)
    return turned / max(float(turned.std()), 1e-6)
