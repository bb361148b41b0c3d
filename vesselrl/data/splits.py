"""Training, validation and test samples that share no patient, written once and read back as they were.

Frames of one sequence are nearly equal and a person looks alike in all of hers, so the unit is the patient. A
split by frame can be asked for; it is marked as LEAKY wherever it goes.

How the patients are dealt out: `vesselrl.data.dealing`. The order that is shuffled is that of SHA-256 sums of
the people in the file names, not of the numbers of their pseudonyms: the same files and the same seed give
the same sides on every machine, with or without a mapping file. The price: whoever knows all patients, the
seed and the ratios can work out which side each is on, though not which number each has.
"""

import hashlib
import json
import logging
import os
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PurePath

from vesselrl.data.annotations import Sample
from vesselrl.data.dealing import Group, deal, deal_fold
from vesselrl.data.patients import person_of
from vesselrl.errors import DataError

logger = logging.getLogger(__name__)

SIDES = ("train", "val", "test")
UNITS = ("patient", "frame")
FORMAT = 2
LEAKY = "LEAKY: split by frame, so that frames of one patient are on several sides"


@dataclass(frozen=True)
class Split:
    """The three sides of a split; no patient is on two of them unless the split is by frame."""

    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    seed: int
    # What was asked for: shares of all samples for train, val and test.
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)
    unit: str = "patient"
    # (i, k): the test side is fold i of k, counted from 1.
    fold: tuple[int, int] | None = None
    # Mean foreground share of train, val and test, where the split is stratified by it.
    foreground: tuple[float, float, float] | None = None
    # Sentences that every result on it carries, because patients of two sides may be the same.
    doubts: tuple[str, ...] = ()

    @property
    def is_leaky(self) -> bool:
        """Whether results on this split may be too good, because a patient can be on two sides."""
        return self.unit == "frame"

    @property
    def mark(self) -> str:
        """The words that every result and report of a leaky split carries; empty for a split by patient."""
        return LEAKY if self.is_leaky else ""

    def patients(self, side: str) -> list[str]:
        """The patients of one side, sorted; `side` is train, val or test."""
        return sorted({sample.patient for sample in getattr(self, side)})


def split_by_patient(
    samples: Sequence[Sample],
    seed: int = 42,
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1),
    shares: Mapping[str, float] | None = None,
    fold: tuple[int, int] | None = None,
    unit: str = "patient",
) -> Split:
    """Divides samples into training, validation and test by patient.

    The patients are shuffled; test, then validation, take or give back one patient after the other as long as
    that brings their number of samples nearer to their share. The others are for training. A side that stays
    empty gets the smallest patient of the side with most patients. With `fold`, the patients are dealt to k
    test sides of about equal size instead, and validation takes its share of the rest. The result depends on
    the samples and the seed, not on the order of the samples.

    Args:
        samples: samples of at least three patients.
        seed: seed of the shuffle.
        ratios: shares of train, val and test, each above 0, with the sum 1; with `fold`, train and val keep
            their proportion.
        shares: foreground share by key of every sample, 0 to 1: of 200 shuffles, the one whose sides have the
            most equal mean share is taken, among those whose sizes are within 2 % of the best.
        fold: (i, k) with i from 1: every patient is on the test side of exactly one of the k folds.
        unit: "patient"; or "frame", which ignores patients, warns, and marks the split as leaky.

    Raises:
        DataError: there are fewer than three patients, or too few for k folds.
        ValueError: the ratios are not three positive numbers with the sum 1, fold or unit is none of the
            above, or `shares` lacks a sample.
    """
    _check_wishes(samples, ratios, shares, fold, unit)
    if unit == "frame":
        logger.warning("%s. Use its results for nothing but a comparison with such results.", LEAKY)
    groups = _group_in_order(samples, "patient" if unit == "patient" else "key")
    _check_number(len(groups), len(samples), fold, unit)
    parts = {
        name: Group(len(group), sum(shares[s.key] for s in group) if shares else None)
        for name, group in groups.items()
    }
    dealt = deal(parts, seed, ratios) if fold is None else deal_fold(parts, seed, ratios, fold)
    sides = [
        tuple(s for name, group in groups.items() if name in dealt[side] for s in group) for side in SIDES
    ]
    foreground = tuple(sum(shares[s.key] for s in side) / len(side) for side in sides) if shares else None
    return Split(*sides, seed, tuple(ratios), unit, fold and tuple(fold), foreground)


