"""Synthetic coronary angiograms with exact masks, for tests, the demo and a first run without data.

One patient is one anatomy and one way of exposing it, a sequence is one view of that patient, and the
frames of a sequence differ by the heart beat, the filling with contrast agent and noise. Any frame can be
drawn alone: its random numbers depend on (seed, name of the domain, patient, sequence, frame) and on
nothing else.
"""

import json
import logging
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from vesselrl.data.angiogram import Domain, Style, choose_style, compose
from vesselrl.data.polygons import mask_to_polygons
from vesselrl.data.vessel_drawing import render_attenuation, render_mask
from vesselrl.data.vessel_tree import CANVAS_PX, Vessel, beat, choose_view, grow_tree, project

logger = logging.getLogger(__name__)

# The domain the miniature model is trained on: wider and clearer vessels, fewer things that look like one.
SOURCE = Domain(
    name="source",
    width_px=(2.3, 9.2),
    branching=0.9,
    tortuosity=0.9,
    loops=0.4,
    contrast=(0.50, 0.88),
    thickness_power=0.75,
    distal_fade=0.2,
    filling_floor=0.9,
    background_contrast=(0.2, 0.7),
    subtracted=0.35,
    brightness=(0.42, 0.74),
    gamma=(0.82, 1.18),
    blur_px=(0.5, 0.9),
    motion_blur_px=(0.0, 1.5),
    noise=(0.007, 0.015),
    catheter=0.5,
    reflux=0.5,
    ribs=(0, 2),
    wires=(0, 1),
    aperture=0.4,
    beat_px=4.0,
    label_shrink_px=0.0,
)

# The domain to adapt to: thinner and fainter, fading more towards the ends, more blur and distractors.
TARGET = Domain(
    name="target",
    width_px=(2.2, 8.5),
    branching=1.0,
    tortuosity=1.0,
    loops=0.6,
    contrast=(0.41, 0.71),
    thickness_power=0.7,
    distal_fade=0.35,
    filling_floor=0.75,
    background_contrast=(0.25, 0.8),
    subtracted=0.35,
    brightness=(0.36, 0.66),
    gamma=(0.8, 1.2),
    blur_px=(0.6, 1.0),
    motion_blur_px=(0.0, 2.0),
    noise=(0.009, 0.0177),
    catheter=0.85,
    reflux=0.5,
    ribs=(0, 4),
    wires=(0, 2),
    aperture=0.45,
    beat_px=6.0,
)

LAYOUTS = ("annotations", "nested", "masks")
PROMPT = "Please segment the blood vessel."
VERSION = 1  # raise it whenever the same plan gives other files


