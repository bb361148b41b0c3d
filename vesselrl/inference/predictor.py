"""Images in, vessel masks out: arrays with `Predictor`, files with `predict_files`."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.special import expit

from vesselrl.data.images import IMAGE_SUFFIXES, read_size
from vesselrl.data.patients import is_impersonal, names_a_person
from vesselrl.data.pseudonyms import MAPPING_FILE, pseudonyms
from vesselrl.data.records import list_images
from vesselrl.data.samples import read_image
from vesselrl.errors import DataError, NotFiniteError
from vesselrl.experiment.run_folder import atomic_write, check_room, check_writable
from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.lora import load_adapter
from vesselrl.models.processing import DEFAULT_PROMPT, Sa2VAProcessor
from vesselrl.models.sa2va import Sa2VA
from vesselrl.scoring.overlay import overlay
from vesselrl.scoring.postprocessing import THRESHOLD_ONLY, PostProcessing


class Prediction(NamedTuple):
    """One image's result in its own pixels, all (H, W)."""

    mask: np.ndarray  # bool, probability > threshold, then post-processed
    probabilities: np.ndarray  # float32 in [0, 1]
    logits: np.ndarray  # float32; probability = 1 / (1 + exp(−logit))


@dataclass(eq=False)
class Predictor:
    """Segments vessels with a Sa2VA, with or without an adapter inside."""

    model: Sa2VA
    processor: Sa2VAProcessor  # of the same checkpoint
    prompt: str = DEFAULT_PROMPT
    post: PostProcessing = THRESHOLD_ONLY  # probabilities to a mask

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

        Without `base_model` it is the embedded miniature; `lora_weights` is an adapter or a run folder, which
        means its best_lora. Without `device` a GPU is taken when there is one. With `use_bf16` vision tower
        and language model are in bfloat16, SAM2 stays in float32. `kwargs` are prompt and post.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, processor = load_sa2va(base_model, device, torch.bfloat16 if use_bf16 else torch.float32)
        if lora_weights is not None:
            model = load_adapter(model, adapter_folder(Path(lora_weights))).merge_and_unload()
        return cls(model.eval(), processor, **kwargs)

    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one uint8 RGB image (H, W, 3)."""
        return self.predict_batch([image])[0]

    @torch.inference_mode()
    def predict_batch(self, images: list[np.ndarray]) -> list[Prediction]:
        """Segments several images in one pass; their sizes may differ."""
        inputs = self.processor(images, self.prompt).to(self.model.device)
        # Compared as logits: at 0.5 the official rule is logit > 0, to the last bit.
        cut = np.float32(np.log(self.post.threshold / (1 - self.post.threshold)))
        results = []
        for logits in (output.float().cpu().numpy() for output in self.model(inputs)):
            check_finite(logits)
            probabilities = expit(logits)
            mask = self.post.postprocess_for(probabilities)(logits > cut)
            results.append(Prediction(mask, probabilities, logits))
        return results


def check_finite(logits: np.ndarray) -> None:
    """Refuses an output that would pass for an empty mask: nan is not above any threshold."""
    if not np.isfinite(logits).all():
        count = f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} pixels"
        advice = "Its weights are damaged or too large: take another checkpoint or adapter, or no --use_bf16"
        raise NotFiniteError(f"The model gives no numbers for {count}, so there is no mask. {advice}.")


def adapter_folder(path: Path) -> Path:
    """The adapter inside a run folder (`best_lora`), or the folder itself when it is an adapter."""
    inside = path / "best_lora"
    return inside if not (path / "adapter_config.json").exists() and inside.is_dir() else path


def predict_files(
    predictor: Predictor, path: Path, output_dir: Path, progress: Callable[[int, int], None] | None = None
) -> Iterator[dict]:
    """Segments an image or a folder of images and writes mask, probability and overlay of each.

    A pseudonym stands for a stem that names a person; only `patients.mapping.json` in the output folder says
    which file it is. Files of the same name are replaced. `progress` takes (images done, images in all).
    Yields `image` (file name), `foreground` (share of pixels, 0 to 1) and `mask` (path) of each.
    """
    if not path.exists():
        raise DataError(f"--image {path} does not exist; give an image file or a folder of images.")
    if not (files := list_images(path, deep=False) if path.is_dir() else [path]):
        raise DataError(f"{path} holds no image; known endings are {', '.join(IMAGE_SUFFIXES)}.")
    stems = [file.stem for file in files]
    # Messages call a file by its name where that says nothing about a person, else by its place.
    places = (f"image {place} of {len(files)} in name order" for place in range(1, len(files) + 1))
    shown = [f.name if is_impersonal(f.stem) else place for f, place in zip(files, places, strict=True)]
    if twice := [stem for stem, count in Counter(stems).items() if count > 1]:
        fault = f"{len(twice)} file names differ only by their ending: {shown[stems.index(twice[0])]}"
        raise DataError(f"{fault} and the next; rename one of each.")
    check_writable(output_dir)
    with suppress(DataError):  # said when it is its turn
        width, height = read_size(files[0], shown[0])
        check_room(output_dir, 4 * len(files) * width * height, f"{len(files)} images of this size")
    output_dir.mkdir(parents=True, exist_ok=True)
    people = [stem for stem in stems if names_a_person(stem)]
    keys = pseudonyms(people, mapping=output_dir / MAPPING_FILE) if people else {}
    for done, (file, name) in enumerate(zip(files, shown, strict=True), start=1):
        image = read_image(file, name)
        stem = keys[file.stem].key if file.stem in keys else file.stem
        yield write_prediction(image, predictor.predict(image), output_dir, stem) | {"image": file.name}
        if progress is not None:
            progress(done, len(files))


def write_prediction(image: np.ndarray, prediction: Prediction, output_dir: Path, stem: str) -> dict:
    """Writes `<stem>_mask.png` (0/255), `<stem>_probability.png` (16 bit) and `<stem>_overlay.png`."""
    pictures = {
        "mask": prediction.mask.astype(np.uint8) * 255,
        "probability": np.round(prediction.probabilities * 65535).astype(np.uint16),
        "overlay": overlay(image, prediction.mask),
    }
    for kind, pixels in pictures.items():
        with atomic_write(output_dir / f"{stem}_{kind}.png") as partial:
            Image.fromarray(pixels).save(partial, format="PNG")
    return {"mask": str(output_dir / f"{stem}_mask.png"), "foreground": float(prediction.mask.mean())}
