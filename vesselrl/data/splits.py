"""Training, validation and test samples that share no patient, written once and read back as they were.

Frames of one sequence are nearly equal and a person looks alike in all of hers, so the unit is the patient.
"""

import hashlib
import json
import os
import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from vesselrl.data.annotations import Sample
from vesselrl.data.errors import DataError

SIDES = ("train", "val", "test")
FORMAT = 1


@dataclass(frozen=True)
class Split:
    """The three sides of a split; no patient is on two of them."""

    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    seed: int
    # What was asked for: shares of all samples for train, val and test.
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)

    def patients(self, side: str) -> list[str]:
        """The patients of one side, sorted; `side` is train, val or test."""
        return sorted({sample.patient for sample in getattr(self, side)})


def split_by_patient(
    samples: Sequence[Sample], seed: int = 42, ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> Split:
    """Divides samples into training, validation and test by patient.

    The patients are shuffled; test, then validation, take or give back one patient after the other as long as
    that brings their number of samples nearer to their share. The others are for training. A side that stays
    empty gets the smallest patient of the side with most patients. The result depends on the samples and the
    seed, not on the order of the samples.

    Args:
        samples: samples of at least three patients.
        seed: seed of the shuffle.
        ratios: shares of train, val and test, each above 0, with the sum 1.

    Raises:
        DataError: there are fewer than three patients.
        ValueError: the ratios are not three positive numbers with the sum 1.
    """
    if len(ratios) != 3 or min(ratios) <= 0 or abs(sum(ratios) - 1) > 1e-6:
        raise ValueError(
            f"ratios are {ratios}. Give three numbers above 0 with the sum 1, such as 0.8 0.1 0.1."
        )
    groups = _group(samples, "patient")
    if len(groups) < 3:
        raise DataError(
            f"The data has {len(groups)} patients ({len(samples)} images). Training, validation and test "
            "need one each and share none: add patients, or give a patient_pattern that tells them apart."
        )
    patients = list(groups)
    random.Random(seed).shuffle(patients)
    sizes = {patient: len(groups[patient]) for patient in patients}
    chosen: dict[str, list[str]] = {}
    for side, ratio in (("test", ratios[2]), ("val", ratios[1])):
        chosen[side] = _choose(patients, sizes, ratio * len(samples))
        patients = [patient for patient in patients if patient not in chosen[side]]
    chosen["train"] = patients
    _fill_empty_sides(chosen, sizes)
    parts = (tuple(s for patient in sorted(chosen[side]) for s in groups[patient]) for side in SIDES)
    return Split(*parts, seed=seed, ratios=tuple(ratios))


def _choose(patients: Sequence[str], sizes: dict[str, int], target: float) -> list[str]:
    """Patients with about `target` samples, so that no one more and no one less would come nearer."""
    chosen: list[str] = []
    total, improved = 0, True
    while improved:
        improved = False
        for patient in patients:
            new_total = total - sizes[patient] if patient in chosen else total + sizes[patient]
            if abs(new_total - target) < abs(total - target):
                chosen.remove(patient) if patient in chosen else chosen.append(patient)
                total, improved = new_total, True
    return chosen


def _fill_empty_sides(chosen: dict[str, list[str]], sizes: dict[str, int]) -> None:
    """Moves the smallest patient of the side with most patients to each side without any."""
    for side in SIDES:
        if not chosen[side]:
            giver = max(chosen.values(), key=len)
            smallest = min(giver, key=sizes.__getitem__)
            giver.remove(smallest)
            chosen[side].append(smallest)


def write_split(path: Path | str, split: Split) -> None:
    """Writes a split as JSON: pseudonyms, counts, patients, and the proof that no patient is shared.

    The file appears complete or not at all.

    Raises:
        DataError: a patient is on two sides; nothing is written.
    """
    patients = {side: split.patients(side) for side in SIDES}
    shared = _shared_patients(split)
    content = {
        "format": FORMAT,
        "unit": "patient",
        "seed": split.seed,
        "ratios": dict(zip(SIDES, split.ratios, strict=True)),
        "total_samples": sum(len(getattr(split, side)) for side in SIDES),
        "counts": {side: len(getattr(split, side)) for side in SIDES},
        "patient_counts": {side: len(patients[side]) for side in SIDES},
        "shared_patients": shared,
        "sha256": _fingerprint(split),
        "patients": patients,
        "samples": {side: [sample.key for sample in getattr(split, side)] for side in SIDES},
    }
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_split(path: Path | str, samples: Iterable[Sample]) -> Split:
    """Reads a split back, with the samples of today; samples that it does not list are left out.

    Raises:
        DataError: the file is missing or broken, it lists samples that are not there any more, or its keys
            now stand for other images, because files were added, removed or renamed.
    """
    path = Path(path)
    content = _read_json(path)
    by_key = {sample.key: sample for sample in samples}
    try:
        keys = {side: [str(key) for key in content["samples"][side]] for side in SIDES}
        ratios = tuple(content["ratios"][side] for side in SIDES)
        seed, expected = content["seed"], content["sha256"]
    except (KeyError, TypeError):
        raise DataError(f"{path.name} is not a split that this program wrote. Make a new split.") from None
    missing = [key for side in SIDES for key in keys[side] if key not in by_key]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"{path.name} lists {len(missing)} samples that the data root does not have: "
            f"{', '.join(missing[:5])}{more}. Restore the data, or make a new split and train again."
        )
    split = Split(*(tuple(by_key[key] for key in keys[side]) for side in SIDES), seed=seed, ratios=ratios)
    if _fingerprint(split) != expected:
        raise DataError(
            f"{path.name} was made from other data: its keys now stand for other images, because files "
            "were added, removed or renamed. Restore the data, or make a new split and train again."
        )
    _shared_patients(split)
    return split


