"""The images of a learning suite and who is on which side, written once for all arms."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vesselrl.benchmarks.learning_arms import SPLIT_SEED, Suite
from vesselrl.data.annotations import Sample, find_samples
from vesselrl.data.builtin import builtin_data
from vesselrl.data.splits import SIDES, Split, read_split, split_by_patient, take, write_split
from vesselrl.errors import DataError

SPLIT_FILE = "data_split.json"


@dataclass(frozen=True)
class SuiteData:
    """The images of a suite; the split lists exactly those that are used."""

    root: Path
    split: Split
    split_file: Path

    @property
    def fingerprint(self) -> str:
        """SHA-256 over side, key and file name of every image."""
        return json.loads(self.split_file.read_text(encoding="utf-8"))["sha256"]


def prepare_suite(suite: Suite, output_dir: Path, data_root: str | None = None) -> SuiteData:
    """Finds the images and writes OUTPUT_DIR/SUITE/data_split.json, or makes sure that it is still the same.

    Args:
        suite: which images, how many.
        output_dir: also gets the built-in data.
        data_root: in place of the suite's own folder.

    Raises:
        DataError: unusable or missing data, no published halves, or other images than before.
    """
    root = Path(data_root or suite.data_root or builtin_data(output_dir))
    if not root.is_dir():
        raise DataError(f"There is no folder {root} with the images of {suite.name}; give its --data_root.")
    samples = find_samples(root)
    split = (
        ordinary_split(suite, samples) if suite.num_val_patients is None else published_split(suite, samples)
    )
    path = output_dir / suite.name / SPLIT_FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_split(path, split)
        return SuiteData(root, split, path)
    before = read_split(path, samples)
    changed = [side for side in SIDES if {*getattr(before, side)} != {*getattr(split, side)}]
    if changed:
        raise DataError(
            f"{path} was written for other {', '.join(changed)} images than {suite.name} has now. Give "
            f"another --output_dir, or delete {path.parent} to train all arms again."
        )
    return SuiteData(root, before, path)


def ordinary_split(suite: Suite, samples: Sequence[Sample]) -> Split:
    """The split by patient of `vesselrl train`, cut to the suite's numbers of images as training cuts it."""
    return _cut(suite, split_by_patient(samples, SPLIT_SEED))


def published_split(suite: Suite, samples: Sequence[Sample]) -> Split:
    """Files named train_* for training and validation, test_* for test.

    Raises:
        DataError: a file of neither half, or fewer than two patients for training and validation.
    """
    halves: dict[str, list[Sample]] = {"train": [], "test": []}
    for sample in samples:
        half = sample.image_path.stem.partition("_")[0]
        if half not in halves:
            raise DataError(
                f"{sample.record} belongs to neither published half of {suite.name}: its name starts with "
                "neither train_ nor test_. Give the --data_root of that set."
            )
        if sample.image_path.stem not in suite.dropped:
            halves[half].append(sample)
    patients = sorted({sample.patient for sample in halves["train"]})
    if len(patients) <= suite.num_val_patients or not halves["test"]:
        raise DataError(
            f"{suite.name} has {len(patients)} patients in train_* and {len(halves['test'])} test_* images; "
            f"more than {suite.num_val_patients} and at least 1 are needed. Check --data_root."
        )
    validating = random.Random(SPLIT_SEED).sample(patients, suite.num_val_patients)
    train = tuple(sample for sample in halves["train"] if sample.patient not in validating)
    val = tuple(sample for sample in halves["train"] if sample.patient in validating)
    return _cut(suite, Split(train, val, tuple(halves["test"]), SPLIT_SEED))


def _cut(suite: Suite, split: Split) -> Split:
    sides = (
        tuple(take(getattr(split, side), number, SPLIT_SEED))
        for side, number in zip(SIDES, (suite.num_train, suite.num_val, suite.num_test), strict=True)
    )
    train, val, test = sides
    total = len(train) + len(val) + len(test)
    ratios = tuple(len(side) / total for side in (train, val, test))
    return Split(train, val, test, SPLIT_SEED, ratios)
