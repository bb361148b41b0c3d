"""Images that are not independent: near duplicates in two subsets, and the base model's pretraining.

Two images of different patients count as frames of one run where hashes of their structures (256 bits) and
maps of their vessels agree: two retinas may differ in 20 bits only, and the vessels of two synthetic patients
correlate by up to 0.84. Frames that were processed differently, or lie further apart, are not found.
"""

import logging
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from PIL import Image

from vesselrl.data.pseudonyms import read_text
from vesselrl.data.samples import Sample
from vesselrl.data.splits import SUBSETS, Split
from vesselrl.errors import DataError

logger = logging.getLogger(__name__)

Pair = tuple[str, str, int]  # key, key, number of different bits
Look = tuple[np.ndarray, np.ndarray]  # the hash, bool (256,), and the vessel map, float32 (64, 64)
HASH_BITS = 16  # per side
MAX_DISTANCE = 72  # bits
MIN_CORRELATION = 0.70  # of the vessel maps, at a shift of up to 10 %
_SIZE, _MAP_SIZE, _MAX_SHIFT = 256, 64, 6  # px; the shift in those of the map


def look_of(image: np.ndarray) -> Look:
    """Hash, of structures without shading, and vessel map of an image, uint8 (H, W, 3)."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, (_SIZE, _SIZE), interpolation=cv2.INTER_AREA)
    pixels = grey.astype(np.float32)
    detail = pixels - cv2.GaussianBlur(pixels, (0, 0), 0.06 * _SIZE)
    contrast = np.sqrt(cv2.GaussianBlur(detail * detail, (0, 0), 0.06 * _SIZE)) + 8
    flat = Image.fromarray(np.clip(128 + 48 * detail / contrast, 0, 255).astype(np.uint8))
    small = np.asarray(flat.resize((HASH_BITS, HASH_BITS), Image.Resampling.LANCZOS))
    return (small > small.mean()).ravel(), _vessel_map(grey)


def find_near_duplicates(samples: Sequence[Sample], looks: Sequence[Look]) -> list[Pair]:
    """Pairs of images of different patients, probably frames of one run, nearest first."""
    if len(samples) < 2:
        return []
    samples, looks = zip(*sorted(zip(samples, looks, strict=True), key=lambda item: item[0].key), strict=True)
    words = np.packbits([bits for bits, _ in looks], axis=1).view(np.uint64)
    patients, found = np.unique([sample.patient for sample in samples], return_inverse=True)[1], []
    for one in range(len(words) - 1):
        distances = np.bitwise_count(words[one + 1 :] ^ words[one]).sum(axis=1, dtype=int)
        near = (distances <= MAX_DISTANCE) & (patients[one + 1 :] != patients[one])
        for other, bits in zip(one + 1 + np.flatnonzero(near), distances[near].tolist(), strict=True):
            if _correlation(looks[one][1], looks[other][1]) >= MIN_CORRELATION:
                found.append((samples[one].key, samples[other].key, bits))
    return sorted(found, key=lambda pair: (pair[2], pair))


def check_near_duplicates(split: Split, found: Sequence[Pair]) -> list[Pair]:
    """The pairs in one subset, perhaps one patient under two names; pairs across subsets are a DataError."""
    samples = [(subset, sample) for subset in SUBSETS for sample in getattr(split, subset)]
    subset_of = {sample.key: subset for subset, sample in samples}
    pairs = [pair for pair in found if {*pair[:2]} <= subset_of.keys()]
    if across := [pair[:2] for pair in pairs if subset_of[pair[0]] != subset_of[pair[1]]]:
        shown = {sample.key: f"{sample.record} ({subset})" for subset, sample in samples}
        records = [map(shown.get, pair) for pair in across[:10]]
        more = f"; and {len(across) - 10} more pairs" if len(across) > 10 else ""
        raise DataError(
            f"{len(across)} pairs of images of different patients look like frames of one run and are in "
            f"different subsets of the split: {'; '.join(map(' and '.join, records))}{more}. Give both the "
            "same patient in an alias file (file_name,patient), or remove one of the two."
        )
    if pairs:
        note = "%d pairs of different patients in one subset look alike: one patient under two names?"
        logger.warning(f"{note} First: %s and %s", len(pairs), *pairs[0][:2])
    return pairs


def _vessel_map(grey: np.ndarray) -> np.ndarray:
    """Dark structures narrower than 7 % of the image as float32 (64, 64), 0 to 255."""
    width = int(0.07 * _SIZE) | 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    dark = cv2.morphologyEx(cv2.GaussianBlur(grey, (0, 0), 0.0035 * _SIZE), cv2.MORPH_BLACKHAT, disc)
    dark = cv2.GaussianBlur(dark.astype(np.float32), (0, 0), 0.007 * _SIZE)
    scaled = np.clip(dark * (255 / max(np.percentile(dark, 99), 1)), 0, 255)
    return cv2.resize(scaled, (_MAP_SIZE, _MAP_SIZE), interpolation=cv2.INTER_AREA)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """The largest correlation of two vessel maps over shifts of up to 10 %, 0 to 1; 0 for an even map."""
    middle = slice(_MAX_SHIFT, -_MAX_SHIFT)
    pairs = ((one, other[middle, middle]), (other, one[middle, middle]))
    uneven = [pair for pair in pairs if min(map(np.std, pair)) > 0]
    return max([0.0, *(float(cv2.matchTemplate(*pair, cv2.TM_CCOEFF_NORMED).max()) for pair in uneven)])


def pretraining_overlap(choice: str | Path, samples: Sequence[Sample]) -> set[str]:
    """Keys of the samples of patients whose images the base model was trained on: no baseline there.

    `choice` is "none", "all", or a text file with a file name (with or without folder and ending), a key or a
    comment (#) per line. Of a name that several patients share, the folder decides, or it is a DataError.
    """
    if choice in ("none", "all"):
        return {sample.key for sample in samples} if choice == "all" else set()
    path = Path(choice)
    text = read_text(path, "--base_trained_on is no file. Give none, all or a text file.")
    lines = [unicodedata.normalize("NFKC", line).strip().replace("\\", "/") for line in text.splitlines()]
    listed = {PurePosixPath(line): number for number, line in enumerate(lines, 1) if line and line[0] != "#"}
    named: dict[str, set[tuple[str, str]]] = defaultdict(set)  # what a line may say → (patient, folder)
    for sample in samples:
        path_here = PurePosixPath(unicodedata.normalize("NFKC", sample.image_path.as_posix()))
        for name in (sample.key, path_here.name, path_here.stem):
            named[name].add((sample.patient, path_here.parent.name))
    seen = set()
    for line, number in listed.items():
        patients = {patient for patient, _ in named[line.name]}
        if len(patients) > 1:
            patients = {own for own, folder in named[line.name] if folder == line.parent.name} or patients
        if len(patients) > 1:
            what = f"Line {number} of {path.name} may mean images of {len(patients)} patients"
            raise DataError(f"{what}. Write the folder of the image too.")
        seen |= patients
    if not seen:
        what = f"None of {len(listed)} lines of {path.name} is an image of this data"
        raise DataError(f"{what}. Write a file name or a key such as P001_S1_F0011 per line, or give none.")
    keys, num_patients = {s.key for s in samples if s.patient in seen}, len({s.patient for s in samples})
    note = "pretraining overlap: the base model was trained on %d of %d patients: %d of %d images"
    logger.info(note, len(seen), num_patients, len(keys), len(samples))
    return keys
