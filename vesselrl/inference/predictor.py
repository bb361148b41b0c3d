"""Images in, vessel masks out."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from scipy.special import expit, logit

from vesselrl.data.images import read_rgb
from vesselrl.data.samples import read_image
from vesselrl.data.tiles import Tiling, tile_px_of
from vesselrl.errors import NotFiniteError
from vesselrl.experiment.options import Masks
from vesselrl.experiment.run_folder import atomic_write
from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.lora import adapter_folder, adapter_settings, load_adapter
from vesselrl.models.miniature import base_checkpoint
from vesselrl.models.processing import DEFAULT_PROMPT, Sa2VAInputs, Sa2VAProcessor
from vesselrl.models.sa2va import Sa2VA
from vesselrl.scoring.measurements import measurement_row, vessel_measurements
from vesselrl.scoring.overlay import overlay
from vesselrl.scoring.postprocessing import THRESHOLD_ONLY, PostProcessing, post_processing

KINDS = ("mask", "probability", "overlay")
STAMP = "vesselrl"  # the text in every result that says from which image and by which settings it is
ImageLike = str | Path | Image.Image | np.ndarray
# As seen, mirrored left to right, upside down, and both.
FLIPS = tuple((slice(None, None, y), slice(None, None, x)) for y in (None, -1) for x in (None, -1))
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Prediction(NamedTuple):
    """One image's result in its own pixels, all (H, W)."""

    mask: np.ndarray  # bool, probability > threshold, then post-processed
    probabilities: np.ndarray  # float32 in [0, 1]
    logits: np.ndarray  # float32; probability = 1 / (1 + exp(−logit))
    image: np.ndarray | None = None  # uint8 RGB (H, W, 3); a black one stands for None

    @property
    def overlay(self) -> np.ndarray:
        """The mask over its image, uint8 RGB (H, W, 3)."""
        black = np.zeros((*self.mask.shape, 3), np.uint8)
        return overlay(black if self.image is None else self.image, self.mask)

    @property
    def uncertainty(self) -> float:
        """One minus the Dice to expect of the mask if the probabilities hold: 1 − 2 Σ p m / (Σ p + Σ m).

        0: all probabilities are 0 or 1; 1: an empty mask, though some are not 0.
        """
        expected, size = self.probabilities.sum(dtype=np.float64), float(self.mask.sum())
        hits = self.probabilities[self.mask].sum(dtype=np.float64)
        return float(1 - 2 * hits / (expected + size)) if expected + size else 0.0

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        Image.fromarray(self.overlay).save(content, "PNG")
        return content.getvalue()

    def save(self, path: str | Path, origin: Mapping = MappingProxyType({})) -> dict:
        """Writes `<path>_mask.png` (0/255), `<path>_probability.png` (16 bit), `<path>_overlay.png`.

        Returns foreground and uncertainty, in [0, 1], and the measurements. A link in their place is
        replaced, not followed; nothing but pixels, these and `origin` is in them.
        """
        levels = np.round(self.probabilities * 65535).astype(np.uint16)
        pixels = self.mask.astype(np.uint8) * 255, levels, self.overlay
        found = {"foreground": float(self.mask.mean()), "uncertainty": round(self.uncertainty, 6)}
        found["measurements"] = measurement_row(vessel_measurements(self.mask))
        stamp = PngImagePlugin.PngInfo()
        stamp.add_text(STAMP, json.dumps({**origin, **found}))
        for kind, values in zip(KINDS, pixels, strict=True):
            with atomic_write(picture_path(path, kind)) as partial:
                Image.fromarray(values).save(partial, format="PNG", pnginfo=stamp)
        return found

    @classmethod
    def of_logits(
        cls, logits: np.ndarray, post: PostProcessing = THRESHOLD_ONLY, image: np.ndarray | None = None
    ) -> "Prediction":
        """The result of a model's output, float32 (H, W), on an image."""
        # Compared as logits: at 0.5 the official rule is logit > 0, to the last bit.
        cut = np.float32(np.log(post.threshold / (1 - post.threshold)))
        probabilities = expit(logits)
        return cls(post.postprocess_for(probabilities)(logits > cut), probabilities, logits, image)


