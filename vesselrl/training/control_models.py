"""The models of the controls, a small U-Net and the Frangi filter: they predict, are saved and are loaded.

Both see one grey image: the green channel, which is the whole image where it is grey and the channel with the
strongest vessels where it is not.
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.special import expit
from torch import Tensor
from torch.nn import functional

from vesselrl.inference.predictor import Prediction

BEST = "best_control"
FILE = "control.json"
WEIGHTS = "model.safetensors"
FORMAT = "vesselrl control 1"

UNET_FEATURES = (8, 16, 32, 64, 64, 8)
UNET_MULTIPLE = 16  # px; four halvings
UNET_SMALLEST = 32  # px; below that the deepest level has one pixel and nothing to normalise with

# The few choices of a filter: standard deviations of its Gaussians in px, a third of a vessel's width or so.
# The first is the start.
SIGMAS = ((2, 3), (2,), (3,), (2, 3, 4))
DEFAULT_VESSELNESS = 0.05
_FLOOR = 1e-6  # of the vesselness, so that every logit is finite


class ControlModel(ABC):
    """A control as a predictor."""

    @abstractmethod
    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one image, uint8 RGB (H, W, 3), at threshold 0.5."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes it to a new folder."""


class UNet(ControlModel):
    """MONAI's BasicUNet with 0.3 million random weights, on one grey image of any size.

    Args:
        device: such as cpu or cuda:0.
    """

    def __init__(self, device: str = "cpu") -> None:
        from monai.networks.nets import BasicUNet

        self.net = BasicUNet(spatial_dims=2, in_channels=1, out_channels=1, features=UNET_FEATURES).to(device)
        self.net.eval()
        self.device = device

    def logits(self, image: np.ndarray) -> Tensor:
        """(H, W) logits of one image, with gradient; padded for the net and cut back."""
        grey = torch.from_numpy(image[..., 1].astype(np.float32)).to(self.device)
        grey = (grey - grey.mean()) / grey.std().clamp(min=1.0)
        height, width = grey.shape
        right, below = (_padded(side) - side for side in (width, height))
        padded = functional.pad(grey[None, None], (0, right, 0, below), mode="replicate")
        return self.net(padded)[0, 0, :height, :width]

    @torch.inference_mode()
    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one image."""
        return _prediction(self.logits(image).float().cpu().numpy())

    def save(self, folder: Path) -> None:
        """Writes control.json and model.safetensors."""
        _write_settings(folder, {"control": "unet", "features": list(UNET_FEATURES)})
        save_file({name: value.contiguous() for name, value in self.net.state_dict().items()},
                  folder / WEIGHTS)  # fmt: skip


class Frangi(ControlModel):
    """The Frangi filter for dark vessels, cut at a vesselness.

    probability = v / (v + threshold) of the vesselness v, so that 0.5 is at the threshold.

    Args:
        sigmas: of the Gaussians, in px.
        threshold: vesselness above which a pixel is vessel, above 0.
    """

    def __init__(self, sigmas: tuple[float, ...] = SIGMAS[0], threshold: float = DEFAULT_VESSELNESS) -> None:
        self.sigmas = tuple(sigmas)
        self.threshold = threshold

    def predict(self, image: np.ndarray) -> Prediction:
        """Segments one image."""
        return self.cut(vesselness(image, self.sigmas))

    def cut(self, response: np.ndarray) -> Prediction:
        """The prediction of a vesselness that is known already."""
        return _prediction(np.log((response + _FLOOR) / (self.threshold + _FLOOR)).astype(np.float32))

    def save(self, folder: Path) -> None:
        """Writes control.json."""
        _write_settings(
            folder, {"control": "frangi", "sigmas": list(self.sigmas), "threshold": self.threshold}
        )


def vesselness(image: np.ndarray, sigmas: tuple[float, ...]) -> np.ndarray:
    """(H, W) response of the Frangi filter to dark ridges, in [0, 1]: the largest over the sigmas."""
    from skimage.filters import frangi

    return frangi(image[..., 1] / 255.0, sigmas=sigmas, black_ridges=True)


def load_control(folder: Path | str, device: str = "cpu") -> ControlModel | None:
    """The best model of a control run.

    Args:
        folder: the run folder, or a folder such as RUN/final_control.
        device: for the U-Net.

    Returns:
        None if this is no control run.

    Raises:
        ValueError: control.json is damaged or of another version.
    """
    folder = Path(folder)
    place = next((f for f in (folder / BEST, folder) if (f / FILE).is_file()), None)
    if place is None:
        return None
    try:
        settings = json.loads((place / FILE).read_text(encoding="utf-8"))
        kind = settings["control"] if settings["format"] == FORMAT else None
        if kind == "frangi":
            return Frangi(tuple(settings["sigmas"]), float(settings["threshold"]))
        if kind == "unet" and tuple(settings["features"]) == UNET_FEATURES:
            model = UNet(device=device)
            model.net.load_state_dict(load_file(place / WEIGHTS, device=device))
            return model
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{place} holds no control that can be read ({error}). Train it again.") from error
    raise ValueError(f"{place / FILE} is not of the format {FORMAT!r}. Train the control again.")


def _padded(side: int) -> int:
    """The next length that the U-Net can halve four times."""
    return max(UNET_SMALLEST, -(-side // UNET_MULTIPLE) * UNET_MULTIPLE)


def _prediction(logits: np.ndarray) -> Prediction:
    return Prediction(logits > 0, expit(logits), logits)


def _write_settings(folder: Path, settings: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **settings}, indent=1) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")
