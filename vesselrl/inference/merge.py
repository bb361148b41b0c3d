"""Writes a merged copy of a checkpoint and proves that it predicts what base and adapter predict together."""

from pathlib import Path

import numpy as np
import torch

from vesselrl.errors import CheckpointError
from vesselrl.experiment.run_folder import atomic_write
from vesselrl.inference.predictor import Predictor, adapter_folder
from vesselrl.models.checkpoint import EMBEDDED, copy_with_weights, load_sa2va
from vesselrl.models.lora import load_adapter
from vesselrl.scoring.overlap import dice

MIN_DICE = 0.999
_DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def merge(
    base_model: str | Path | None, lora_weights: str | Path, output_model: str | Path, dtype: str = "keep"
) -> dict:
    """Writes base model plus adapter, added in float32, as a new folder in the official layout.

    The copy is loaded again and appears under its name only when it predicts what base and adapter predict.
    `dtype`: keep (each tensor as in the base), float32 or bfloat16. Gives `output`, `verified_dice` (smallest
    over the test pictures) and `max_probability_gap`.
    """
    if dtype not in _DTYPES:
        raise CheckpointError(f"--dtype {dtype} is unknown; choose one of {', '.join(_DTYPES)}.")
    source, target = EMBEDDED if base_model is None else Path(base_model), Path(output_model)
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another --output_model or remove it.")
    model, processor = load_sa2va(source)
    adapted = load_adapter(model, adapter_folder(Path(lora_weights)))
    images = _test_pictures(2 * model.config.tile_px)
    expected = Predictor(adapted.get_base_model(), processor).predict_batch(images)
    with atomic_write(target) as partial:
        copy_with_weights(source, partial, adapted.merge_and_unload(), _DTYPES[dtype])
        got = Predictor(*load_sa2va(partial)).predict_batch(images)
        pairs = list(zip(expected, got, strict=True))
        worst = min(dice(a.mask, b.mask) for a, b in pairs)
        if worst < MIN_DICE:
            fault = f"predicts other masks than base plus adapter (Dice {worst:.4f}, not {MIN_DICE})"
            raise CheckpointError(f"The merged copy {fault} and was removed. Merge with --dtype float32.")
    gap = max(float(np.abs(a.probabilities - b.probabilities).max()) for a, b in pairs)
    return {"output": str(target), "verified_dice": worst, "max_probability_gap": gap}


def _test_pictures(side: int) -> list[np.ndarray]:
    """Dark branching lines on a noisy ground, enough to give masks with many borders."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    pictures = []
    for _ in range(2):
        picture = 170 + 30 * np.sin(3 * x + 2 * y) + rng.normal(0, 6, (side, side))
        for _ in range(6):
            offset, slope, bend = rng.uniform(0.1, 0.9), rng.uniform(-1, 1), rng.uniform(-0.5, 0.5)
            distance = np.abs(y - offset - slope * (x - 0.5) - bend * (x - 0.5) ** 2)
            picture -= 90 * np.exp(-((distance / rng.uniform(0.006, 0.02)) ** 2))
        grey = np.clip(picture, 0, 255).astype(np.uint8)
        pictures.append(np.repeat(grey[..., None], 3, axis=2))
    return pictures
