"""A stored threshold sweep of a run: its `thresholds.json`, or that of an evaluation of its best adapter."""

import json
import math
from pathlib import Path
from typing import Any

SCORES = ("dice", "recall", "precision")
PLACES = (
    "thresholds.json",
    "evaluation/thresholds.json",
    "evaluation/test_best_lora_thresholds.json",
    "evaluation/val_best_lora_thresholds.json",
)


def read_sweep(run_folder: Path) -> dict[str, Any] | None:
    """The threshold sweep of a run: lists of one length, the chosen threshold, and what it was measured on.

    Two forms are understood: lists (`thresholds`, `dice`, `recall`, `precision`, `chosen`), and points
    (`curve` with `threshold` and the scores, `best`). Undefined scores (null) become nan.

    Returns:
        dict with `thresholds`, `dice`, `recall`, `precision`, `chosen`, `side`, `n_images`, `n_patients`;
        None if no sweep was stored.

    Raises:
        ValueError: the file is damaged or incomplete; the message names it.
    """
    path = next((Path(run_folder) / name for name in PLACES if (Path(run_folder) / name).is_file()), None)
    if path is None:
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if "curve" in stored:
            points = stored["curve"]
            stored |= {name: [point[name] for point in points] for name in SCORES}
            stored |= {
                "thresholds": [point["threshold"] for point in points],
                "chosen": stored["best"]["threshold"],
            }
        sweep = {name: stored[name] for name in ("side", "n_images", "n_patients")}
        sweep["chosen"] = float(stored["chosen"])
        sweep["thresholds"] = [float(value) for value in stored["thresholds"]]
        for name in SCORES:
            sweep[name] = [math.nan if value is None else float(value) for value in stored[name]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path.name} in {path.parent.name} is no threshold sweep "
            f"({type(error).__name__}: {error}). Tune the threshold again."
        ) from error
    lengths = {name: len(sweep[name]) for name in ("thresholds", *SCORES)}
    if len(set(lengths.values())) > 1 or not sweep["thresholds"]:
        raise ValueError(
            f"{path.name} in {path.parent.name} holds lists of unequal length or none: {lengths}. "
            "Tune the threshold again."
        )
    return sweep
