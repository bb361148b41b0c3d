"""Rebuilds the embedded miniature.

Supervised pre-training from random weights on the synthetic source domain. The three candidate masks of the
decoder are trained alike and its quality head learns their true overlap, so that the official choice (largest
estimated IoU) means something and a later fine-tuning can rely on it.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vesselrl.models.checkpoint import load_tokenizer
from vesselrl.models.miniature import (
    EMBEDDED_SAM2,
    miniature_config,
    random_sa2va,
    write_miniature,
    write_tokenizer,
)
from vesselrl.models.processing import Sa2VAProcessor
from vesselrl.models.sa2va import DecodedMasks, Sa2VA, upsample
from vesselrl.synthetic.dataset import SOURCE, draw_sequence
from vesselrl.training.batches import warm_cosine
from vesselrl.training.supervised import mask_loss

logger = logging.getLogger(__name__)

IMAGE_PX = 256
NUM_THREADS = 2


@dataclass(frozen=True)
class PretrainPlan:
    """Everything that decides the miniature's weights; stored in its model card."""

    num_steps: int = 500
    batch_size: int = 4
    num_patients: int = 300
    num_frames: int = 3
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.05
    seed: int = 0
    data_seed: int = 1000


def pretrain_miniature(folder: Path, plan: PretrainPlan, log_every: int = 25) -> Sa2VA:
    """Trains a random miniature and writes it as a checkpoint folder in the official layout.

    Always two CPU threads, so that the same plan gives the same weights whatever the number of cores.

    Args:
        folder: where the checkpoint goes.
        plan: data, length and seeds.
        log_every: steps between log lines.
    """
    torch.set_num_threads(NUM_THREADS)
    config = miniature_config(EMBEDDED_SAM2)
    model = random_sa2va(config, plan.seed).train()
    model.lm.lm_head.requires_grad_(False)  # no text is generated here
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    processor = Sa2VAProcessor(config, load_tokenizer(folder))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine(step, plan.num_steps, plan.warmup_share)
    )
    started, running = time.perf_counter(), []
    for step, (images, truth) in enumerate(source_batches(plan), start=1):
        inputs = processor(images)
        decoded = model.decode(model.encode_image(inputs.sam_pixels), model.seg_prompts(inputs))
        loss = candidate_loss(decoded, truth, config.sam2.image_size)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        running.append(float(loss.detach()))
        if step % log_every == 0 or step == plan.num_steps:
            seconds = time.perf_counter() - started
            logger.info("pretrain step %d/%d loss %.4f, %.2f s per step", step, plan.num_steps,
                        np.mean(running[-log_every:]), seconds / step)  # fmt: skip
    write_miniature(folder, config, model.eval())
    return model


def candidate_loss(decoded: DecodedMasks, truth: Tensor, sam_px: int) -> Tensor:
    """Mean mask loss of the three candidates plus the squared error of their estimated IoU."""
    candidates = decoded.iou.shape[-1]
    low_res = decoded.logits[:, 0].flatten(0, 1)[:, None]
    sizes = (tuple(truth.shape[1:]),) * len(low_res)
    logits = torch.stack(upsample(low_res, sizes, sam_px))
    repeated = truth.repeat_interleave(candidates, dim=0)
    with torch.no_grad():
        hit, positive = (logits > 0) & (repeated > 0.5), (logits > 0) | (repeated > 0.5)
        iou = hit.sum((1, 2)) / positive.sum((1, 2)).clamp(min=1)
    quality = functional.mse_loss(decoded.iou[:, 0].flatten(), iou)
    return mask_loss(logits, repeated).mean() + 0.1 * quality


def source_batches(plan: PretrainPlan) -> Iterator[tuple[list[np.ndarray], Tensor]]:
    """`num_steps` batches of source images with random flips and quarter turns; (B, H, W) float truth."""
    frames = [
        frame
        for patient in range(1, plan.num_patients + 1)
        for frame in draw_sequence(SOURCE, patient, 1, plan.num_frames, IMAGE_PX, plan.data_seed)
    ]
    rng = np.random.default_rng([plan.seed, 1])
    for _ in range(plan.num_steps):
        chosen = [frames[k] for k in rng.integers(len(frames), size=plan.batch_size)]
        turned = [_turn(image, mask, int(rng.integers(8))) for image, mask in chosen]
        truth = torch.from_numpy(np.stack([mask for _, mask in turned])).float()
        yield [image for image, _ in turned], truth


def _turn(image: np.ndarray, mask: np.ndarray, choice: int) -> tuple[np.ndarray, np.ndarray]:
    """One of the eight symmetries of the square, the same for image and mask."""
    turned = [np.rot90(array, choice % 4, axes=(0, 1)) for array in (image, mask)]
    if choice >= 4:
        turned = [array[:, ::-1] for array in turned]
    return np.ascontiguousarray(turned[0]), np.ascontiguousarray(turned[1])
