"""Best, median and worst images of a run: which ones, their pictures, and what is written beside them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vesselrl.experiment.run_folder import write_text
from vesselrl.scoring.metrics import dice
from vesselrl.scoring.overlay import topology_errors

FORMAT = "vesselrl cases 1"
FOLDER = "cases"
RANKS = ("best", "median", "worst")


@dataclass(frozen=True, eq=False)
class Case:
    """One image with its truth and the masks before and after training.

    Attributes:
        key: pseudonym of the image; names its files.
        image: uint8 (H, W, 3), RGB.
        truth: bool (H, W).
        before: bool (H, W), None = failed prediction.
        after: bool (H, W), None = failed prediction.
        rank: "best", "median" or "worst", as from `choose_cases`; "" for another image.
        side: side of the split the image is from, "val" or "test".
        dice_before: None: computed from the masks.
        dice_after: None: computed from the masks.
    """

    key: str
    image: np.ndarray
    truth: np.ndarray
    before: np.ndarray | None
    after: np.ndarray | None
    rank: str = ""
    side: str = "val"
    dice_before: float | None = None
    dice_after: float | None = None


def choose_cases(rows: Sequence[Mapping[str, Any]], count: int = 2) -> dict[str, str]:
    """Keys of the best, median and worst images by Dice -> their rank, best first; no image twice.

    Within a rank the images come from different patients where there are enough. With fewer than 3 images
    per wanted one, each rank gets a third of them (a single image is the median).

    Args:
        rows: rows of the validation after training, with `key`, `patient` and `dice`.
        count: images per rank.

    Raises:
        ValueError: no rows, or `count` below 1.

    >>> rows = [{"key": f"P{i}_F1", "patient": f"P{i}", "dice": i / 10} for i in range(7)]
    >>> choose_cases(rows, count=1)
    {'P6_F1': 'best', 'P3_F1': 'median', 'P0_F1': 'worst'}
    """
    if not rows or count < 1:
        raise ValueError(f"Cannot choose {count} cases of {len(rows)} images. Give rows, and count >= 1.")
    falling = sorted(rows, key=lambda row: (-row["dice"], row["key"]))
    if len(falling) == 1:
        return {falling[0]["key"]: "median"}
    each = max(1, min(count, len(falling) // 3))
    best = _first(falling, each)
    worst = _first([row for row in reversed(falling) if row not in best], each)
    centre = (len(falling) - 1) / 2
    central = sorted(range(len(falling)), key=lambda place: abs(place - centre))
    middle = [falling[place] for place in central if falling[place] not in (*best, *worst)]
    chosen = {"best": best, "median": _first(middle, each), "worst": worst}
    return {row["key"]: rank for rank in RANKS for row in chosen[rank]}


def _first(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The first rows of different patients, filled up with further rows where the patients do not suffice."""
    patients: set[str] = set()
    chosen, further = [], []
    for row in rows:
        (further if row["patient"] in patients else chosen).append(row)
        patients.add(row["patient"])
    return [*chosen, *further][:count]


def write_cases(folder: Path, cases: Sequence[Case]) -> Path:
    """Write FOLDER/cases/KEY.png for every case (image, truth, before, after) and FOLDER/cases/cases.json.

    Args:
        folder: the run folder.
        cases: in the order they are to be shown.

    Returns:
        Path of cases.json.

    Raises:
        ValueError: no cases, a key twice or unfit as a file name, or sizes within a case differ.
    """
    from vesselrl.evaluation.figures import plot_panels

    keys = [case.key for case in cases]
    unfit = [key for key in keys if Path(key).name != key or key.startswith(".")]
    if not cases or len(set(keys)) < len(keys) or unfit:
        raise ValueError(f"Cases need distinct keys that can be file names: got {keys}. Use Sample.key.")
    place = Path(folder) / FOLDER
    for case in cases:
        plot_panels([(case.key, case.image, case.truth, case.before, case.after)], place / f"{case.key}.png")
    document = {"format": FORMAT, "cases": [_describe(case) for case in cases]}
    write_text(place / "cases.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    return place / "cases.json"


def read_cases(folder: Path) -> list[dict[str, Any]]:
    """What `write_cases` wrote, empty if there is nothing.

    Raises:
        ValueError: cases.json is damaged; the message names it.
    """
    path = Path(folder) / FOLDER / "cases.json"
    if not path.is_file():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{FOLDER}/cases.json is no valid JSON ({error}). Write the cases again.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{FOLDER}/cases.json is not in the format {FORMAT!r}. Write the cases again.")
    return document["cases"]


def _describe(case: Case) -> dict[str, Any]:
    """What is written beside the picture of a case."""
    described: dict[str, Any] = {"key": case.key, "rank": case.rank, "side": case.side}
    described["file"] = f"{FOLDER}/{case.key}.png"
    given = {"before": case.dice_before, "after": case.dice_after}
    for state, mask in (("before", case.before), ("after", case.after)):
        drawn = np.zeros(np.shape(case.truth), dtype=bool) if mask is None else mask
        errors = topology_errors(drawn, case.truth)
        value = dice(drawn, case.truth) if given[state] is None else given[state]
        described[state] = {
            "dice": float(value),
            "failed": mask is None,
            "breaks": len(errors.breaks),
            "false_pieces": len(errors.false_pieces),
        }
    return described
