"""Rendering of a synthetic angiogram: from vessels to one grey X-ray frame and its exact mask.

X-rays are weakened exponentially, so everything is added up as attenuation (background, vessels, catheter, ribs) and
turned into brightness once: brightness = beam · exp(−attenuation). A vessel weakens the beam by the length of the path
inside it (a chord of its round section), so it is dark in the middle, soft at the edge, and crossings are darker. Then
come the blur of detector and motion, quantum noise and the round aperture. What this leaves out: scatter, overlap of
heart phases within one exposure, and vessels below the resolution of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from vesselrl.data.vessel_tree import CANVAS_PX, Vessel

_MARGIN = 12  # pixels around the image, so that vessels may cross its border
_LAYERS = 4  # vessels in different layers add up where they cross
_REFERENCE_PX = 8.0  # path through a vessel at which its attenuation equals `Domain.contrast`


@dataclass(frozen=True)
class Domain:
    """Everything that makes one clinic's angiograms look as they do.

    Pairs are ranges (low, high) from which every patient draws; lengths are in pixels of a 256-pixel image.
    """

    name: str
    # Width of the thinnest twig and of the root vessel.
    width_px: tuple[float, float]
    # Side branches per length and winding; 1 is usual.
    branching: float
    tortuosity: float
    # Expected number of collaterals per patient, each of which closes a loop.
    loops: float
    # Attenuation of an 8-pixel vessel: 0.5 leaves 61 % of the light.
    contrast: tuple[float, float]
    # Attenuation grows with (path through the vessel) ** this; below 1 helps twigs, 1 is physics.
    thickness_power: float
    # Loss of contrast per 256 px from the ostium: contrast · exp(−distal_fade · path / 256).
    distal_fade: float
    # Share of its contrast that a vessel not yet reached by the bolus still shows; 1 switches filling off.
    filling_floor: float
    # Strength of anatomy behind the vessels (lungs, diaphragm, spine, clutter); 0 is plain grey.
    background_contrast: tuple[float, float]
    # Mean brightness without vessels, 0 to 1 (automatic exposure holds it), and the display curve.
    brightness: tuple[float, float]
    gamma: tuple[float, float]
    # Standard deviation of the detector blur, length of the motion blur.
    blur_px: tuple[float, float]
    motion_blur_px: tuple[float, float]
    # Standard deviation of quantum noise at half brightness, 0 to 1.
    noise: tuple[float, float]
    # Probability of a catheter; how many ribs and wires; probability of a round aperture.
    catheter: float
    ribs: tuple[int, int]
    wires: tuple[int, int]
    aperture: float
    # Displacement by the heart beat at the border of the image.
    beat_px: float
    # The annotator of this domain draws each vessel narrower by this much on either side.
    label_shrink_px: float = 0.0


@dataclass(frozen=True)
class Style:
    """What stays the same in all frames of one sequence: values drawn from the ranges of a domain, and the backdrop.

    `backdrop` (relative to its mean) and `distractors` are attenuations, float32 (size, size); `aperture` is bool (size, size).
    """

    contrast: float
    brightness: float
    gamma: float
    blur_px: float
    motion_blur_px: float
    motion_angle: float
    noise: float
    backdrop: np.ndarray
    distractors: np.ndarray
    aperture: np.ndarray


def choose_style(
    domain: Domain, tree: list[Vessel], patient_rng: np.random.Generator, rng: np.random.Generator, size: int
) -> Style:
    """Draw the appearance of one sequence: exposure from the patient's generator, anatomy behind it from the sequence's."""
    background = np.float32(patient_rng.uniform(*domain.background_contrast))
    subtracted = patient_rng.random() < 0.35  # a flat, subtracted-looking picture
    backdrop, aperture = background * _backdrop(rng, subtracted, size), _aperture(rng, domain.aperture, size)
    backdrop += np.log(np.exp(-backdrop[aperture]).mean())
    return Style(
        contrast=patient_rng.uniform(*domain.contrast),
        brightness=patient_rng.uniform(*domain.brightness),
        gamma=patient_rng.uniform(*domain.gamma),
        blur_px=patient_rng.uniform(*domain.blur_px),
        motion_blur_px=patient_rng.uniform(*domain.motion_blur_px),
        noise=patient_rng.uniform(*domain.noise),
        motion_angle=rng.uniform(0, np.pi),
        backdrop=backdrop,
        distractors=_distractors(domain, tree, rng, size, 0.35 if subtracted else 1.0),
        aperture=aperture,
    )


def render_mask(tree: list[Vessel], size: int, shrink_px: float = 0.0) -> np.ndarray:
    """Lumen of all vessels, bool (size, size): pixels whose centre lies inside, that is, pixels at least half covered.

    Args:
        tree: projected vessels, in pixels of a 256-pixel image whatever `size` is.
        size: side of the square image.
        shrink_px: how much narrower on either side the annotator draws (256-pixel units); half a pixel always remains.
    """
    scale = size / CANVAS_PX
    points, radius, _, _ = _sample(tree, [np.ones(len(vessel.radius)) for vessel in tree], scale)
    radius = np.maximum(radius - shrink_px * scale, 0.5)
    mask = np.zeros((size + 2 * _MARGIN) ** 2, bool)
    for index, distance, chosen in _stamps(points, radius, size):
        mask[index[distance <= radius[chosen, None]]] = True
    return _crop(mask.reshape(size + 2 * _MARGIN, -1))


def render_attenuation(tree: list[Vessel], concentration: list[np.ndarray], size: int, power: float) -> np.ndarray:
    """Attenuation by vessels of unit contrast, float32 (size, size).

    Each pixel takes concentration · (chord / 8 px)**power of the nearest vessel of its layer, the chord averaged over the
    width of the pixel so that twigs thinner than a pixel are not lost; the layers add up.

    Args:
        tree: projected vessels.
        concentration: contrast agent at each centreline point of each vessel, 0 to 1.
        size: side of the square image.
        power: see `Domain.thickness_power`.
    """
    scale = size / CANVAS_PX
    points, radius, agent, layer = _sample(tree, concentration, scale)
    side = size + 2 * _MARGIN
    layers = np.zeros(_LAYERS * side * side, np.float32)
    for index, distance, chosen in _stamps(points, radius, size):
        chord = _mean_chord(distance, radius[chosen, None]) / (scale * _REFERENCE_PX)
        value = agent[chosen, None] * chord**power
        np.maximum.at(layers, index + (layer[chosen] * side * side)[:, None], value)
    return _crop(layers.reshape(_LAYERS, side, side).sum(axis=0))


def compose(style: Style, vessels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One frame as uint8 RGB (size, size, 3) with equal channels.

    Args:
        style: appearance of the sequence.
        vessels: attenuation by the vessels at unit contrast, (size, size).
        rng: generator of the frame; gives noise and the small drift of the backdrop by breathing.
    """
    size = vessels.shape[0]
    scale = size / CANVAS_PX
    drift = np.float32([[1, 0, rng.normal(0, 1.0) * scale], [0, 1, rng.normal(0, 1.0) * scale]])
    behind = cv2.warpAffine(style.backdrop + style.distractors, drift, (size, size), borderMode=cv2.BORDER_REFLECT_101)
    light = style.brightness * np.exp(-(behind + style.contrast * vessels))
    light = _blur(light.astype(np.float32), style, scale)
    grain = rng.standard_normal((size, size), dtype=np.float32)
    grain = 0.6 * grain + 0.9 * cv2.GaussianBlur(grain, (0, 0), 0.8)
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
    return cv2.filter2D(light, -1, (kernel / kernel.sum()).astype(np.float32), borderType=cv2.BORDER_REFLECT_101)


