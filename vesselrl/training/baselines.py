"""Baselines in place of the model: a small U-Net, from random weights or pre-trained, and the Frangi filter.

Both see the green channel alone: the whole of a grey image, and the strongest vessels of another.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vesselrl.data.polygons import resize_mask
from vesselrl.data.samples import Sample, load_fov
from vesselrl.data.splits import take
from vesselrl.errors import LearningError
from vesselrl.evaluation.evaluate import Load, load_pixels
from vesselrl.evaluation.tuning import counts_by_threshold, threshold_curve
from vesselrl.experiment.config import RANDOM_MODEL, TrainConfig
from vesselrl.experiment.progress import Progress
from vesselrl.experiment.run_folder import atomic_write, damaged_files, read_json, write_json, write_sums
from vesselrl.inference.predictor import Prediction, check_finite
from vesselrl.models.checkpoint import check_weight, load_detail_head
from vesselrl.models.sa2va import FEATURES, GreyUNet
from vesselrl.scoring.overlap import dice
from vesselrl.training.checkpoint import DAMAGED, tensors_hash

logger = logging.getLogger(__name__)

BEST = "best_control"
FILE = "control.json"
WEIGHTS = "model.safetensors"
FORMAT = "vesselrl control 1"

# The choices of a filter, first its start: standard deviations of Gaussians in px, about a third of a vessel.
SIGMAS = ((2, 3), (2,), (3,), (2, 3, 4))
DEFAULT_VESSELNESS = 0.05
FIT_IMAGES, FIT_PX = 8, 512  # that a model is compared with the filter on, and their longest side
TEACHING_PASSES = 700  # over images, that teach it: R078
BRIGHT = 1.5  # vessels are where the filter for bright ones has so many times the Dice of the other
INVERT = "The vessels are bright, those of angiograms are dark: invert the images (255 - value of a pixel)."
_FLOOR = 1e-6  # of the vesselness, so that every logit is finite


class _Control:
    """What both are as a model in training, see `checkpoint.Model`."""

    kind, head = "control", None
    images_per_pass = 1

    def predict_batch(self, images: list[np.ndarray]) -> list[Prediction]:
        """Segments several images, one after the other."""
        return [*map(self.predict, images)]


class UNet(_Control):
    """A U-Net of 0.3 million weights on the image alone: random ones, or the detail head's first."""

    def __init__(self, device: str = "cpu", is_pretrained: bool = False) -> None:
        self.is_pretrained, self.device = is_pretrained, device
        self.on_image = (load_detail_head() if is_pretrained else GreyUNet()).to(device).eval()
        self.net = self.on_image.unet.requires_grad_(True)
        self.trainable = dict(self.net.named_parameters())
        self.savings, self.store = {}, None
        self.counts = {"unet": sum(parameter.numel() for parameter in self.trainable.values())}
        self.start = self.base = self.values()

    def logits(self, image: np.ndarray) -> Tensor:
        """(H, W) logits of one image, with gradient."""
        grey = torch.from_numpy(image[..., 1].astype(np.float32)).to(self.device)
        return self.on_image(grey, torch.zeros_like(grey)) if self.is_pretrained else self.on_image(grey)

    def batch_logits(self, images: list[np.ndarray], keys: list[str]) -> list[Tensor]:
        """Logits per image for a supervised step."""
        return [self.logits(image) for image in images]

    @torch.inference_mode()
    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one image, uint8 RGB (H, W, 3), at threshold 0.5."""
        return _prediction(self.logits(image).float().cpu().numpy())

    def check_gradients(self) -> None:
        """Refuses a first gradient that misses a weight."""
        if silent := [name for name, weight in self.trainable.items() if weight.grad is None]:
            raise LearningError(f"{len(silent)} weights of the U-Net have no gradient, such as {silent[0]}.")

    def values(self) -> dict[str, Tensor]:
        """Returns a copy of the weights."""
        return {name: value.clone() for name, value in self.net.state_dict().items()}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Sets the weights."""
        self.net.load_state_dict(values)

    def distance(self) -> float:
        """Euclidean distance of the weights from their start."""
        now = self.net.state_dict()
        return float(sum((now[name] - self.start[name]).double().square().sum() for name in now) ** 0.5)

    def save(self, folder: Path) -> None:
        """Writes control.json and model.safetensors."""
        control = "unet_pretrained" if self.is_pretrained else "unet"
        write_json(folder / FILE, {"format": FORMAT, "control": control, "features": FEATURES})
        with atomic_write(folder / WEIGHTS) as partial:
            save_file({name: value.contiguous() for name, value in self.net.state_dict().items()}, partial)
        write_sums(folder)

    def identity(self) -> str:
        """Hash of the first weights."""
        return tensors_hash(self.start)


