"""Random changes of an image and its mask together, so that no epoch shows the same image twice.

Flips and quarter turns move whole pixels; rotation, scale and elastic bending become one map, and image and
mask are read through it once, bilinear: a mask cut at one half keeps a 3-px vessel better than the nearest
neighbour. Beyond its border both are black, as at the edge of an X-ray aperture.
"""

from dataclasses import dataclass, fields

import cv2
import numpy as np

from vesselrl.scoring.overlap import as_mask

UNIT_PX = 512  # shorter side of the image in whose pixels the lengths of a plan are given
_NUM_BENDS = 8  # control points of the elastic grid along the shorter side
_STREAM = 0xA06  # keeps these random numbers apart from others of the same seed


@dataclass(frozen=True)
class Augmentation:
    """How far images may be changed; every field is off by default, and amounts are drawn for each image.

    Lengths are in px of an image whose shorter side has 512 px.

    >>> print(Augmentation(rotation_deg=10, gamma=1.2))
    rotation_deg 10, gamma 1.2
    """

    flips: bool = False  # left-right and top-bottom, each for half of the images
    quarter_turns: bool = False  # 0, 90, 180 or 270 degrees; an image that is not square changes its shape
    rotation_deg: float = 0.0  # largest angle, to either side, uniform
    scale: float = 1.0  # largest factor; from 1/scale to scale, uniform in its logarithm
    elastic_px: float = 0.0  # largest shift in x and in y of control points 64 px apart; to 12 nothing folds
    gamma: float = 1.0  # largest exponent of the brightness in [0, 1], drawn as the scale
    contrast: float = 1.0  # largest factor about the mean brightness, drawn as the scale
    blur_px: float = 0.0  # largest standard deviation of a Gaussian blur, uniform from 0
    noise: float = 0.0  # largest standard deviation of Gaussian noise, in shares of the full range, as above

    def __str__(self) -> str:
        values = [(field, getattr(self, field.name)) for field in fields(self)]
        changed = [(field.name, value) for field, value in values if value != field.default]
        return ", ".join(name if value is True else f"{name} {value}" for name, value in changed) or "none"

    @property
    def is_none(self) -> bool:
        """True if nothing is ever changed, so that what was computed for an image holds in every epoch."""
        return self == Augmentation()


AUGMENTATIONS = {
    "none": Augmentation(),
    "flips": Augmentation(flips=True),
    "light": Augmentation(flips=True, rotation_deg=10, scale=1.1, gamma=1.15, contrast=1.15, noise=0.01),
    "strong": Augmentation(
        flips=True, quarter_turns=True, rotation_deg=25, scale=1.25, elastic_px=6,
        gamma=1.4, contrast=1.3, blur_px=1.2, noise=0.03
    ),
}  # fmt: skip


def get_augmentation(name: str) -> Augmentation:
    """The plan of a name, none, flips, light or strong; any other is a ValueError."""
    if name not in AUGMENTATIONS:
        raise ValueError(f"augment is {name!r}. Choose one of {', '.join(AUGMENTATIONS)}.")
    return AUGMENTATIONS[name]


def augment(
    image: np.ndarray, mask: np.ndarray, plan: Augmentation, seed: int, epoch: int, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """One random change of an image; the same for the same seed, epoch and index, whatever came before.

    A grey image stays grey, and an empty mask stays empty. The amount of one kind of change does not depend
    on which others the plan has. Without any, image (H, W, 3) and mask (H, W) are returned as they came.
    `index` is the number of the sample in its data set, not in the epoch's order.
    """
    mask = as_mask(mask)
    if image.shape != (*mask.shape, 3) or image.dtype != np.uint8:
        need = f"a uint8 image of shape {(*mask.shape, 3)} for its mask: got {image.dtype} {image.shape}"
        raise ValueError(f"augment needs {need}. Load both through the data set.")
    if plan.is_none:
        return image, mask
    place, bend, light, grain = np.random.default_rng([_STREAM, seed, epoch, index]).spawn(4)
    # Every number is drawn, needed or not: a change that is switched off leaves the others as they were.
    angle, factor = np.deg2rad(plan.rotation_deg * place.uniform(-1, 1)), plan.scale ** place.uniform(-1, 1)
    flips, num_turns = place.integers(2, size=2) * plan.flips, place.integers(4) * plan.quarter_turns
    image, mask = (np.rot90(np.flip(pixels, np.flatnonzero(flips)), num_turns) for pixels in (image, mask))
    image, mask = np.ascontiguousarray(image), np.ascontiguousarray(mask)
    if plan.rotation_deg > 0 or plan.scale > 1 or plan.elastic_px > 0:
        places = _source_places(mask.shape, angle, factor, plan.elastic_px, bend)
        image = cv2.remap(image, places, None, cv2.INTER_LINEAR)
        mask = cv2.remap(mask.view(np.uint8) * np.uint8(255), places, None, cv2.INTER_LINEAR) >= 128
    gamma, contrast = plan.gamma ** light.uniform(-1, 1), plan.contrast ** light.uniform(-1, 1)
    if gamma != 1 or contrast != 1:  # gamma, then contrast about the mean: one curve for all channels
        curve = (np.arange(256) / 255) ** gamma
        mean = curve @ np.bincount(image.ravel(), minlength=256) / image.size
        curve = mean + contrast * (curve - mean)
        image = cv2.LUT(image, np.round(255 * curve.clip(0, 1)).astype(np.uint8))
    sigma = plan.blur_px * light.uniform() * min(mask.shape) / UNIT_PX
    if sigma >= 0.2:  # less is a kernel of one pixel
        image = cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    if (sigma := 255 * plan.noise * grain.uniform()) > 0:
        noise = grain.standard_normal(mask.shape, dtype=np.float32) * np.float32(sigma)
        image = cv2.add(image, cv2.merge([noise, noise, noise]), dtype=cv2.CV_8U)
    return image, mask


def _source_places(
    shape: tuple[int, int], angle: float, factor: float, elastic_px: float, rng: np.random.Generator
) -> np.ndarray:
    """Where each new pixel comes from, float32 (H, W, 2), x and y; angles in radians, counter-clockwise."""
    height, width = shape
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    x = np.arange(width, dtype=np.float32)[None, :] - np.float32(centre_x)
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(centre_y)
    cosine, sine = np.float32(np.cos(angle) / factor), np.float32(np.sin(angle) / factor)
    places = np.empty((height, width, 2), np.float32)
    places[..., 0] = cosine * x - sine * y + np.float32(centre_x)
    places[..., 1] = sine * x + cosine * y + np.float32(centre_y)
    if elastic_px > 0:
        shorter = min(shape)
        elastic = np.float32(elastic_px * shorter / UNIT_PX)
        grid = [max(2, round(_NUM_BENDS * side / shorter)) for side in shape]
        shifts = elastic * rng.uniform(-1, 1, (*grid, 2)).astype(np.float32)
        places += cv2.resize(shifts, (width, height), interpolation=cv2.INTER_CUBIC)
    return places
