"""Finds images of different patients that look like frames of one run: leaks that no file name shows.

Two tests must agree, both on the image at 256×256 px in grey:

1. A perceptual hash. The image minus its blurred self, divided by its local contrast, is hashed by ImageHash
   (`average_hash` with 16×16 bits); the distance of two images is the number of different bits, 0 to 256.
2. The vessels. The dark structures narrower than 7 % of the image (black-hat transform) must correlate by
   `MIN_CORRELATION` at some shift of up to 10 % of the image.

The hash alone is not enough: photographs of two retinas may differ in 20 bits only, because the optic disc is
always in the same place. The vessels alone are not enough either: those of two synthetic patients correlate
by up to 0.84. Frames of one run that were processed differently (such as one with the background subtracted)
or lie further apart are not found.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vesselrl.data.annotations import Sample
from vesselrl.data.splits import SIDES, Split
from vesselrl.errors import DataError

logger = logging.getLogger(__name__)

Pair = tuple[str, str, int]

HASH_BITS = 16  # per side
MAX_DISTANCE = 72
MIN_CORRELATION = 0.70
_SIZE = 256
_MAP_SIZE = 64
_MAX_SHIFT = 6  # px of the vessel map: 10 %


def find_near_duplicates(
    samples: Sequence[Sample], load: Callable[[Sample], np.ndarray], threshold: int = MAX_DISTANCE
) -> list[Pair]:
    """Pairs of images of different patients that are probably frames of one run, the nearest first.

    Args:
        samples: samples with `key` and `patient`.
        load: gives the image of a sample, uint8 (H, W, 3).
        threshold: largest number of different bits, 0 to 256.

    Returns:
        (key, key, distance in bits) of each pair.

    Raises:
        ValueError: the threshold is not a number of bits from 0 to 256.
    """
    if not 0 <= threshold <= HASH_BITS**2:
        raise ValueError(f"threshold is {threshold}. Give a number of bits from 0 to {HASH_BITS**2}.")
    samples = sorted(samples, key=lambda sample: sample.key)
    if len(samples) < 2:
        return []
    hashes, maps = [], []
    for sample in samples:
        grey = _grey(load(sample))
        hashes.append(hash_image(grey))
        maps.append(vessel_map(grey))
    patients = np.unique([sample.patient for sample in samples], return_inverse=True)[1]
    found = []
    for one, other, distance in _near_hashes(np.stack(hashes), patients, threshold):
        if correlation(maps[one], maps[other]) >= MIN_CORRELATION:
            found.append((samples[one].key, samples[other].key, distance))
    return sorted(found, key=lambda pair: (pair[2], pair))


def check_near_duplicates(
    split: Split, load: Callable[[Sample], np.ndarray], threshold: int = MAX_DISTANCE
) -> list[Pair]:
    """Makes sure that no image has a near duplicate of another patient on another side of the split.

    Args:
        split: what is to be trained and tested on.
        load: gives the image of a sample, uint8 (H, W, 3).
        threshold: as for `find_near_duplicates`.

    Returns:
        The pairs of different patients on one side: no leak, but perhaps one patient under two names.

    Raises:
        DataError: there are pairs across the sides; the message names the records.
    """
    side_of = {sample.key: side for side in SIDES for sample in getattr(split, side)}
    samples = {sample.key: sample for side in SIDES for sample in getattr(split, side)}
    pairs = find_near_duplicates(list(samples.values()), load, threshold)
    across = [pair for pair in pairs if side_of[pair[0]] != side_of[pair[1]]]
    if across:
        names = [
            f"{samples[one].record} ({side_of[one]}) and {samples[other].record} ({side_of[other]})"
            for one, other, _ in across[:10]
        ]
        more = f"; and {len(across) - 10} more pairs" if len(across) > 10 else ""
        raise DataError(
            f"{len(across)} pairs of images of different patients look like frames of one run and are on "
            f"different sides of the split: {'; '.join(names)}{more}. Give both the same patient in an alias "
            "file (file_name,patient), or remove one of the two."
        )
    if pairs:
        logger.warning(
            "%d pairs of images of different patients on one side of the split look alike: one patient under "
            "two names? First: %s and %s",
            len(pairs),
            *pairs[0][:2],
        )
    return pairs


def hash_image(grey: np.ndarray) -> np.ndarray:
    """The 256 bits of a grey image, bool (256,), of its structures without the shading of the background."""
    import cv2
    import imagehash
    from PIL import Image

    pixels = grey.astype(np.float32)
    detail = pixels - cv2.GaussianBlur(pixels, (0, 0), 0.06 * _SIZE)
    contrast = np.sqrt(cv2.GaussianBlur(detail * detail, (0, 0), 0.06 * _SIZE)) + 8
    flat = np.clip(128 + 48 * detail / contrast, 0, 255).astype(np.uint8)
    return imagehash.average_hash(Image.fromarray(flat), hash_size=HASH_BITS).hash.ravel()


def vessel_map(grey: np.ndarray) -> np.ndarray:
    """Dark structures narrower than 7 % of the image as float32 (64, 64), 0 to 255."""
    import cv2

    width = int(0.07 * _SIZE) | 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    dark = cv2.morphologyEx(cv2.GaussianBlur(grey, (0, 0), 0.0035 * _SIZE), cv2.MORPH_BLACKHAT, disc)
    dark = cv2.GaussianBlur(dark.astype(np.float32), (0, 0), 0.007 * _SIZE)
    scaled = np.clip(dark * (255 / max(np.percentile(dark, 99), 1)), 0, 255)
    return cv2.resize(scaled, (_MAP_SIZE, _MAP_SIZE), interpolation=cv2.INTER_AREA)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """The largest correlation of two vessel maps over shifts of up to 10 %, 0 to 1; 0 for an even map."""
    import cv2

    middle = slice(_MAX_SHIFT, -_MAX_SHIFT)
    best = 0.0
    for whole, part in ((one, other[middle, middle]), (other, one[middle, middle])):
        if part.std() > 0 and whole.std() > 0:
            best = max(best, float(cv2.matchTemplate(whole, part, cv2.TM_CCOEFF_NORMED).max()))
    return best


def _grey(image: np.ndarray) -> np.ndarray:
    """A colour image as uint8 (256, 256)."""
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (_SIZE, _SIZE), interpolation=cv2.INTER_AREA)


def _near_hashes(hashes: np.ndarray, patients: np.ndarray, threshold: int) -> Iterator[tuple[int, int, int]]:
    """(i, j, distance) with i < j for different patients and at most `threshold` different bits.

    Args:
        hashes: bool (N, bits).
        patients: whole numbers (N,).
        threshold: in bits.
    """
    words = np.packbits(hashes, axis=1).view(np.uint64)
    for one in range(len(words) - 1):
        distances = np.bitwise_count(words[one + 1 :] ^ words[one]).sum(axis=1, dtype=int)
        near = (distances <= threshold) & (patients[one + 1 :] != patients[one])
        for offset in np.flatnonzero(near):
            yield one, one + 1 + int(offset), int(distances[offset])