def _check_wishes(
    samples: Sequence[Sample],
    ratios: Sequence[float],
    shares: Mapping[str, float] | None,
    fold: tuple[int, int] | None,
    unit: str,
) -> None:
    """Raises ValueError for arguments of `split_by_patient` that mean nothing."""
    if len(ratios) != 3 or min(ratios) <= 0 or abs(sum(ratios) - 1) > 1e-6:
        raise ValueError(
            f"ratios are {ratios}. Give three numbers above 0 with the sum 1, such as 0.8 0.1 0.1."
        )
    if unit not in UNITS:
        raise ValueError(f"unit is {unit!r}. Give one of {', '.join(UNITS)}.")
    if fold is not None and (len(fold) != 2 or fold[1] < 2 or not 1 <= fold[0] <= fold[1]):
        raise ValueError(f"fold is {'/'.join(map(str, fold))}. Give i/k with k from 2 and i from 1 to k.")
    missing = [] if shares is None else [sample.key for sample in samples if sample.key not in shares]
    if missing:
        raise ValueError(f"shares lacks {len(missing)} of {len(samples)} samples, such as {missing[0]}.")


def _check_number(num_groups: int, num_samples: int, fold: tuple[int, int] | None, unit: str) -> None:
    """Raises DataError where there are too few patients, or frames, for the sides."""
    if num_groups < 3:
        if unit == "frame":
            raise DataError(f"The data has {num_groups} images. Training, validation and test need one each.")
        raise DataError(
            f"The data has {num_groups} patients ({num_samples} images). Training, validation and test "
            "need one each and share none: add patients, or give a patient_pattern that tells them apart."
        )
    if fold is not None and num_groups < max(fold[1], 4 if fold[1] == 2 else 3):
        raise DataError(
            f"The data has {num_groups} {unit}s, too few for {fold[1]} folds. Ask for {num_groups} folds."
        )


