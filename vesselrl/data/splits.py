"""Training, validation and test samples that share no patient, written once and read back as they were.

The order that is shuffled is that of SHA-256 sums of the people in the file names, not of their pseudonyms:
the same files and seed give the same subsets with or without a mapping file. The price: whoever knows all
patients and the seed can work out which subset each is in, but no number.
"""

import hashlib
import json
import logging
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations, zip_longest
from pathlib import Path, PurePath

from vesselrl.data.patients import copy_groups, parse_name
from vesselrl.data.samples import Sample
from vesselrl.errors import DataError
from vesselrl.experiment.run_folder import MALFORMED, json_hash, read_json, write_text

logger = logging.getLogger(__name__)

SUBSETS = ("train", "val", "test")
UNITS = ("patient", "frame")
SPLIT_FILE = "data_split.json"
FORMAT = 2
LEAKY = "LEAKY: split by frame, so that frames of one patient are on several sides"  # as in stored results
NUM_SHUFFLES = 200
# For more equal foreground, sizes of the subsets may be this much worse than the best (share of all samples).
SIZE_TOLERANCE = 0.02

Fold = tuple[int, int] | None  # (i, k), i counted from 1
Assignment = dict[str, list[str]]  # names of groups by subset
Groups = dict[Hashable, list[Sample]]


@dataclass(frozen=True)
class Split:
    """The three subsets of a split; no patient is in two of them unless the split is by frame."""

    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    seed: int
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)  # shares of train, val and test, as asked for
    unit: str = "patient"
    fold: Fold = None  # (i, k): the test subset is fold i of k
    foreground: tuple[float, float, float] | None = None  # mean shares, where the split is stratified by them
    caveats: tuple[str, ...] = ()  # sentences that every result on it carries

    @property
    def is_leaky(self) -> bool:
        """Whether results on this split may be too good, because a patient can be in two subsets."""
        return self.unit == "frame"

    def patients(self, subset: str) -> list[str]:
        """The patients of train, val or test, sorted."""
        return sorted({sample.patient for sample in getattr(self, subset)})


def split_by_patient(
    samples: Sequence[Sample],
    seed: int = 42,
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1),
    shares: Mapping[str, float] | None = None,
    fold: Fold = None,
    unit: str = "patient",
) -> Split:
    """Divides samples into training, validation and test by patient, whatever their order.

    The patients are shuffled; test, then validation, take or give back one patient after the other as long as
    that brings their number of samples nearer to their share (`ratios`: train, val, test, with the sum 1);
    the others are for training. Fewer than three patients, or too few for k folds, are a DataError.

    With `shares`, foreground shares by key, the shuffle of 200 is taken whose subsets have the most equal
    means, among those whose sizes are within 2 % of the best. `fold` is (i, k) with i from 1: every patient
    is tested in one of k folds. The unit "frame" ignores patients, warns, and marks the split as leaky.
    """
    if unit == "frame":
        logger.warning("%s. Use its results for nothing but a comparison with such results.", LEAKY)
    groups = _group_in_order(samples, "key" if unit == "frame" else "patient")
    groups = _join_copies(groups, samples) if unit == "frame" else groups
    what = f"The data has {len(groups)} {'image' if unit == 'frame' else 'patient'}s"
    if len(groups) < 3:
        advice = "" if unit == "frame" else " Add patients, or give a patient_pattern that tells them apart."
        need = "Training, validation and test need one each and share none."
        raise DataError(f"{what} ({len(samples)} images). {need}{advice}")
    if fold is not None and len(groups) < max(fold[1], 4 if fold[1] == 2 else 3):
        raise DataError(f"{what}, too few for {fold[1]} folds. Ask for {len(groups)} folds.")
    sizes = {name: len(group) for name, group in groups.items()}
    sums = {name: sum(shares[s.key] for s in group) for name, group in groups.items()} if shares else None
    assigned = _assign(sizes, sums, seed, ratios, fold)
    subsets = [tuple(s for name in groups if name in assigned[x] for s in groups[name]) for x in SUBSETS]
    means = tuple(sum(shares[s.key] for s in subset) / len(subset) for subset in subsets) if shares else None
    return Split(*subsets, seed, tuple(ratios), unit, fold and tuple(fold), means)


