"""Synthetic coronary angiograms with exact masks, for tests, the demo and a first run without data.

One patient is one anatomy and exposure, a sequence is one view of that patient, and its frames differ by
heart beat, filling and noise, by random numbers of (seed, domain, patient, sequence, frame) alone.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vesselrl.data.polygons import mask_to_polygons
from vesselrl.experiment.progress import logged
from vesselrl.experiment.run_folder import atomic_write, check_room, read_json
from vesselrl.synthetic.rendering import Domain, choose_style, compose, render_attenuation, render_mask
from vesselrl.synthetic.tree import CANVAS_PX, Rng, Vessel, beat, grow_tree, project

logger = logging.getLogger(__name__)

# The domain the miniature model is trained on: wider and clearer vessels, fewer distractors.
SOURCE = Domain(
    name="source", width_px=(2.3, 9.2), branching=0.9, tortuosity=0.9, loops=0.4,
    contrast=(0.50, 0.88), thickness_power=0.75, distal_fade=0.2, filling_floor=0.9,
    background_contrast=(0.2, 0.7), subtracted=0.35, brightness=(0.42, 0.74), gamma=(0.82, 1.18),
    blur_px=(0.5, 0.9), motion_blur_px=(0.0, 1.5), noise=(0.007, 0.015),
    catheter=0.5, reflux=0.5, ribs=(0, 2), wires=(0, 1), aperture=0.4, beat_px=4.0,
)  # fmt: skip

# The domain to adapt to: thinner and fainter, fading more towards the ends, more blur and distractors.
TARGET = Domain(
    name="target", width_px=(2.2, 8.5), branching=1.0, tortuosity=1.0, loops=0.6,
    contrast=(0.41, 0.71), thickness_power=0.7, distal_fade=0.35, filling_floor=0.75,
    background_contrast=(0.25, 0.8), subtracted=0.35, brightness=(0.36, 0.66), gamma=(0.8, 1.2),
    blur_px=(0.6, 1.0), motion_blur_px=(0.0, 2.0), noise=(0.009, 0.0177),
    catheter=0.85, reflux=0.5, ribs=(0, 4), wires=(0, 2), aperture=0.45, beat_px=6.0,
)  # fmt: skip

LAYOUTS = ("annotations", "nested", "masks")
PROMPT = "Please segment the blood vessel."
VERSION = 1  # raise it whenever the same settings give other files
SEED = 7  # of the built-in data


class BuiltinSize(NamedTuple):
    """How much of the target domain is drawn where the user gives no data."""

    num_patients: int
    num_sequences: int
    num_frames: int
    size: int


FULL = BuiltinSize(num_patients=128, num_sequences=2, num_frames=5, size=256)
SMALL = BuiltinSize(num_patients=20, num_sequences=1, num_frames=1, size=64)  # for the debug preset


def builtin_data(output_dir: str | Path, size: BuiltinSize = FULL) -> Path:
    """Folder of the built-in data set, named by a hash of all that decides its content; drawn if absent."""
    content = hashlib.sha256(repr((VERSION, TARGET, SEED, size)).encode()).hexdigest()[:8]
    root = Path(output_dir) / "data" / f"synthetic_target_{size.size}px_{content}"
    if not root.exists():
        number = size.num_patients * size.num_sequences * size.num_frames
        logger.info("no --data_root given: drawing %d synthetic angiograms into %s", number, root)
    return write_dataset(root, TARGET, seed=SEED, **size._asdict())


def write_dataset(
    root: str | Path,
    domain: Domain,
    num_patients: int,
    num_sequences: int,
    num_frames: int,
    size: int = 256,
    seed: int = 0,
    layout: str = "annotations",
) -> Path:
    """Writes a data set, complete or not at all, or reuses the same one; anything else is a FileExistsError.

    Every layout has `images/*.jpg`, quality 95, and `synthetic.json` with the settings; besides,

    - annotations: `annotations.json` with flat polygons, and `masks/<stem>_mask.png` (0/255);
    - nested: `annotations.json` with polygons one level deeper and the text as one string; no `masks/`;
    - masks: `masks/<stem>.png` (0/255).
    """
    counts = {"num_patients": num_patients, "num_sequences": num_sequences, "num_frames": num_frames}
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}. Choose one of {', '.join(LAYOUTS)}.")
    if low := [f"{name} is {number}" for name, number in counts.items() if number < 1]:
        raise ValueError(f"{', '.join(low)}. Give a number from 1.")
    # The last two are constant now, and keep the folders that were drawn before.
    own = {"size": size, "seed": seed, "layout": layout, "vary_names": False, "first_patient": 1}
    settings = {"version": VERSION, "domain": asdict(domain)} | counts | own
    root, num_images = Path(root), num_patients * num_sequences * num_frames
    if not root.exists() or not any(root.iterdir()):
        check_room(root, num_images * (size**2 + 10_000), f"{num_images} images")
        try:
            _draw(root, domain, settings)
            return root
        except OSError:
            if not any(root.glob("*")):
                raise  # else another process has drawn it meanwhile
    _check_same(root, json.loads(json.dumps(settings)), num_images)
    logger.info("reusing the synthetic angiograms in %s", root)
    return root


def _draw(root: Path, domain: Domain, settings: dict) -> None:
    size, seed, layout = settings["size"], settings["seed"], settings["layout"]
    num_patients, num_sequences = settings["num_patients"], settings["num_sequences"]
    with atomic_write(root) as partial:
        (partial / "images").mkdir(parents=True)
        if layout != "nested":
            (partial / "masks").mkdir()
        records = []
        names = product(range(1, num_patients + 1), range(1, num_sequences + 1))
        for patient, sequence in logged(names, "drawing sequences", num_patients * num_sequences):
            frames = draw_sequence(domain, patient, sequence, settings["num_frames"], size, seed)
            drawn = zip(frames, _stems(seed, patient, sequence, settings["num_frames"]), strict=True)
            records += [_write_frame(partial, layout, *frame, stem) for frame, stem in drawn]
        if layout != "masks":
            (partial / "annotations.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        (partial / "synthetic.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _check_same(root: Path, settings: dict, num_images: int) -> None:
    """Refuses a folder that is not the complete data set of these settings."""
    advice = "Choose another folder, or remove this one."
    try:
        found = {**read_json(root / "synthetic.json")}
    except FileNotFoundError:
        raise FileExistsError(f"{root} has no synthetic.json, so it is no such data set. {advice}") from None
    except (TypeError, ValueError):
        raise FileExistsError(f"{root / 'synthetic.json'} is damaged. {advice}") from None
    different = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
    if different:
        there = "; ".join(f"{key} {found.get(key)!r}, not {settings.get(key)!r}" for key in different)
        raise FileExistsError(f"{root} holds other synthetic angiograms: {there}. {advice}")
    if (num_found := len(list((root / "images").glob("*.jpg")))) != num_images:
        raise FileExistsError(f"{root} holds {num_found} images where {num_images} were written. {advice}")


def _stems(seed: int, patient: int, sequence: int, num_frames: int) -> Iterator[str]:
    """File names without ending, as an export has them; the person and the numbers are made up."""
    rng = np.random.default_rng([seed, patient, sequence])
    code, number = f"{int(rng.integers(2**32)):08X}", int(rng.integers(3, 14))
    for _ in range(num_frames):
        yield f"SYNTH({patient:010d})_S-{sequence}_1_{code}_frame_{number:06d}"
        number += int(rng.integers(1, 4))


def _write_frame(root: Path, layout: str, image: np.ndarray, mask: np.ndarray, stem: str) -> dict:
    """Writes the files of one frame and returns its annotation record."""
    Image.fromarray(image[:, :, 0]).save(root / "images" / f"{stem}.jpg", quality=95)
    if layout != "nested":
        ending = ".png" if layout == "masks" else "_mask.png"
        Image.fromarray(mask.astype(np.uint8) * 255).save(root / "masks" / f"{stem}{ending}")
    if layout == "masks":
        return {}
    polygons = [polygon.ravel().tolist() for polygon in mask_to_polygons(mask)]
    record = {"image": f"{stem}.jpg", "mask": polygons, "text": [PROMPT]}
    return record | {"mask": [polygons], "text": PROMPT} if layout == "nested" else record


def draw_sequence(
    domain: Domain, patient: int, sequence: int, num_frames: int, size: int = 256, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draws (image uint8 (size, size, 3), mask bool (size, size)) of the first frames of one sequence.

    A frame is the same however many are drawn; patients and sequences are counted from 1.

    >>> image, mask = draw_sequence(TARGET, patient=1, sequence=1, num_frames=1, size=64)[0]
    >>> image.shape, image.dtype.name, mask.shape, mask.dtype.name
    ((64, 64, 3), 'uint8', (64, 64), 'bool')
    """
    if size < 64 or size % 4:
        raise ValueError(f"size is {size}. Choose a multiple of 4 from 64.")
    patient_rng, rng = _generator(seed, domain, patient), _generator(seed, domain, patient, sequence)
    anatomy = grow_tree(patient_rng, domain.width_px, domain.branching, domain.tortuosity, domain.loops)
    tree = project(rng, anatomy, mirror=patient_rng.random() < 0.3)
    style, frames = choose_style(domain, tree[0], patient_rng, rng, size), []
    for frame in range(num_frames):
        rng = _generator(seed, domain, patient, sequence, frame)
        moved = beat(tree, 2 * np.pi * frame / 9 + rng.normal(0, 0.1), domain.beat_px)
        agent = [_concentration(domain, vessel, front=140.0 + 70.0 * frame) for vessel in moved]
        image = compose(style, render_attenuation(moved, agent, size, domain.thickness_power), rng)
        frames.append((image, render_mask(moved, size, domain.label_shrink_px) & style.aperture))
    return frames


def _generator(seed: int, domain: Domain, *numbers: int) -> Rng:
    """Random numbers of a patient, a sequence (patient, sequence) or a frame (… and its number)."""
    return np.random.default_rng([seed, zlib.crc32(domain.name.encode()), len(numbers), *numbers])


def _concentration(domain: Domain, vessel: Vessel, front: float) -> np.ndarray:
    """Contrast agent along a vessel, filled as far as the bolus has come."""
    filled = 1 / (1 + np.exp((vessel.path - front) / 35))
    filled = domain.filling_floor + (1 - domain.filling_floor) * filled
    faded = np.exp(-domain.distal_fade * vessel.path / CANVAS_PX)
    # Inside its parent a branch adds nothing, or every junction would be a dark spot.
    from_start = vessel.path - vessel.path[0]
    own = np.clip(from_start / vessel.parent_radius - 0.3, 0, 1) if vessel.parent_radius else 1.0
    return filled * faded * own
