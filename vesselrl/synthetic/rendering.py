"""One synthetic angiogram frame: vessels, background and distractors become a grey X-ray image and a mask.

Everything is added up as attenuation, float32 (size, size), then brightness = exposure · exp(−attenuation): a
vessel weakens the beam by the path inside it. Lengths are in px of a 256-px image.
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
    distal_fade: float  # contrast · exp(−distal_fade · path from the ostium / 256)
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
    ones = [np.ones(len(vessel.radius)) for vessel in tree]
    mask = np.zeros(_padded(size) ** 2, bool)
    for index, distance, radius, *_ in _stamps(tree, ones, size):
        mask[index[distance <= np.maximum(radius - shrink_px * size / CANVAS_PX, 0.5)]] = True
    return _crop(mask, size)


def render_attenuation(
    tree: list[Vessel], concentration: list[np.ndarray], size: int, power: float
) -> np.ndarray:
    """Attenuation by vessels of unit contrast; `concentration` is that of the contrast agent at each point.

    Each pixel takes concentration · (chord / 8 px)**power of the vessel of its layer where this is largest;
    the layers add up. The chord is averaged over the width of a pixel, so that thin twigs are not lost.
    """
    unit = size / CANVAS_PX * _REFERENCE_PX
    area = _padded(size) ** 2
    layers = np.zeros(_LAYERS * area, np.float32)
    for index, distance, radius, agent, layer in _stamps(tree, concentration, size):
        # Integral of the chord of a circle, 2·√(r² − t²), from distance − ½ to distance + ½.
        ends = (np.clip((distance + half) / radius, -1, 1) for half in (0.5, -0.5))
        far, near = (radius**2 * (t * np.sqrt(1 - t**2) + np.arcsin(t)) for t in ends)
        chord = np.maximum(far - near, 0) / unit
        np.maximum.at(layers, index + layer * area, agent * chord**power)
    return _crop(layers.reshape(_LAYERS, area).sum(axis=0), size)


def _stamps(tree: list[Vessel], values: list[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Flat pixels (n, w²) in windows round n points, distances; radius, value, layer (n, 1) of the points."""
    scale, side = size / CANVAS_PX, _padded(size)
    sampled = []
    for vessel, value in zip(tree, values, strict=True):
        flat = vessel.points[:, :2] * scale - 0.5 * (1 - scale)
        along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(flat, axis=0).T))])
        at = np.linspace(0, along[-1], max(2, int(along[-1] / 0.6)))  # every 0.6 px
        sampled.append([np.interp(at, along, own) for own in (*flat.T, vessel.radius * scale, value)])
    x, y, radius, value = np.concatenate(sampled, axis=1).astype(np.float32)
    layer = np.repeat(np.arange(len(tree)) % _LAYERS, [len(own[0]) for own in sampled])
    points = np.column_stack([x, y]) + _margin(size)
    corner = np.floor(points).astype(np.int64)
    reach = np.ceil(radius + 0.5).astype(np.int64)
    inside = ((corner - reach[:, None] >= 0) & (corner + reach[:, None] + 1 < side)).all(axis=1)
    for half in np.unique(reach[inside]):
        chosen = np.flatnonzero(inside & (reach == half))
        span = np.arange(-half, half + 2)
        dy, dx = (grid.ravel() for grid in np.meshgrid(span, span, indexing="ij"))
        x, y = corner[chosen, 0, None] + dx, corner[chosen, 1, None] + dy
        distance = np.hypot(x - points[chosen, :1], y - points[chosen, 1:], dtype=np.float32)
        yield y * side + x, distance, *(own[chosen, None] for own in (radius, value, layer))


def _margin(size: int) -> int:
    """Pixels around the image that are cut off at the end, so that vessels may cross its border."""
    return int(np.ceil(12 * max(1.0, size / CANVAS_PX)))


def _padded(size: int) -> int:
    return size + 2 * _margin(size)