def take(samples: Sequence[Sample], n: int | None, seed: int = 42) -> list[Sample]:
    """The first n samples in an order that goes round the patients, so that a few samples show many patients.

    Within a patient it goes round the sequences, in shuffled frames. A larger n adds to the samples of a
    smaller one, and the order of `samples` does not matter.

    Args:
        samples: what to choose from.
        n: how many, at least 1; None, or more than there are, gives all.
        seed: seed of the shuffles.

    Raises:
        ValueError: n is below 1.
    """
    if n is not None and n < 1:
        raise ValueError(f"n is {n}. Ask for at least 1 sample, or for None to take all.")
    generator = random.Random(seed)
    queues = []
    for _, patient_samples in sorted(_group(samples, "patient").items()):
        sequences = [frames for _, frames in sorted(_group(patient_samples, "sequence").items())]
        for frames in sequences:
            generator.shuffle(frames)
        generator.shuffle(sequences)
        queues.append(list(_go_round(sequences)))
    generator.shuffle(queues)
    return list(_go_round(queues))[:n]


def _go_round(queues: Sequence[Sequence[Sample]]) -> Iterator[Sample]:
    """The first of each queue, then the second of each, and so on."""
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue):
                yield queue[turn]


def _group(samples: Iterable[Sample], name: str) -> dict[Hashable, list[Sample]]:
    """The samples by one of their fields, in the order of their keys."""
    groups = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample.key):
        groups[getattr(sample, name)].append(sample)
    return groups


def _fingerprint(split: Split) -> str:
    """SHA-256 over side, key and file name of every sample: it shows whether a key means the same image.

    File names carry patient names, so they enter only into this one sum over all of them.
    """
    lines = [
        f"{side}\t{sample.key}\t{sample.image_path.name}" for side in SIDES for sample in getattr(split, side)
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _shared_patients(split: Split) -> dict[str, list[str]]:
    """The patients that each pair of sides has in common, which must be none.

    Raises:
        DataError: there are some; the message names them.
    """
    shared = {}
    for one, other in combinations(SIDES, 2):
        patients = sorted(set(split.patients(one)) & set(split.patients(other)))
        if patients:
            raise DataError(
                f"{len(patients)} patients are on two sides of the split, {one} and {other}: "
                f"{', '.join(patients[:5])}. Make the split by patient."
            )
        shared[f"{one}_{other}"] = patients
    return shared


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"There is no split {path}. Train first, or give the run folder that holds it."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DataError(f"{path.name} is damaged (not valid JSON). Make a new split.") from None
