"""Sa2VA as a stochastic policy over masks.

The action is a whole mask. Each pixel is on with probability sigmoid(logit / temperature), and neighbours are
sampled together (a Gaussian copula over a smooth random field), so that samples gain and lose whole twigs.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from vesselrl.errors import LearningError
from vesselrl.experiment.run_folder import atomic_write
from vesselrl.inference.predictor import Prediction, Predictor
from vesselrl.models.lora import adapter_delta_norm, adapter_parameters, save_adapter, trainable_counts
from vesselrl.models.processing import Sa2VAInputs, Sa2VAProcessor
from vesselrl.models.sa2va import DecodedMasks, ImageFeatures, Sa2VA, upsample
from vesselrl.training.checkpoint import tensor_hash, tensors_hash, with_values

logger = logging.getLogger(__name__)

GIB = 1024**3


class FeatureStore:
    """Features of the frozen image encoder by image, on the CPU: in memory first, then in files.

    A file is named after the model (`weights_hash`) and the pixels, so runs share the folder. Read back they
    are the computed ones to the last bit, in the same memory layout, which decides how later layers round.
    `disk_bytes` limits the folder, files of other models included; without one there is memory only.
    """

    def __init__(
        self,
        folder: Path | None = None,
        model_hash: str = "",
        memory_bytes: int = 2 * GIB,
        disk_bytes: int = 20 * GIB,
    ) -> None:
        self.folder = None if folder is None else folder / model_hash
        self._memory: dict[str, ImageFeatures] = {}
        self._memory_left = memory_bytes
        self._disk_left = disk_bytes
        for path in folder.rglob("*") if folder else ():
            with suppress(FileNotFoundError):  # other runs may remove files meanwhile
                self._disk_left -= path.stat().st_size if path.is_file() else 0

    def fetch(self, key: str, pixels: Tensor, compute: Callable[[], ImageFeatures]) -> ImageFeatures:
        """Features of one image, kept or computed; within a run a key stands for the same (1, 3, S, S)."""
        if key in self._memory:
            return self._memory[key]
        file = self.folder / f"{tensor_hash(pixels)}.safetensors" if self.folder else None
        features = self._read(file) if file and file.exists() else None
        if features is None:
            features = ImageFeatures(*(level.detach().cpu() for level in compute()))
            if file:
                self._write(file, features)
        size = sum(level.nbytes for level in features)
        if size <= self._memory_left:
            self._memory_left -= size
            self._memory[key] = features
        return features

    def _read(self, file: Path) -> ImageFeatures | None:
        try:
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata()
                levels = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
            if header["sha256"] != tensors_hash(levels, header["strides"]):
                raise ValueError("its checksum is wrong")
            strides = json.loads(header["strides"])
            levels = {n: torch.empty_strided(v.shape, strides[n]).copy_(v) for n, v in levels.items()}
            return ImageFeatures(**levels)
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s cannot be read (%s): computed again", file, error)
            return None

    def _write(self, file: Path, features: ImageFeatures) -> None:
        size = sum(level.nbytes for level in features)
        if size > self._disk_left:
            if self._disk_left > 0:
                logger.warning(
                    "%s has reached its limit: the features of further images stay in memory only. "
                    "Raise --cache_gb, or delete the folder.",
                    self.folder.parent,
                )
            self._disk_left = 0
            return
        levels = {name: level.contiguous() for name, level in features._asdict().items()}
        strides = json.dumps({name: level.stride() for name, level in features._asdict().items()})
        header = {"strides": strides, "sha256": tensors_hash(levels, strides)}
        try:
            with atomic_write(file) as partial:
                save_file(levels, partial, header)
            self._disk_left -= size
        except OSError as error:
            logger.warning("%s Features are kept in memory only.", error)
            self._disk_left = 0


def weights_hash(module: nn.Module) -> str:
    """First 16 hex digits of the sha256 over a module's names and values, its device and torch's version."""
    lines = [f"{name} {tensor_hash(value)}" for name, value in sorted(module.state_dict().items())]
    lines.append(f"{next(module.parameters()).device.type} {torch.__version__}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


class MaskPolicy:
    """A Sa2VA with trainable adapters: images in, mask logits at native size out.

    Outputs of frozen parts are kept for each image: the [SEG] state where the language model is frozen, the
    features where the image encoder is. Frozen parts see one image at a time, so that a kept value is the
    computed one to the last bit. Without `keys_repeat`, as with augmentation, nothing is kept beyond a batch.
    """

    kind = "lora"

    def __init__(
        self, peft_model: PeftModel, processor: Sa2VAProcessor, prompt: str, keys_repeat: bool = True
    ) -> None:
        self.peft_model = peft_model
        self.model: Sa2VA = peft_model.get_base_model()
        self.processor = processor
        self.prompt = prompt
        self.predictor = Predictor(self.model, processor, prompt)
        self.trainable = adapter_parameters(peft_model)
        self.counts = trainable_counts(peft_model)
        self.language_is_frozen = not any(".lm." in name for name in self.trainable)
        self.encoder_is_frozen = not any(".vision_encoder." in name for name in self.trainable)
        self.store: FeatureStore | None = None
        self.keys_repeat = keys_repeat
        self.start = self.values()
        self.reference_values = self.start
        self._states: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}

    # ---- As a model in training, see `checkpoint.Model`

    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one image."""
        self.peft_model.eval()
        return self.predictor.predict(image)

    def values(self) -> dict[str, Tensor]:
        """Returns a copy of the trainable values."""
        return {name: parameter.detach().clone() for name, parameter in self.trainable.items()}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Sets the trainable values."""
        for name, parameter in self.trainable.items():
            parameter.data.copy_(values[name])

    def distance(self, start: dict[str, Tensor] | None = None) -> float:
        """Euclidean distance of the adapters from `start`, by default their own."""
        return adapter_delta_norm(self.peft_model, start or self.start)

    def save(self, folder: Path) -> None:
        """Writes the adapter in PEFT's layout."""
        save_adapter(self.peft_model, folder)

    def identity(self) -> str:
        """Hash of base weights, the adapters' start, configuration, tokenizer and prompt."""
        weights = {n: v for n, v in self.model.state_dict().items() if ".lora_" not in n} | self.start
        tokenizer = self.processor.tokenizer.backend_tokenizer.to_str()
        return tensors_hash(weights, f"{self.model.config} {tokenizer} {self.prompt}")

    def batch_logits(self, images: list[np.ndarray], keys: list[str]) -> list[Tensor]:
        """Logits (H, W) per image for a supervised step, with LoRA dropout; the frozen model has none."""
        self.peft_model.train()
        inputs = self.prepare(images)
        decoded = self.decode(inputs, keys)
        logits = self.logits(decoded, decoded.best(), inputs)
        self.peft_model.eval()
        return logits

    def check_gradients(self) -> None:
        """Raises LearningError for first gradients that miss an adapter, or reach frozen weights.

        LoRA's first matrix has none while the second is zero; of the decoder's hyper-networks only that of
        the chosen candidate mask has one.
        """
        parameters = self.peft_model.named_parameters()
        strays = [name for name, p in parameters if p.grad is not None and not p.requires_grad]
        if strays:
            raise LearningError(f"{len(strays)} frozen weights received a gradient, such as {strays[0]}.")
        second = {name: p.grad for name, p in self.trainable.items() if ".lora_B." in name}
        silent = {name for name, gradient in second.items() if gradient is None or not bool(gradient.any())}
        candidates = {name for name in second if "output_hypernetworks_mlps." in name}
        if not candidates <= silent:
            silent -= candidates
        if silent or not second:
            raise LearningError(
                f"{len(silent)} of {len(self.trainable)} adapter matrices received no gradient, such as "
                f"{min(silent, default='(there are none)')}. No trainable parameter there can learn; "
                "narrow --lora_scope."
            )

    # ---- Forward passes

    def prepare(self, images: list[np.ndarray]) -> Sa2VAInputs:
        """Model inputs for a batch, on the model's device."""
        if not self.keys_repeat:
            self._states.clear()
            self._reference.clear()
        return self.processor(images, self.prompt).to(self.model.device)

    def decode(self, inputs: Sa2VAInputs, keys: list[str]) -> DecodedMasks:
        """Candidate masks of a batch; keys name the images, one each."""
        return self.model.decode(self.features(inputs, keys), self.seg_prompts(inputs, keys))

    def features(self, inputs: Sa2VAInputs, keys: list[str]) -> ImageFeatures:
        """SAM2's features of a batch; kept ones where the image encoder is frozen."""
        if not self.encoder_is_frozen:
            return self.model.encode_image(inputs.sam_pixels)
        with torch.no_grad():
            pairs = zip(inputs.sam_pixels.split(1), keys, strict=True)
            images = [self._frozen_features(*pair) for pair in pairs]
        return ImageFeatures(*(torch.cat(level) for level in zip(*images, strict=True)))

    def _frozen_features(self, pixels: Tensor, key: str) -> ImageFeatures:
        if self.store is None or not self.keys_repeat:
            return self.model.encode_image(pixels)
        kept = self.store.fetch(key, pixels, lambda: self.model.encode_image(pixels))
        return ImageFeatures(*(level.to(pixels.device) for level in kept))

    def seg_prompts(self, inputs: Sa2VAInputs, keys: list[str]) -> Tensor:
        """(B, P, C) prompt tokens, from kept [SEG] states where the language model is frozen."""
        if not self.language_is_frozen:
            return self.model.seg_prompts(inputs)
        with torch.no_grad():
            for index, key in enumerate(keys):
                if key not in self._states:
                    self._states[key] = self.model.seg_states(inputs.image(index)).cpu()
        projector, states = self.model.text_hidden_fcs, torch.cat([self._states[key] for key in keys])
        return projector(states.to(self.model.device, next(projector.parameters()).dtype))

    def logits(self, decoded: DecodedMasks, choice: Tensor, inputs: Sa2VAInputs) -> list[Tensor]:
        """Native-size logits (H, W) per image of the chosen candidates (B, P)."""
        return upsample(decoded.select(choice), inputs.sizes, self.model.config.sam2.image_size)

    # ---- The reference of the KL term

    def freeze_reference(self, values: dict[str, Tensor] | None = None) -> None:
        """Makes these values the reference, by default the present ones; PPO does so when it begins."""
        self.reference_values = self.values() if values is None else values
        self._reference.clear()

    def reference_logits(self, inputs: Sa2VAInputs, keys: list[str], choice: Tensor) -> list[Tensor]:
        """Native-size logits of the reference policy for the current policy's choice of candidates."""
        if any(key not in self._reference for key in keys):
            with torch.no_grad(), with_values(self, self.reference_values):
                decoded = self.decode(inputs, keys)
            self._reference.update(zip(keys, decoded.logits.cpu().unbind(0), strict=True))
        stored = torch.stack([self._reference[key] for key in keys]).to(self.model.device)
        return self.logits(DecodedMasks(stored, stored.new_zeros(stored.shape[:3])), choice, inputs)


def sample_masks(
    logits: Tensor, num_samples: int, correlation_px: float, temperature: float, generator: torch.Generator
) -> Tensor:
    """Samples K masks of one image, each pixel Bernoulli(sigmoid(logit / temperature)), neighbours together.

    (H, W) logits give (K, H, W) bool masks, the same ones on every device as the generator is on the CPU.
    `correlation_px` is the deviation of the Gaussian that smooths the random field, 0: independent pixels.
    """
    field = gaussian_field(num_samples, logits.shape, correlation_px, generator).to(logits.device)
    # P(field < quantile of p) = p for a standard normal field.
    uniform = torch.special.ndtr(field)
    return uniform < torch.sigmoid(logits.detach().float() / temperature)


def gaussian_field(
    count: int, shape: tuple[int, int], correlation_px: float, generator: torch.Generator
) -> Tensor:
    """(count, H, W) smooth random fields, exactly standard normal at every pixel, also at the borders."""
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
