"""From settings to the parts of a run: data, batches, and the model with its adapters."""

import logging
import math
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from vesselrl.data.augment import get_augmentation
from vesselrl.data.check import PATIENT_CODES, DataReport, check_data
from vesselrl.data.dataset import BatchSource, TrainBatch, VesselDataset, contact_sheet, difficulty_table
from vesselrl.data.near_duplicates import check_near_duplicates, pretraining_overlap
from vesselrl.data.records import CODES
from vesselrl.data.samples import Sample, find_samples, load_mask
from vesselrl.data.splits import SPLIT_FILE, Split, read_split, split_by_patient, take, write_split
from vesselrl.data.tiles import Tiling
from vesselrl.errors import DataError, RewardError
from vesselrl.evaluation.evaluate import caveats_of, caveats_of_built_in, load_pixels
from vesselrl.evaluation.results import Caveat
from vesselrl.experiment.config import RANDOM_MODEL, READING, TrainConfig
from vesselrl.experiment.options import hide_paths
from vesselrl.experiment.run_folder import RunFolder, atomic_write, check_room, find_run
from vesselrl.models.lora import check_scope
from vesselrl.scoring.rewards import Reward, make_reward
from vesselrl.synthetic.dataset import FULL, SMALL, builtin_data
from vesselrl.training import processes
from vesselrl.training.baselines import Frangi, UNet
from vesselrl.training.checkpoint import Model
from vesselrl.training.features import FeatureStore
from vesselrl.training.policy import keep_states, load_policy
from vesselrl.training.ppo import PPOUpdate
from vesselrl.training.supervised import SupervisedUpdate

logger = logging.getLogger(__name__)

SHEET_FILE = "contact_sheet.png"
SHEET_IMAGES = 12
PICTURES_BYTES = 5_000_000  # of pictures, reports and metrics
STATE_COPIES = 21  # of the adapters' values: up to seven in a state, the one before and the next beside it
# On validation 0.95 was a little better than Adam's own 0.999 with every seed tried; docs/results.md, R040.
BETAS = (0.9, 0.95)
SANITY_STEPS = 600  # as many as the embedded miniature needs to know four images by heart; docs/results.md
CONTROLS = {
    "unet": {"model": "U-Net from random weights", "start": "them"},
    "unet_pretrained": {"model": "U-Net from the detail head's first weights", "start": "them"},
    "frangi": {"model": "Frangi filter", "start": "default settings"},
}


