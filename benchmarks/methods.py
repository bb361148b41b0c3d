"""The methods of the learning benchmark, its suites with every size, and the split of their images.

A method is a training, or another post-processing of the predictions of one. C0 to C7 are the controls that
reinforcement learning must beat.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vesselrl.data.samples import Sample, find_samples
from vesselrl.data.splits import SUBSETS, Split, read_split, split_by_patient, take, write_split
from vesselrl.errors import DataError
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.synthetic.dataset import builtin_data

SPLIT_SEED = 42
FIRST_SEED = 42  # of the trainings: 42, 43, ...
# Of every training and of all masks but the base model's: specks are easily removed and gaps easily closed,
# so nobody shall win by having fewer of them.
FIXED_POST = PostProcessing(min_component_px=20, close_gaps=0.05)


class Method(NamedTuple):
    """One row of the comparison."""

    label: str
    # Options of `vesselrl train`; None: nothing is trained.
    options: dict[str, Any] | None = None
    # Whose predictions are taken; its own if empty, of several those of highest tuned validation reward.
    sources: tuple[str, ...] = ()
    # "raw": threshold 0.5; "fixed": `FIXED_POST`; "threshold": the same, its threshold tuned on validation;
    # "tuned": threshold, smallest component and closing of gaps tuned.
    post: str = "fixed"


METHODS = {
    "base": Method("C0 base model", post="raw"),
    "base_tuned": Method("C1 base, tuned threshold", sources=("base",), post="threshold"),
    "sft": Method("C2 supervised", {"stage": "sft"}),
    "sft_tuned": Method("C3 supervised, tuned threshold", sources=("sft",), post="threshold"),
    "sft_cldice": Method("C4 supervised with soft clDice", {"stage": "sft", "sft_loss": "bce_dice_cldice"}),
    "unet": Method("C5 U-Net from scratch", {"control": "unet"}),
    "frangi": Method("C6 Frangi filter", {"control": "frangi"}),
    "sft_post": Method("C7 best of C2 to C4, post-processed", sources=("sft", "sft_cldice"), post="tuned"),
    "rl": Method("PPO", {"stage": "rl"}),
    "rl_post": Method("PPO, post-processed", sources=("rl",), post="tuned"),
    "sft_rl": Method("supervised then PPO", {"stage": "sft+rl"}),
    "sft_rl_post": Method("supervised then PPO, post-processed", sources=("sft_rl",), post="tuned"),
}
RL = ("rl", "rl_post", "sft_rl", "sft_rl_post")
# The strongest of these on validation is the control that must be beaten.
STRONG_CONTROLS = ("sft", "sft_tuned", "sft_cldice", "sft_post")
# Those that are compared at the recall of the RL method, with the source of their predictions.
EQUAL_RECALL = {"base_tuned": "base", "sft_tuned": "sft"}


class Suite(NamedTuple):
    """Images, sizes and schedule, the same for every method."""

    name: str
    title: str
    options: dict[str, Any]
    sizes: dict[str, int]  # most images of a subset; all of one that is not named
    data_root: str | None = None  # None: the built-in synthetic target domain
    num_val_patients: int | None = None  # of the published training half; None: no halves, split by patient
    dropped: tuple[str, ...] = ()  # file names without ending that no subset gets


COMMON = {"batch_size": 1, "num_passes": 2, "min_component_px": 20, "close_gaps": 0.05}
SUITES = {
    "synthetic": Suite(
        "synthetic",
        "the built-in synthetic target domain",
        COMMON | {"num_epochs": 4, "val_freq": 250},
        {"train": 250, "val": 100},
    ),
    # train_017 and train_030 are frames of runs that the test half shows as well.
    "coronary80": Suite(
        "coronary80",
        "coronary80, its published halves",
        COMMON | {"num_epochs": 12, "val_freq": 60},
        {},
        "../shared/data/coronary80",
        8,
        ("train_017", "train_030"),
    ),
    "chase_db1": Suite(
        "chase_db1",
        "CHASE_DB1, its published halves",
        COMMON | {"num_epochs": 9, "val_freq": 96},
        {},
        "../shared/data/chase_db1",
        2,
    ),
}
# Epochs and sizes of --reduced: to see the whole way in minutes, not to claim anything.
REDUCED = {
    "synthetic": (2, {"train": 150, "val": 40, "test": 52}),
    "coronary80": (3, {}),
    "chase_db1": (3, {}),
}


def get_suite(name: str, reduced: bool = False) -> Suite:
    """A suite by name, in full or reduced; a reduced one has a folder of its own."""
    suite, (epochs, sizes) = SUITES[name], REDUCED[name]
    own = {
        "title": f"{suite.title}, reduced",
        "options": suite.options | {"num_epochs": epochs},
        "sizes": sizes,
    }
    return suite._replace(name=f"{name}_reduced", **own) if reduced else suite


def prepare_suite(suite: Suite, output_dir: Path, data_root: str | None = None) -> tuple[Path, Split]:
    """Finds the images; writes OUTPUT_DIR/SUITE/data_split.json, or makes sure that it is still the same."""
    root = Path(data_root or suite.data_root or builtin_data(output_dir))
    if not root.is_dir():
        raise DataError(f"There is no folder {root} with the images of {suite.name}; give its --data_root.")
    samples = find_samples(root)
    published = suite.num_val_patients is not None
    split = published_split(suite, samples) if published else split_by_patient(samples, SPLIT_SEED)
    cut = {name: tuple(take(getattr(split, name), suite.sizes.get(name), SPLIT_SEED)) for name in SUBSETS}
    total = sum(map(len, cut.values()))
    split = Split(**cut, seed=SPLIT_SEED, ratios=tuple(len(subset) / total for subset in cut.values()))
    path = output_dir / suite.name / "data_split.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_split(path, split)
        return root, split
    before = read_split(path, samples)
    changed = [name for name in SUBSETS if {*getattr(before, name)} != {*getattr(split, name)}]
    if changed:
        raise DataError(
            f"{path} was written for other {', '.join(changed)} images than {suite.name} has now. Give "
            f"another --output_dir, or delete {path.parent} to train everything again."
        )
    return root, before


def published_split(suite: Suite, samples: Sequence[Sample]) -> Split:
    """Files named train_* for training and validation, test_* for test; a DataError if a file is neither."""
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
    return Split(train, val, tuple(halves["test"]), SPLIT_SEED)
