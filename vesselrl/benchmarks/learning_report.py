"""The report of a learning suite as HTML and Markdown: verdicts, scores, differences, figure, trainings."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from vesselrl.benchmarks.learning_arms import ARMS, BY_NAME, RL_ARMS, Suite
from vesselrl.benchmarks.learning_comparison import Contest, patient_mean
from vesselrl.benchmarks.learning_figure import pareto_figure
from vesselrl.benchmarks.learning_ledger import ledger_rows
from vesselrl.benchmarks.learning_outcome import Outcome
from vesselrl.benchmarks.learning_runner import Job, training_seconds
from vesselrl.evaluation.charts import svg
from vesselrl.evaluation.document import Bullets, Chart, Document, Section, Table, Terms, Text, to_markdown
from vesselrl.evaluation.html import to_html
from vesselrl.evaluation.metric_words import WORDS, count, metric_name, number, with_interval
from vesselrl.evaluation.results import Evaluation
from vesselrl.evaluation.statistics import Difference
from vesselrl.experiment.run_folder import write_text

SHOWN = ("dice", "recall", "precision", "cldice", "topology_score", "beta0_error", "beta1_error",
         "length_ratio", "length_error", "reward")  # fmt: skip
DIFFERENCES = ("dice", "recall", "precision", "cldice", "topology_score", "length_error", "reward")
OWN_WORDS = (
    (
        "Topology score",
        "clDice times the agreement in pieces, junctions and ends, 0 to 1; as the reward pays",
    ),
    ("Length error", "how far the length ratio is from 1, image by image; 0 is right"),
)
HOW_TO_READ = (
    "Every score is the mean over patients of per-patient means, on the test images, with its 95 % interval "
    "(bootstrap over patients). With several seeds an image's score is the mean over them first.",
    "A difference is paired, patient by patient; better or worse is said where its interval leaves out 0. "
    "The intervals are not adjusted for the number of comparisons.",
    "Post-processing, C7's source and the strongest control were chosen on validation images by "
    "the default reward. RL arms get the same choices as the controls.",
    "Post-processed: threshold, smallest component and closing of gaps, tuned on validation.",
    "E2 holds where Dice is not lower by more than 0.005 (lower end of the interval above -0.005), β0 error "
    "is lower by at least 20 %, and β0 error, length error and reward are better with intervals that leave "
    "out 0, against the strongest of C2, C3, C4 and C7 on validation.",
    "E3 holds where the control has the same validation recall, by its threshold, and the RL arm has the "
    "higher precision or topology score, the interval leaving out 0.",
)


def write_learning_report(
    folder: Path,
    suite: Suite,
    outcome: Outcome,
    jobs: Sequence[Job],
    passes: int,
    failures: dict[str, str],
    argv: Sequence[str] = (),
) -> tuple[Path, ...]:
    """Writes FOLDER/report.html, report.md with pareto.png, and ledger_rows.md; returns their paths."""
    figure = pareto_figure(outcome) if outcome.together else None
    picture = folder / "pareto.png"
    if figure is not None:
        figure.savefig(picture, format="png", dpi=130)
    charts = () if figure is None else (_chart(svg(figure, "Dice against pieces wrong"), picture.name),)
    document = Document(
        title=f"Reinforcement learning against its controls: {suite.title}",
        subtitle=_subtitle(outcome, jobs, passes),
        summary=outcome.summary(),
        sections=tuple(_sections(suite, outcome, jobs, failures, charts)),
    )
    contents = {
        "report.html": to_html(document),
        "report.md": to_markdown(document),
        "ledger_rows.md": ledger_rows(suite, outcome, jobs, passes, argv),
    }
    for name, text in contents.items():
        write_text(folder / name, text)
    return tuple(folder / name for name in contents)


def _subtitle(outcome: Outcome, jobs: Sequence[Job], passes: int) -> str:
    seeds = ", ".join(dict.fromkeys(str(job.seed) for job in jobs))
    text = f"Seeds {seeds}; every training looked at {passes} images, counting each pass"
    for evaluation in list(outcome.together.values())[:1]:
        summary = evaluation.summary
        images, patients = count(summary["n_images"], "test image"), count(summary["n_patients"], "patient")
        text += f"; {images} of {patients}"
    return text + "."


def _sections(
    suite: Suite,
    outcome: Outcome,
    jobs: Sequence[Job],
    failures: dict[str, str],
    charts: tuple[Chart, ...],
) -> Iterable[Section]:
    if outcome.claims:
        yield Section("Verdicts", (Bullets(outcome.words()),))
    if outcome.together:
        yield Section("All arms", (_scores_table(outcome.together),))
    if outcome.contests:
        strongest = f"Strongest control on validation: {_label(outcome.best_control)}."
        yield Section("RL arms against each control", (Text(strongest), _contests_table(outcome)))
    if outcome.at_recall:
        yield Section("At equal recall", (_equal_recall_table(outcome),))
    if charts:
        yield Section("Dice against topology", (*charts, Bullets(tuple(_front_sentences(outcome)))))
    if outcome.results:
        yield Section("Every seed", (_seeds_table(outcome, jobs),))
    yield Section("What was trained", _trainings(suite, jobs))
    left_out = [arm.label for arm in ARMS if arm.name not in outcome.results]
    notes = [f"Failed: {name}: {why}." for name, why in failures.items()]
    notes += [f"Left out: {', '.join(left_out)}."] if left_out else []
    if notes:
        yield Section("What is missing", (Bullets(tuple(notes)),))
    terms = (*(WORDS[metric] for metric in SHOWN if metric in WORDS), *OWN_WORDS)
    yield Section("How to read this", (Bullets(HOW_TO_READ), Terms(terms)))


def _scores_table(evaluations: dict[str, Evaluation]) -> Table:
    rows = [(_label(name), *_scores(evaluation)) for name, evaluation in evaluations.items()]
    return Table(("arm", *map(metric_name, SHOWN)), tuple(rows), stacked=True)


def _seeds_table(outcome: Outcome, jobs: Sequence[Job]) -> Table:
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    rows = []
    for name, results in outcome.results.items():
        for seed, result in zip(seeds, results, strict=True):
            post = f"{result.source}, {result.post.threshold:g}, {result.post.min_component_px} px, "
            post += f"gaps {result.post.close_gaps:g}"
            reward = number("reward", patient_mean(result.val, "reward"))
            rows.append((_label(name), str(seed), post, reward, *_scores(result.test)))
    header = (
        "arm",
        "seed",
        "source, threshold, smallest component, closing of gaps",
        "validation reward",
        *map(metric_name, SHOWN),
    )
    return Table(header, tuple(rows), text_columns=3, stacked=True)


def _contests_table(outcome: Outcome) -> Table:
    rows = [(_label(arm), _label(control), *_differences(contest))
            for (arm, control), contest in outcome.contests.items()]  # fmt: skip
    return _differences_table(rows, "arm", "minus")


def _equal_recall_table(outcome: Outcome) -> Table:
    rows = []
    for (arm, control), contest in outcome.at_recall.items():
        thresholds = ", ".join(f"{threshold:g}" for threshold in outcome.equal[arm, control].thresholds)
        rows.append((_label(arm), f"{_label(control)}, at {thresholds}", *_differences(contest)))
    return _differences_table(rows, "arm", "minus the control at the thresholds of equal validation recall")


def _differences_table(rows: list[tuple[str, ...]], arm: str, control: str) -> Table:
    header = (arm, control, *map(metric_name, DIFFERENCES), "β0 error, relative")
    return Table(header, tuple(rows), text_columns=2, stacked=True)


def _differences(contest: Contest) -> list[str]:
    cells = []
    for name in DIFFERENCES:
        difference = contest.differences[name]
        text = with_interval(name, difference.mean, difference.low, difference.high, sign=True)
        better = (difference.mean > 0) != (name == "length_error")
        cells.append(f"{text} {'better' if better else 'worse'}" if difference.clear else text)
    return [*cells, _relative(contest.beta0_relative)]


def _relative(change: Difference) -> str:
    """A relative change of an error in percent, with its interval and verdict."""
    if change.reason:
        return "-"
    text = f"{100 * change.mean:+.1f} % ({100 * change.low:+.1f} to {100 * change.high:+.1f} %)"
    return f"{text} {'better' if change.mean < 0 else 'worse'}" if change.clear else text


def _chart(drawn: str, file: str) -> Chart:
    caption = (
        "Means over test patients and seeds. Squares: RL arms; circles: controls; curves: thresholds 0.2 to "
        "0.8 (solid for RL arms); grey ring: no arm is as good in both Dice and β0 error."
    )
    return Chart(drawn, caption, file)


def _front_sentences(outcome: Outcome) -> Iterable[str]:
    """Where each RL arm stands between Dice and β0 error."""
    for name in (name for name in RL_ARMS if name in outcome.together):
        dice, beta0 = outcome.points()[name]
        beaten, beats = outcome.beaten_by(name), outcome.beats(name)
        text = f"{_label(name)} (Dice {number('dice', dice)}, β0 error {number('beta0_error', beta0)}): "
        text += f"no worse in both and better in one than {', '.join(beats)}; " if beats else ""
        none = "no control beats it so, nor C1 to C4 at other thresholds."
        text += f"beaten so by {', '.join(beaten)}." if beaten else none
        yield text


def _trainings(suite: Suite, jobs: Sequence[Job]) -> tuple[Text, Table]:
    """The settings of all trainings, and what is each arm's own with the time that it took."""
    rows = []
    for job in jobs:
        seconds = training_seconds(job) if job.run else None
        state = "failed" if job.run is None else "done" if seconds is None else f"{seconds / 60:.0f} min"
        rows.append((job.arm.label, str(job.seed), _options(job.arm.settings), state))
    table = Table(("arm", "seed", "options", "time"), tuple(rows), text_columns=3)
    return Text(f"Options of all: {_options(suite.settings)}, on one data split."), table


def _options(settings: dict) -> str:
    return " ".join(f"--{name} {value}" for name, value in settings.items())


def _scores(evaluation: Evaluation) -> list[str]:
    """The shown scores with their intervals."""
    metrics = evaluation.summary["metrics"]
    intervals = ((name, *(metrics[name][key] for key in ("patient_mean", "low", "high"))) for name in SHOWN)
    return [with_interval(*interval) for interval in intervals]


def _label(name: str) -> str:
    return BY_NAME[name].label if name else "none"