@dataclass(frozen=True)
class RunData:
    """Samples of one run, how many were asked for and found, and the caveats of scores on them."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    counts: dict
    val_caveats: Mapping[Caveat, str]
    test_caveats: Mapping[Caveat, str]


def prepare_data(config: TrainConfig, run: RunFolder) -> RunData:
    """Checks, finds, splits and chooses the samples; writes data_split.json."""
    data, sanity, control = config.data, config.run.sanity_overfit, config.optim.control
    report = check_before_training(config) if data.data_root else None
    size = SMALL if config.model.model_path == RANDOM_MODEL else FULL
    root = Path(data.data_root) if data.data_root else builtin_data(config.run.output_dir, size)
    samples = find_samples(root, **{name: getattr(data, name) for name in READING})
    split = make_split(config, samples, report)
    write_split(run.path / SPLIT_FILE, split)
    train = take(list(split.train), sanity or data.max_train_samples, data.split_seed)
    val = train if sanity else take(list(split.val), data.max_val_samples, data.split_seed)
    test = [] if sanity else list(split.test)
    # A control has no base model.
    seen = pretraining_overlap("none" if control else data.base_trained_on, samples)
    logger.info("data: %d train, %d validation, %d test images", len(train), len(val), len(test))
    counts = {"found": len(samples), "patients": len({sample.patient for sample in samples})}
    requests = (data.max_train_samples, data.max_val_samples, None)
    for name, used, requested in zip(("train", "val", "test"), (train, val, test), requests, strict=True):
        available = len(getattr(split, name))
        if requested and requested > available:
            logger.warning("%s: %d images requested, %d available", name, requested, available)
        counts[name] = {"requested": requested, "available": available, "used": len(used)}
    counts |= {"split_unit": split.unit, "test_seen_by_base": sum(sample.key in seen for sample in test)}
    own = caveats_of_built_in(data.data_root, control or config.model.model_path)
    own |= {Caveat.CONTROL: Caveat.CONTROL.text(**CONTROLS[control])} if control else {}
    caveats = (caveats_of(split, subset, seen) | own for subset in (val, test))
    return RunData(train, val, test, counts, *caveats)


def check_before_training(config: TrainConfig) -> DataReport:
    """Checks every file of the user's data: DataError for errors, warnings are counted in the log."""
    root = config.data.data_root
    reading = {name: getattr(config.data, name) for name in READING}
    report = check_data(root, **reading)
    errors, warnings = report.of("error"), report.of("warning")
    given = [f" --{n} {shlex.quote(v)}" for n, v in hide_paths(reading).items() if v is not None]
    hint = f"`vesselrl data check DATA_ROOT{''.join(given)}`"
    if errors:
        count = f"This is the first of {len(errors)} errors; {hint} lists all."
        raise DataError(f"{errors[0].message} {count if len(errors) > 1 else f'{hint} shows more.'}")
    if warnings:
        kinds = Counter(finding.code for finding in warnings)
        listed = ", ".join(f"{CODES[code]}: {number}" for code, number in kinds.items())
        logger.warning("data check: %s (%s lists them)", listed, hint)
        for finding in warnings:
            if finding.code in PATIENT_CODES:
                logger.warning("PATIENTS: %s", finding.message)
    return report


def make_split(config: TrainConfig, samples: list[Sample], report: DataReport | None) -> Split:
    """The split with its caveats: a given one, that of the run of `init_lora`, or a new one."""
    data, init_lora = config.data, config.model.init_lora
    fold, unit = data.fold and tuple(map(int, data.fold.split("/"))), data.split_unit  # fold: (i, k)
    if data.split_file is not None:
        split = replace(read_split(data.split_file, samples), caveats=())  # those of another training
    elif (start := find_run(init_lora)) is not None:
        split = read_split(start / SPLIT_FILE, samples)
        if (fold or split.fold, unit) != (split.fold, split.unit):
            raise DataError(
                f"--init_lora {init_lora} goes on with that run's split (fold {split.fold}, unit "
                f"{split.unit}); it cannot be trained on fold {fold or split.fold}, unit {unit}. Leave the "
                "options out, or start from another adapter."
            )
    else:
        shares = None if report is None else report.foreground
        split = split_by_patient(samples, data.split_seed, shares=shares, fold=fold, unit=unit)
        split = split if init_lora is None else replace(split, caveats=(Caveat.UNKNOWN_START.text(),))
    for caveat in split.caveats:
        logger.warning(caveat)
    if report is not None and not split.is_leaky:
        if {finding.code for finding in report.findings} & {*PATIENT_CODES}:
            split = replace(split, caveats=(*split.caveats, Caveat.UNCLEAR_PATIENTS.text()))
        try:
            check_near_duplicates(split, report.near_duplicates)
        except DataError as error:
            if data.near_duplicates == "stop":
                raise DataError(f"{error} Or accept them with --near_duplicates allow.") from None
            logger.warning("%s", error)
            caveats = dict.fromkeys((*split.caveats, Caveat.NEAR_DUPLICATES.text()))
            split = replace(split, caveats=tuple(caveats))
    return split