def extend_split(split: Split, samples: Sequence[Sample]) -> Split:
    """A split with more samples: known patients stay, a new one joins the subset furthest below its share."""
    if split.is_leaky:
        raise DataError("The split is by frame: no patient has a subset. Give one by patient.")
    sizes = {x: len(getattr(split, x)) for x in SUBSETS}
    subset_of = {sample.patient: x for x in SUBSETS for sample in getattr(split, x)}
    counts = Counter(subset_of.get(sample.patient) for sample in samples)
    for patient, group in _group_in_order(samples, "patient").items():
        if patient not in subset_of:
            share = (len(group) + sum(counts[x] for x in SUBSETS)) / sum(sizes.values())
            subset_of[patient] = max(SUBSETS, key=lambda x: sizes[x] * share - counts[x])
            counts[subset_of[patient]] += len(group)
    subsets = {x: tuple(s for s in samples if subset_of[s.patient] == x) for x in SUBSETS}
    return replace(split, **subsets, foreground=None)


def _join_copies(groups: Groups, samples: Sequence[Sample]) -> Groups:
    """Puts the copies of one source picture into the first of their groups, which hold an image each."""
    names = [path.with_suffix("").as_posix() for path in relative_paths(samples)]
    key_of = {name: sample.key for name, sample in zip(names, samples, strict=True)}
    joined, place = dict(groups), {key: number for number, key in enumerate(groups)}
    for copies in copy_groups(names):
        first, *others = sorted((key_of[name] for name in copies), key=place.__getitem__)
        joined[first] = [*joined[first], *chain(*map(joined.pop, others))]
    return joined


def _assign(
    sizes: Mapping[str, int], sums: Mapping[str, float] | None, seed: int, ratios: Sequence[float], fold: Fold
) -> Assignment:
    """Names of the groups for train, val and test; `sums`: of foreground shares by group, if they count."""
    best = partial(_best, foreground=sums, seed=seed)
    total = sum(sizes.values())
    if fold is None:
        return best(sizes, {"test": ratios[2] * total, "val": ratios[1] * total, "train": ratios[0] * total})
    even = {str(number): total / fold[1] for number in range(1, fold[1] + 1)}
    test = best(sizes, even, divide=partial(_assign_evenly, largest_first=sums is None))[str(fold[0])]
    rest = {name: size for name, size in sizes.items() if name not in test}
    left = sum(rest.values())
    val = ratios[1] / (ratios[0] + ratios[1]) * left
    return {"test": test} | best(rest, {"val": val, "train": left - val})


def _take_turns(order: list[str], sizes: Mapping[str, int], targets: Mapping[str, float]) -> Assignment:
    """Each subset but the last takes what brings it nearest to its target; the last gets the others."""
    *first, last = targets
    assigned: Assignment = {}
    for subset in first:
        assigned[subset] = _choose(order, sizes, targets[subset])
        chosen = set(assigned[subset])
        order = [name for name in order if name not in chosen]
    assigned[last] = order
    for members in reversed(assigned.values()):
        if not members:
            giver = max(assigned.values(), key=len)
            members.append(min(giver, key=sizes.__getitem__))
            giver.remove(members[0])
    return assigned


def _choose(order: Sequence[str], sizes: Mapping[str, int], target: float) -> list[str]:
    """Groups with about `target` samples, so that no one more and no one less would come nearer."""
    chosen: dict[str, None] = {}
    total, before = 0, None
    while total != before:
        before = total
        for name in order:
            new_total = total + sizes[name] * (-1 if name in chosen else 1)
            if abs(new_total - target) < abs(total - target):
                total = new_total
                if name in chosen:
                    del chosen[name]
                else:
                    chosen[name] = None
    return list(chosen)


def _assign_evenly(
    order: list[str], sizes: Mapping[str, int], targets: Mapping[str, float], *, largest_first: bool
) -> Assignment:
    """Each group goes to the subset with fewest samples."""
    assigned: Assignment = {subset: [] for subset in targets}
    totals = dict.fromkeys(targets, 0)
    if largest_first:  # else different orders are wanted, to choose from
        order = sorted(order, key=lambda name: -sizes[name])
    for name in order:
        # Two groups at least stay outside each subset: what is left needs two subsets of its own.
        open_subsets = [subset for subset in totals if len(assigned[subset]) < len(order) - 2]
        subset = min(open_subsets, key=totals.__getitem__)
        assigned[subset].append(name)
        totals[subset] += sizes[name]
    return assigned


