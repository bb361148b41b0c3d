"""Sa2VA as a stochastic policy over masks.

The action is a whole mask. Each pixel is on with probability sigmoid(logit / temperature), and neighbouring
pixels are drawn together (a Gaussian copula over a smooth random field), so that samples gain and lose whole
twigs instead of specks while every pixel keeps exactly its own probability. Log-probabilities are therefore
per pixel.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from vesselrl.models.lora import adapter_parameters
from vesselrl.models.processing import Sa2VAInputs, Sa2VAProcessor
from vesselrl.models.sa2va import DecodedMasks, Sa2VA, upsample


class MaskPolicy:
    """The trainable model: images in, mask logits at native size out.

    Where the language model is frozen, an image's [SEG] state never changes: it is computed once and kept,
    and the language model is not run again for that image.
    """

    def __init__(self, peft_model: PeftModel, processor: Sa2VAProcessor, prompt: str) -> None:
        self.peft_model = peft_model
        self.model: Sa2VA = peft_model.get_base_model()
        self.processor = processor
        self.prompt = prompt
        self.trainable = adapter_parameters(peft_model)
        self.language_is_frozen = not any(".lm." in name for name in self.trainable)
        self._states: dict[str, Tensor] = {}
        self.start = self.values()
        self._reference_values = self.start
        self._reference: dict[str, Tensor] = {}

    def values(self) -> dict[str, Tensor]:
        """A copy of the trainable values."""
        return {name: parameter.detach().clone() for name, parameter in self.trainable.items()}

    def freeze_reference(self) -> None:
        """Makes the policy of this moment the reference; PPO does so when it begins."""
        self._reference_values = self.values()
        self._reference.clear()

    def prepare(self, images: list[np.ndarray]) -> Sa2VAInputs:
        """Model inputs for a batch, on the model's device."""
        return self.processor(images, self.prompt).to(self.model.device)

    def decode(self, inputs: Sa2VAInputs, keys: list[str]) -> DecodedMasks:
        """Candidate masks of a batch; keys name the images, one each, and index the cache."""
        features = self.model.encode_image(inputs.sam_pixels)
        return self.model.decode(features, self.seg_prompts(inputs, keys))

    def seg_prompts(self, inputs: Sa2VAInputs, keys: list[str]) -> Tensor:
        """(B, P, C) prompt tokens, from cached [SEG] states where the language model is frozen."""
        if not self.language_is_frozen:
            return self.model.seg_prompts(inputs)
        if any(key not in self._states for key in keys):
            with torch.no_grad():
                states = self.model.seg_states(inputs)
            self._states.update(zip(keys, states.cpu().unbind(0), strict=True))
        states = torch.stack([self._states[key] for key in keys]).to(self.model.device)
        return self.model.text_hidden_fcs(states.to(next(self.model.text_hidden_fcs.parameters()).dtype))

    def logits(self, decoded: DecodedMasks, choice: Tensor, inputs: Sa2VAInputs) -> list[Tensor]:
        """Native-size logits (H, W) per image of the chosen candidates (B, P)."""
        return upsample(decoded.select(choice), inputs.sizes, self.model.config.sam2.image_size)

    def reference_logits(self, inputs: Sa2VAInputs, keys: list[str], choice: Tensor) -> list[Tensor]:
        """Native-size logits of the reference policy; its low-resolution masks are computed once per image.

        The candidates are those that the current policy chose, so that a changed choice is no divergence.
        """
        if any(key not in self._reference for key in keys):
            with torch.no_grad(), self.at(self._reference_values):
                decoded = self.decode(inputs, keys)
            self._reference.update(zip(keys, decoded.logits.cpu().unbind(0), strict=True))
        stored = torch.stack([self._reference[key] for key in keys]).to(self.model.device)
        return self.logits(DecodedMasks(stored, stored.new_zeros(stored.shape[:3])), choice, inputs)

    @contextmanager
    def at(self, values: dict[str, Tensor]) -> Iterator[None]:
        """The model with other adapter values, for the length of a `with` block."""
        now = self.values()
        self._write(values)
        try:
            yield
        finally:
            self._write(now)

    def at_start(self) -> AbstractContextManager[None]:
        """The model with its starting adapter, for the length of a `with` block."""
        return self.at(self.start)

    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.trainable.items():
            parameter.data.copy_(values[name])


def sample_masks(
    logits: Tensor, num_samples: int, correlation_px: float, temperature: float, generator: torch.Generator
) -> Tensor:
    """Draws K masks of one image, each pixel Bernoulli(sigmoid(logit / temperature)), neighbours together.

    Args:
        logits: (H, W) float.
        num_samples: K.
        correlation_px: standard deviation of the smoothing of the random field, in pixels;
            0 draws pixels independently.
        temperature: above 0; larger explores more.
        generator: CPU generator, so that a seed gives the same masks on every device.

    Returns:
        (K, H, W) bool.
    """
    field = gaussian_field(num_samples, logits.shape, correlation_px, generator).to(logits.device)
    # P(field < quantile of p) = p for a standard normal field.
    uniform = torch.special.ndtr(field)
    return uniform < torch.sigmoid(logits.detach().float() / temperature)


def gaussian_field(
    count: int, shape: tuple[int, int], correlation_px: float, generator: torch.Generator
) -> Tensor:
    """(count, H, W) smooth random fields, exactly standard normal at every pixel.

    White noise on a larger canvas is filtered by a Gaussian of unit energy, so that borders
    need no correction.
    """
    height, width = shape
    if correlation_px <= 0:
        return torch.randn(count, height, width, generator=generator)
    radius = max(1, round(3 * correlation_px))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / correlation_px) ** 2)
    kernel = kernel / kernel.square().sum().sqrt()
    noise = torch.randn(count, 1, height + 2 * radius, width + 2 * radius, generator=generator)
    noise = functional.conv2d(noise, kernel.view(1, 1, -1, 1))
    return functional.conv2d(noise, kernel.view(1, 1, 1, -1))[:, 0]


def log_probs(logits: Tensor, masks: Tensor, temperature: float) -> Tensor:
    """Per-pixel log-probability of masks, log sigmoid(+-logit / temperature).

    Args:
        logits: (H, W).
        masks: (K, H, W) bool.
        temperature: as in sampling.

    Returns:
        (K, H, W), at most 0.
    """
    scaled = logits.float() / temperature
    return functional.logsigmoid(torch.where(masks, scaled, -scaled))
