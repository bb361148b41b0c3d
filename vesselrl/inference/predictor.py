"""Images in, vessel masks out; the only class that users of a trained model need."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import expit

from vesselrl.models.loading import load_sa2va
from vesselrl.models.lora import load_adapter, merge_adapter
from vesselrl.models.processing import DEFAULT_PROMPT, Sa2VAProcessor
from vesselrl.models.sa2va import Sa2VA
from vesselrl.scoring.masks import drop_small_components


class Prediction(NamedTuple):
    """One image's result in its own pixels, all (H, W).

    Attributes:
        mask: bool, probability > threshold, without components that are too small.
        probabilities: float32 in [0, 1].
        logits: float32; probability = 1 / (1 + exp(-logit)).
    """

    mask: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray


class Predictor:
    """Segments vessels with a Sa2VA.

    Args:
        model: native Sa2VA, with or without an adapter inside.
        processor: of the same checkpoint.
        prompt: the question put to the model.
        threshold: probability above which a pixel is vessel, between 0 and 1.
        min_component_px: smallest 8-connected component that the mask keeps, in px; 0 keeps all.

    Raises:
        ValueError: the threshold is not between 0 and 1, or min_component_px is negative.
    """

    def __init__(
        self,
        model: Sa2VA,
        processor: Sa2VAProcessor,
        prompt: str = DEFAULT_PROMPT,
        threshold: float = 0.5,
        min_component_px: int = 0,
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"The threshold is {threshold}; give a probability between 0 and 1.")
        if min_component_px < 0:
            raise ValueError(f"min_component_px is {min_component_px}; give 0 or more.")
        self.model = model
        self.processor = processor
        self.prompt = prompt
        self.threshold = threshold
        self.min_component_px = min_component_px

    @classmethod
    def from_pretrained(
        cls,
        base_model: str | Path | None = None,
        lora_weights: str | Path | None = None,
        device: str | None = None,
        use_bf16: bool = False,
        **kwargs: str | float,
    ) -> "Predictor":
        """Loads a base model and, if given, an adapter.

        Args:
            base_model: checkpoint folder; None is the embedded miniature.
            lora_weights: adapter folder such as RUN/best_lora; a run folder means its best_lora.
            device: `cpu`, `cuda` or `cuda:1`; None takes a GPU when there is one.
            use_bf16: vision tower and language model in bfloat16; SAM2 stays in float32.
            **kwargs: prompt, threshold, min_component_px.
        """
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, processor = load_sa2va(base_model, where, torch.bfloat16 if use_bf16 else torch.float32)
        if lora_weights is not None:
            model = merge_adapter(load_adapter(model, adapter_folder(Path(lora_weights))))
        return cls(model.eval(), processor, **kwargs)

    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one image.

        Args:
            image: uint8 RGB (H, W, 3).
        """
        return self.predict_batch([image])[0]

    @torch.inference_mode()
    def predict_batch(self, images: list[np.ndarray]) -> list[Prediction]:
        """Segments several images in one pass; their sizes may differ."""
        inputs = self.processor(images, self.prompt).to(self.model.device)
        results = []
        for logits in self.model(inputs):
            values = logits.float().cpu().numpy()
            # Compared as logits: at 0.5 the official rule is logit > 0, to the last bit.
            cut = np.float32(np.log(self.threshold / (1 - self.threshold)))
            mask = drop_small_components(values > cut, self.min_component_px)
            results.append(Prediction(mask, expit(values), values))
        return results


def adapter_folder(path: Path) -> Path:
    """The adapter inside a run folder (`best_lora`), or the folder itself when it is an adapter."""
    inside = path / "best_lora"
    return inside if not (path / "adapter_config.json").exists() and inside.is_dir() else path