def _best(
    sizes: Mapping[str, int],
    targets: Mapping[str, float],
    foreground: Mapping[str, float] | None,
    seed: int,
    divide: Callable[[list[str], Mapping[str, int], Mapping[str, float]], Assignment] = _take_turns,
) -> Assignment:
    """The division of the first shuffle, or of the shuffle that makes foreground shares most equal."""
    generator, order, candidates = random.Random(seed), list(sizes), []
    for _ in range(1 if foreground is None else NUM_SHUFFLES):
        generator.shuffle(order)
        candidates.append(divide(list(order), sizes, targets))
    if foreground is None:
        return candidates[0]

    def mean(names: Iterable[str]) -> float:
        return sum(map(foreground.__getitem__, names)) / sum(map(sizes.__getitem__, names))

    def size_gap(found: Assignment) -> float:
        return max(abs(sum(map(sizes.__getitem__, found[x])) - targets[x]) for x in targets)

    limit, overall = min(map(size_gap, candidates)) + SIZE_TOLERANCE * sum(sizes.values()), mean(sizes)
    fit = [found for found in candidates if size_gap(found) <= limit]
    return min(fit, key=lambda found: max(abs(mean(names) - overall) for names in found.values()))


def write_split(path: Path | str, split: Split) -> None:
    """Writes a split as JSON; a patient in two subsets of a split by patient is a DataError."""
    patients = {subset: split.patients(subset) for subset in SUBSETS}
    keys = {subset: [sample.key for sample in getattr(split, subset)] for subset in SUBSETS}
    content = {
        "format": FORMAT,
        "unit": split.unit,
        "leaky": split.is_leaky,
        "mark": LEAKY if split.is_leaky else "",
        "doubts": list(split.caveats),
        "seed": split.seed,
        "fold": None if split.fold is None else {"i": split.fold[0], "k": split.fold[1]},
        "ratios": dict(zip(SUBSETS, split.ratios, strict=True)),
        "total_samples": sum(map(len, keys.values())),
        "counts": {subset: len(keys[subset]) for subset in SUBSETS},
        "patient_counts": {subset: len(patients[subset]) for subset in SUBSETS},
        "foreground": dict(zip(SUBSETS, split.foreground, strict=True)) if split.foreground else None,
        "shared_patients": _shared_patients(split),
        "sha256": _fingerprint(split),
        "patients": patients,
        "samples": keys,
    }
    write_text(Path(path), json.dumps(content | {"checksum": json_hash(content)}, indent=1) + "\n")


def read_split(path: Path | str, samples: Iterable[Sample]) -> Split:
    """Reads a split back, with the samples of today; a key that now means another image is a DataError."""
    path = Path(path)
    try:
        content = read_json(path)
    except FileNotFoundError:
        fault = f"There is no split {path.name}. Train first, or give the run that holds it."
        raise DataError(fault) from None
    except ValueError:
        raise DataError(f"{path.name} is damaged (not valid JSON). Make a new split.") from None
    try:
        checksum = content.pop("checksum", None)
        keys = {subset: [str(key) for key in content["samples"][subset]] for subset in SUBSETS}
        fold, foreground, unit = content.get("fold"), content.get("foreground"), content["unit"]
        settings = {
            "seed": content["seed"],
            "ratios": tuple(content["ratios"][subset] for subset in SUBSETS),
            "unit": UNITS[UNITS.index(unit)],
            "fold": None if fold is None else (fold["i"], fold["k"]),
            "foreground": None if foreground is None else tuple(foreground[subset] for subset in SUBSETS),
            "caveats": tuple(str(caveat) for caveat in content.get("doubts", ())),
        }
        expected, found = content["sha256"], json_hash(content)
    except MALFORMED:
        raise DataError(f"{path.name} is not a split that this program wrote. Make a new split.") from None
    if checksum is not None and checksum != found:
        fault = f"{path.name} is damaged: its content is not what was written"
        raise DataError(f"{fault}. Put it back; if the change is meant, remove its line checksum.")
    advice = "Restore the data, or make a new split and train again."
    by_key = {sample.key: sample for sample in samples}
    if missing := [key for subset in SUBSETS for key in keys[subset] if key not in by_key]:
        what = f"{path.name} lists {len(missing)} samples that the data root does not have"
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(f"{what}: {', '.join(missing[:5])}{more}. {advice}")
    split = Split(*(tuple(by_key[key] for key in keys[subset]) for subset in SUBSETS), **settings)
    if _fingerprint(split) != expected:
        what = "its keys now stand for other images, because files were added, removed or renamed"
        raise DataError(f"{path.name} was made from other data: {what}. {advice}")
    _shared_patients(split)
    return split


