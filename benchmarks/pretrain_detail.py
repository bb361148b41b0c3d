"""Rebuilds the first weights of the detail head: supervised training on synthetic images of many kinds."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks import run
from benchmarks.pretrain import WEIGHT_DECAY
from vesselrl.data.augment import AUGMENTATIONS, augment
from vesselrl.models.checkpoint import save_detail_head
from vesselrl.models.sa2va import DetailHead
from vesselrl.synthetic.dataset import SOURCE, draw_sequence
from vesselrl.training.setup import warm_cosine
from vesselrl.training.supervised import mask_loss

logger = logging.getLogger(__name__)

LEARNING_RATE, WARMUP_SHARE = 2e-3, 0.05
IMAGE_PX, DATA_SEED = 256, 2000
# Every range of the generator opened.
WIDE = replace(
    SOURCE, name="wide", width_px=(1.2, 13.0), branching=1.1, tortuosity=1.2, loops=1.0,
    contrast=(0.2, 0.95), thickness_power=0.65, distal_fade=0.35, filling_floor=0.7,
    background_contrast=(0.0, 1.0), brightness=(0.2, 0.85), gamma=(0.6, 1.6), blur_px=(0.3, 1.8),
    motion_blur_px=(0.0, 3.0), noise=(0.002, 0.03), ribs=(0, 4), wires=(0, 2),
)  # fmt: skip
TEXTURED, SLOPED, INVERTED = 0.4, 0.3, 0.15  # shares of the images
UNKNOWN = 0.35  # share of the images whose coarse logits say nothing


def pretrain_detail(output: str, num_steps: int = 6000, num_images: int = 800, seed: int = 0) -> int:
    """Trains the detail head from random weights on synthetic images with coarse logits of many qualities.

    Args:
        output: safetensors file.
        num_steps: of one image each.
        num_images: drawn, each changed anew at every step.
        seed: of weights, images and order.
    """
    torch.set_num_threads(1)  # the same weights on any number of cores
    torch.manual_seed(seed)
    head = DetailHead().train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: warm_cosine(k, num_steps, WARMUP_SHARE))
    recent = []
    for step, (pixels, coarse, truth) in enumerate(wide_images(num_steps, num_images, seed), start=1):
        loss = mask_loss(head(pixels, coarse)[None], truth[None]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        rates.step()
        recent.append(float(loss.detach()))
        if step % 100 == 0 or step == num_steps:
            logger.info("step %d/%d, mean loss %.4f", step, num_steps, np.mean(recent))
            recent = []
    save_detail_head(head.eval(), Path(output))
    logger.info("sha256 %s", hashlib.sha256(Path(output).read_bytes()).hexdigest())
    return 0


def wide_images(num_steps: int, num_images: int, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Grey pixels, coarse logits and truth, all (H, W) float32, of one image after the other."""
    patients = range(1, num_images + 1)  # with little contrast agent and with much
    frames = [draw_sequence(WIDE, p, 1, 1 + p % 4, IMAGE_PX, DATA_SEED)[-1] for p in patients]
    order = np.random.default_rng([seed, 1])
    for step in range(num_steps):
        if step % num_images == 0:
            places = order.permutation(num_images)
        index = int(places[step % num_images])
        rng = np.random.default_rng([seed, 2, step])
        image, truth = augment(*frames[index], AUGMENTATIONS["strong"], seed, step, index)
        grey = varied(image[..., 0].astype(np.float32), rng)
        other = frames[int(rng.integers(num_images))][1]
        coarse = coarse_logits(truth, other, rng)
        yield tuple(map(torch.from_numpy, (grey, coarse, truth.astype(np.float32))))


def varied(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image with texture of several scales, with a slope of brightness, inverted, each at random."""
    size = len(grey)
    if rng.random() < TEXTURED:
        for cells in (size // 32, size // 8, size // 3):
            grey = grey + bumps(rng, size, cells) * rng.uniform(0, 12)
    if rng.random() < SLOPED:
        y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
        angle = rng.uniform(0, 2 * np.pi)
        grey = grey + rng.uniform(20, 120) * (x * np.cos(angle) + y * np.sin(angle))
    grey = grey.clip(0, 255)
    return np.ascontiguousarray(255 - grey if rng.random() < INVERTED else grey, np.float32)


def coarse_logits(truth: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Logits as a mask decoder gives them: too thin or thick, broken, with false vessels, or all 0."""
    if rng.random() < UNKNOWN:
        return np.zeros(truth.shape, np.float32)
    size = len(truth)
    parts = truth * np.float32(1)
    missing = bumps(rng, size, int(rng.integers(4, 24))) < rng.normal(-1.2, 0.8)
    parts[missing] = 0
    wrong = bumps(rng, size, int(rng.integers(3, 12))) > rng.normal(2.0, 0.7)
    parts = np.maximum(parts, np.rot90(other, int(rng.integers(4))) & wrong)
    soft = cv2.GaussianBlur(parts, (0, 0), rng.uniform(0.8, 3.5))
    logits = rng.uniform(6, 30) * (soft - rng.uniform(0.1, 0.7)) + rng.uniform(0, 1.5) * bumps(
        rng, size, size // 6
    )
    return logits.astype(np.float32)


def bumps(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """(size, size) smooth noise with about `cells` bumps across, standard deviation near 1."""
    noise = cv2.resize(
        rng.standard_normal((cells, cells), dtype=np.float32), (size, size), interpolation=cv2.INTER_CUBIC
    )
    return noise / max(float(noise.std()), 1e-6)


if __name__ == "__main__":
    run(pretrain_detail)
