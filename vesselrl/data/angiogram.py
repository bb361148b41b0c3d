"""One synthetic angiogram frame: from vessels and their surroundings to a grey X-ray picture.

X-rays are weakened exponentially, so everything is added up as attenuation (anatomy, vessels, catheter,
ribs) and turned into brightness once: brightness = exposure · exp(−attenuation). A vessel weakens the
beam by the length of the path inside it, so it is dark in the middle, soft at the edge, and crossings are
darker. Then come the blur of detector and motion, quantum noise and the round aperture. Left out:
scatter, several heart phases in one exposure, streaming of contrast agent, and vessels too thin for the
mask.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from vesselrl.data.surroundings import (
    draw_anatomy,
    draw_aperture,
    draw_catheter,
    draw_reflux,
    draw_rib,
    draw_wire,
    subtract,
)
from vesselrl.data.vessel_tree import CANVAS_PX, Vessel


@dataclass(frozen=True)
class Domain:
    """Everything that makes one clinic's angiograms look as they do.

    Pairs are ranges (low, high) from which every patient draws; lengths are in px of a 256-px image.
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
    # Share of patients whose pictures are digitally subtracted: flat and grey.
    subtracted: float
    # Mean brightness without vessels, 0 to 1 (automatic exposure holds it), and the display curve.
    brightness: tuple[float, float]
    gamma: tuple[float, float]
    # Standard deviation of the detector blur, length of the motion blur.
    blur_px: tuple[float, float]
    motion_blur_px: tuple[float, float]
    # Standard deviation of quantum noise at half brightness, 0 to 1.
    noise: tuple[float, float]
    # Probability of a catheter, of contrast agent that flows back at the ostium; how many ribs and wires.
    catheter: float
    reflux: float
    ribs: tuple[int, int]
    wires: tuple[int, int]
    # Probability of a round aperture.
    aperture: float
    # Displacement by the heart beat at the border of the image.
    beat_px: float
    # The annotator of this domain draws each vessel narrower by this much on either side.
    label_shrink_px: float = 0.0


@dataclass(frozen=True)
class Style:
    """What all frames of one sequence share: values from the ranges of a domain, and the surroundings."""

    contrast: float
    brightness: float
    gamma: float
    blur_px: float
    motion_blur_px: float
    motion_angle: float
    noise: float
    # Attenuation by all that is not a vessel, float32 (size, size), relative to the mean of the anatomy.
    surroundings: np.ndarray
    # Field of view, bool (size, size).
    aperture: np.ndarray


def choose_style(
    domain: Domain, root: Vessel, patient_rng: np.random.Generator, rng: np.random.Generator, size: int
) -> Style:
    """Draw the appearance of one sequence.

    Args:
        domain: the ranges to draw from.
        root: first vessel of the projected tree; the catheter ends there.
        patient_rng: generator of the patient; decides exposure, noise and kind of picture.
        rng: generator of the sequence; decides what lies behind the vessels.
        size: side of the image in px.
    """
    strength = patient_rng.uniform(*domain.background_contrast)
    subtracted = patient_rng.random() < domain.subtracted
    anatomy = draw_anatomy(rng, size)
    anatomy = np.float32(strength) * (subtract(rng, anatomy) if subtracted else anatomy)
    aperture = draw_aperture(rng, domain.aperture, size)
    exposure = np.log(np.exp(-anatomy[aperture]).mean())
    distractors = _draw_distractors(domain, root, rng, size, bones=0.35 if subtracted else 1.0)
    return Style(
        contrast=patient_rng.uniform(*domain.contrast),
        brightness=patient_rng.uniform(*domain.brightness),
        gamma=patient_rng.uniform(*domain.gamma),
        blur_px=patient_rng.uniform(*domain.blur_px),
        motion_blur_px=patient_rng.uniform(*domain.motion_blur_px),
        motion_angle=rng.uniform(0, np.pi),
        noise=patient_rng.uniform(*domain.noise),
        surroundings=anatomy + exposure + distractors,
        aperture=aperture,
    )


def _draw_distractors(
    domain: Domain, root: Vessel, rng: np.random.Generator, size: int, bones: float
) -> np.ndarray:
    """Attenuation by what looks like a vessel and is not; subtraction weakens bones to the share `bones`."""
    total = np.zeros((size, size), np.float32)
    if rng.random() < domain.catheter:
        total += draw_catheter(rng, root, size)
    if rng.random() < domain.reflux:
        total += draw_reflux(rng, root, size)
    for _ in range(int(rng.integers(domain.ribs[0], domain.ribs[1] + 1))):
        total += bones * draw_rib(rng, size)
    for _ in range(int(rng.integers(domain.wires[0], domain.wires[1] + 1))):
        total += draw_wire(rng, size)
    return total


def compose(style: Style, vessels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One frame as uint8 RGB (size, size, 3) with equal channels.

    Args:
        style: appearance of the sequence.
        vessels: attenuation by the vessels at unit contrast, (size, size).
        rng: generator of the frame; gives noise and the small drift of the surroundings by breathing.
    """
    size = vessels.shape[0]
    scale = size / CANVAS_PX
    drift = np.float32([[1, 0, rng.normal(0, 1.0) * scale], [0, 1, rng.normal(0, 1.0) * scale]])
    behind = cv2.warpAffine(style.surroundings, drift, (size, size), borderMode=cv2.BORDER_REFLECT_101)
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
