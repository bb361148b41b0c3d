"""From settings to the parts of a run: data, reward, device, model with adapters."""

import logging
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vesselrl.data.annotations import DataError, Sample, find_samples, load_image, load_mask
from vesselrl.data.augment import get_augmentation
from vesselrl.data.builtin import FULL, SMALL, builtin_data
from vesselrl.data.check import check_data
from vesselrl.data.contact_sheet import contact_sheet
from vesselrl.data.curriculum import difficulty_table
from vesselrl.data.dataset import VesselDataset
from vesselrl.data.findings import render
from vesselrl.data.in_sample import base_trained_on
from vesselrl.data.near_duplicates import check_near_duplicates
from vesselrl.data.splits import Split, read_split, split_by_patient, take, write_split
from vesselrl.evaluation.held_out import run_folder
from vesselrl.evaluation.marks import marks_of
from vesselrl.experiment.config import RANDOM_MODEL, TrainConfig
from vesselrl.experiment.runs import RunFolder
from vesselrl.inference.predictor import adapter_folder
from vesselrl.models.loading import describe_config, load_sa2va
from vesselrl.models.lora import LORA_PRESETS, attach_lora, load_adapter
from vesselrl.models.miniature import random_checkpoint
from vesselrl.scoring.rewards import Reward
from vesselrl.training.batches import BatchSource
from vesselrl.training.feature_store import GIB, FeatureStore, weights_hash
from vesselrl.training.policy import MaskPolicy

logger = logging.getLogger(__name__)

SPLIT_FILE = "data_split.json"
SHEET_IMAGES = 12
SANITY_STEPS = 600  # as many as the embedded miniature needs to know four images by heart; docs/results.md


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
    size = SMALL if config.model_path == RANDOM_MODEL else FULL
    root = Path(config.data_root) if config.data_root else builtin_data(config.output_dir, size)
    samples = find_samples(root, config.patient_pattern, config.patient_aliases)
    if config.data_root:
        check_before_training(config)
    split = make_split(config, samples)
    write_split(run.path / SPLIT_FILE, split)
    train = take(list(split.train), config.sanity_overfit or config.max_train_samples, config.seed)
    val = train if config.sanity_overfit else take(list(split.val), config.max_val_samples, config.seed)
    test = [] if config.sanity_overfit else list(split.test)
    seen = base_trained_on(config.base_trained_on, samples)
    logger.info("data: %d train, %d validation, %d test images", len(train), len(val), len(test))
    counts = {
        "found": len(samples),
        "patients": len({sample.patient for sample in samples}),
        "train": count_side("train", config.max_train_samples, len(split.train), len(train)),
        "val": count_side("val", config.max_val_samples, len(split.val), len(val)),
        "test": count_side("test", None, len(split.test), len(test)),
        "split": split.mark or "by patient",
        "test_seen_by_base": sum(sample.key in seen for sample in test),
    }
    marks = (marks_of(split, side, seen) for side in (val, test))
    return RunData(train, val, test, counts, *marks)


def check_before_training(config: TrainConfig) -> None:
    """Looks at every file of the user's data; errors stop the run, warnings are logged.

    Raises:
        DataError: there are errors, or all masks are empty.
    """
    report = check_data(config.data_root, config.patient_pattern, config.patient_aliases)
    errors = report.of("error")
    if errors:
        raise DataError(
            f"The data has {len(errors)} errors, the first of which is: {errors[0].message} "
            f"`vesselrl data check {config.data_root}` lists all."
        )
    for line in render(report).splitlines() if report.of("warning") else ():
        logger.warning("data check: %s", line)
    if report.counts["empty_masks"] == report.counts["images"]:
        raise DataError(
            f"All {report.counts['images']} masks are empty. Check that masks or polygons mark the vessels."
        )


def make_split(config: TrainConfig, samples: list[Sample]) -> Split:
    """The split of the run that `init_lora` belongs to, or a new one.

    Raises:
        DataError: too few patients, or near duplicates on two sides.
    """
    previous = earlier_split(config)
    if previous:
        return read_split(previous, samples)
    split = split_by_patient(samples, config.seed, fold=config.fold_numbers, unit=config.split_unit)
    if config.data_root and config.near_duplicates == "stop" and not split.is_leaky:
        check_near_duplicates(split, load_image)
    return split


