"""One synthetic angiogram frame: vessels, background and distractors become a grey X-ray image and a mask.

Everything is added up as attenuation, float32 (size, size), and turned into brightness once: exposure ·
exp(−attenuation). A vessel weakens the beam by the length of the path inside it, so it is dark in the middle,
soft at the edge, and crossings are darker. Lengths are in px of a 256-px image. Left out: scatter, streaming
of contrast agent, and vessels too thin for the mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from vesselrl.synthetic.tree import CANVAS_PX, Range, Rng, Vessel

_LAYERS = 4  # vessels in different layers add up where they cross
_REFERENCE_PX = 8.0  # path through a vessel at which its attenuation is 1


@dataclass(frozen=True)
class Domain:
    """Everything that makes one clinic's angiograms look as they do; patients draw from the ranges."""

    name: str
    width_px: Range  # of the thinnest twig and of the root vessel
    branching: float  # side branches per length; 1 is usual
    tortuosity: float  # winding; 1 is usual
    loops: float  # expected number of collaterals per patient, each of which closes a loop
    contrast: Range  # attenuation of an 8-px vessel: 0.5 leaves 61 % of the light
    thickness_power: float  # attenuation grows with (path through the vessel) ** this; 1 is physics
    distal_fade: (
        float  # loss of contrast per 256 px from the ostium: contrast · exp(−distal_fade · path / 256)
    )
    filling_floor: float  # share of its contrast that a vessel shows before the bolus comes; 1: no filling
    background_contrast: Range  # strength of the anatomy behind the vessels; 0 is plain grey
    subtracted: float  # share of patients whose images are digitally subtracted: flat and grey
    brightness: Range  # mean without vessels, 0 to 1 (automatic exposure holds it)
    gamma: Range  # of the display curve
    blur_px: Range  # standard deviation of the detector blur
    motion_blur_px: Range  # length of the motion blur
    noise: Range  # standard deviation of quantum noise at half brightness, 0 to 1
    catheter: float  # probability
    reflux: float  # probability of contrast agent that flows back at the ostium
    ribs: tuple[int, int]
    wires: tuple[int, int]
    aperture: float  # probability of a round field of view
    beat_px: float  # displacement by the heart beat at the border of the image
    label_shrink_px: float = 0.0  # how much narrower the annotator draws each vessel on either side


def render_mask(tree: list[Vessel], size: int, shrink_px: float = 0.0) -> np.ndarray:
    """Lumen of all vessels, bool (size, size): the pixels whose centre lies inside; no width is rounded."""
    scale = size / CANVAS_PX
    points, radius, _, _ = _resample(tree, [np.ones(len(vessel.radius)) for vessel in tree], scale)
    radius = np.maximum(radius - shrink_px * scale, 0.5)
    side = size + 2 * _margin(size)
    mask = np.zeros(side * side, bool)
    for index, distance, chosen in _stamps(points, radius, size):
        mask[index[distance <= radius[chosen, None]]] = True
    return _crop(mask.reshape(side, side), size)


def render_attenuation(
    tree: list[Vessel], concentration: list[np.ndarray], size: int, power: float
) -> np.ndarray:
    """Attenuation by vessels of unit contrast; `concentration` is that of the contrast agent at each point.

    Each pixel takes concentration · (chord / 8 px)**power of the vessel of its layer where this is largest;
    the layers add up. The chord is averaged over the width of a pixel, so that thin twigs are not lost.
    """
    scale = size / CANVAS_PX
    points, radius, agent, layer = _resample(tree, concentration, scale)
    side = size + 2 * _margin(size)
    layers = np.zeros(_LAYERS * side * side, np.float32)
    for index, distance, chosen in _stamps(points, radius, size):
        chord = _mean_chord(distance, radius[chosen, None]) / (scale * _REFERENCE_PX)
        value = agent[chosen, None] * chord**power
        np.maximum.at(layers, index + (layer[chosen] * side * side)[:, None], value)
    return _crop(layers.reshape(_LAYERS, side, side).sum(axis=0), size)


