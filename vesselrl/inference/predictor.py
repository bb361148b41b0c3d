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
from vesselrl.scoring.postprocessing import THRESHOLD_ONLY, PostProcessing


class Prediction(NamedTuple):
    """One image's result in its own pixels, all (H, W).

    Attributes:
        mask: bool, probability > threshold, then post-processed.
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
        post: how masks are made of probabilities.
    """

    def __init__(
        self,
        model: Sa2VA,
        processor: Sa2VAProcessor,
        prompt: str = DEFAULT_PROMPT,
        post: PostProcessing = THRESHOLD_ONLY,
    ) -> None:
        self.model = model
        self.processor = processor
        self.prompt = prompt
        self.post = post

    @classmethod
    def from_pretrained(
        cls,
        base_model: str | Path | None = None,
        lora_weights: str | Path | None = None,
        device: str | None = None,
        use_bf16: bool = False,
        **kwargs: str | PostProcessing,
    ) -> "Predictor":
        """Loads a base model and, if given, an adapter.

        Args:
            base_model: checkpoint folder; None is the embedded miniature.
            lora_weights: adapter folder such as RUN/best_lora; a run folder means its best_lora.
            device: `cpu`, `cuda` or `cuda:1`; None takes a GPU when there is one.
            use_bf16: vision tower and language model in bfloat16; SAM2 stays in float32.
            **kwargs: prompt, post.
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
            cut = np.float32(np.log(self.post.threshold / (1 - self.post.threshold)))
            probabilities = expit(values)
            mask = self.post.finisher(probabilities)(values > cut)
            results.append(Prediction(mask, probabilities, values))
        return results


def adapter_folder(path: Path) -> Path:
    """The adapter inside a run folder (`best_lora`), or the folder itself when it is an adapter."""
    inside = path / "best_lora"
    return inside if not (path / "adapter_config.json").exists() and inside.is_dir() else path
