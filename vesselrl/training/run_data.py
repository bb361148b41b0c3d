"""The data of one run: checked, found, split, chosen, and in which batches it is shown."""

import logging
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from PIL import Image

from vesselrl.data.annotations import Sample, find_samples, load_image, load_mask
from vesselrl.data.augment import get_augmentation
from vesselrl.data.builtin import FULL, SMALL, builtin_data
from vesselrl.data.check import check_data
from vesselrl.data.contact_sheet import contact_sheet
from vesselrl.data.curriculum import difficulty_table
from vesselrl.data.dataset import VesselDataset
from vesselrl.data.findings import CODES, DataReport
from vesselrl.data.in_sample import base_trained_on
from vesselrl.data.near_duplicates import check_near_duplicates
from vesselrl.data.splits import Split, read_split, split_by_patient, take, write_split
from vesselrl.errors import DataError
from vesselrl.evaluation.marks import marks_of
from vesselrl.experiment.config import RANDOM_MODEL, TrainConfig
from vesselrl.experiment.run_folder import RunFolder, find_run
from vesselrl.training.batches import BatchSource

logger = logging.getLogger(__name__)

SPLIT_FILE = "data_split.json"
SHEET_FILE = "contact_sheet.png"
SHEET_IMAGES = 12
SANITY_STEPS = 600  # as many as the embedded miniature needs to know four images by heart; docs/results.md
CONTROL_MARKS = {
    None: (),
    "unet": ("CONTROL: a U-Net from random weights; its gain over them is no gain over a base model.",),
    "frangi": ("CONTROL: a Frangi filter; its gain over default settings is no gain over a base model.",),
}
UNKNOWN_START = (
    "UNKNOWN START: --init_lora has no data_split.json beside it, so its adapter may have been trained on "
    "the patients of this test."
)