def write_split(path: Path | str, split: Split) -> None:
    """Writes a split as JSON: pseudonyms, counts, patients, and the proof that no patient is shared.

    A split by frame is marked as leaky, with the patients that are shared. The file appears complete or not
    at all.

    Raises:
        DataError: a patient is on two sides of a split by patient; nothing is written.
    """
    patients = {side: split.patients(side) for side in SIDES}
    shared = _shared_patients(split)
    content = {
        "format": FORMAT,
        "unit": split.unit,
        "leaky": split.is_leaky,
        "mark": split.mark,
        "doubts": list(split.doubts),
        "seed": split.seed,
        "fold": None if split.fold is None else {"i": split.fold[0], "k": split.fold[1]},
        "ratios": dict(zip(SIDES, split.ratios, strict=True)),
        "total_samples": sum(len(getattr(split, side)) for side in SIDES),
        "counts": {side: len(getattr(split, side)) for side in SIDES},
        "patient_counts": {side: len(patients[side]) for side in SIDES},
        "foreground": dict(zip(SIDES, split.foreground, strict=True)) if split.foreground else None,
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

    A file of format 1 may have the keys of a time before numbers were salted: they are understood.

    Args:
        path: data_split.json.
        samples: all samples of the data root.

    Raises:
        DataError: the file is missing or broken, it lists samples that are not there any more, or its keys
            now stand for other images, because files were added, removed or renamed.
    """
    path = Path(path)
    content = _read_json(path)
    samples = list(samples)
    wrong = DataError(f"{path.name} is not a split that this program wrote. Make a new split.")
    try:
        keys = {side: [str(key) for key in content["samples"][side]] for side in SIDES}
        fold, foreground = content.get("fold"), content.get("foreground")
        settings = {
            "seed": content["seed"],
            "ratios": tuple(content["ratios"][side] for side in SIDES),
            "unit": content.get("unit", "patient"),
            "fold": None if fold is None else (fold["i"], fold["k"]),
            "foreground": None if foreground is None else tuple(foreground[side] for side in SIDES),
            "doubts": tuple(str(doubt) for doubt in content.get("doubts", ())),
        }
        expected = content["sha256"]
    except (AttributeError, KeyError, TypeError):
        raise wrong from None
    if settings["unit"] not in UNITS:
        raise wrong
    split, missing = _choose({sample.key: sample for sample in samples}, keys, settings, expected)
    if split is None and content.get("format") == 1:
        split, _ = _choose(_by_unsalted_key(samples), keys, settings, expected)
    if split is None and missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"{path.name} lists {len(missing)} samples that the data root does not have: "
            f"{', '.join(missing[:5])}{more}. Restore the data, or make a new split and train again."
        )
    if split is None:
        raise DataError(
            f"{path.name} was made from other data: its keys now stand for other images, because files "
            "were added, removed or renamed. Restore the data, or make a new split and train again."
        )
    _shared_patients(split)
    return split


def _choose(
    by_key: Mapping[str, Sample], keys: Mapping[str, list[str]], settings: dict, expected: str
) -> tuple[Split | None, list[str]]:
    """The split of these keys, or None and the keys that are missing, if any."""
    missing = [key for side in SIDES for key in keys[side] if key not in by_key]
    if missing:
        return None, missing
    split = Split(*(tuple(by_key[key] for key in keys[side]) for side in SIDES), **settings)
    key_of = {sample.image_path: key for key, sample in by_key.items()}
    same = _fingerprint(split, lambda sample: key_of[sample.image_path]) == expected
    return (split if same else None), []


def _by_unsalted_key(samples: Sequence[Sample]) -> dict[str, Sample]:
    """The samples by the keys that they had when patients were numbered without a salt."""
    result = {}
    for number, group in enumerate(_group_in_order(samples, "patient").values(), start=1):
        result |= {f"P{number:03d}{sample.key[len(sample.patient) :]}": sample for sample in group}
    return result


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
    for patient_samples in _group_in_order(samples, "patient").values():
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


def _group_in_order(samples: Iterable[Sample], name: str) -> dict[Hashable, list[Sample]]:
    """The samples by one of their fields, the groups in an order without the numbers of patients.

    It is that of the people in the file names. Where two patients have the same there, as in p1/001.png and
    p2/001.png, the paths of all their files decide.
    """
    samples = list(samples)
    groups = _group(samples, name)
    paths = _digests_of_paths(samples)
    order = {
        label: (min(person_of(s.image_path.stem) for s in group), paths[group[0].patient], label)
        for label, group in groups.items()
    }
    return {label: groups[label] for label in sorted(groups, key=order.__getitem__)}


def relative_paths(samples: Sequence[Sample]) -> list[PurePath]:
    """The paths of the images below the deepest folder that holds all of them."""
    folder = os.path.commonpath([sample.image_path.parent for sample in samples]) if samples else ""
    return [sample.image_path.relative_to(folder) for sample in samples]


def _digests_of_paths(samples: Sequence[Sample]) -> dict[str, str]:
    """SHA-256 over the paths of the images of each patient, below the folder that holds all images."""
    paths: dict[str, list[str]] = defaultdict(list)
    for sample, path in zip(samples, relative_paths(samples), strict=True):
        paths[sample.patient].append(path.as_posix())
    return {
        patient: hashlib.sha256("\n".join(sorted(own)).encode()).hexdigest() for patient, own in paths.items()
    }


def _fingerprint(split: Split, key_of: Callable[[Sample], str] = lambda sample: sample.key) -> str:
    """SHA-256 over side, key and file of every sample: it shows whether a key means the same image.

    The file is its path below the folder that holds all images: p1/001.png is another than p2/001.png.
    Paths carry patient names, so they enter only into this one sum over all of them.
    """
    samples = [(side, sample) for side in SIDES for sample in getattr(split, side)]
    paths = relative_paths([sample for _, sample in samples])
    lines = [
        f"{side}\t{key_of(sample)}\t{path.as_posix()}"
        for (side, sample), path in zip(samples, paths, strict=True)
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _shared_patients(split: Split) -> dict[str, list[str]]:
    """The patients that each pair of sides has in common, which must be none in a split by patient.

    Raises:
        DataError: there are some; the message names them.
    """
    shared = {}
    for one, other in combinations(SIDES, 2):
        patients = sorted(set(split.patients(one)) & set(split.patients(other)))
        if patients and not split.is_leaky:
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