def training_batches(config: TrainConfig, data: RunData, run: RunFolder, tiling: Tiling) -> BatchSource:
    """The batches of all epochs; writes contact_sheet.png and, with a curriculum, difficulty.json."""
    batch_size, seed, num_epochs = config.optim.batch_size, config.optim.seed, config.optim.num_epochs
    if config.run.sanity_overfit:
        num_epochs = max(num_epochs, math.ceil(SANITY_STEPS / math.ceil(len(data.train) / batch_size)))
    passes = partial(config.passes_of_epoch, num_epochs=num_epochs)
    share = {"first": processes.rank(), "stride": processes.count()}
    if config.run.sanity_overfit:  # without augmentation or curriculum
        dataset = VesselDataset(data.train, seed=seed, tiling=tiling)
        return BatchSource(dataset, batch_size, seed, num_epochs, num_passes=passes, **share)
    plan = get_augmentation(config.data.augment)
    logger.info("augmentation: %s", plan)
    difficulties = None
    if config.data.curriculum:
        table = difficulty_table(data.train, load_pixels)
        run.write_json("difficulty.json", table)
        difficulties = [table[sample.key]["difficulty"] for sample in data.train]
    dataset = VesselDataset(data.train, plan, seed, tiling)
    batches = BatchSource(dataset, batch_size, seed, num_epochs, difficulties, passes)
    shown = list(islice(batches.epoch(1), -(-SHEET_IMAGES // batch_size)))
    items = [item for batch in shown for item in zip(batch.keys, batch.images, batch.truths, strict=True)]
    with atomic_write(run.path / SHEET_FILE) as partial_file:
        Image.fromarray(contact_sheet(items[:SHEET_IMAGES])).save(partial_file, format="PNG")
    return replace(batches, **share)


def read_ahead(batches: Iterable[TrainBatch], store: FeatureStore | None) -> Iterator[TrainBatch]:
    """The batches; each is made, and its kept features are read, while the one before is learned from."""
    left = iter(batches)

    def make() -> TrainBatch | None:
        batch = next(left, None)
        if batch is not None and store is not None:
            store.fetch_ahead(batch.keys)
        return batch

    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(make)
        while (batch := coming.result()) is not None:
            coming = maker.submit(make)
            yield batch


@contextmanager
def open_run(config: TrainConfig, resume_from: Path | None) -> Iterator[RunFolder]:
    """The run's folder, a new one or that to go on in, locked; processes but the main one get a scratch."""
    if not processes.is_main():
        with TemporaryDirectory() as scratch, processes.peers("by peer"):
            if resume_from is not None and (metrics := RunFolder(resume_from).metrics_file).exists():
                shutil.copy(metrics, scratch)
            yield RunFolder(Path(scratch))
        return
    if resume_from is None:
        run = RunFolder.create(config.run.output_dir)
        logger.info("run folder %s", run.path)
    else:
        run = RunFolder(resume_from)
    with run.locked(), run.says_how_to_go_on(), processes.peers("by peer"):
        yield run


@contextmanager
def untouched(run: RunFolder, is_new: bool) -> Iterator[RunFolder]:
    """Where to prepare a run: in its new folder, which an error removes again, or in a scratch folder."""
    if not is_new:
        with TemporaryDirectory() as scratch:
            yield RunFolder(Path(scratch))
        return
    try:
        yield run
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise


def make_model(config: TrainConfig, device: str, data: RunData) -> tuple[Model, Tiling]:
    """The Sa2VA with adapters, or a baseline, which has no square, and how large images are cut."""
    tiling = Tiling.of_model(config.data.tile_px or 0, 0)
    if config.optim.control is None:
        model = load_policy(config, device, data.train)
        keep_states(model, data.train, [*data.val, *data.test])
        tiling = model.predictor.tiling
    else:
        torch.manual_seed(config.optim.seed)
        is_pretrained = config.optim.control == "unet_pretrained"
        model = Frangi() if config.optim.control == "frangi" else UNet(device, is_pretrained)
    for component, count in model.counts.items():
        logger.info("trainable in %s: %s values", component, f"{count:,}")
    return model, tiling


def make_updates(
    config: TrainConfig, model: Model, reward: Reward
) -> tuple[torch.optim.Optimizer | None, dict[str, PPOUpdate | SupervisedUpdate]]:
    """AdamW, and the steps by stage; none for a filter."""
    if not model.trainable:
        return None, {}
    groups = [{"params": [], "rate_factor": 1.0}, {"params": [], "rate_factor": config.detail_rate_factor}]
    for name, parameter in model.trainable.items():
        groups[".detail." in name]["params"].append(parameter)
    is_cuda = next(iter(model.trainable.values())).is_cuda
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=config.optim.weight_decay, fused=is_cuda)
    is_unet = config.optim.control is not None
    flips = np.random.default_rng([config.optim.seed, 3]) if is_unet else None
    updates = {"sft": SupervisedUpdate(model, optimizer, config, flips)}
    if not is_unet:
        updates["rl"] = PPOUpdate(model, optimizer, reward, config)
    return optimizer, updates


def check_settings(config: TrainConfig) -> Reward:
    """The reward of these settings, before anything is written; an error says which of them cannot be met."""
    check_scope(config.model.lora_scope)
    for name in config.run.trackers:
        if find_spec(name) is None:
            raise ValueError(f"--report_to {name} needs the package {name}: pip install 'vesselrl[{name}]'.")
    if processes.use_fsdp() and config.model.use_nf4:
        raise ValueError("--use_nf4 packs weights that FSDP cannot split: leave out one of the two.")
    return make_reward(config.to_dict())


def check_disk(config: TrainConfig, model: Model, run: RunFolder) -> None:
    """Raises RefusedError where the disk has no room for all that the run has yet to write, caches apart."""
    if not processes.is_main():
        return
    one = sum(values.numel() * values.element_size() for values in model.trainable.values())
    adapters = 2 + config.optim.num_epochs // config.run.save_freq
    written = sum(file.stat().st_size for file in run.path.rglob("*.safetensors"))
    left = max(0, one * (adapters + STATE_COPIES) - written)
    check_room(run.path, PICTURES_BYTES + left, "this training")


def check_reward(reward: Reward, data: RunData) -> None:
    """Scores a perfect and an empty mask, so that a broken function of the user's stops the run at once."""
    truth = load_mask(data.train[0])
    try:
        for mask in (truth, np.zeros_like(truth)):
            reward(mask, truth)
    except RewardError as error:
        error.exit_code = 2  # nothing has begun
        raise


def select_device(gpu: int) -> str:
    """`cuda:N` when there is such a GPU, else `cpu`; sets the CPU threads of the image library."""
    import cv2

    cv2.setNumThreads(1)  # masks are scored in threads of our own
    if not torch.cuda.is_available():
        logger.info("no GPU: running on the CPU with %d threads", torch.get_num_threads())
        return "cpu"
    if processes.count() > 1:
        return f"cuda:{torch.cuda.current_device()}"  # each process has its own
    if gpu >= torch.cuda.device_count():
        raise ValueError(f"--gpu is {gpu}, but there are {torch.cuda.device_count()} GPUs, counted from 0.")
    return f"cuda:{gpu}"


def learning_rate(config: TrainConfig, batches: BatchSource) -> Callable[[int], float]:
    """The learning rate by step, from 0: a warm cosine per stage, before the health rules lower it."""
    stage_of = partial(config.stage_of_epoch, num_epochs=batches.num_epochs)
    stages = [
        (sum(map(batches.num_batches, epochs)), config.rate_of_stage(stage))
        for stage, epochs in groupby(range(1, batches.num_epochs + 1), stage_of)
    ]

    def rate(step: int) -> float:
        for num_steps, peak in stages:
            if step < num_steps:
                return peak * warm_cosine(step, num_steps, config.optim.warmup_share)
            step -= num_steps
        return 0.0

    return rate


def warm_cosine(step: int, num_steps: int, warmup_share: float) -> float:
    """Factor on the peak rate for a step from 0: linear warm-up, then a half cosine from 1 down to 0.

    >>> [round(warm_cosine(step, 10, 0.2), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = max(1, round(num_steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))