def _crop(flat: np.ndarray, size: int) -> np.ndarray:
    inner = slice(_margin(size), _margin(size) + size)
    return np.ascontiguousarray(flat.reshape(_padded(size), -1)[inner, inner])


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
    """Draws the appearance of one sequence; `patient_rng` decides exposure, noise and kind of image."""
    strength = patient_rng.uniform(*domain.background_contrast)
    subtracted = patient_rng.random() < domain.subtracted
    anatomy = _anatomy(rng, size)
    if subtracted:  # hardly anything is left, but a relief where it has moved
        moved = _moved(anatomy, rng.normal(0, 1.2, 2) * size / CANVAS_PX)
        anatomy = 0.12 * anatomy + 0.8 * (anatomy - moved)
    anatomy = np.float32(strength) * anatomy
    aperture = np.ones((size, size), bool)
    if rng.random() < domain.aperture:  # the round field of view of an image intensifier
        y, x = np.mgrid[:size, :size] / size - 0.5
        radius, angle = rng.uniform(0.55, 0.75), rng.uniform(0, 2 * np.pi)
        reach = rng.uniform(0.4, 1.2) * (radius - 0.5)
        aperture = np.hypot(x - reach * np.cos(angle), y - reach * np.sin(angle)) < radius
    exposure = np.log(np.exp(-anatomy[aperture]).mean())
    background = anatomy + exposure + _distractors(domain, root, rng, size, bones=0.35 if subtracted else 1.0)
    names = ("contrast", "brightness", "gamma", "blur_px", "motion_blur_px", "noise")
    values = {name: patient_rng.uniform(*getattr(domain, name)) for name in names}
    return Style(**values, motion_angle=rng.uniform(0, np.pi), background=background, aperture=aperture)


def _anatomy(rng: Rng, size: int) -> np.ndarray:
    """Gradient, heart shadow, spine, clutter, diaphragm with its sharp edge and lung marking."""
    small = size // 4
    y, x = np.mgrid[:small, :small] / small - 0.5
    slope = rng.normal(0, 0.5, 2)
    smooth = slope[0] * x + slope[1] * y
    angle, reach, spread = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.5), rng.uniform(0.35, 0.7, 2)
    heart = ((x - reach * np.cos(angle)) / spread[0]) ** 2 + ((y - reach * np.sin(angle)) / spread[1]) ** 2
    smooth += rng.uniform(0.3, 0.9) / (1 + np.exp(np.clip((heart - 1) * rng.uniform(2, 12), -30, 30)))
    if rng.random() < 0.4:  # the spine, a vertical band of vertebrae
        middle, lean, half = rng.uniform(-0.45, 0.45), rng.uniform(-0.3, 0.3), rng.uniform(0.09, 0.15)
        band = 1 / (1 + np.exp((np.abs(x - middle - lean * y) - half) / 0.015))
        discs = np.cos(2 * np.pi * (y + lean * x) / rng.uniform(0.2, 0.3) + rng.uniform(0, 6)) > 0.75
        discs = cv2.GaussianBlur(discs.astype(np.float32), (0, 0), 1.5)
        smooth += rng.uniform(0.2, 0.5) * band * (1 - 0.25 * discs)
    for cells, amount in ((3, 0.2), (7, 0.08), (18, 0.035)):
        smooth += _clutter(rng, small, cells, amount)
    full = cv2.resize(smooth.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[:size, :size] / size - 0.5
    for _ in range(rng.integers(0, 3)):  # beyond a large arc, as the diaphragm or the border of the heart
        weight = rng.uniform(0.25, 0.8)
        angle = rng.choice([np.pi / 2, np.pi / 2, 0.0, -0.8, np.pi]) + rng.normal(0, 0.25)
        radius = rng.uniform(0.5, 1.6)
        reach = rng.uniform(0.15, 0.4) + radius
        beyond = np.hypot(x - reach * np.cos(angle), y - reach * np.sin(angle)) - radius
        edge = 1 / (1 + np.exp(np.clip(beyond * size / rng.uniform(1.0, 4.0), -30, 30)))
        full += weight * edge.astype(np.float32)
    marking = rng.standard_normal((size, size), dtype=np.float32)  # of the lungs: fibres along one direction
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(0, 180), 1.0)
    marking = cv2.GaussianBlur(marking, (0, 0), sigmaX=size * 0.035, sigmaY=size * 0.006)
    marking = cv2.warpAffine(marking, turn, (size, size), borderMode=cv2.BORDER_REFLECT_101)
    marking = marking / max(float(marking.std()), 1e-6)
    marking = marking * np.clip(_clutter(rng, size, 5, 0.6) + 0.3, 0, 1.5)
    fine, finest = _clutter(rng, size, size // 8, 0.025), _clutter(rng, size, size // 3, 0.02)
    return full + 0.035 * marking + fine + finest


def _clutter(rng: Rng, size: int, cells: int, amount: float) -> np.ndarray:
    """Smooth noise with about `cells` bumps across the image and standard deviation near `amount`."""
    noise = rng.standard_normal((cells, cells), dtype=np.float32) * np.float32(amount)
    return cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)


