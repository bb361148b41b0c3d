"""The report of one run as HTML and Markdown, made from the files of its folder. Needs no torch.

Measured values only: what was hoped for or aimed at is not shown beside them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vesselrl.evaluation.cases import RANKS, read_cases
from vesselrl.evaluation.charts import svg
from vesselrl.evaluation.document import (
    Block,
    Bullets,
    Chart,
    Document,
    Picture,
    Section,
    Table,
    Text,
    to_markdown,
)
from vesselrl.evaluation.figures import curves_figure, read_metrics
from vesselrl.evaluation.html import to_html
from vesselrl.evaluation.metric_words import SIDES, WORDS, count, masks_in_words, metric_name, number
from vesselrl.evaluation.report_sections import (
    FAILED_IS_EMPTY,
    HUMAN,
    MEAN_OVER_PATIENTS,
    TUNED,
    calibration_section,
    reading_section,
    score_blocks,
    settings_table,
    short_path,
    threshold_section,
)
from vesselrl.evaluation.result_sections import result_sections, summary_sentences
from vesselrl.evaluation.results import Evaluation, read_evaluation, read_extra, set_mismatch
from vesselrl.evaluation.thresholds import read_sweep
from vesselrl.experiment.run_folder import write_text

STEP_METRICS = ("reward", "dice", "recall", "precision", "cldice", "beta0_error", "length_ratio")
# Files that a later evaluation of the best adapter leaves in the run's folder `evaluation`, and what their
# column is called.
BEST = "test_best_lora"
LATER = {
    BEST: "{masks}",
    f"{BEST}_tuned": "{masks}, tuned",
    f"{BEST}_tuned_post": "{masks}, tuned for reward",
    f"{BEST}_flips": "with flips, {masks}",
    f"{BEST}_flips_tuned": "with flips, {masks}, tuned",
    f"{BEST}_flips_tuned_post": "with flips, {masks}, tuned for reward",
    "test_human_agreement": "human agreement",
}
SAME_MODEL = ("base_model", "prompt")  # of an evaluation's plan
LATER_CAPTION = (
    "The best adapter, evaluated later on the test images; mean over patients with its 95 % interval. "
    f"{TUNED} {HUMAN}"
)
HOW_TO_READ = (
    MEAN_OVER_PATIENTS,
    "The range in brackets is the 95 % interval of that mean, by resampling patients. The difference is "
    "paired: the same images before and after.",
    "A change is called better or worse only if the interval of the difference leaves out 0. Without a "
    "verdict these patients prove no change. The intervals are not corrected for the number of scores.",
    FAILED_IS_EMPTY,
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
    test_after.json, cases/ and what a later evaluation left in evaluation/; a part whose file is missing is
    left out.

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
    shown = next((pair[1] for pair in (test, validation) if pair), None)
    sections = [
        *(result_sections("Test", test) if test else ()),
        *(result_sections("Validation", validation, note) if validation else ()),
        *_training_section(run_folder),
        *_findings_section(info),
        *_later_sections(run_folder, test[1] if test else None),
        *_case_section(run_folder),
        reading_section(
            HOW_TO_READ,
            shown.metrics if shown else tuple(WORDS),
            shown.metric_spec if shown else info.get("metric_spec") or {},
        ),
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


def _findings_section(info: Mapping[str, Any]) -> tuple[Section, ...]:
    """What the log noticed during the training, in its own words."""
    rows = tuple(
        (str(found["step"]), found["code"].replace("_", " "), found["sign"], found["advice"])
        for found in info.get("findings") or ()
    )
    if not rows:
        return ()
    caption = "Each is listed when it was first seen. docs/diagnostics.md explains them."
    table = Table(("step", "finding", "what was seen", "what to change"), rows, caption, text_columns=4)
    return (Section("What the log noticed", (table,)),)


def _later_sections(run_folder: Path, test: Evaluation | None) -> tuple[Section, ...]:
    """The best adapter at other settings, its threshold and its calibration, as evaluated after training.

    An evaluation of other images or labels than those of the run's test, or with another base model or prompt
    than the one at the plan's threshold, is left out, and that is said.
    """
    folder = run_folder / "evaluation"
    paths = {name: folder / f"{name}.json" for name in LATER}
    found = {name: read_evaluation(path) for name, path in paths.items() if path.is_file()}
    if not found:
        return ()
    reference = test or next(iter(found.values()))
    extras = {name: read_extra(paths[name]) for name in found}
    plans = {name: extra.get("plan") for name, extra in extras.items()}
    current = plans.get(BEST) or plans.get(f"{BEST}_flips")
    left_out = [
        name
        for name, one in found.items()
        if set_mismatch(reference, one, "the test", name) or _another_model(plans[name], current)
    ]
    columns = {
        LATER[name].format(masks=masks_in_words(extras[name])): one
        for name, one in found.items()
        if name not in left_out
    }
    blocks = score_blocks(columns, LATER_CAPTION) if columns else ()
    if left_out:
        note = (
            "Left out, because images, labels, definitions or the model asked for are not those of the rest"
        )
        blocks = (*blocks, Text(f"{note}: {', '.join(left_out)}."))
    sections = [Section("Test at other settings", blocks)]
    sweep_path = folder / f"{BEST}_thresholds.json"
    if f"{BEST}_tuned" in found.keys() - left_out and sweep_path.is_file():
        others = "Every other score of this report is at 0.5 unless it says otherwise."
        sections.append(threshold_section(read_sweep(sweep_path), others))
    if BEST in found and BEST not in left_out:
        sections += calibration_section(found[BEST].calibration)
    return tuple(sections)


def _another_model(plan: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two evaluations asked another base model, or asked otherwise; a second observer has no plan."""
    return bool(plan and other) and any(plan.get(what) != other.get(what) for what in SAME_MODEL)


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
        side = SIDES.get(case["side"], case["side"])
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
    return Section(
        "Settings and origin",
        (
            Table(("fact", "value"), rows, "Origin", text_columns=2),
            settings_table(info.get("args") or {}, "Settings of the training (inputs, not results)"),
        ),
    )