@dataclass(frozen=True)
class RunData:
    """Samples of one run, how many were asked for and found, and what its scores must be marked with."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    counts: dict
    val_marks: tuple[str, ...] = ()
    test_marks: tuple[str, ...] = ()


def prepare_data(config: TrainConfig, run: RunFolder) -> RunData:
    """Checks, finds, splits and chooses the samples; writes data_split.json.

    Raises:
        DataError: unusable data; the message names file and record.
    """
    report = check_before_training(config) if config.data_root else None
    size = SMALL if config.model_path == RANDOM_MODEL else FULL
    root = Path(config.data_root) if config.data_root else builtin_data(config.output_dir, size)
    samples = find_samples(root, config.patient_pattern, config.patient_aliases)
    split = make_split(config, samples, report)
    write_split(run.path / SPLIT_FILE, split)
    seed = config.split_seed
    train = take(list(split.train), config.sanity_overfit or config.max_train_samples, seed)
    val = train if config.sanity_overfit else take(list(split.val), config.max_val_samples, seed)
    test = [] if config.sanity_overfit else list(split.test)
    # A control has no base model.
    seen = base_trained_on("none" if config.control else config.base_trained_on, samples)
    logger.info("data: %d train, %d validation, %d test images", len(train), len(val), len(test))
    counts = {
        "found": len(samples),
        "patients": len({sample.patient for sample in samples}),
        "train": count_side("train", config.max_train_samples, len(split.train), len(train)),
        "val": count_side("val", config.max_val_samples, len(split.val), len(val)),
        "test": count_side("test", None, len(split.test), len(test)),
        "split_unit": split.unit,
        "test_seen_by_base": sum(sample.key in seen for sample in test),
    }
    marks = (marks_of(split, side, seen) + CONTROL_MARKS[config.control] for side in (val, test))
    return RunData(train, val, test, counts, *marks)


def check_before_training(config: TrainConfig) -> DataReport:
    """Looks at every file of the user's data; errors stop the run, warnings are counted in the log.

    Raises:
        DataError: there are errors.
    """
    report = check_data(config.data_root, config.patient_pattern, config.patient_aliases)
    errors, warnings = report.of("error"), report.of("warning")
    hint = f"`vesselrl data check {config.data_root}`"
    if len(errors) == 1:
        raise DataError(f"{errors[0].message} {hint} shows more.")
    if errors:
        raise DataError(f"{errors[0].message} This is the first of {len(errors)} errors; {hint} lists all.")
    if warnings:
        kinds = Counter(finding.code for finding in warnings)
        listed = ", ".join(f"{CODES[code]}: {number}" for code, number in kinds.items())
        logger.warning("data check: %s (%s lists them)", listed, hint)
    return report


def make_split(config: TrainConfig, samples: list[Sample], report: DataReport | None) -> Split:
    """The split, with what is doubtful about it: a given one, that of the run of `init_lora`, or a new one.

    Raises:
        DataError: too few patients, near duplicates on two sides, or options that contradict that run.
    """
    start = find_run(config.init_lora)
    if config.split_file is not None:
        split = replace(read_split(config.split_file, samples), doubts=())  # those of another training
    elif start is not None:
        split = read_split(start / SPLIT_FILE, samples)
        given = (config.fold_numbers or split.fold, config.split_unit)
        if given != (split.fold, split.unit):
            raise DataError(
                f"--init_lora {config.init_lora} goes on with that run's split (fold {split.fold}, unit "
                f"{split.unit}); it cannot be trained on fold {given[0]}, unit {given[1]}. Leave the options "
                "out, or start from another adapter."
            )
    else:
        shares = None if report is None else report.foreground
        fold = config.fold_numbers
        split = split_by_patient(samples, config.split_seed, shares=shares, fold=fold, unit=config.split_unit)
        split = split if config.init_lora is None else replace(split, doubts=(UNKNOWN_START,))
    for doubt in split.doubts:
        logger.warning(doubt)
    if config.data_root and not split.is_leaky:
        doubts = dict.fromkeys((*split.doubts, *look_for_duplicates(config, split)))
        split = replace(split, doubts=tuple(doubts))
    return split


def look_for_duplicates(config: TrainConfig, split: Split) -> tuple[str, ...]:
    """What must be said of look-alike images on two sides of the split, where they are allowed.

    Raises:
        DataError: there are some, and they are not allowed.
    """
    try:
        check_near_duplicates(split, load_image)
    except DataError as error:
        if config.near_duplicates == "stop":
            raise DataError(f"{error} Or accept them with --near_duplicates allow.") from None
        logger.warning("%s", error)
        return ("NEAR DUPLICATES: images of different patients on two sides of the split look alike.",)
    return ()


def training_batches(config: TrainConfig, data: RunData, run: RunFolder) -> BatchSource:
    """The batches of all epochs; writes contact_sheet.png and, with a curriculum, difficulty.json.

    A sanity run has epochs enough for `SANITY_STEPS` batches, without augmentation or curriculum.
    """
    if config.sanity_overfit:
        num_epochs = math.ceil(SANITY_STEPS / math.ceil(len(data.train) / config.batch_size))
        num_epochs = max(config.num_epochs, num_epochs)
        return BatchSource(
            VesselDataset(data.train), config.batch_size, config.seed, num_epochs,
            sweeps=partial(config.num_sweeps, num_epochs=num_epochs),
        )  # fmt: skip
    plan = get_augmentation(config.augment)
    logger.info("augmentation: %s", plan)
    dataset = VesselDataset(data.train, augmentation=plan, seed=config.seed)
    difficulties = None
    if config.curriculum:
        table = difficulty_table(data.train, lambda sample: (load_image(sample), load_mask(sample)))
        run.write_json("difficulty.json", table)
        difficulties = [table[sample.key]["difficulty"] for sample in data.train]
    sweeps = partial(config.num_sweeps, num_epochs=config.num_epochs)
    batches = BatchSource(dataset, config.batch_size, config.seed, config.num_epochs, difficulties, sweeps)
    shown = list(islice(batches.epoch(1), -(-SHEET_IMAGES // config.batch_size)))
    items = [item for batch in shown for item in zip(batch.keys, batch.images, batch.truths, strict=True)]
    Image.fromarray(contact_sheet(items[:SHEET_IMAGES])).save(run.path / SHEET_FILE)
    return batches


def count_side(side: str, requested: int | None, available: int, used: int) -> dict:
    """Requested, available and used images of one side; asking for more than there are is a warning."""
    if requested and requested > available:
        logger.warning("%s: %d images requested, %d available", side, requested, available)
    return {"requested": requested, "available": available, "used": used}
