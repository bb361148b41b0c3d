"""Supervised steps: the controls that reinforcement learning must beat, and the miniature's pre-training."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn import Module, functional
from torch.optim import Optimizer

from vesselrl.data.dataset import TrainBatch
from vesselrl.experiment.config import TrainConfig
from vesselrl.scoring.topology import topology
from vesselrl.training.checkpoint import Model
from vesselrl.training.health import check_moved, take_step

# Erosions of the soft skeleton; 10 reach the centre line of vessels up to 22 px wide, MONAI's 3 up to 8 px.
SKELETON_ITERATIONS = 10


def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice loss per image, at the image's own size.

    Mean over pixels of BCE + 1 - (2 * sum(p t) + 1) / (sum(p) + sum(t) + 1), with p = sigmoid(logit); logits
    and truth in {0, 1} are (B, H, W), losses (B,).
    """
    probability = torch.sigmoid(logits)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    overlap = (probability * truth).sum((1, 2))
    soft_dice = (2 * overlap + 1) / (probability.sum((1, 2)) + truth.sum((1, 2)) + 1)
    return cross_entropy + 1 - soft_dice


def mask_cldice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Half `mask_loss`, half 1 - soft clDice (Shit et al., clDice, CVPR 2021); shapes as for `mask_loss`.

    Soft clDice is 2 * tprec * tsens / (tprec + tsens), where tprec is the share of the prediction's soft
    skeleton inside the truth and tsens the reverse. One half is their largest weight: connectivity first.
    """
    probability = torch.sigmoid(logits)
    tprec = share_inside(soft_skeleton(probability), truth)
    tsens = share_inside(soft_skeleton(truth), probability)
    return 0.5 * mask_loss(logits, truth) + 0.5 * (1 - 2 * tprec * tsens / (tprec + tsens + 1e-4))


def mask_skeleton_recall_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """`mask_loss` plus 1 - the probability's mean over the truth's tube; shapes as for `mask_loss`.

    The tube: the truth's skeleton, and its other pixels up to two steps along rows and columns from there.
    Kirchhoff et al., Skeleton Recall Loss, ECCV 2024, with their weights of 1, and 1 added above and below.
    """
    tube = torch.stack([torch.from_numpy(topology(mask).skeleton) for mask in truth]).to(truth)
    tube = extreme(torch.maximum, extreme(torch.maximum, tube, "cross"), "cross") * truth
    return mask_loss(logits, truth) + 1 - share_inside(tube, torch.sigmoid(logits))


def mask_scnp_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """`mask_loss` of the worst logit of a pixel's class in its 3 x 3 (SCNP, Valverde et al., CVPR 2026)."""
    vessel, keys, end = truth > 0, pixel_keys(logits), 2**63 - 1
    lowest = extreme(torch.minimum, torch.where(vessel, keys, end), "square")
    highest = extreme(torch.maximum, torch.where(vessel, -end, keys), "square")
    return mask_loss(pick(logits, torch.where(vessel, lowest, highest)), truth)


def share_inside(part: Tensor, whole: Tensor) -> Tensor:
    """(sum(part * whole) + 1) / (sum(part) + 1) per image; both are (B, H, W) in [0, 1]."""
    return ((part * whole).sum((1, 2)) + 1) / (part.sum((1, 2)) + 1)


def soft_skeleton(image: Tensor) -> Tensor:
    """What openings take from an image (B, H, W) in [0, 1] and from its erosions, joined as a + (1 - a) * b.

    As MONAI's `soft_skel`, in a fraction of its time: integers that name pixels in the order of their values
    go through erosion and dilation, which choose pixels; the gradient need not.
    """
    keys = pixel_keys(image) if image.requires_grad else image
    skeleton, one = torch.zeros_like(image), torch.ones_like(image)
    for _ in range(SKELETON_ITERATIONS + 1):
        eroded = extreme(torch.minimum, keys, "cross")
        opened = extreme(torch.maximum, eroded, "square")
        ridge = torch.relu(pick(image, keys) - pick(image, opened))
        skeleton, keys = skeleton.lerp(one, ridge), eroded
    return skeleton


def pixel_keys(image: Tensor) -> Tensor:
    """Integers in the order of the pixels' values, as float32, with the pixel's number in the lower half."""
    bits = image.detach().float().contiguous().view(torch.int32)
    ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)  # as negative floats are a sign and a size
    return ordered.long() << 32 | torch.arange(image.numel(), device=image.device).view_as(image)


