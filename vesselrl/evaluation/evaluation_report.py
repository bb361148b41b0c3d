"""The report of one held-out evaluation as HTML and Markdown, made from its files. Needs no torch.

A model needs no run folder for it: the untouched base has a report as an adapter has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vesselrl.evaluation.document import Block, Document, Section, Table, to_markdown
from vesselrl.evaluation.html import to_html
from vesselrl.evaluation.metric_words import (
    SIDES,
    images_text,
    masks_in_words,
    metric_name,
    number,
    with_interval,
)
from vesselrl.evaluation.report_sections import (
    FAILED_IS_EMPTY,
    HUMAN,
    MEAN_OVER_PATIENTS,
    TUNED,
    calibration_section,
    reading_section,
    score_blocks,
    settings_table,
    threshold_section,
)
from vesselrl.evaluation.results import (
    MAX_FAILED_SHARE,
    Evaluation,
    group_means,
    read_evaluation,
    read_extra,
    set_mismatch,
)
from vesselrl.evaluation.thresholds import read_sweep
from vesselrl.experiment.run_folder import write_text

PATIENT_METRICS = ("dice", "cldice", "recall", "precision")
HOW_TO_READ = (
    MEAN_OVER_PATIENTS,
    "The range in brackets is the 95 % interval of that mean, by resampling patients. Few patients make it "
    "wide.",
    FAILED_IS_EMPTY,
    "Columns side by side score the same images. Whether they differ by more than chance is not tested here.",
)
# What was chosen on validation, by the ending of its file.
TUNED_FILES = {"tuned": "tuned", "tuned_post": "tuned for reward"}
# What flatters an adapter on images that are not the test's.
NOT_TEST = {
    "val": "These images also chose the adapter, so the scores flatter it; this is no test result.",
    "train": "The adapter was trained on these images: the scores say nothing about new patients.",
    "all": "The adapter was trained on some of these images: the scores say nothing about new patients.",
}


@dataclass(frozen=True)
class StoredEvaluation:
    """What one held-out evaluation left in its folder; None: not there, or not of this evaluation.

    Attributes:
        name: of the files, e.g. `test_base`.
        extra: `plan` (see `EvaluationPlan`), `threshold`, `flips`, `min_component_px` and `close_gaps`.
        given: scores at the plan's threshold.
        tuned: how masks are made, chosen on validation -> scores.
        sweep: the validation curve that chose the threshold.
        human: the second observer against the first.
    """

    name: str
    extra: Mapping[str, Any]
    given: Evaluation
    tuned: Mapping[str, Evaluation]
    sweep: Mapping[str, Any] | None
    human: Evaluation | None

    @property
    def columns(self) -> dict[str, Evaluation]:
        """Header -> scores of the same images."""
        named = {masks_in_words(self.extra): self.given} | self.tuned
        if self.human:
            named["human agreement"] = self.human
        return named


def write_evaluation_report(path: Path) -> tuple[Path, Path]:
    """Write FOLDER/NAME.html and FOLDER/NAME.md beside FOLDER/NAME.json and return their paths.

    Reads NAME.json and, where they exist and belong to the same evaluation, those of `TUNED_FILES`,
    NAME_thresholds.json and SIDE_human_agreement.json.

    Args:
        path: FOLDER/NAME.json as `evaluate_held_out` wrote it.

    Raises:
        ValueError: a file is damaged or no held-out evaluation; the message names it.
    """
    path = Path(path)
    document = evaluation_document(read_stored(path))
    html_path, markdown_path = path.with_suffix(".html"), path.with_suffix(".md")
    write_text(markdown_path, to_markdown(document))
    write_text(html_path, to_html(document))
    return html_path, markdown_path


def read_stored(path: Path) -> StoredEvaluation:
    """Reads an evaluation and what was written with it; see `write_evaluation_report`."""
    given, extra = read_evaluation(path), read_extra(path)
    if "plan" not in extra:
        raise ValueError(
            f"{path} is no evaluation of held-out patients: it has no plan. Give a file of vesselrl evaluate."
        )
    sweep_path = path.with_name(f"{path.stem}_thresholds.json")
    human_path = path.with_name(f"{extra['plan']['side']}_human_agreement.json")
    tuned: dict[str, Evaluation] = {}
    for ending, words in TUNED_FILES.items():
        tuned_path = path.with_name(f"{path.stem}_{ending}.json")
        # An earlier evaluation under the same name may have left files of another model or of other data.
        if tuned_path.is_file() and (tuned_extra := read_extra(tuned_path)).get("plan") == extra["plan"]:
            tuned[f"{masks_in_words(tuned_extra)}, {words}"] = read_evaluation(tuned_path)
    sweep = read_sweep(sweep_path) if tuned and sweep_path.is_file() else None
    human = None
    if human_path.is_file():
        found = read_evaluation(human_path)
        human = None if set_mismatch(given, found, "model", "observer") else found
    return StoredEvaluation(path.stem, extra, given, tuned, sweep, human)


def evaluation_document(stored: StoredEvaluation) -> Document:
    """The report of one evaluation as a document."""
    plan, given = stored.extra["plan"], stored.given
    caption = ["Mean over patients with its 95 % interval."]
    caption += [TUNED] if stored.tuned else []
    caption += [HUMAN] if stored.human else []
    sections = [
        Section("Scores", score_blocks(stored.columns, " ".join(caption))),
        Section("Patients", _patient_blocks(given, stored.extra["threshold"])),
    ]
    if stored.sweep:
        others = f"The scores by patient are at threshold {stored.extra['threshold']:g}, as asked for."
        sections.append(threshold_section(stored.sweep, others))
    settings = settings_table(
        plan, "What was asked for. What is not named was taken from the run or is the default"
    )
    sections += [
        *calibration_section(given.calibration),
        reading_section(HOW_TO_READ, given.metrics, given.metric_spec),
        Section("Settings", (settings,)),
    ]
    side = SIDES.get(plan["side"], plan["side"])
    facts = [stored.name, f"{side} patients", masks_in_words(stored.extra)]
    facts += ["mean over the image and its mirror images"] if stored.extra["flips"] else []
    return Document(
        title=f"Evaluation of {_model_name(plan)}",
        subtitle=", ".join(facts),
        summary=_summary(stored),
        sections=tuple(sections),
    )


def _model_name(plan: Mapping[str, Any]) -> str:
    """What was evaluated, without folders of the machine."""
    weights = plan["lora_weights"]
    return f"the adapter {Path(weights).resolve().name}" if weights else "the untouched base model"


def _summary(stored: StoredEvaluation) -> tuple[str, ...]:
    """The marks, then Dice at every setting, the weakest patient and the failures."""
    plan, given = stored.extra["plan"], stored.given
    amounts, means = given.summary, group_means(given.rows, "patient")
    sentences = list(given.marks)
    if plan["lora_weights"] and plan["side"] in NOT_TEST:
        sentences.append(NOT_TEST[plan["side"]])
    where = images_text(amounts["n_images"], amounts["n_patients"], plan["side"])
    sentences.append(f"Dice on {where}: {_dice(given)} at threshold {stored.extra['threshold']:g}.")
    sentences += [f"Dice, {words} on validation images: {_dice(one)}." for words, one in stored.tuned.items()]
    if stored.human:
        sentences.append(f"Human agreement, a second person against the first: Dice {_dice(stored.human)}.")
    lowest = min(means, key=lambda patient: means[patient]["dice"])
    sentences.append(f"Lowest Dice of a patient: {means[lowest]['dice']:.3f} ({lowest}).")
    failures = f"{amounts['n_failed']} of {amounts['n_images']}"
    sentences.append(f"Failed predictions, counted as empty masks: {failures}.")
    if given.too_many_failed:
        sentences.append(
            f"More than {100 * MAX_FAILED_SHARE:g} % failed: do not use these scores before it is clear why."
        )
    return tuple(sentences)


def _dice(evaluation: Evaluation) -> str:
    """Mean Dice with its interval."""
    score = evaluation.summary["metrics"]["dice"]
    text = with_interval("dice", score["patient_mean"], score["low"], score["high"])
    return text.replace("(", "(95 % interval ")


def _patient_blocks(evaluation: Evaluation, threshold: float) -> tuple[Block, ...]:
    """A table with the mean scores of every patient."""
    means = group_means(evaluation.rows, "patient")
    metrics = [metric for metric in PATIENT_METRICS if metric in evaluation.metrics]
    rows = []
    for patient in sorted(means, key=lambda name: means[name]["dice"]):
        images = [row for row in evaluation.rows if row["patient"] == patient]
        failed = sum(bool(row["failed"]) for row in images)
        scores = [number(metric, means[patient][metric]) for metric in metrics]
        rows.append((patient, str(len(images)), str(failed), *scores))
    header = ("patient", "images", "failed", *(metric_name(metric) for metric in metrics))
    caption = f"Mean of each patient's images at threshold {threshold:g}; lowest Dice first."
    return (Table(header, tuple(rows), caption),)