def _fingerprint(split: Split) -> str:
    """SHA-256 over subset, key and file of every sample: it shows whether a key means the same image."""
    samples = [(subset, sample) for subset in SUBSETS for sample in getattr(split, subset)]
    paths = relative_paths([sample for _, sample in samples])
    lines = [f"{x}\t{s.key}\t{path.as_posix()}" for (x, s), path in zip(samples, paths, strict=True)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _shared_patients(split: Split) -> dict[str, list[str]]:
    """The patients that each pair of subsets has in common; a DataError if any, unless split by frame."""
    shared = {}
    for one, other in combinations(SUBSETS, 2):
        patients = sorted(set(split.patients(one)) & set(split.patients(other)))
        if patients and not split.is_leaky:
            what = f"{len(patients)} patients are in two subsets of the split, {one} and {other}"
            raise DataError(f"{what}: {', '.join(patients[:5])}. Make the split by patient.")
        shared[f"{one}_{other}"] = patients
    return shared


def take(samples: Sequence[Sample], n: int | None, seed: int = 42) -> list[Sample]:
    """The first n samples, or all, in an order that goes round the patients, and round their sequences.

    A larger n adds to the samples of a smaller one, and the order of `samples` does not matter.
    """
    if n is not None and n < 1:
        raise ValueError(f"n is {n}. Ask for at least 1 sample, or for None to take all.")
    generator, queues = random.Random(seed), []
    for patient_samples in _group_in_order(samples, "patient").values():
        sequences = [frames for _, frames in sorted(_group(patient_samples, "sequence").items())]
        for frames in sequences:
            generator.shuffle(frames)
        generator.shuffle(sequences)
        queues.append(_go_round(sequences))
    generator.shuffle(queues)
    return _go_round(queues)[:n]


def _go_round(queues: Sequence[Sequence[Sample]]) -> list[Sample]:
    """The first of each queue, then the second of each, and so on."""
    return [sample for turn in zip_longest(*queues) for sample in turn if sample is not None]


def _group(samples: Iterable[Sample], name: str) -> Groups:
    """The samples by one of their fields, in the order of their keys."""
    groups = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample.key):
        groups[getattr(sample, name)].append(sample)
    return groups


def _group_in_order(samples: Sequence[Sample], name: str) -> Groups:
    """The samples by one of their fields, the groups by the people, then by the paths, of their files."""
    groups = _group(samples, name)
    paths: dict[str, list[str]] = defaultdict(list)
    for sample, path in zip(samples, relative_paths(samples), strict=True):
        paths[sample.patient].append(path.as_posix())
    digests = {p: hashlib.sha256("\n".join(sorted(own)).encode()).hexdigest() for p, own in paths.items()}

    def place(label: Hashable) -> tuple[str, str, Hashable]:
        people = {parse_name(sample.image_path.stem).person for sample in groups[label]}
        person = min(hashlib.sha256(person.encode()).hexdigest() for person in people)
        return person, digests[groups[label][0].patient], label

    return {label: groups[label] for label in sorted(groups, key=place)}


def relative_paths(samples: Sequence[Sample]) -> list[PurePath]:
    """The paths of the images below the deepest folder that holds all of them."""
    folder = os.path.commonpath([sample.image_path.parent for sample in samples]) if samples else ""
    return [sample.image_path.relative_to(folder) for sample in samples]