def pick(image: Tensor, keys: Tensor) -> Tensor:
    """The values of the pixels that keys stand for; keys that are values stand for themselves."""
    if keys.is_floating_point():
        return keys
    return image.flatten().index_select(0, keys.int().flatten()).view_as(keys)


def extreme(choose: Callable[..., Tensor], image: Tensor, shape: Literal["cross", "square"]) -> Tensor:
    """torch.minimum or torch.maximum over the cross of 5 or the square of 9 around each pixel, (B, H, W)."""
    result = image.clone()
    for axis in (1, 2):
        source, size = image if shape == "cross" else result.clone(), image.shape[axis] - 1
        for here, there in ((0, 1), (1, 0)):
            part = result.narrow(axis, here, size)
            choose(part, source.narrow(axis, there, size), out=part)
    return result


SFT_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce_dice": mask_loss,
    "bce_dice_cldice": mask_cldice_loss,
    "bce_dice_scnp": mask_scnp_loss,
    "bce_dice_skeleton_recall": mask_skeleton_recall_loss,
}


class SupervisedUpdate:
    """Supervised steps of adapters or, with `flips` of image and truth, of a U-Net, with self-checks."""

    def __init__(
        self, model: Model, optimizer: Optimizer, config: TrainConfig, flips: Generator | None = None
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.max_grad_norm = config.optim.max_grad_norm
        self.loss = SFT_LOSSES[config.optim.sft_loss]
        self.deep_supervision = config.optim.deep_supervision
        self.flips = flips
        self.checked, self.num_steps = False, 0

    def step(self, batch: TrainBatch) -> dict[str, float]:
        """One update on a batch, and its metrics; LearningError where the model does not move at first."""
        started = time.perf_counter()
        if self.flips:
            drawn = [[k for k in (0, 1) if self.flips.random() < 0.5] for _ in range(batch.size)]
            axes = drawn[batch.first :: batch.stride] or drawn[:1]
            parts = {name: getattr(batch, name) for name in ("images", "truths", "fovs")}
            batch = replace(batch, **{name: [*map(flip, part, axes)] for name, part in parts.items()})
        with self._decoder_logits(batch) as coarse:
            logits = self.model.batch_logits(batch.images, batch.keys)
        weighted = [(1.0, logits), *[(self.deep_supervision, coarse)] * bool(coarse)]
        losses = [
            weight * self.loss(one[None], torch.from_numpy(truth.astype(np.float32)).to(one.device)[None])
            for weight, maps in weighted
            for one, truth in zip(batch.inside(maps), batch.truths, strict=True)
        ]
        loss = torch.cat(losses).sum() / len(logits) * batch.weight
        shared = self.model, self.optimizer, loss, self.max_grad_norm
        value, norm = take_step(*shared, is_first=not self.checked)
        if not self.checked:
            check_moved(self.model.distance())
            self.checked = True
        self.num_steps += 1
        took = time.perf_counter() - started
        return {"train/loss": value, "train/grad_norm": norm, "time/step": took}

    @contextmanager
    def _decoder_logits(self, batch: TrainBatch) -> Iterator[list[Tensor]]:
        """Collects the logits that a detail head is given; of every other image it gets 0 in their place.

        They fit images that were trained on better than others, and the head would rely on them too much.
        """
        seen: list[Tensor] = []

        def watch(_: Module, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            is_shown = (self.num_steps + batch.places[len(seen)]) % 2
            seen.append(given[1])
            return given[0], given[1] if is_shown else torch.zeros_like(given[1])

        with self.model.head.register_forward_pre_hook(watch) if self.deep_supervision else nullcontext():
            yield seen

    def state_dict(self) -> dict[str, Any]:
        """State of the self-checks and of the flips, and the number of steps."""
        flips = self.flips and self.flips.bit_generator.state
        return {"checked": self.checked, "flips": flips, "num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.checked, self.num_steps = state["checked"], state.get("num_steps", 0)
        if self.flips:
            self.flips.bit_generator.state = state["flips"]


def flip(pixels: np.ndarray | None, axes: list[int]) -> np.ndarray | None:
    """A copy of an image or mask, if there is one, flipped along some axes."""
    return None if pixels is None else np.flip(pixels, axes).copy()
