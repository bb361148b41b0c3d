"""The parts of a report that compare before and after: the answer, tables, differences, patients."""

from collections.abc import Mapping, Sequence
from typing import Any

from vesselrl.evaluation.charts import Estimate, interval_figure, patient_figure, svg
from vesselrl.evaluation.document import Block, Chart, Section, Table, Text
from vesselrl.evaluation.metric_words import (
    count,
    good_direction,
    images_text,
    metric_name,
    number,
    with_interval,
)
from vesselrl.evaluation.results import (
    NO_DIRECTION,
    UNIT_METRICS,
    Evaluation,
    before_after_table,
    group_means,
)


def summary_sentences(
    test: tuple[Evaluation, Evaluation] | None, validation: tuple[Evaluation, Evaluation] | None
) -> tuple[str, ...]:
    """The answer in a few sentences: Dice, what got better or worse, failures."""
    pair = test or validation
    if pair is None:
        return ("This run has no stored evaluation before and after training.",)
    before, after = pair
    table = before_after_table(before, after)
    where = images_text(after.summary["n_images"], after.summary["n_patients"], "test" if test else "val")
    (line,) = (line for line in table if line["metric"] == "dice")
    change = with_interval("dice", line["difference"], line["low"], line["high"], sign=True)
    change = change.replace("(", "(95 % interval ")
    finding = line["verdict"] or line["reason"] or "no change is proven"
    first = f"Dice on {where}: {line['before']:.3f} before, {line['after']:.3f} after, {change}: {finding}."
    sentences = [*after.marks, first]
    for verdict in ("better", "worse"):
        found = [metric_name(line["metric"]) for line in table if line["verdict"] == verdict]
        sentences.append(f"Clearly {verdict}: {', '.join(found) or 'nothing'}.")
    if not test:
        sentences.append("These images also chose the adapter; there is no test result.")
    failed = [one.summary["n_failed"] for one in pair]
    sentences.append(f"Failed predictions, counted as empty masks: {failed[0]} before, {failed[1]} after.")
    return tuple(sentences)


def result_sections(name: str, pair: tuple[Evaluation, Evaluation], note: str = "") -> tuple[Section, ...]:
    """Scores before and after on one side of the split, their differences as a chart, patient by patient."""
    before, after = pair
    table = before_after_table(before, after)
    summary = after.summary
    header = ("score", "better is", "before", "after", "difference", "verdict")
    measured = images_text(summary["n_images"], summary["n_patients"])
    caption = f"{measured}; mean over patients with its 95 % interval."
    rows = comparison_rows(before, after, table)
    blocks: list[Block] = [
        *([Text(note)] if note else []),
        Table(header, tuple(rows), caption, text_columns=2),
    ]
    undefined = [line for line in table if line["n_undefined"]]
    if undefined:
        listed = ", ".join(f"{metric_name(line['metric'])} {line['n_undefined']}" for line in undefined)
        blocks.append(Text(f"Images where a score is undefined and left out: {listed}."))
    shown = [line for line in table if line["metric"] in UNIT_METRICS - NO_DIRECTION]
    estimates = [
        Estimate(metric_name(line["metric"]), line["difference"], line["low"], line["high"], line["verdict"])
        for line in shown
    ]
    drawn = svg(interval_figure({"Difference, after minus before": estimates}), f"{name}: differences")
    blocks.append(Chart(drawn, "Differences with 95 % intervals. Blue dot: better; red cross: worse; grey: "
                               "no change proven. Right of 0 is better."))  # fmt: skip
    sections = [Section(name, tuple(blocks))]
    if name == "Test":
        sections.append(Section("Test patients", _patient_blocks(before, after)))
    return tuple(sections)


def comparison_rows(
    before: Evaluation, after: Evaluation, table: Sequence[Mapping[str, Any]]
) -> list[tuple[str, ...]]:
    """Lines of the before/after table, as text: name, direction, both scores, difference, verdict."""
    rows = []
    for line in table:
        metric = line["metric"]
        scores = [one.summary["metrics"][metric] for one in (before, after)]
        cells = [with_interval(metric, one["patient_mean"], one["low"], one["high"]) for one in scores]
        difference = with_interval(metric, line["difference"], line["low"], line["high"], sign=True)
        verdict = line["verdict"] or line["reason"]
        rows.append((metric_name(metric), good_direction(metric), *cells, difference, verdict))
    return rows


def _patient_blocks(before: Evaluation, after: Evaluation) -> tuple[Block, ...]:
    """Dice of every patient as a chart, Dice and clDice as a table."""
    means = [group_means(one.rows, "patient") for one in (before, after)]
    dice = [{patient: line["dice"] for patient, line in side.items()} for side in means]
    drawn = svg(patient_figure(*dice, "Dice"), "Dice of every patient before and after")
    images = {patient: 0 for patient in means[0]}
    for row in after.rows:
        images[row["patient"]] += 1
    metrics = [metric for metric in ("dice", "cldice") if metric in means[0][min(images)]]
    header = ["patient", "images"]
    for metric in metrics:
        header += [f"{metric_name(metric)} before", "after", "difference"]
    rows = []
    for patient in sorted(images, key=lambda name: dice[1][name]):
        cells = [patient, str(images[patient])]
        for metric in metrics:
            first, last = (side[patient][metric] for side in means)
            cells += [number(metric, first), number(metric, last), number(metric, last - first, sign=True)]
        rows.append(tuple(cells))
    gained = sum(dice[1][patient] > dice[0][patient] for patient in images)
    table = Table(tuple(header), tuple(rows), "Lowest Dice after training first.")
    finding = Text(f"Dice rose in {gained} of {count(len(images), 'patient')}.")
    return finding, Chart(drawn, "Dice of every patient. Blue line: rose; red line: fell."), table