@dataclass(eq=False)
class Predictor:
    """Segments vessels with a Sa2VA, with or without an adapter inside."""

    model: Sa2VA
    processor: Sa2VAProcessor  # of the same checkpoint
    prompt: str = DEFAULT_PROMPT
    post: PostProcessing = THRESHOLD_ONLY  # probabilities to a mask
    # In place of the model's own, from inputs and images (H, W, 3) to logits (H, W).
    forward: Callable[[Sa2VAInputs, list[np.ndarray]], list[torch.Tensor]] | None = None
    tile_px: int | None = None  # side of the tiles of large images, see `tiling`
    flips: bool = False  # the mean probability of an image and its three mirror images

    @classmethod
    def from_pretrained(
        cls,
        base_model: str | Path | None = None,
        lora_weights: str | Path | None = None,
        device: str | None = None,
        use_bf16: bool = False,
        **kwargs: str | int | PostProcessing | None,
    ) -> "Predictor":
        """Loads a base model and, if given, an adapter.

        Without `base_model` it is that of the adapter's run, or the embedded miniature; `lora_weights` is an
        adapter, also of a hub, or a run folder, which means its best_lora. Without `device` a GPU is taken
        when there is one. With `use_bf16` vision tower and language model are in bfloat16, SAM2 stays in
        float32. `kwargs` are prompt, post, tile_px and flips.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype, settings = torch.bfloat16 if use_bf16 else torch.float32, adapter_settings(lora_weights)
        with base_checkpoint(base_model or settings.get("model_path"), settings.get("seed")) as folder:
            model, processor = load_sa2va(folder, device, dtype)
        if lora_weights is not None:
            model = load_adapter(model, adapter_folder(lora_weights)).merge_and_unload()
        return cls(model.eval(), processor, **kwargs)

    def predict(self, image: ImageLike) -> Prediction:
        """Segments one image, given as `as_rgb` takes it."""
        return self.predict_batch([image])[0]

    @torch.inference_mode()
    def predict_batch(self, images: Sequence[ImageLike]) -> list[Prediction]:
        """Segments several images, whose sizes may differ: those that are not cut in one pass."""
        images = [as_rgb(image, f"Image {number}") for number, image in enumerate(images)]
        found = self._flipped(images) if self.flips else self._sized(images)
        return [Prediction.of_logits(one, self.post, image) for one, image in zip(found, images, strict=True)]

    @property
    def tiling(self) -> Tiling:
        """Tiles of `tile_px` (0: none), or (None) of SAM2's square for images more than twice as large."""
        return Tiling.of_model(self.tile_px, self.processor.config.sam2.image_size)

    def _flipped(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Logits of the mean probability of each image and its three mirror images."""
        means = [np.zeros(image.shape[:2], np.float32) for image in images]
        for flip in FLIPS:
            found = self._sized([np.ascontiguousarray(image[flip]) for image in images])
            for mean, logits in zip(means, found, strict=True):
                mean += expit(logits[flip]) / np.float32(len(FLIPS))
        return [*map(_finite_logit, means)]

    def _sized(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Logits of images of any size."""
        cut = [self.tiling.cuts(*image.shape[:2]) for image in images]
        whole = [image for image, is_cut in zip(images, cut, strict=True) if not is_cut]
        logits = iter(self._logits(whole) if whole else ())
        pairs = zip(images, cut, strict=True)
        return [self._tiled(image) if is_cut else next(logits) for image, is_cut in pairs]

    def _logits(self, images: list[np.ndarray]) -> list[np.ndarray]:
        inputs = self.processor(images, self.prompt, device=self.model.device)
        outputs = self.model(inputs) if self.forward is None else self.forward(inputs, images)
        results = [output.float().cpu().numpy() for output in outputs]
        for logits in results:
            check_finite(logits)
        return results

    def _tiled(self, image: np.ndarray) -> np.ndarray:
        """Logits of an image from tiles, one after the other, whose probabilities are blended."""
        return _finite_logit(self.tiling.blend(image, lambda tile: expit(self._logits([tile])[0])))

    def fingerprint(self) -> str:
        """Hash of all that a mask depends on beside its image: model, tokenizer, prompt and settings."""
        sums = []
        for name, tensor in self.model.state_dict().items():
            bits = tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
            # Sums are much faster than a hash; the second tells apart what stands in another order.
            totals = [int(part.sum(dtype=torch.int64)) for part in (bits, bits[::13])]
            sums.append((name, str(tensor.dtype), tuple(tensor.shape), totals))
        tokenizer = self.processor.tokenizer.backend_tokenizer.to_str()
        about = (sums, str(self.model.config), tokenizer, self.prompt, self.post, self.tiling, self.flips)
        return hashlib.sha256(repr(about).encode()).hexdigest()


def _finite_logit(probabilities: np.ndarray) -> np.ndarray:
    limits = np.finfo(np.float32)
    return logit(probabilities.clip(limits.tiny, 1 - limits.epsneg))


def check_finite(logits: np.ndarray) -> None:
    """Refuses an output that would pass for an empty mask: nan is not above any threshold."""
    if not np.isfinite(logits).all():
        count = f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} pixels"
        advice = "Its weights are damaged or too large: take another checkpoint or adapter, or no --use_bf16"
        raise NotFiniteError(f"The model gives no numbers for {count}, so there is no mask. {advice}.")


def load_predictor(args: Masks, adapter: str | None) -> Predictor:
    """The model as its adapter's run used it, where nothing else is asked for."""
    settings = adapter_settings(adapter)
    prompt = args.prompt or settings.get("prompt", DEFAULT_PROMPT)
    post = post_processing(settings, args.threshold, args.min_component_px, args.close_gaps)
    made = {"prompt": prompt, "post": post, "use_bf16": args.use_bf16, "flips": args.flips}
    made["tile_px"] = tile_px_of(settings, args.tile_px)
    return Predictor.from_pretrained(args.base_model, adapter, **made)


def picture_path(result: str | Path, kind: str) -> Path:
    """The file of one of the `KINDS` of a result."""
    return Path(f"{result}_{kind}.png")


def as_rgb(image: ImageLike, name: str = "The image") -> np.ndarray:
    """A file, Pillow image or array as `read_rgb` gives a file: uint8 RGB (H, W, 3).

    Arrays are grey (H, W) of 8 or 16 bits, RGB or RGBA. What is no file is not turned.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image), name)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return image
    file = io.BytesIO()
    try:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture.save(file, "TIFF")
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        given = [str(getattr(image, part, "")) for part in ("dtype", "shape")]
        found = " ".join(filter(None, given)) or type(image).__name__
        needed = "a file, a Pillow image, or an array of uint8 or uint16: grey (H, W), or uint8 RGB (H, W, 3)"
        raise ValueError(f"{name} is {found}; give {needed}.") from None
    return read_rgb(file, name)
