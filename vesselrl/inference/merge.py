"""Hands an adapter on: as a merged checkpoint, proven to predict what both predict together, or to a hub."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from vesselrl.errors import CheckpointError, RunError
from vesselrl.experiment.run_folder import SHARED_FILE, atomic_write, json_hash
from vesselrl.inference.predictor import Prediction, Predictor
from vesselrl.models.checkpoint import checkpoint_folder, copy_with_weights, load_sa2va
from vesselrl.models.lora import ADAPTER_FILES, adapter_folder, adapter_settings, check_adapter, load_adapter
from vesselrl.scoring.overlap import dice

MIN_DICE = 0.999
# Of the probabilities: weights that stay float32 differ in the order of a sum, rounded ones move the borders.
MAX_GAP = {torch.float32: 3e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
CARD = "README.md"
PREDICTS_BY = ("prompt", "tile_px", "min_component_px", "close_gaps")  # settings of a run
MAX_PICTURES = 8  # to find two in which the model finds vessel
_DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def merge(
    base_model: str | Path | None, lora_weights: str | Path, output_model: str | Path, dtype: str = "keep"
) -> dict:
    """Writes base model plus adapter, added in float32, as a new folder in the official layout.

    The copy is loaded again and appears under its name only when it predicts what base and adapter predict,
    masks and probabilities, on pictures in which these find vessel: two empty masks prove nothing.
    `dtype`: keep (each tensor as in the base), float32 or bfloat16. Gives `output`, `verified_dice` (smallest
    over the test pictures), `max_probability_gap`, and with a detail head beside the weights
    `dice_without_head`, how far the masks of other code, which passes it over, agree with those; else None.
    """
    if dtype not in _DTYPES:
        raise CheckpointError(f"--dtype {dtype} is unknown; choose one of {', '.join(_DTYPES)}.")
    source, target = checkpoint_folder(base_model), Path(output_model)
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another --output_model or remove it.")
    model, processor = load_sa2va(source)
    adapted = load_adapter(model, adapter_folder(lora_weights))
    changed = {f"{name}.weight" for name in adapted.base_model.targeted_module_names}
    expected = _with_vessel(Predictor(adapted.get_base_model(), processor))
    with atomic_write(target) as partial:
        dtypes = copy_with_weights(source, partial, adapted.merge_and_unload(), changed, _DTYPES[dtype])
        allowed = max(MAX_GAP.get(one, MAX_GAP[torch.float32]) for one in dtypes)
        merged = Predictor(*load_sa2va(partial))
        pairs = [(one, merged.predict(one.image)) for one in expected]
        worst = min(dice(a.mask, b.mask) for a, b in pairs)
        gap = max(float(np.abs(a.probabilities - b.probabilities).max()) for a, b in pairs)
        if worst < MIN_DICE or gap > allowed:
            found = f"Dice {worst:.4f}, at least {MIN_DICE}; probabilities {gap:.2g} apart"
            fault = "The merged copy predicts other masks than base plus adapter"
            advice = "Merge with --dtype float32"
            raise RunError(f"{fault} ({found}, at most {allowed:g}) and was removed. {advice}.")
    measured = {"verified_dice": worst, "max_probability_gap": gap, "dice_without_head": None}
    if merged.model.detail:
        merged.model.detail = None
        measured["dice_without_head"] = min(dice(merged.predict(a.image).mask, a.mask) for a in expected)
    return {"output": str(target), **measured}


def push(lora_weights: str | Path, repository: str, public: bool = False) -> str:
    """Uploads an adapter, its model card and the settings that it predicts by; returns the address.

    These files alone leave the machine: none of them holds a path to data or the name of a patient.
    """
    folder, settings = adapter_folder(lora_weights), adapter_settings(lora_weights)
    check_adapter(folder)
    if not (folder / CARD).is_file():
        advice = "`vesselrl evaluate --lora_weights RUN` writes it, for the best adapter of a run"
        raise CheckpointError(f"{folder} has no model card, {CARD}. {advice}.")
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError

    shared = {name: settings[name] for name in PREDICTS_BY if name in settings}
    files = {name: folder / name for name in (*ADAPTER_FILES, CARD) if (folder / name).is_file()}
    files[SHARED_FILE] = json.dumps({"args": shared, "args_sha256": json_hash(shared)}, indent=1).encode()
    try:
        api = HfApi(library_name="vesselrl")
        name = api.create_repo(repository, private=not public, exist_ok=True).repo_id
        operations = [CommitOperationAdd(*file) for file in files.items()]
        return str(api.create_commit(name, operations, commit_message="An adapter of vesselrl").repo_url)
    except (OSError, ValueError, HTTPError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        advice = "Look at the network and the name, and log in with `hf auth login`"
        fault = f"Hugging Face did not take {folder.name} as {repository} ({reason})"
        raise RunError(f"{fault}. {advice}.") from None


def _with_vessel(predictor: Predictor) -> list[Prediction]:
    """The predictions of two test pictures, or of one, whose masks are not empty."""
    all_of_them = map(predictor.predict, _test_pictures(2 * predictor.model.config.tile_px))
    if found := [*islice((one for one in all_of_them if one.mask.any()), 2)]:
        return found
    fault = f"Base and adapter find no vessel in {MAX_PICTURES} test pictures"
    advice = "See with `vesselrl evaluate` whether this adapter is the right one"
    raise CheckpointError(f"{fault}: nothing would prove the copy. {advice}.")


def _test_pictures(side: int) -> Iterator[np.ndarray]:
    """Dark branching lines on a noisy ground, enough to give masks with many borders."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    for _ in range(MAX_PICTURES):
        picture = 170 + 30 * np.sin(3 * x + 2 * y) + rng.normal(0, 6, (side, side))
        for _ in range(6):
            offset, slope, bend = rng.uniform(0.1, 0.9), rng.uniform(-1, 1), rng.uniform(-0.5, 0.5)
            distance = np.abs(y - offset - slope * (x - 0.5) - bend * (x - 0.5) ** 2)
            picture -= 90 * np.exp(-((distance / rng.uniform(0.006, 0.02)) ** 2))
        yield np.repeat(np.clip(picture, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