def training_batches(config: TrainConfig, data: RunData, run: RunFolder) -> BatchSource:
    """The batches of all epochs; writes contact_sheet.png and, with a curriculum, difficulty.json.

    A sanity run has as many epochs as it takes to make `SANITY_STEPS`, without augmentation or curriculum.
    """
    if config.sanity_overfit:
        num_epochs = math.ceil(SANITY_STEPS / math.ceil(len(data.train) / config.batch_size))
        dataset = VesselDataset(data.train)
        return BatchSource(dataset, config.batch_size, config.seed, max(config.num_epochs, num_epochs))
    plan = get_augmentation(config.augment)
    logger.info("augmentation: %s", plan)
    dataset = VesselDataset(data.train, augmentation=plan, seed=config.seed)
    difficulties = None
    if config.curriculum:
        table = difficulty_table(data.train, lambda sample: (load_image(sample), load_mask(sample)))
        run.write_json("difficulty.json", table)
        difficulties = [table[sample.key]["difficulty"] for sample in data.train]
    batches = BatchSource(dataset, config.batch_size, config.seed, config.num_epochs, difficulties)
    shown = list(islice(batches.epoch(1), -(-SHEET_IMAGES // config.batch_size)))
    items = [item for batch in shown for item in zip(batch.keys, batch.images, batch.truths, strict=True)]
    Image.fromarray(contact_sheet(items[:SHEET_IMAGES])).save(run.path / "contact_sheet.png")
    return batches


def count_side(side: str, requested: int | None, available: int, used: int) -> dict:
    """Requested, available and used images of one side; asking for more than there are is a warning."""
    if requested and requested > available:
        logger.warning("%s: %d images requested, %d available", side, requested, available)
    return {"requested": requested, "available": available, "used": used}


def earlier_split(config: TrainConfig) -> Path | None:
    """data_split.json of the run that `init_lora` belongs to, if any."""
    run = run_folder(config.init_lora)
    return None if run is None else run / SPLIT_FILE


def check_reward(reward: Reward, data: RunData) -> None:
    """Scores a perfect and an empty mask, so that a broken function of the user's stops the run at once.

    Raises:
        RewardError: it failed or returned no number.
    """
    truth = load_mask(data.train[0])
    for pred in (truth, np.zeros_like(truth)):
        reward(pred, truth)


def select_device(gpu: int) -> str:
    """`cuda:N` when there is such a GPU, else `cpu`; sets the CPU threads of the image library.

    Raises:
        ValueError: there are GPUs, but not this one.
    """
    import cv2

    cv2.setNumThreads(1)  # masks are scored in threads of our own
    if not torch.cuda.is_available():
        logger.info("no GPU: running on the CPU with %d threads", torch.get_num_threads())
        return "cpu"
    if gpu >= torch.cuda.device_count():
        raise ValueError(f"--gpu is {gpu}, but there are {torch.cuda.device_count()} GPUs, counted from 0.")
    return f"cuda:{gpu}"


def load_policy(config: TrainConfig, device: str) -> MaskPolicy:
    """The model with new adapters, or with those of `init_lora`.

    Raises:
        CheckpointError: unusable model or adapter folder.
    """
    dtype = torch.bfloat16 if config.use_bf16 else torch.float32
    torch.manual_seed(config.seed)  # LoRA's first matrices are random
    if config.model_path == RANDOM_MODEL:
        with random_checkpoint(config.seed) as folder:
            model, processor = load_sa2va(folder, device, dtype)
    else:
        model, processor = load_sa2va(config.model_path, device, dtype)
    logger.info("model %s", describe_config(model.config, processor))
    if config.init_lora is not None:
        peft_model = load_adapter(model, adapter_folder(Path(config.init_lora)), is_trainable=True)
    else:
        preset = LORA_PRESETS[config.lora_preset]
        peft_model = attach_lora(
            model,
            config.lora_scope,
            preset.projections,
            rank=config.lora_rank or preset.rank,
            alpha=config.lora_alpha or preset.alpha,
            dropout=preset.dropout if config.lora_dropout is None else config.lora_dropout,
        )
    policy = MaskPolicy(peft_model, processor, config.prompt, keys_repeat=keys_repeat(config))
    policy.store = feature_store(config, policy)
    return policy


def keys_repeat(config: TrainConfig) -> bool:
    """Whether an image looks the same in every epoch, so that what is computed for it can be kept."""
    return bool(config.sanity_overfit) or get_augmentation(config.augment).is_none


def feature_store(config: TrainConfig, policy: MaskPolicy) -> FeatureStore | None:
    """Keeps the features of a frozen image encoder; None, with the reason logged, where they change."""
    if not policy.encoder_is_frozen:
        logger.info("image features are not kept: the image encoder is trained")
        return None
    if not policy.keys_repeat:
        logger.info("image features are not kept: augmentation changes the images")
        return None
    if config.cache_gb == 0:
        return FeatureStore()
    encoder_hash = weights_hash(policy.model.sam.vision_encoder)
    folder = Path(config.output_dir) / "cache" / "features"
    logger.info("image features are kept in memory and, up to %g GB, in %s", config.cache_gb, folder)
    return FeatureStore(folder, encoder_hash, disk_bytes=round(config.cache_gb * GIB))
