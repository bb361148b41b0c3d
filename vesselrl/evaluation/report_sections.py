"""The parts that reports share: scores side by side, threshold, calibration, how to read, settings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vesselrl.evaluation.charts import nearest, reliability_figure, svg, threshold_figure
from vesselrl.evaluation.document import Block, Bullets, Chart, Section, Table, Terms, Text
from vesselrl.evaluation.metric_words import (
    WORDS,
    good_direction,
    images_text,
    metric_name,
    number,
    with_interval,
)
from vesselrl.evaluation.results import Evaluation

SWEEP_ROWS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MEAN_OVER_PATIENTS = (
    "Every score is the mean over patients of each patient's mean: a patient with many frames counts once."
)
FAILED_IS_EMPTY = "A failed prediction counts as an empty mask and is never left out."
TUNED = "What is called tuned was chosen on validation images."
HUMAN = (
    "Human agreement: a second person's masks, scored against the first person's; it shows how well two "
    "people agree on these images."
)


def score_blocks(evaluations: Mapping[str, Evaluation], caption: str) -> tuple[Block, ...]:
    """Evaluations of one set of images side by side: a table, and what is undefined or has no interval.

    A reward that means something else than the first column's is not shown.

    Args:
        evaluations: header of the column -> evaluation; not empty.
        caption: what the columns are.
    """
    columns = [one.summary for one in evaluations.values()]
    reward_spec = next(iter(evaluations.values())).reward_spec
    rows = [("Images", "-", *(str(one["n_images"]) for one in columns))]
    rows.append(("Failed predictions", "lower", *(str(one["n_failed"]) for one in columns)))
    notes = []
    for metric in dict.fromkeys(name for one in evaluations.values() for name in one.metrics):
        scores = {
            label: one.summary["metrics"].get(metric)
            for label, one in evaluations.items()
            if metric != "reward" or one.reward_spec == reward_spec
        }
        rows.append((metric_name(metric), good_direction(metric), *(_score(metric, scores.get(label))
                     for label in evaluations)))  # fmt: skip
        for label, one in scores.items():
            if one and one["n_undefined"]:
                notes.append(f"{metric_name(metric)} ({label}) {one['n_undefined']}")
    blocks: list[Block] = [Table(("score", "better is", *evaluations), tuple(rows), caption, text_columns=2)]
    if notes:
        blocks.append(Text(f"Images where a score is undefined and left out: {', '.join(notes)}."))
    reasons = {score["reason"] for one in columns for score in one["metrics"].values() if score["reason"]}
    if reasons:
        blocks.append(Text(f"Scores without an interval: {'; '.join(sorted(reasons))}."))
    return tuple(blocks)


def _score(metric: str, score: Mapping[str, Any] | None) -> str:
    """A patient mean with its interval, `-` where the metric was not scored."""
    return "-" if score is None else with_interval(metric, score["patient_mean"], score["low"], score["high"])


def threshold_section(sweep: Mapping[str, Any], others: str) -> Section:
    """Scores by threshold and the precision-recall curve.

    Args:
        sweep: as from `read_sweep`.
        others: a sentence on the threshold of the other scores of the report.
    """
    measured = images_text(sweep["n_images"], sweep["n_patients"], sweep["side"])
    intro = f"Measured on {measured}. The threshold {sweep['chosen']:.3g} was chosen on them. {others}"
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
    return Section("Threshold", (Text(intro), Chart(drawn, caption), table))


def calibration_section(calibration: Mapping[str, Any] | None) -> tuple[Section, ...]:
    """Reliability curve of predicted probabilities, as from `calibration.py`; none without probabilities."""
    if not calibration or not calibration["bins"]:
        return ()
    bins = calibration["bins"]
    finding = f"Expected calibration error, 0 is perfect: {calibration['expected_calibration_error']:.4f}."
    if calibration["n_failed"]:
        finding += f" Failed predictions have no probabilities and are left out: {calibration['n_failed']}."
    drawn = svg(reliability_figure({"measured": bins}), "Reliability")
    caption = (
        "Of the pixels with a predicted probability, the share that is vessel; below the diagonal the model "
        "sees more vessel than there is."
    )
    rows = tuple(
        (f"{line['low']:.1f} to {line['high']:.1f}", number("dice", line["predicted"]),
         number("dice", line["observed"]), f"{line['pixels']:,}")
        for line in bins
    )  # fmt: skip
    table = Table(("probability", "mean predicted", "vessel", "pixels"), rows)
    return (Section("Calibration", (Text(finding), Chart(drawn, caption), table)),)


def reading_section(how: Sequence[str], metrics: Sequence[str], spec: Mapping[str, Any]) -> Section:
    """How to read the numbers, what each score means, and the stored definitions.

    Args:
        how: sentences.
        metrics: columns of the scores to explain.
        spec: the metric specification of an evaluation; may be empty.
    """
    terms = tuple(WORDS[metric] for metric in metrics if metric in WORDS)
    blocks: list[Block] = [Bullets(tuple(how)), Terms(terms)]
    if spec:
        rows = tuple((name.replace("_", " "), str(value)) for name, value in spec.items())
        caption = "Definitions that the scores were computed with"
        blocks.append(Table(("definition", "value"), rows, caption, text_columns=2))
    return Section("How to read this", tuple(blocks))


def settings_table(settings: Mapping[str, Any], caption: str) -> Table:
    """Settings that were given, without folders of the machine."""
    rows = ((name, short_path(_as_text(value))) for name, value in settings.items() if value is not None)
    return Table(("setting", "value"), tuple(rows), caption, text_columns=2)


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