@dataclass(frozen=True)
class DatasetPlan:
    """Everything that decides the content of a written data set; stored in it as `synthetic.json`."""

    domain: Domain
    num_patients: int
    num_sequences: int
    num_frames: int
    size: int = 256
    seed: int = 0
    layout: str = "annotations"
    # True: the file names of the patients follow six patterns in turn; False: the first pattern for all.
    vary_names: bool = False
    # Number of the first patient, so that two data sets of one seed need not share patients.
    first_patient: int = 1

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}. Choose one of {', '.join(LAYOUTS)}.")
        for name in ("num_patients", "num_sequences", "num_frames", "first_patient"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. Give a number from 1.")
        _check_size(self.size)

    @property
    def num_images(self) -> int:
        """Frames of all sequences of all patients."""
        return self.num_patients * self.num_sequences * self.num_frames


def draw_sequence(
    domain: Domain, patient: int, sequence: int, num_frames: int, size: int = 256, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw the first frames of one sequence.

    Args:
        domain: `SOURCE`, `TARGET`, or a variation of them by `dataclasses.replace`.
        patient: number of the patient, from 1.
        sequence: number of the sequence, from 1.
        num_frames: how many frames; a frame is the same however many are drawn.
        size: side of the square image in px, a multiple of 4 from 64.
        seed: seed of the whole data set.

    Returns:
        (image, mask) pairs: image uint8 (size, size, 3) with equal channels, mask bool (size, size).

    Raises:
        ValueError: "size is 32. Choose a multiple of 4 from 64."

    >>> image, mask = draw_sequence(TARGET, patient=1, sequence=1, num_frames=1, size=64)[0]
    >>> image.shape, image.dtype.name, mask.shape, mask.dtype.name
    ((64, 64, 3), 'uint8', (64, 64), 'bool')
    """
    _check_size(size)
    tree, style = _prepare(domain, patient, sequence, size, seed)
    return [
        _draw_frame(domain, tree, style, _generator(seed, domain, patient, sequence, frame), frame)
        for frame in range(num_frames)
    ]


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
    """Write a data set, or reuse the same one if it is there; `write_plan` offers more choices.

    Returns:
        The folder, such as `write_dataset("demo", TARGET, num_patients=12, num_sequences=2, num_frames=5)`.
    """
    plan = DatasetPlan(domain, num_patients, num_sequences, num_frames, size, seed, layout)
    return write_plan(root, plan)


def write_plan(
    root: str | Path,
    plan: DatasetPlan,
    num_processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the data set of a plan; its files do not depend on the number of processes.

    All is written into a temporary folder beside `root` and renamed at the end: `root` is complete or absent.

    Layouts, each with `images/*.jpg`, quality 95, and `synthetic.json`:
        annotations: `annotations.json` with flat polygons, and `masks/<stem>_mask.png` (0/255).
        nested: `annotations.json` with polygons one level deeper and the text as one string; no `masks/`.
        masks: `masks/<stem>.png` (0/255).

    Args:
        root: folder to create; it may exist if it is empty or holds the same data set.
        plan: what to draw.
        num_processes: above 1, that many new processes draw one sequence each; the calling script then needs
            the guard `if __name__ == "__main__"`.
        progress: called as progress(sequences done, sequences in all).

    Returns:
        The folder.

    Raises:
        FileExistsError: `root` holds something else; the message names the settings that differ.
    """
    root = Path(root)
    settings = {"version": VERSION, **json.loads(json.dumps(asdict(plan)))}
    if root.exists() and any(root.iterdir()):
        _check_same(root, settings, plan.num_images)
        logger.info("reusing the synthetic angiograms in %s", root)
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        records = _write_files(partial, plan, num_processes, progress)
        if plan.layout != "masks":
            (partial / "annotations.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        (partial / "synthetic.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        partial.chmod(0o755)
        if root.exists():
            root.rmdir()
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _check_size(size: int) -> None:
    if size < 64 or size % 4:
        raise ValueError(f"size is {size}. Choose a multiple of 4 from 64.")


def _check_same(root: Path, settings: dict, num_images: int) -> None:
    """Refuse a folder that is not the complete data set of these settings."""
    advice = "Choose another folder, or remove this one."
    try:
        found = json.loads((root / "synthetic.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileExistsError(
            f"{root} exists and has no synthetic.json, so it is no synthetic data set. {advice}"
        ) from None
    different = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
    if different:
        there = "; ".join(f"{key} {found.get(key)!r}, not {settings.get(key)!r}" for key in different)
        raise FileExistsError(f"{root} holds other synthetic angiograms: {there}. {advice}")
    num_found = len(list((root / "images").glob("*.jpg")))
    if num_found != num_images:
        raise FileExistsError(f"{root} holds {num_found} images where {num_images} were written. {advice}")


def _generator(seed: int, domain: Domain, *numbers: int) -> np.random.Generator:
    """Random numbers of a patient, a sequence (patient, sequence) or a frame (patient, sequence, frame)."""
    salt = zlib.crc32(domain.name.encode())
    return np.random.default_rng([seed, salt, len(numbers), *numbers])


def _prepare(domain: Domain, patient: int, sequence: int, size: int, seed: int) -> tuple[list[Vessel], Style]:
    """What all frames of a sequence share: the tree of the patient in this view, and its appearance."""
    patient_rng = _generator(seed, domain, patient)
    anatomy = grow_tree(patient_rng, domain.width_px, domain.branching, domain.tortuosity, domain.loops)
    mirror = patient_rng.random() < 0.3
    rng = _generator(seed, domain, patient, sequence)
    tree = project(anatomy, choose_view(rng, mirror=mirror))
    return tree, choose_style(domain, tree[0], patient_rng, rng, size)


def _draw_frame(
    domain: Domain, tree: list[Vessel], style: Style, rng: np.random.Generator, frame: int
) -> tuple[np.ndarray, np.ndarray]:
    """One frame: the tree at its place in the heart cycle, filled as far as the bolus has come."""
    size = style.aperture.shape[0]
    moved = beat(tree, 2 * np.pi * frame / 9 + rng.normal(0, 0.1), domain.beat_px)
    front = 140.0 + 70.0 * frame
    agent = []
    for vessel in moved:
        filled = 1 / (1 + np.exp((vessel.path - front) / 35))
        filled = domain.filling_floor + (1 - domain.filling_floor) * filled
        faded = np.exp(-domain.distal_fade * vessel.path / CANVAS_PX)
        # Inside its parent a branch adds nothing, or every junction would be a dark spot.
        from_start = vessel.path - vessel.path[0]
        own = np.clip(from_start / vessel.parent_radius - 0.3, 0, 1) if vessel.parent_radius else 1.0
        agent.append(filled * faded * own)
    image = compose(style, render_attenuation(moved, agent, size, domain.thickness_power), rng)
    return image, render_mask(moved, size, domain.label_shrink_px) & style.aperture


def _write_files(
    root: Path, plan: DatasetPlan, num_processes: int, progress: Callable[[int, int], None] | None
) -> list[dict]:
    """Write images and masks of all sequences and return the annotation records in order."""
    (root / "images").mkdir()
    if plan.layout != "nested":
        (root / "masks").mkdir()
    patients = range(plan.first_patient, plan.first_patient + plan.num_patients)
    jobs = [(root, plan, p, s) for p in patients for s in range(1, plan.num_sequences + 1)]
    if num_processes == 1:
        return _collect(map(_write_sequence, jobs), len(jobs), progress)
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        return _collect(pool.map(_write_sequence, jobs), len(jobs), progress)


def _collect(
    parts: Iterable[list[dict]], num_parts: int, progress: Callable[[int, int], None] | None
) -> list[dict]:
    """Join the records of the sequences as they come, and report."""
    records: list[dict] = []
    for done, part in enumerate(parts, start=1):
        records += part
        if progress:
            progress(done, num_parts)
    return records


def _write_sequence(job: tuple[Path, DatasetPlan, int, int]) -> list[dict]:
    """Write the files of one sequence and return its annotation records."""
    root, plan, patient, sequence = job
    rng = np.random.default_rng([plan.seed, patient, sequence])
    code, number = f"{int(rng.integers(2**32)):08X}", int(rng.integers(3, 14))
    records = []
    for image, mask in draw_sequence(plan.domain, patient, sequence, plan.num_frames, plan.size, plan.seed):
        stem = _stem(patient if plan.vary_names else 1, patient, sequence, code, number)
        number += int(rng.integers(1, 4))
        Image.fromarray(image[:, :, 0]).save(root / "images" / f"{stem}.jpg", quality=95)
        if plan.layout != "nested":
            ending = ".png" if plan.layout == "masks" else "_mask.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(root / "masks" / f"{stem}{ending}")
        if plan.layout == "masks":
            continue
        polygons = [polygon.ravel().tolist() for polygon in mask_to_polygons(mask)]
        nested = plan.layout == "nested"
        records.append({
            "image": f"{stem}.jpg",
            "mask": [polygons] if nested else polygons,
            "text": PROMPT if nested else [PROMPT],
        })  # fmt: skip
    return records


def _stem(pattern: int, patient: int, sequence: int, code: str, frame: int) -> str:
    """File name without ending, after one of six patterns in use; the person and the number are made up."""
    tail = f"S-{sequence}_1_{code}_frame_{frame:06d}"
    person = "".join(chr(ord("A") + int(digit)) for digit in str(patient))
    patterns = (
        f"SYNTH({patient:010d})_{tail}",
        f"SYNTH^({patient:010d})_{tail}",
        f"SYNTH_{patient:010d}__{tail}",
        f"SYNTH__{patient:010d}__{tail}",
        f"SYNTH ({patient:010d}) {tail.replace('_', ' ')}",
        f"SYNTH_{person}_frame_{1000 * sequence + frame:06d}",
    )
    return patterns[(pattern - 1) % len(patterns)]
