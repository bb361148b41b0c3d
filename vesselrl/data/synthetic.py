"""Synthetic coronary angiograms with exact masks, for tests, the demo and a first run without data.

One patient is one anatomy and one way of exposing it, a sequence is one view of that patient, and the frames of a sequence
differ by the heart beat, the filling with contrast agent and noise. Any frame can be drawn alone: its random numbers depend
on (seed, domain, patient, sequence, frame) and on nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from vesselrl.data.angiogram import Domain, Style, choose_style, compose, render_attenuation, render_mask
from vesselrl.data.vessel_tree import CANVAS_PX, Vessel, beat, choose_view, grow_tree, project

__all__ = ["LAYOUTS", "SOURCE", "TARGET", "DatasetPlan", "Domain", "draw_sequence", "write_dataset", "write_plan"]

logger = logging.getLogger(__name__)

LAYOUTS = ("annotations", "nested", "masks")
PROMPT = "Please segment the blood vessel."
VERSION = 1  # raise it whenever the same seed gives other pictures

SOURCE = Domain(
    name="source",
    width_px=(2.6, 10.0),
    branching=0.8,
    tortuosity=0.8,
    loops=0.2,
    contrast=(0.65, 0.95),
    thickness_power=0.75,
    distal_fade=0.15,
    filling_floor=1.0,
    background_contrast=(0.15, 0.4),
    brightness=(0.5, 0.75),
    gamma=(0.9, 1.1),
    blur_px=(0.5, 0.8),
    motion_blur_px=(0.0, 1.0),
    noise=(0.008, 0.015),
    catheter=0.3,
    ribs=(0, 1),
    wires=(0, 0),
    aperture=0.2,
    beat_px=4.0,
    label_shrink_px=0.2,
)

TARGET = Domain(
    name="target",
    width_px=(2.2, 8.5),
    branching=1.0,
    tortuosity=1.0,
    loops=0.6,
    contrast=(0.45, 0.75),
    thickness_power=0.7,
    distal_fade=0.3,
    filling_floor=0.75,
    background_contrast=(0.3, 0.9),
    brightness=(0.38, 0.72),
    gamma=(0.8, 1.2),
    blur_px=(0.6, 1.0),
    motion_blur_px=(0.0, 2.0),
    noise=(0.009, 0.020),
    catheter=0.85,
    ribs=(0, 4),
    wires=(0, 2),
    aperture=0.45,
    beat_px=5.0,
)


@dataclass(frozen=True)
class DatasetPlan:
    """Everything that decides the content of a written data set; stored beside it as `synthetic.json`."""

    domain: Domain
    num_patients: int
    num_sequences: int
    num_frames: int
    size: int = 256
    seed: int = 0
    layout: str = "annotations"
    # True: file names follow five different patterns, one patient each; False: the first pattern for everybody.
    vary_names: bool = False
    # Number of the first patient, so that two data sets of one seed need not share patients.
    first_patient: int = 1

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"Unknown layout {self.layout!r}. Choose one of {', '.join(LAYOUTS)}.")
        for field in ("num_patients", "num_sequences", "num_frames"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}. Ask for at least 1.")
        _check_size(self.size)


def draw_sequence(
    domain: Domain, patient: int, sequence: int, num_frames: int, size: int = 256, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw the first frames of one sequence.

    Args:
        domain: preset `SOURCE` or `TARGET`, or a variation by `dataclasses.replace`.
        patient: patient number, from 1.
        sequence: sequence number, from 1.
        num_frames: how many frames; frame k is the same however many are asked for.
        size: side of the square image in pixels, at least 64.
        seed: seed of the whole data set.

    Returns:
        (image, mask) pairs: image uint8 (size, size, 3) with equal channels, mask bool (size, size).

    Raises:
        ValueError: "size is 32. Angiograms are drawn at 64 pixels or more; ..."

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
    root: Path | str,
    domain: Domain,
    num_patients: int,
    num_sequences: int,
    num_frames: int,
    size: int = 256,
    seed: int = 0,
    layout: str = "annotations",
) -> Path:
    """Write a data set, or reuse the complete one that is there; see `write_plan` for more choices.

    Example: `write_dataset("demo_data", TARGET, num_patients=12, num_sequences=2, num_frames=5)`.

    Returns:
        The folder, with `images/`, `synthetic.json` and, depending on the layout, `annotations.json` and `masks/`.
    """
    return write_plan(root, DatasetPlan(domain, num_patients, num_sequences, num_frames, size, seed, layout))


def write_plan(
    root: Path | str,
    plan: DatasetPlan,
    num_processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the data set of a plan; the files do not depend on the number of processes.

    Everything is written into a temporary folder beside `root` and renamed at the end, so `root` is complete or absent.

    Layouts:
        annotations: `images/*.jpg`, `annotations.json` with flat polygons, `masks/<stem>_mask.png`.
        nested: the same with polygons one level deeper (object, then polygons) and text as one string; no `masks/`.
        masks: `images/*.jpg` and `masks/<stem>.png`.

    Args:
        root: folder to create.
        plan: what to draw.
        num_processes: above 1, sequences are drawn by that many fresh processes; call it from a file that is guarded by
            `if __name__ == "__main__"`.
        progress: called as progress(sequences done, sequences in all).

    Raises:
        FileExistsError: `root` holds something else; the message says which setting differs.
    """
    root = Path(root)
    settings = {"version": VERSION, **json.loads(json.dumps(asdict(plan)))}
    if root.exists():
        _check_same(root, settings)
        logger.info("Reusing the synthetic data in %s", root)
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        records = _write_all(partial, plan, num_processes, progress)
        if plan.layout != "masks":
            (partial / "annotations.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        (partial / "synthetic.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        partial.chmod(0o755)
        os.rename(partial, root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _check_size(size: int) -> None:
    if size < 64 or size % 4:
        raise ValueError(f"size is {size}. Angiograms are drawn at 64 pixels or more; choose a multiple of 4.")


def _check_same(root: Path, settings: dict) -> None:
    """Refuse a folder whose `synthetic.json` is missing or tells of other settings."""
    try:
        found = json.loads((root / "synthetic.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileExistsError(
            f"{root} exists and is not a synthetic data set (no synthetic.json). Choose another folder, or remove it."
        ) from None
    different = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
    if different:
        shown = "; ".join(f"{key}: there {found.get(key)!r}, asked for {settings.get(key)!r}" for key in different)
        raise FileExistsError(f"{root} holds other synthetic data ({shown}). Choose another folder, or remove it.")


def _generator(seed: int, domain: Domain, *numbers: int) -> np.random.Generator:
    """Random numbers that depend on these values only; fewer numbers mean a wider scope (patient, sequence, frame)."""
    salt = zlib.crc32(domain.name.encode())
    return np.random.default_rng([seed, salt, len(numbers), *numbers])


def _prepare(domain: Domain, patient: int, sequence: int, size: int, seed: int) -> tuple[list[Vessel], Style]:
    """What all frames of a sequence share: the patient's tree in this view, and its appearance."""
    patient_rng = _generator(seed, domain, patient)
    anatomy = grow_tree(patient_rng, domain.width_px, domain.branching, domain.tortuosity, domain.loops)
    mirror = patient_rng.random() < 0.3
    rng = _generator(seed, domain, patient, sequence)
    tree = project(anatomy, choose_view(rng, mirror))
    return tree, choose_style(domain, tree, patient_rng, rng, size)


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
        outside_parent = np.clip((vessel.path - vessel.path[0]) / max(vessel.parent_radius, 1e-6) - 0.3, 0, 1)
        agent.append(filled * faded * (outside_parent if vessel.parent_radius else 1.0))
    image = compose(style, render_attenuation(moved, agent, size, domain.thickness_power), rng)
    return image, render_mask(moved, size, domain.label_shrink_px) & style.aperture


def _write_all(
    root: Path, plan: DatasetPlan, num_processes: int, progress: Callable[[int, int], None] | None
) -> list[dict]:
    """Write every sequence and return the annotation records in order."""
    (root / "images").mkdir()
    if plan.layout != "nested":
        (root / "masks").mkdir()
    patients = range(plan.first_patient, plan.first_patient + plan.num_patients)
    jobs = [(root, plan, p, s) for p in patients for s in range(1, plan.num_sequences + 1)]
    records: list[dict] = []
    if num_processes > 1:
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
            for done, part in enumerate(pool.map(_write_sequence, jobs), start=1):
                records += part
                if progress:
                    progress(done, len(jobs))
        return records
    for done, job in enumerate(jobs, start=1):
        records += _write_sequence(job)
        if progress:
            progress(done, len(jobs))
    return records


def _write_sequence(job: tuple[Path, DatasetPlan, int, int]) -> list[dict]:
    """Write the files of one sequence and return its annotation records."""
    root, plan, patient, sequence = job
    rng = np.random.default_rng([plan.seed, patient, sequence])
    code, number = f"{int(rng.integers(2**32)):08X}", int(rng.integers(3, 14))
    records = []
    for image, mask in draw_sequence(plan.domain, patient, sequence, plan.num_frames, plan.size, plan.seed):
        stem = _stem(patient if plan.vary_names else 0, patient, sequence, code, number)
        number += int(rng.integers(1, 4))
        Image.fromarray(image[:, :, 0]).save(root / "images" / f"{stem}.jpg", quality=95)
        if plan.layout != "nested":
            name = f"{stem}.png" if plan.layout == "masks" else f"{stem}_mask.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(root / "masks" / name)
        polygons = outline(mask) if plan.layout != "masks" else []
        nested = plan.layout == "nested"
        records.append(
            {
                "image": f"{stem}.jpg",
                "mask": [polygons] if nested else polygons,
                "text": PROMPT if nested else [PROMPT],
            }
        )
    return records


def _stem(style: int, patient: int, sequence: int, code: str, frame: int) -> str:
    """File name without ending, after one of the five patterns in use; the person and the number are made up."""
    tail = f"S-{sequence}_1_{code}_frame_{frame:06d}"
    patterns = (
        f"SYNTH({patient:010d})_{tail}",
        f"SYNTH^({patient:010d})_{tail}",
        f"SYNTH_{patient:010d}__{tail}",
        f"SYNTH__{patient:010d}__{tail}",
        f"SYNTH ({patient:010d}) {tail}",
    )
    return patterns[style % len(patterns)]


def outline(mask: np.ndarray) -> list[list[int]]:
    """Flat outline polygons [x1, y1, x2, y2, ...] of a bool mask, through pixel centres, one per connected piece.

    A piece with a hole is cut through the hole, so that filling all polygons, borders included (as `cv2.fillPoly` does),
    gives the mask back exactly. An empty mask has no polygons.
    """
    polygons: list[list[int]] = []
    pieces = [mask.astype(np.uint8)]
    while pieces:
        piece = pieces.pop()
        contours, hierarchy = cv2.findContours(piece, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        for number, contour in enumerate(contours):
            _, _, child, parent = hierarchy[0][number]
            if parent >= 0:
                continue
            if child < 0:
                polygons.append(contour.ravel().tolist() * (3 if len(contour) < 3 else 1))
                continue
            alone = np.zeros_like(piece)
            cv2.drawContours(alone, contours, number, 1, cv2.FILLED)
            alone &= piece
            column = int(contours[child][:, 0, 0].mean())
            left = alone.copy()
            left[:, column + 1 :] = 0
            alone[:, : column + 1] = 0
            pieces += [left, alone]
    return polygons