class Frangi(_Control):
    """The Frangi filter for dark vessels with Gaussians of some sigmas, in px, cut at a vesselness.

    probability = v / (v + threshold) of the vesselness v, so that 0.5 is at the threshold.
    """

    def __init__(self, sigmas: Sequence[float] = SIGMAS[0], threshold: float = DEFAULT_VESSELNESS) -> None:
        self.trainable: dict = {}
        self.counts: dict[str, int] = {}
        self.start = self.base = (tuple(sigmas), threshold)
        self.restore(self.start)

    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one image, uint8 RGB (H, W, 3), at threshold 0.5."""
        return self.cut(vesselness(image, self.sigmas))

    def cut(self, response: np.ndarray) -> Prediction:
        """Prediction of a vesselness that is known already."""
        return _prediction(np.log((response + _FLOOR) / (self.threshold + _FLOOR)).astype(np.float32))

    def values(self) -> tuple[tuple[float, ...], float]:
        """Returns sigmas and threshold."""
        return self.sigmas, self.threshold

    def restore(self, values: tuple[tuple[float, ...], float]) -> None:
        """Sets sigmas and threshold."""
        self.sigmas, self.threshold = values

    def distance(self) -> float:
        """Distance of the threshold from its start, as the difference of their logarithms."""
        return float(abs(np.log(self.threshold / self.start[1])))

    def save(self, folder: Path) -> None:
        """Writes control.json."""
        settings = {"control": "frangi", "sigmas": self.sigmas, "threshold": self.threshold}
        write_json(folder / FILE, {"format": FORMAT} | settings)
        write_sums(folder)

    def identity(self) -> str:
        """Where the choice of a filter starts."""
        return str(self.start)


def vesselness(image: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """(H, W) response of the Frangi filter to dark ridges, in [0, 1]: the largest over the sigmas."""
    from skimage.filters import frangi

    return frangi(image[..., 1] / 255.0, sigmas=sigmas, black_ridges=True)


def best_frangi(
    samples: Sequence[Sample], progress: Progress | None = None, load: Load = load_pixels
) -> tuple[tuple[float, ...], float]:
    """The sigmas and the threshold with the best mean over patients of Dice on these samples."""
    counted: dict[tuple, list] = {sigmas: [] for sigmas in SIGMAS}
    for number, sample in enumerate(samples, start=1):
        image, truth = load(sample)
        # The filter takes the largest response over its sigmas, so each is computed once for all sets.
        single = {s: vesselness(image, (s,)) for s in sorted({s for sigmas in SIGMAS for s in sigmas})}
        for sigmas, counts in counted.items():
            response = np.maximum.reduce([single[s] for s in sigmas]) * _seen(sample, truth.shape)
            counts.append(counts_by_threshold(Frangi(sigmas).cut(response).probabilities, truth))
        if progress is not None:
            progress(number, len(samples))
    patients = [sample.patient for sample in samples]
    curves = {sigmas: threshold_curve(counts, patients) for sigmas, counts in counted.items()}
    best = max(curves, key=lambda sigmas: curves[sigmas].best.dice)
    probability = curves[best].best.threshold
    # The curve's thresholds are on v / (v + default); the same cut as a vesselness.
    return best, DEFAULT_VESSELNESS * probability / (1 - probability)


def _seen(sample: Sample, shape: tuple[int, int]) -> np.ndarray | bool:
    """The field of view at the size of a mask; True where all of the image counts."""
    return True if (fov := load_fov(sample)) is None else resize_mask(fov, shape)


def measure_fit(config: TrainConfig, data: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Dice and foreground of a model on a few images (in `rows`), beside the truth's and those of a filter.

    The filter, for dark or bright vessels, was chosen on training images. Nothing for controls.
    """
    if config.optim.control or config.model.model_path == RANDOM_MODEL:
        return {}
    train, val = (take(samples, FIT_IMAGES) for samples in (data.train, data.val))
    own = [row for row in rows if row["key"] in {sample.key for sample in val}]
    fit: dict[str, Any] = {"images": len(own)}
    fit |= {name: float(np.mean([row[name] for row in own])) for name in ("dice", "foreground")}
    for polarity in ("dark", "bright"):
        load = partial(_load_small, is_negative=polarity == "bright")
        model, pairs = Frangi(*best_frangi(train, load=load)), [*map(load, val)]
        masks = [model.predict(image).mask for image, _ in pairs]
        triples = zip(val, masks, pairs, strict=True)
        scores = [dice(mask & _seen(sample, mask.shape), truth) for sample, mask, (_, truth) in triples]
        fit[f"frangi_{polarity}"] = float(np.mean(scores))
    fit["true_foreground"] = float(np.mean([truth.mean() for _, truth in pairs]))
    logger.info("fit before training: %s", ", ".join(f"{name} {value:.3g}" for name, value in fit.items()))
    return fit | {"teaching": teaching(config, len(data.train), fit)}