def _moved(pixels: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """An image moved to the right and down by (x, y) px."""
    matrix = np.float32([[1, 0, shift[0]], [0, 1, shift[1]]])
    return cv2.warpAffine(pixels, matrix, pixels.shape[::-1], borderMode=cv2.BORDER_REFLECT_101)


def _distractors(domain: Domain, root: Vessel, rng: Rng, size: int, bones: float) -> np.ndarray:
    """Attenuation by what resembles a vessel and is none; subtraction weakens ribs to the share `bones`."""
    scale, ostium = size / CANVAS_PX, root.points[0, :2]
    total = np.zeros((size, size), np.float32)
    if rng.random() < domain.catheter:  # from the upper border of the image to the ostium
        away = ostium - root.points[min(6, len(root.points) - 1), :2]
        away = away / max(float(np.hypot(*away)), 1e-6)
        bend = ostium + away * rng.uniform(20, 60)
        entry = np.array([ostium[0] + rng.uniform(-60, 60), -40.0])
        total += rng.uniform(0.2, 0.5) * _bent_tube(ostium, bend, entry, rng.uniform(1.8, 2.6), size)
    if rng.random() < domain.reflux:  # a blurred cloud of contrast agent beside the ostium
        centre = (ostium + rng.normal(0, 7, 2)) * scale
        y, x = np.mgrid[:size, :size].astype(np.float32)
        spread = rng.uniform(6, 14, 2) * scale
        cloud = np.exp(-(((x - centre[0]) / spread[0]) ** 2 + ((y - centre[1]) / spread[1]) ** 2))
        uneven = np.clip(1 + _clutter(rng, size, 24, 0.5), 0, 2)
        total += (rng.uniform(0.1, 0.3) * cloud * uneven).astype(np.float32)
    for _ in range(rng.integers(*domain.ribs, endpoint=True)):
        half = rng.uniform(5, 9)  # a wide faint band with two denser borders
        angle, bend, at = rng.uniform(-0.7, 0.7), rng.uniform(-0.5, 0.5), rng.uniform(0, size)
        y, x = np.mgrid[:size, :size].astype(np.float32)
        u = (x - size / 2) * np.cos(angle) + (y - at) * np.sin(angle)
        v = -(x - size / 2) * np.sin(angle) + (y - at) * np.cos(angle) + bend * u**2 / size
        across = np.abs(v) / scale - half
        band = 1 / (1 + np.exp(across / 0.7)) + 0.9 * np.exp(-((across / 1.3) ** 2))
        total += bones * (rng.uniform(0.02, 0.07) * band).astype(np.float32)
    for _ in range(rng.integers(*domain.wires, endpoint=True)):  # thin, as the leads of electrodes
        start, end = rng.uniform(-20, CANVAS_PX + 20, (2, 2))
        start[rng.integers(2)] = -10
        bend = (start + end) / 2 + rng.normal(0, 45, 2)
        total += rng.uniform(0.08, 0.2) * _bent_tube(start, bend, end, rng.uniform(0.4, 0.8), size)
    return total


def _bent_tube(start: np.ndarray, bend: np.ndarray, end: np.ndarray, radius: float, size: int) -> np.ndarray:
    """A tube of constant width along a quadratic Bézier curve, of unit attenuation at 8 px."""
    part = np.linspace(0, 1, 80)[:, None]
    flat = (1 - part) ** 2 * start + 2 * part * (1 - part) * bend + part**2 * end
    tube = Vessel(np.column_stack([flat, np.zeros(80)]), np.full(80, radius), path=np.arange(80.0))
    return render_attenuation([tube], [np.ones(80)], size, power=0.6)


def compose(style: Style, vessels: np.ndarray, rng: Rng) -> np.ndarray:
    """One frame as uint8 RGB (size, size, 3); `vessels` is their attenuation at unit contrast."""
    size = vessels.shape[0]
    scale = size / CANVAS_PX
    behind = _moved(style.background, rng.normal(0, 1.0, 2) * scale)  # it drifts by breathing
    light = style.brightness * np.exp(-(behind + style.contrast * vessels))
    light = cv2.GaussianBlur(light.astype(np.float32), (0, 0), max(style.blur_px * scale, 0.3))
    if (length := style.motion_blur_px * scale) >= 1.2:
        reach, cosine, sine = int(np.ceil(length / 2)), np.cos(style.motion_angle), np.sin(style.motion_angle)
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        across, down = np.abs(-sine * x + cosine * y), np.abs(cosine * x + sine * y)
        kernel = np.clip(1 - across, 0, 1) * np.clip(length / 2 + 0.5 - down, 0, 1)
        kernel = (kernel / kernel.sum()).astype(np.float32)
        light = cv2.filter2D(light, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    grain = rng.standard_normal((size, size), dtype=np.float32)
    grain = 0.6 * grain + 0.9 * cv2.GaussianBlur(grain, (0, 0), 0.8)
    grain /= grain.std()
    light = light + style.noise * np.sqrt(np.maximum(light, 0.02) / 0.5) * grain
    light = np.clip(light, 0, 1) ** style.gamma
    light[~style.aperture] = 0.06 + 0.006 * grain[~style.aperture]
    grey = np.clip(light * 255 + 0.5, 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
