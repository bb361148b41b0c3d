"""From settings to the parts of a run: reward, device, model with adapters."""

import logging
from pathlib import Path

import numpy as np
import torch

from vesselrl.data.annotations import load_mask
from vesselrl.data.augment import get_augmentation
from vesselrl.experiment.config import RANDOM_MODEL, TrainConfig
from vesselrl.inference.predictor import adapter_folder
from vesselrl.models.loading import describe_config, load_sa2va
from vesselrl.models.lora import LORA_PRESETS, attach_lora, load_adapter
from vesselrl.models.miniature import random_checkpoint
from vesselrl.scoring.rewards import Reward
from vesselrl.training.feature_store import GIB, FeatureStore, weights_hash
from vesselrl.training.policy import MaskPolicy
from vesselrl.training.run_data import RunData

logger = logging.getLogger(__name__)


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
    if not policy.keys_repeat:
        logger.info("augmentation changes the images: nothing that the model says of them is kept")
        return None
    if not policy.encoder_is_frozen:
        logger.info("image features are not kept: the image encoder is trained")
        return None
    if config.cache_gb == 0:
        return FeatureStore()
    encoder_hash = weights_hash(policy.model.sam.vision_encoder)
    folder = Path(config.output_dir) / "cache" / "features"
    logger.info("image features are kept in memory and, up to %g GB, in %s", config.cache_gb, folder)
    return FeatureStore(folder, encoder_hash, disk_bytes=round(config.cache_gb * GIB))