def _resample(tree: list[Vessel], values: list[np.ndarray], scale: float) -> tuple[np.ndarray, ...]:
    """Centrelines every 0.6 px: points (N, 2), radius, value and layer (N,), in px of the image."""
    points, radii, sampled, layers = [], [], [], []
    for number, (vessel, value) in enumerate(zip(tree, values, strict=True)):
        flat = vessel.points[:, :2] * scale - 0.5 * (1 - scale)
        along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(flat, axis=0).T))])
        at = np.linspace(0, along[-1], max(2, int(along[-1] / 0.6)))
        points.append(np.column_stack([np.interp(at, along, flat[:, 0]), np.interp(at, along, flat[:, 1])]))
        radii.append(np.interp(at, along, vessel.radius * scale))
        sampled.append(np.interp(at, along, value))
        layers.append(np.full(len(at), number % _LAYERS))
    single = (np.concatenate(parts).astype(np.float32) for parts in (points, radii, sampled))
    return *single, np.concatenate(layers)


def _stamps(points: np.ndarray, radius: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """For each window width w: flat pixels (n, w²) round n points, distances (n, w²), numbers of points."""
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
    """Pixels around the image that are cut off at the end, so that vessels may cross its border."""
    return int(np.ceil(12 * max(1.0, size / CANVAS_PX)))


def _crop(padded: np.ndarray, size: int) -> np.ndarray:
    margin = _margin(size)
    return np.ascontiguousarray(padded[margin : margin + size, margin : margin + size])


@dataclass(frozen=True)
class Style:
    """Appearance that all frames of one sequence share."""

    contrast: float
    brightness: float
    gamma: float
    blur_px: float
    motion_blur_px: float
    noise: float
    motion_angle: float
    background: np.ndarray  # attenuation by all that is not a vessel, relative to the mean of the anatomy
    aperture: np.ndarray  # field of view, bool (size, size)


def choose_style(domain: Domain, root: Vessel, patient_rng: Rng, rng: Rng, size: int) -> Style:
    """Draws the appearance of one sequence; a catheter ends at the root vessel.

    The patient's generator decides exposure, noise and kind of image, the sequence's what lies behind.
    """
    strength = patient_rng.uniform(*domain.background_contrast)
    subtracted = patient_rng.random() < domain.subtracted
    anatomy = _anatomy(rng, size)
    anatomy = np.float32(strength) * (_subtract(rng, anatomy) if subtracted else anatomy)
    aperture = _aperture(rng, domain.aperture, size)
    exposure = np.log(np.exp(-anatomy[aperture]).mean())
    distractors = _distractors(domain, root, rng, size, bones=0.35 if subtracted else 1.0)
    background = anatomy + exposure + distractors
    names = ("contrast", "brightness", "gamma", "blur_px", "motion_blur_px", "noise")
    values = {name: patient_rng.uniform(*getattr(domain, name)) for name in names}
    return Style(**values, motion_angle=rng.uniform(0, np.pi), background=background, aperture=aperture)


def _aperture(rng: Rng, probability: float, size: int) -> np.ndarray:
    """The round field of view of an image intensifier, bool; all True without one."""
    if rng.random() >= probability:
        return np.ones((size, size), bool)
    y, x = np.mgrid[:size, :size] / size - 0.5
    radius, angle = rng.uniform(0.55, 0.75), rng.uniform(0, 2 * np.pi)
    reach = rng.uniform(0.4, 1.2) * (radius - 0.5)
    return np.hypot(x - reach * np.cos(angle), y - reach * np.sin(angle)) < radius


def _anatomy(rng: Rng, size: int) -> np.ndarray:
    """Gradient, heart shadow, spine, clutter, diaphragm with its sharp edge and lung marking."""
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
    fine, finest = _clutter(rng, size, size // 8, 0.025), _clutter(rng, size, size // 3, 0.02)
    return full + 0.035 * marking + fine + finest


def _spine(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A vertical band of vertebrae."""
    middle, lean, half = rng.uniform(-0.45, 0.45), rng.uniform(-0.3, 0.3), rng.uniform(0.09, 0.15)
    across = np.abs(x - middle - lean * y)
    band = 1 / (1 + np.exp((across - half) / 0.015))
    discs = np.cos(2 * np.pi * (y + lean * x) / rng.uniform(0.2, 0.3) + rng.uniform(0, 6)) > 0.75
    return rng.uniform(0.2, 0.5) * band * (1 - 0.25 * cv2.GaussianBlur(discs.astype(np.float32), (0, 0), 1.5))


def _clutter(rng: Rng, size: int, cells: int, amount: float) -> np.ndarray:
    """Smooth noise with about `cells` bumps across the image and standard deviation near `amount`."""
    noise = rng.standard_normal((cells, cells), dtype=np.float32) * np.float32(amount)
    return cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)


def _sharp_edge(rng: Rng, size: int) -> np.ndarray:
    """The region beyond a large arc, 0 to 1, with an edge of about 2 px: diaphragm or border of the heart."""
    angle = rng.choice([np.pi / 2, np.pi / 2, 0.0, -0.8, np.pi]) + rng.normal(0, 0.25)
    radius = rng.uniform(0.5, 1.6)
    reach = rng.uniform(0.15, 0.4) + radius
    y, x = np.mgrid[:size, :size] / size - 0.5
    distance = np.hypot(x - reach * np.cos(angle), y - reach * np.sin(angle)) - radius
    return (1 / (1 + np.exp(np.clip(distance * size / rng.uniform(1.0, 4.0), -30, 30)))).astype(np.float32)


def _streaks(rng: Rng, size: int) -> np.ndarray:
    """Fibrous lung marking: noise drawn out along one direction, standard deviation 1."""
    noise = rng.standard_normal((size, size), dtype=np.float32)
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(0, 180), 1.0)
    long = cv2.GaussianBlur(noise, (0, 0), sigmaX=size * 0.035, sigmaY=size * 0.006)
    turned = cv2.warpAffine(long, turn, (size, size), borderMode=cv2.BORDER_REFLECT_101)
    return turned / max(float(turned.std()), 1e-6)


def _subtract(rng: Rng, anatomy: np.ndarray) -> np.ndarray:
    """Digital subtraction: hardly anything is left of the anatomy, but a relief where it has moved."""
    size = anatomy.shape[0]
    right, down = rng.normal(0, 1.2, 2) * size / CANVAS_PX
    shift = np.float32([[1, 0, right], [0, 1, down]])
    moved = cv2.warpAffine(anatomy, shift, (size, size), borderMode=cv2.BORDER_REFLECT_101)
    return 0.12 * anatomy + 0.8 * (anatomy - moved)


def _distractors(domain: Domain, root: Vessel, rng: Rng, size: int, bones: float) -> np.ndarray:
    """Attenuation by what resembles a vessel and is none; subtraction weakens ribs to the share `bones`."""
    total = np.zeros((size, size), np.float32)
    if rng.random() < domain.catheter:
        total += _catheter(rng, root, size)
    if rng.random() < domain.reflux:
        total += _reflux(rng, root, size)
    for _ in range(int(rng.integers(domain.ribs[0], domain.ribs[1] + 1))):
        total += bones * _rib(rng, size)
    for _ in range(int(rng.integers(domain.wires[0], domain.wires[1] + 1))):
        total += _wire(rng, size)
    return total


def _catheter(rng: Rng, root: Vessel, size: int) -> np.ndarray:
    """A tube of constant width that runs from the upper border of the image to the ostium."""
    ostium = root.points[0, :2]
    away = ostium - root.points[min(6, len(root.points) - 1), :2]
    away = away / max(float(np.hypot(*away)), 1e-6)
    bend = ostium + away * rng.uniform(20, 60)
    entry = np.array([ostium[0] + rng.uniform(-60, 60), -40.0])
    return rng.uniform(0.2, 0.5) * _bent_tube(ostium, bend, entry, rng.uniform(1.8, 2.6), size)


def _reflux(rng: Rng, root: Vessel, size: int) -> np.ndarray:
    """A blurred cloud of contrast agent beside the ostium."""
    scale = size / CANVAS_PX
    centre = (root.points[0, :2] + rng.normal(0, 7, 2)) * scale
    y, x = np.mgrid[:size, :size].astype(np.float32)
    spread = rng.uniform(6, 14, 2) * scale
    cloud = np.exp(-(((x - centre[0]) / spread[0]) ** 2 + ((y - centre[1]) / spread[1]) ** 2))
    uneven = np.clip(1 + _clutter(rng, size, 24, 0.5), 0, 2)
    return (rng.uniform(0.1, 0.3) * cloud * uneven).astype(np.float32)


def _rib(rng: Rng, size: int) -> np.ndarray:
    """A wide faint band with two denser borders."""
    half = rng.uniform(5, 9)
    angle, bend, at = rng.uniform(-0.7, 0.7), rng.uniform(-0.5, 0.5), rng.uniform(0, size)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    u = (x - size / 2) * np.cos(angle) + (y - at) * np.sin(angle)
    v = -(x - size / 2) * np.sin(angle) + (y - at) * np.cos(angle) + bend * u**2 / size
    across = np.abs(v) / (size / CANVAS_PX)
    band = 1 / (1 + np.exp((across - half) / 0.7)) + 0.9 * np.exp(-(((across - half) / 1.3) ** 2))
    return (rng.uniform(0.02, 0.07) * band).astype(np.float32)


def _wire(rng: Rng, size: int) -> np.ndarray:
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
    tube = Vessel(np.column_stack([flat, np.zeros(80)]), np.full(80, radius_px), path=np.arange(80.0))
    return render_attenuation([tube], [np.ones(80)], size, power=0.6)


def compose(style: Style, vessels: np.ndarray, rng: Rng) -> np.ndarray:
    """One frame as uint8 RGB (size, size, 3) with equal channels.

    `vessels` is their attenuation at unit contrast; the generator of the frame gives noise and the small
    drift of the background by breathing.
    """
    size = vessels.shape[0]
    scale = size / CANVAS_PX
    drift = np.float32([[1, 0, rng.normal(0, 1.0) * scale], [0, 1, rng.normal(0, 1.0) * scale]])
    behind = cv2.warpAffine(style.background, drift, (size, size), borderMode=cv2.BORDER_REFLECT_101)
    light = style.brightness * np.exp(-(behind + style.contrast * vessels))
    light = _blur(light.astype(np.float32), style, scale)
    grain = rng.standard_normal((size, size), dtype=np.float32)
    grain = 0.6 * grain + 0.9 * cv2.GaussianBlur(grain, (0, 0), 0.8)
    grain /= grain.std()
    light = light + style.noise * np.sqrt(np.maximum(light, 0.02) / 0.5) * grain
    light = np.clip(light, 0, 1) ** style.gamma
    light[~style.aperture] = 0.06 + 0.006 * grain[~style.aperture]
    grey = np.clip(light * 255 + 0.5, 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _blur(light: np.ndarray, style: Style, scale: float) -> np.ndarray:
    """Detector blur, then motion blur along one direction."""
    light = cv2.GaussianBlur(light, (0, 0), max(style.blur_px * scale, 0.3))
    length = style.motion_blur_px * scale
    if length < 1.2:
        return light
    side = 2 * int(np.ceil(length / 2)) + 1
    along = np.arange(side) - side // 2
    x, y = np.meshgrid(along, along)
    across = np.abs(-np.sin(style.motion_angle) * x + np.cos(style.motion_angle) * y)
    down = np.abs(np.cos(style.motion_angle) * x + np.sin(style.motion_angle) * y)
    kernel = np.clip(1 - across, 0, 1) * np.clip(length / 2 + 0.5 - down, 0, 1)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    return cv2.filter2D(light, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
