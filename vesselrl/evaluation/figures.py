"""Pictures of a run: training curves, and image | truth | before | after of chosen cases. Matplotlib is lazy.

Colours are colour-blind safe and mean the same in every picture: white is a vessel found, red (vermilion) a
vessel missed, blue a vessel invented.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vesselrl.evaluation.charts import INK, LINE_COLOURS, legend_above, new_figure, plain_axes
from vesselrl.experiment.run_folder import atomic_write, write_json
from vesselrl.scoring.overlap import dice
from vesselrl.scoring.overlay import HIT, INVENTED, MISSED, overlay, topology_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

MAX_POINTS = 1000
VALIDATION = {
    "val/dice": "Dice",
    "val/recall": "recall",
    "val/precision": "precision",
    "val/cldice": "clDice",
}
# Title, logged keys with their legend entries (None: the title says it), lower end of the axis.
PANELS = (
    ("Reward", {"train/reward": "training", "val/reward": "validation"}, None),
    ("Reward terms (training)", {}, None),
    ("Validation scores", VALIDATION, None),
    ("Loss", {"train/loss": None}, None),
    ("KL to the policy that sampled", {"train/approx_kl": None}, 0.0),
    ("Share of clipped ratios", {"train/clipfrac": None}, 0.0),
    ("Gradient norm", {"train/grad_norm": None}, 0.0),
)
BREAK_MARKER = {"marker": "o", "ms": 6, "mfc": "none", "mec": "#F0E442", "mew": 1.2}
FALSE_MARKER = {"marker": "s", "ms": 3.6, "mfc": "none", "mec": "#7FC8F8", "mew": 0.5}
CASES_FORMAT = "vesselrl cases 1"
CASES_FOLDER = "cases"
RANKS = ("best", "median", "worst")


def read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads a metrics.jsonl: key -> (steps, values), steps ascending, values finite.

    A step logged twice, as after a resume, keeps its last value. A last line that a crash cut off is skipped.

    Raises:
        ValueError: another line is no JSON object with a "step"; the message names the line.
    """
    series: dict[str, dict[int, float]] = {}
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                logger.warning("%s: the last line is cut off and was skipped.", path)
                continue
            raise ValueError(f"{path} line {number} is not JSON ({error}). Remove or repair it.") from error
        if not isinstance(entry, dict) or "step" not in entry:
            raise ValueError(
                f"{path} line {number} has no 'step': got {line[:60]!r}. Log a step on every line."
            )
        for key, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                series.setdefault(key, {})[int(entry["step"])] = float(value)
    series.pop("step", None)
    steps = {key: sorted(points) for key, points in series.items()}
    return {
        key: (np.array(steps[key]), np.array([series[key][step] for step in steps[key]])) for key in series
    }


def plot_curves(metrics_jsonl_path: Path, out_png: Path) -> Path:
    """Draws the curves of a run as PNG; see `curves_figure`."""
    return _save(curves_figure(metrics_jsonl_path), out_png)


