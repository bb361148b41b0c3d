"""The report of one run as HTML and Markdown, made from the files of its folder. Needs no torch.

Measured values only: what was hoped for or aimed at is not shown beside them.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vesselrl.evaluation.cases import RANKS, read_cases
from vesselrl.evaluation.charts import nearest, reliability_figure, svg, threshold_figure
from vesselrl.evaluation.document import (
    Block,
    Bullets,
    Chart,
    Document,
    Picture,
    Section,
    Table,
    Terms,
    Text,
    to_markdown,
)
from vesselrl.evaluation.figures import curves_figure, read_metrics
from vesselrl.evaluation.html import to_html
from vesselrl.evaluation.metric_words import WORDS, count, metric_name, number
from vesselrl.evaluation.result_sections import later_section, result_sections, summary_sentences
from vesselrl.evaluation.results import Evaluation, read_evaluation, write_text
from vesselrl.evaluation.sweep_files import read_sweep

STEP_METRICS = ("reward", "dice", "recall", "precision", "cldice", "beta0_error", "length_ratio")
SWEEP_ROWS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
HOW_TO_READ = (
    "Every score is the mean over patients of each patient's mean: a patient with many frames counts once.",
    "The range in brackets is the 95 % interval of that mean, by resampling patients. The difference is "
    "paired: the same images before and after.",
    "A change is called better or worse only if the interval of the difference leaves out 0. Without a "
    "verdict these patients prove no change. The intervals are not corrected for the number of scores.",
    "A failed prediction counts as an empty mask and is never left out.",
    "The validation images chose the adapter, so their scores flatter it; the test images chose nothing.",
)
LAST_VALIDATION = (
    "After is the last validation of the training; the test used the best adapter, which may be older."
)
CASE_COLOURS = (
    "White: vessel found. Red: vessel missed. Blue: vessel invented.",
    "Yellow ring, a break: a stretch of the true centreline that the prediction misses although it finds the "
    "vessel on both sides, and does not join the two sides within 3 px beside it. A vessel that ends too "
    "early, or is missed altogether, is not a break.",
    "Light blue square, a false piece: a separate piece of the prediction that touches no true vessel.",
)


def write_run_report(run_folder: Path) -> tuple[Path, Path]:
    """Write RUN/report.html and RUN/report.md from the files of a run folder and return their paths.

    Reads training_info.json, metrics.jsonl, val_before, val_best or val_latest, test_before and
    test_after.json, cases/ and the threshold sweep; a part whose file is missing is left out.

    Raises:
        ValueError: the folder is no finished run, or a file is damaged; the message names the file.
    """
    run_folder = Path(run_folder)
    document = run_document(run_folder)
    html_path, markdown_path = run_folder / "report.html", run_folder / "report.md"
    write_text(markdown_path, to_markdown(document))
    write_text(html_path, to_html(document))
    return html_path, markdown_path


def run_document(run_folder: Path) -> Document:
    """The report of a run folder as a document; see `write_run_report`."""
    info = _read_info(run_folder)
    test = _read_pair(run_folder, "test_before", "test_after")
    best = _read_pair(run_folder, "val_before", "val_best")
    validation = best or _read_pair(run_folder, "val_before", "val_latest")
    note = "" if best else LAST_VALIDATION
    sections = [
        *(result_sections("Test", test) if test else ()),
        *(result_sections("Validation", validation, note) if validation else ()),
        *_training_section(run_folder),
        *_threshold_section(run_folder),
        *later_section(run_folder),
        *_calibration_section(run_folder, test or validation),
        *_case_section(run_folder),
        _reading_section(test or validation, info),
        _origin_section(info),
    ]
    origin = info.get("provenance") or {}
    facts = [f"Run of {str(origin.get('date', ''))[:10]}" if origin.get("date") else "Run"]
    if info.get("total_steps"):
        facts.append(count(info["total_steps"], "training step"))
    return Document(
        title=f"Report of {run_folder.resolve().name}",
        subtitle=", ".join(facts),
        summary=summary_sentences(test, validation),
        sections=tuple(sections),
    )


def _read_info(run_folder: Path) -> dict[str, Any]:
    """training_info.json of a run."""
    path = run_folder / "training_info.json"
    if not path.is_file():
        raise ValueError(f"{run_folder.name} is no finished run: it has no training_info.json. Train first.")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"training_info.json of {run_folder.name} is no valid JSON ({error}).") from error
    if not isinstance(info, dict):
        raise ValueError(f"training_info.json of {run_folder.name} holds no settings and results.")
    return info


def _read_pair(run_folder: Path, before: str, after: str) -> tuple[Evaluation, Evaluation] | None:
    """Two evaluations of a run, None unless both are there."""
    paths = [run_folder / f"{name}.json" for name in (before, after)]
    if not all(path.is_file() for path in paths):
        return None
    return read_evaluation(paths[0]), read_evaluation(paths[1])


def _training_section(run_folder: Path) -> tuple[Section, ...]:
    """Curves over the steps and the scores of every validation."""
    path = run_folder / "metrics.jsonl"
    if not path.is_file():
        return ()
    series = read_metrics(path)
    blocks: list[Block] = []
    if any(key.startswith(("train/", "val/")) for key in series):
        caption = (
            "Training values pale, their running mean over a tenth of the run strong; validation as points. "
            "The reward terms are weighted: they add up to the reward."
        )
        blocks.append(Chart(svg(curves_figure(path), "Training curves"), caption, "curves.png"))
    metrics = [metric for metric in STEP_METRICS if f"val/{metric}" in series]
    if metrics:
        points = {metric: dict(zip(*map(list, series[f"val/{metric}"]), strict=True)) for metric in metrics}
        steps = sorted({step for values in points.values() for step in values})
        rows = tuple(
            (str(step), *(number(metric, points[metric].get(step)) for metric in metrics)) for step in steps
        )
        header = ("step", *(metric_name(metric) for metric in metrics))
        caption = "Every validation; step 0 is the untouched model. Mean over patients."
        blocks.append(Table(header, rows, caption, text_columns=0))
    return (Section("Training", tuple(blocks)),) if blocks else ()


def _threshold_section(run_folder: Path) -> tuple[Section, ...]:
    """Scores by threshold and the precision-recall curve, where a sweep was stored."""
    sweep = read_sweep(run_folder)
    if sweep is None:
        return ()
    side = {"val": "validation", "test": "test"}.get(sweep["side"], sweep["side"])
    images, patients = count(sweep["n_images"], f"{side} image"), count(sweep["n_patients"], "patient")
    intro = (
        f"Measured on {images} of {patients}. "
        f"The threshold {sweep['chosen']:.3g} was chosen on them. Every other score of this report is at 0.5 "
        "unless it says otherwise."
    )
    drawn = svg(threshold_figure(sweep), "Scores by threshold, and precision by recall")
    values = sweep["thresholds"]
    places = {nearest(values, wanted) for wanted in (*SWEEP_ROWS, sweep["chosen"])}
    rows = []
    for place in sorted(places, key=lambda place: values[place]):
        chosen = " (chosen)" if place == nearest(values, sweep["chosen"]) else ""
        scores = [number(metric, sweep[metric][place]) for metric in ("dice", "recall", "precision")]
        rows.append((f"{values[place]:.3g}{chosen}", *scores))
    table = Table(("threshold", "Dice", "Recall", "Precision"), tuple(rows))
    caption = "Left: a higher threshold finds less and invents less. Right: the same, threshold by threshold."
    return (Section("Threshold", (Text(intro), Chart(drawn, caption), table)),)


def _calibration_section(run_folder: Path, pair: tuple[Evaluation, Evaluation] | None) -> tuple[Section, ...]:
    """Reliability curve before and after, where probabilities were scored."""
    before, after = pair or (None, None)
    later = run_folder / "evaluation" / "test_best_lora.json"
    if later.is_file() and (after is None or after.calibration is None):
        after = read_evaluation(later)
    curves = {name: one.calibration for name, one in (("before", before), ("after", after)) if one}
    stored = {name: curve for name, curve in curves.items() if curve and curve["bins"]}
    if not stored:
        return ()
    drawn = svg(reliability_figure({name: curve["bins"] for name, curve in stored.items()}), "Reliability")
    error = "expected_calibration_error"
    errors = ", ".join(f"{curve[error]:.4f} {name}" for name, curve in stored.items())
    finding = Text(f"Expected calibration error, 0 is perfect: {errors}.")
    caption = (
        "Of the pixels with a predicted probability, the share that is vessel; below the diagonal the model "
        "sees more vessel than there is."
    )
    rows = [
        (name, f"{line['low']:.1f} to {line['high']:.1f}", number("dice", line["predicted"]),
         number("dice", line["observed"]), f"{line['pixels']:,}")
        for name, curve in stored.items() for line in curve["bins"]
    ]  # fmt: skip
    header = ("state", "probability", "mean predicted", "vessel", "pixels")
    return (Section("Calibration", (finding, Chart(drawn, caption), Table(header, tuple(rows)))),)


def _case_section(run_folder: Path) -> tuple[Section, ...]:
    """Pictures of the best, median and worst images."""
    cases = read_cases(run_folder)
    if not cases:
        return ()
    order = {rank: place for place, rank in enumerate(RANKS)}
    blocks: list[Block] = [
        Text("Best, median and worst by Dice after training, chosen among the validation images."),
        Bullets(CASE_COLOURS),
    ]
    for case in sorted(cases, key=lambda case: order.get(case["rank"], len(order))):
        before, after = case["before"], case["after"]
        side = {"val": "validation", "test": "test"}.get(case["side"], case["side"])
        caption = (
            f"{side.capitalize()} image. Dice {before['dice']:.3f} before, {after['dice']:.3f} after; breaks "
            f"{before['breaks']} and {after['breaks']}; false pieces {before['false_pieces']} and "
            f"{after['false_pieces']}."
        )
        caption += "".join(f" The prediction {name} failed." for name in ("before", "after")
                           if case[name]["failed"])  # fmt: skip
        title = f"{case['rank'].capitalize()}: {case['key']}" if case["rank"] else case["key"]
        blocks.append(Picture(run_folder / case["file"], case["file"], title, caption))
    return (Section("Cases", tuple(blocks)),)


def _reading_section(pair: tuple[Evaluation, Evaluation] | None, info: Mapping[str, Any]) -> Section:
    """How to read the numbers, what each score means, and the stored definitions."""
    used = pair[1].metrics if pair else tuple(WORDS)
    spec = pair[1].metric_spec if pair else info.get("metric_spec") or {}
    terms = tuple((WORDS[metric][0], WORDS[metric][1]) for metric in used if metric in WORDS)
    blocks: list[Block] = [Bullets(HOW_TO_READ), Terms(terms)]
    if spec:
        rows = tuple((name.replace("_", " "), str(value)) for name, value in spec.items())
        caption = "Definitions that the scores were computed with"
        blocks.append(Table(("definition", "value"), rows, caption, text_columns=2))
    return Section("How to read this", tuple(blocks))


def _origin_section(info: Mapping[str, Any]) -> Section:
    """Data, settings, versions and command of the run, without folders of the machine."""
    origin = info.get("provenance") or {}
    counts = info.get("counts") or {}
    facts = [("command", " ".join(short_path(str(word)) for word in origin.get("command") or ()))]
    facts += [(name, str(origin.get(name) or "")) for name in ("date", "git_commit", "device", "platform")]
    facts += [(name, str(version)) for name, version in (origin.get("packages") or {}).items() if version]
    for side in ("train", "val", "test"):
        if isinstance(counts.get(side), Mapping):
            facts.append((f"{side} images", f"{counts[side].get('used')} of {counts[side].get('available')}"))
    facts += [("patients", str(counts["patients"]))] if "patients" in counts else []
    facts += [(f"trainable values, {part}", f"{amount:,}")
              for part, amount in (counts.get("trainable") or {}).items()]  # fmt: skip
    rows = tuple((name.replace("_", " "), value) for name, value in facts if value)
    settings = tuple((name, short_path(_as_text(value))) for name, value in (info.get("args") or {}).items()
                     if value is not None)  # fmt: skip
    return Section(
        "Settings and origin",
        (
            Table(("fact", "value"), rows, "Origin", text_columns=2),
            Table(("setting", "value"), settings, "Settings of the training (inputs, not results)", 2),
        ),
    )


def short_path(text: str) -> str:
    """A path from the root or from a home folder as its last part, also behind an option's `=`.

    >>> short_path("--data_root=/home/somebody/angio"), short_path("output/run"), short_path("~/models/sa2va")
    ('--data_root=.../angio', 'output/run', '.../sa2va')
    """
    option, mark, value = text.rpartition("=")
    path = value if mark and option.startswith("-") else text
    absolute = path.startswith(("/", "~", "\\\\")) or path[1:3] in (":\\", ":/")
    if not absolute:
        return text
    last = path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return f"{option}{mark}.../{last}" if path is value and mark else f".../{last}"


def _as_text(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return str(value)