def _load_small(sample: Sample, is_negative: bool) -> tuple[np.ndarray, np.ndarray]:
    """An image, or its negative, and its truth, at most FIT_PX wide and high."""
    image, truth = load_pixels(sample)
    factor = min(1, FIT_PX / max(truth.shape))
    size = tuple(max(1, round(factor * side)) for side in truth.shape[::-1])
    image = cv2.resize(255 - image if is_negative else image, size, interpolation=cv2.INTER_AREA)
    return image, resize_mask(truth, size[::-1])


def teaching(config: TrainConfig, num_images: int, fit: Mapping[str, float]) -> str:
    """What teaches a model images that it does not know, beyond what a run on `num_images` does already."""
    num_epochs = math.ceil(TEACHING_PASSES / (num_images * config.ppo.num_passes))
    options = {
        "--stage sft+rl": config.optim.stage == "rl",
        "--detail_head pretrained": config.model.detail_head == "none",
        "--augment flips": config.data.augment == "none",
        f"--num_epochs {num_epochs}": config.optim.num_epochs < num_epochs,
    }
    missing = " ".join(option for option, is_missing in options.items() if is_missing)
    teach = f"Teach it: {missing}." if missing else "This training teaches it: look at the later validations."
    return f"{INVERT} {teach}" if fit["frangi_bright"] > BRIGHT * fit["frangi_dark"] else teach


def load_control(folder: Path | str, device: str = "cpu") -> UNet | Frangi | None:
    """The best model of a control run, or that of a folder such as RUN/final_control; None for others."""
    folder = Path(folder)
    if (place := next((f for f in (folder / BEST, folder) if (f / FILE).is_file()), None)) is None:
        return None
    try:
        if damaged := damaged_files(place):
            raise ValueError(f"{damaged[0]} is not as it was saved")
        settings = read_json(place / FILE)
        kind = settings["control"] if settings["format"] == FORMAT else None
        if kind == "frangi":
            return Frangi(tuple(settings["sigmas"]), float(settings["threshold"]))
        if kind in ("unet", "unet_pretrained") and tuple(settings["features"]) == FEATURES:
            model, weights = UNet(device, kind != "unet"), load_file(place / WEIGHTS, device=device)
            for name, tensor in weights.items():
                check_weight(name, tensor, place)
            model.net.load_state_dict(weights)
            return model
    except DAMAGED as error:
        raise ValueError(f"{place} holds no control that can be read ({error}). Train it again.") from error
    raise ValueError(f"{place / FILE} is not of the format {FORMAT!r}. Train the control again.")


def _prediction(logits: np.ndarray) -> Prediction:
    check_finite(logits)
    return Prediction.of_logits(logits)