def _sample(
    tree: list[Vessel], values: list[np.ndarray], scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centrelines resampled every 0.6 pixel: points (N, 2), radius (N,), value (N,), layer (N,), in pixels of the image."""
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


def _stamps(points: np.ndarray, radius: np.ndarray, size: int):
    """Yield, per window size, flat pixel indices (n, w²), distances to the centreline point (n, w²) and point numbers."""
    side = size + 2 * _MARGIN
    corner = np.floor(points).astype(np.int64) + _MARGIN
    reach = np.ceil(radius + 0.5).astype(np.int64)
    inside = ((corner - reach[:, None] >= 0) & (corner + reach[:, None] + 1 < side)).all(axis=1)
    for half in np.unique(reach[inside]):
        chosen = np.flatnonzero(inside & (reach == half))
        span = np.arange(-half, half + 2)
        dy, dx = (grid.ravel() for grid in np.meshgrid(span, span, indexing="ij"))
        x, y = corner[chosen, 0, None] + dx, corner[chosen, 1, None] + dy
        offset = points[chosen] + _MARGIN
        distance = np.hypot(x - offset[:, :1], y - offset[:, 1:], dtype=np.float32)
        yield y * side + x, distance, chosen


def _mean_chord(distance: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Chord of a circle at `distance` from its centre, averaged over one pixel: ∫ 2·sqrt(r² − t²) dt from d−½ to d+½."""

    def area(t: np.ndarray) -> np.ndarray:
        t = np.clip(t / radius, -1, 1)
        return radius**2 * (t * np.sqrt(1 - t**2) + np.arcsin(t))

    return np.maximum(area(distance + 0.5) - area(distance - 0.5), 0)


def _crop(padded: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(padded[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN])


def _aperture(rng: np.random.Generator, probability: float, size: int) -> np.ndarray:
    """The round field of view of an image intensifier, which cuts one or two corners; all True without one."""
    if rng.random() >= probability:
        return np.ones((size, size), bool)
    y, x = np.mgrid[:size, :size] / size - 0.5
    radius, angle = rng.uniform(0.55, 0.75), rng.uniform(0, 2 * np.pi)
    reach = rng.uniform(0.4, 1.2) * (radius - 0.5)
    return np.hypot(x - reach * np.cos(angle), y - reach * np.sin(angle)) < radius


def _backdrop(rng: np.random.Generator, subtracted: bool, size: int) -> np.ndarray:
    """Attenuation by everything behind the vessels, float32 (size, size), least value 0.

    Plain: gradient, heart shadow, bright lung, diaphragm with its sharp edge, spine, soft clutter, lung marking.
    Subtracted: what a subtraction leaves, a flat grey with the relief of clutter that moved between the two exposures.
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
    full += 0.035 * marking + _clutter(rng, size, size // 8, 0.025) + _clutter(rng, size, size // 3, 0.02)
    if subtracted:
        shift = np.float32([[1, 0, rng.normal(0, 1.2)], [0, 1, rng.normal(0, 1.2)]])
        moved = cv2.warpAffine(full, shift, (size, size), borderMode=cv2.BORDER_REFLECT_101)
        full = 0.12 * full + 0.8 * (full - moved)
    return (full - full.min()).astype(np.float32)


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
    """The region beyond a large arc, 0 to 1, with an edge of about two pixels: diaphragm or border of the heart."""
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


def _distractors(
    domain: Domain, tree: list[Vessel], rng: np.random.Generator, size: int, bones: float
) -> np.ndarray:
    """Attenuation by what looks like a vessel and is not, float32 (size, size).

    Catheter, contrast agent that flows back into the aorta, ribs (weakened by `bones` in a subtracted picture), wires.
    """
    total = np.zeros((size, size), np.float32)
    if rng.random() < domain.catheter:
        total += _catheter(tree[0], rng, size)
    if rng.random() < 0.5:
        total += _reflux(tree[0], rng, size)
    for _ in range(int(rng.integers(domain.ribs[0], domain.ribs[1] + 1))):
        total += bones * _rib(rng, size)
    for _ in range(int(rng.integers(domain.wires[0], domain.wires[1] + 1))):
        total += rng.uniform(0.08, 0.2) * _wire(rng, size)
    return total


def _catheter(root: Vessel, rng: np.random.Generator, size: int) -> np.ndarray:
    """A tube of constant width that runs from outside the image to the ostium."""
    ostium = root.points[0, :2]
    away = ostium - root.points[min(6, len(root.points) - 1), :2]
    away = away / max(float(np.hypot(*away)), 1e-6)
    bend = ostium + away * rng.uniform(20, 60)
    exit_point = np.array([ostium[0] + rng.uniform(-60, 60), -40.0])
    part = np.linspace(0, 1, 60)[:, None]
    points = (1 - part) ** 2 * ostium + 2 * part * (1 - part) * bend + part**2 * exit_point
    tube = Vessel(np.column_stack([points, np.zeros(60)]), np.full(60, rng.uniform(1.8, 2.6)), np.arange(60.0))
    return rng.uniform(0.2, 0.5) * render_attenuation([tube], [np.ones(60)], size, 0.6)


def _reflux(root: Vessel, rng: np.random.Generator, size: int) -> np.ndarray:
    """A blurred cloud of contrast agent beside the ostium."""
    scale = size / CANVAS_PX
    centre = (root.points[0, :2] + rng.normal(0, 7, 2)) * scale
    y, x = np.mgrid[:size, :size].astype(np.float32)
    spread = rng.uniform(6, 14, 2) * scale
    cloud = np.exp(-(((x - centre[0]) / spread[0]) ** 2 + ((y - centre[1]) / spread[1]) ** 2))
    return (rng.uniform(0.1, 0.3) * cloud * np.clip(1 + _clutter(rng, size, 24, 0.5), 0, 2)).astype(np.float32)


def _rib(rng: np.random.Generator, size: int) -> np.ndarray:
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


def _wire(rng: np.random.Generator, size: int) -> np.ndarray:
    """A thin bent line across the image, as the lead of an electrode."""
    start, end = rng.uniform(-20, CANVAS_PX + 20, (2, 2))
    start[int(rng.integers(2))] = -10
    part = np.linspace(0, 1, 90)[:, None]
    middle = (start + end) / 2 + rng.normal(0, 45, 2)
    points = (1 - part) ** 2 * start + 2 * part * (1 - part) * middle + part**2 * end
    line = Vessel(np.column_stack([points, np.zeros(90)]), np.full(90, rng.uniform(0.4, 0.8)), np.arange(90.0))
    return render_attenuation([line], [np.ones(90)], size, 0.6)
