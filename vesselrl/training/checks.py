"""Self-checks at the first update: a run that cannot learn stops at once and says why."""

import re

import torch
from torch import Tensor, nn

from vesselrl.errors import LearningError, NotFiniteError
from vesselrl.models.lora import adapter_parameters

RATIO_TOLERANCE = 1e-4
# Only the hyper-network of the chosen candidate mask receives a gradient.
_CANDIDATE = re.compile(r"output_hypernetworks_mlps\.(\d)\.")


def check_first_ratio(ratio_gap: float, kl: float) -> None:
    """Before the first update the policy is the one that drew the masks, and is its own reference.

    Raises:
        LearningError: "The ratio before the first update is off by 0.02 ..."
    """
    if ratio_gap > RATIO_TOLERANCE:
        raise LearningError(
            f"The ratio before the first update is off by {ratio_gap:.2g} (allowed {RATIO_TOLERANCE:g}): "
            "two passes over the same image differ. Something random is active in the model (dropout, "
            "stochastic depth); turn it off."
        )
    if kl > RATIO_TOLERANCE:
        raise LearningError(
            f"The KL to the reference is {kl:.2g} before the first update, 0 was expected: the reference is "
            "not the starting policy. Start the run again from a saved adapter."
        )


def check_samples_differ(masks: Tensor) -> None:
    """At least two of the K sampled masks (K, H, W) of an image differ.

    Raises:
        LearningError: all samples are equal, so there is nothing to compare.
    """
    if len(masks) < 2 or bool((masks[1:] == masks[:1]).all()):
        raise LearningError(
            f"All {len(masks)} sampled masks of the first image are equal: the policy is completely sure of "
            "every pixel, or num_samples is below 2. Raise --temperature or --num_samples."
        )


def check_gradients(model: nn.Module) -> None:
    """Every adapter received a gradient, and nothing else did.

    LoRA's first matrix has none while the second is zero, so the second one is looked at.

    Raises:
        LearningError: naming adapters without gradient, or weights that should have none.
    """
    strays = [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
    if strays:
        raise LearningError(f"{len(strays)} frozen weights received a gradient, such as {strays[0]}.")
    trainable = adapter_parameters(model)
    silent = {
        name
        for name, parameter in trainable.items()
        if ".lora_B." in name and (parameter.grad is None or not bool(parameter.grad.any()))
    }
    candidates = {name for name in trainable if ".lora_B." in name and _CANDIDATE.search(name)}
    if candidates and not candidates <= silent:
        silent -= candidates
    if silent or not trainable:
        raise LearningError(
            f"{len(silent)} of {len(trainable)} adapter matrices received no gradient, such as "
            f"{min(silent, default='(there are none)')}. No trainable parameter there can learn; "
            "narrow --lora_scope."
        )


def check_seg_embedding(prompts: Tensor, negative: Tensor) -> None:
    """The [SEG] embedding depends on the image: the negative of an image changes it.

    Args:
        prompts: (B, P, C) for the images.
        negative: (B, P, C) for their negatives, with the texts left alone.

    Raises:
        LearningError: the embedding ignores the image.
    """
    change = (prompts - negative).norm() / prompts.norm()
    if not bool(change > 1e-4):
        raise LearningError(
            f"The negative of an image changes the [SEG] embedding by only {float(change):.2g}: the language "
            "model does not see the image. Check that <image> is in --prompt and that the tokenizer belongs "
            "to the checkpoint."
        )


def check_changed(delta_norm: float) -> None:
    """The adapter moved with the first update.

    Raises:
        LearningError: it did not.
    """
    if not torch.isfinite(torch.tensor(delta_norm)) or delta_norm == 0:
        raise LearningError(
            f"After the first update the adapter has moved by {delta_norm}. Check --learning_rate (0 teaches "
            "nothing, nan or inf means that it is far too large)."
        )


def check_finite(loss: Tensor) -> None:
    """The loss is a number.

    Raises:
        NotFiniteError: it is nan or infinite.
    """
    if not bool(torch.isfinite(loss.detach()).all()):
        raise NotFiniteError(f"The loss is {float(loss.detach())}: --learning_rate is probably too high.")


def check_finite_gradients(optimizer: torch.optim.Optimizer, *arguments: object) -> None:
    """The gradients that an optimizer is about to use are numbers; a hook for `register_step_pre_hook`.

    Raises:
        NotFiniteError: one is nan or infinite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
        raise NotFiniteError("The gradient is nan or infinite: --learning_rate is probably too high.")