def curves_figure(metrics_jsonl_path: Path) -> "Figure":
    """The curves of a run: reward, its terms, validation scores, loss, KL, clipped share, gradient norm.

    Panels without data are left out; the loss is shown for supervised runs only. Training values are drawn
    pale, with a running mean over a tenth of the run on top; validation values as points.

    Raises:
        ValueError: the file is damaged, or holds none of the known keys.
    """
    series = read_metrics(metrics_jsonl_path)
    if "train/reward" in series:
        series.pop("train/loss", None)  # of PPO: its size says nothing about learning
    terms = [key.removeprefix("train/reward/") for key in series if key.startswith("train/reward/")]
    labels = {f"train/reward/{term}": "Dice" if term == "dice" else term.replace("_", " ") for term in terms}
    panels = []
    for title, keys, floor in PANELS:
        found = {key: label for key, label in (keys or labels).items() if key in series}
        panels += [(title, found, floor)] if found else []
    if not panels:
        known = ", ".join(key for _, keys, _ in PANELS for key in keys or ("train/reward/",))
        raise ValueError(f"{metrics_jsonl_path} holds nothing to draw: found {sorted(series)}, know {known}.")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.6 * columns, 3.3 * rows)
    last_step = max(int(series[key][0][-1]) for _, keys, _ in panels for key in keys)
    for position, (title, keys, floor) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, position)
        for (key, label), colour in zip(keys.items(), cycle(LINE_COLOURS), strict=False):
            as_points = key.startswith("val/") or len(series[key][0]) < 20
            _draw_series(axes, *series[key], as_points, {"color": colour, "lw": 1.8, "label": label})
        plain_axes(axes, title, "step")
        legend_above(axes)
        axes.set_xlim(-0.02 * max(last_step, 1), 1.02 * max(last_step, 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        if floor is not None and axes.dataLim.ymin >= floor:
            axes.set_ylim(bottom=floor)
    return figure


def _draw_series(
    axes: "Axes", steps: np.ndarray, values: np.ndarray, as_points: bool, style: dict[str, Any]
) -> None:
    """Points, or pale values with a running mean on top."""
    if as_points:
        axes.plot(steps, values, marker="o", ms=3.5, clip_on=False, **style)
        return
    window = np.ones(max(3, len(values) // 10))
    mean = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
    some = slice(None, None, math.ceil(len(values) / MAX_POINTS))  # a long run draws every k-th step
    axes.plot(steps[some], values[some], color=style["color"], lw=0.8, alpha=0.3)
    axes.plot(steps[some], mean[some], **style)


@dataclass(frozen=True, eq=False)
class Case:
    """An image, uint8 (H, W, 3), its truth and the masks before and after, bool (H, W); None = failed."""

    key: str  # pseudonym of the image; names its files
    image: np.ndarray
    truth: np.ndarray
    before: np.ndarray | None
    after: np.ndarray | None
    rank: str = ""  # "best", "median" or "worst", as from `choose_cases`
    subset: str = "val"


def plot_panels(cases: Sequence[Case], out_png: Path) -> Path:
    """Draws image | truth | before | after, one row per case, with errors coloured and marked and Dice below.

    Breaks and false components are marked as `topology_errors` defines them; a failed prediction is drawn as
    an empty mask. Up to about eight cases stay legible.

    Raises:
        ValueError: no cases, or sizes within a case differ.
    """
    if not cases:
        raise ValueError("There is nothing to draw: got 0 cases. Give at least one.")
    figure = new_figure(11.0, 2.95 * len(cases) + 0.75)
    grid = figure.subplots(len(cases), 4, squeeze=False)
    for column, title in enumerate(("image", "truth", "before", "after")):
        grid[0, column].set_title(title, fontsize=12, fontweight="bold", color=INK, pad=8)
    for line, case in zip(grid, cases, strict=True):
        line[0].imshow(case.image)
        line[0].set_ylabel(case.key, fontsize=9, color=INK)
        line[1].imshow(overlay(case.image, case.truth, case.truth))
        _draw_errors(line[2], case.image, case.before, case.truth)
        _draw_errors(line[3], case.image, case.after, case.truth)
        for axes in line:
            axes.set(xticks=[], yticks=[], xlim=line[0].get_xlim(), ylim=line[0].get_ylim())
            for spine in axes.spines.values():
                spine.set_visible(False)
    _colour_key(figure)
    return _save(figure, out_png)


def _draw_errors(axes: "Axes", image: np.ndarray, mask: np.ndarray | None, truth: np.ndarray) -> None:
    shown = np.zeros(np.shape(truth), dtype=bool) if mask is None else mask
    errors = topology_errors(shown, truth)
    axes.imshow(overlay(image, shown, truth))
    for places, style in ((errors.false_pieces, FALSE_MARKER), (errors.breaks, BREAK_MARKER)):
        rows, columns = [place[0] for place in places], [place[1] for place in places]
        axes.plot(columns, rows, ls="none", **style)
    numbers = ((len(errors.breaks), "break"), (len(errors.false_pieces), "false component"))
    counted = ", ".join(f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in numbers)
    failed = "failed, " if mask is None else ""
    axes.set_xlabel(f"{failed}Dice {dice(shown, truth):.3f}, {counted}", fontsize=9, color=INK)


def _colour_key(figure: "Figure") -> None:
    """The meaning of colours and markers, below all panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    meanings = (("found", HIT), ("missed", MISSED), ("invented", INVENTED))
    entries: list[Any] = [
        Patch(facecolor=np.array(colour) / 255, edgecolor="#888888", linewidth=0.8, label=label)
        for label, colour in meanings
    ]
    for label, style in (("break", BREAK_MARKER), ("false component", FALSE_MARKER)):
        entries.append(Line2D([], [], ls="none", label=label, **(style | {"ms": 9})))
    legend = figure.legend(handles=entries, loc="outside lower center", ncols=5, fontsize=10)
    legend.get_frame().set(facecolor="#D9D9D9", edgecolor="none")


def _save(figure: "Figure", out_png: Path) -> Path:
    out_png = Path(out_png)
    with atomic_write(out_png) as partial:
        figure.savefig(partial, format="png", dpi=130)
    return out_png


def choose_cases(rows: Sequence[Mapping[str, Any]], count: int = 2) -> dict[str, str]:
    """Keys of the best, median and worst images by Dice -> their rank, best first; no image twice.

    Each rank gets `count` images, or a third of the rows where they are too few (a single image is the
    median), of different patients where there are enough.

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
    """Writes FOLDER/cases/KEY.png for every case and FOLDER/cases/cases.json; returns the latter's path.

    Raises:
        ValueError: no cases, a key twice or unfit as a file name, or sizes within a case differ.
    """
    keys = [case.key for case in cases]
    unfit = [key for key in keys if Path(key).name != key or key.startswith(".")]
    if not cases or len(set(keys)) < len(keys) or unfit:
        raise ValueError(f"Cases need distinct keys that can be file names: got {keys}. Use Sample.key.")
    path = Path(folder) / CASES_FOLDER / "cases.json"
    for case in cases:
        plot_panels([case], path.with_name(f"{case.key}.png"))
    write_json(path, {"format": CASES_FORMAT, "cases": [_describe(case) for case in cases]})
    return path


def read_cases(folder: Path) -> list[dict[str, Any]]:
    """The cases that `write_cases` described, empty if there are none.

    Raises:
        ValueError: cases.json is damaged; the message names it.
    """
    path = Path(folder) / CASES_FOLDER / "cases.json"
    document = read_json(path) if path.is_file() else {"format": CASES_FORMAT, "cases": []}
    if document.get("format") != CASES_FORMAT:
        raise ValueError(f"cases.json of cases is not in the format {CASES_FORMAT!r}. Write the cases again.")
    return document["cases"]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run.

    Raises:
        ValueError: the file holds none; the message names it.
    """
    place = f"{path.name} of {path.parent.name}"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{place} is no valid JSON ({error}). Write it again.") from error
    if not isinstance(document, dict):
        raise ValueError(f"{place} holds no JSON object. Write it again.")
    return document


def _describe(case: Case) -> dict[str, Any]:
    file = f"{CASES_FOLDER}/{case.key}.png"
    described: dict[str, Any] = {"key": case.key, "rank": case.rank, "side": case.subset, "file": file}
    for state, mask in (("before", case.before), ("after", case.after)):
        shown = np.zeros(np.shape(case.truth), dtype=bool) if mask is None else mask
        errors = topology_errors(shown, case.truth)
        described[state] = {
            "dice": float(dice(shown, case.truth)),
            "failed": mask is None,
            "breaks": len(errors.breaks),
            "false_pieces": len(errors.false_pieces),
        }
    return described
