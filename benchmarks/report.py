"""The report of a learning suite as Markdown, its figure, and rows for the ledger."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.methods import METHODS, RL, Suite
from benchmarks.trainings import Training, read_info
from benchmarks.verdicts import RELATIVE, Differences, Outcome, Pair, patient_mean, percent
from vesselrl.evaluation.results import Evaluation, verdict
from vesselrl.evaluation.words import metric_name, with_interval
from vesselrl.experiment.run_folder import git_commit, write_text

SHOWN = "dice recall precision cldice topology_score beta0_error beta1_error length_ratio length_error reward"
DIFFERENCES = "dice recall precision cldice topology_score length_error reward"
LEDGER = "dice recall precision cldice beta0_error length_ratio reward"
COLOURS = {name: f"C{k}" for k, name in enumerate(n for n, m in METHODS.items() if not m.sources)}
READING = (
    "Means over patients on the test images, with 95 % intervals (bootstrap over patients); over several "
    "seeds an image's score is the mean over them first. Differences are paired, and not adjusted for their "
    "number. Choices are made on validation images; docs/bench-learning.md defines methods and hypotheses."
)


def write_report(
    folder: Path,
    suite: Suite,
    outcome: Outcome,
    trainings: Sequence[Training],
    num_passes: int,
    failures: Mapping[str, str],
    command: str,
) -> list[Path]:
    """Writes FOLDER/report.md with pareto.png, and ledger_rows.md; returns their paths."""
    label = {name: method.label for name, method in METHODS.items()}
    seeds = ", ".join(dict.fromkeys(str(training.seed) for training in trainings))
    scores = [(label[name], *_scores(evaluation)) for name, evaluation in outcome.together.items()]
    each = [
        (label[name], one.source, *vars(one.post).values(), *_scores(one.val, "reward"), *_scores(one.test))
        for name, results in outcome.results.items()
        for one in results
    ]
    post = ("source", "threshold", "smallest component", "gaps closed above", "validation reward")
    times = [
        (label[t.method], t.seed, "failed" if t.run is None else t.stored.get("seconds", "-"))
        for t in trainings
    ]
    left_out = [method.label for name, method in METHODS.items() if name not in outcome.results]
    missing = [f"- Failed: {name}: {why}." for name, why in failures.items()]
    missing += [f"- Left out: {', '.join(left_out)}."] if left_out else []
    strongest = f"Strongest on validation: {label.get(outcome.best_control, 'none')}.\n\n"
    sections = {
        "Verdicts": "\n".join(f"- {words}" for words in outcome.words()),
        "All methods": table(("method", *_names(SHOWN)), scores),
        "RL methods minus each control": strongest + _differences(outcome.differences),
        "RL methods minus a control at equal validation recall": _differences(outcome.at_recall),
        "Dice against β0 error": "![Dice against β0 error, recall against precision](pareto.png)",
        "Every seed": table(("method", *post, *_names(SHOWN)), each),
        "Trainings": table(("method", "seed", "seconds"), times),
        "Missing": "\n".join(missing) or "Nothing.",
    }
    title = f"# Reinforcement learning against its controls: {suite.title}"
    about = f"Seeds {seeds}; every training looked at {num_passes} images, counting each pass. {READING}"
    page = [title, about, *(f"## {name}\n\n{text}" for name, text in sections.items())]
    if outcome.together:
        pareto_figure(outcome).savefig(folder / "pareto.png", dpi=130)
    ledger = ledger_rows(suite, outcome, trainings, num_passes, (f"`{command}`", seeds))
    texts = {"report.md": "\n\n".join(page) + "\n", "ledger_rows.md": ledger}
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = (header, ["---"] * len(header), *rows)
    escaped = ([str(cell).replace("|", "\\|") for cell in cells] for cells in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def _names(metrics: str) -> list[str]:
    return [metric_name(metric) for metric in metrics.split()]


def _scores(evaluation: Evaluation, metrics: str = SHOWN) -> list[str]:
    found, keys = evaluation.summary["metrics"], ("patient_mean", "low", "high")
    return [str(with_interval(metric, *(found[metric][key] for key in keys))) for metric in metrics.split()]


def _differences(compared: Mapping[Pair, Differences]) -> str:
    rows = []
    for (method, control), found in compared.items():
        cells = [
            with_interval(d.metric, d.mean, d.low, d.high, True, verdict(d.metric, d.mean) if d.clear else "")
            for d in map(found.get, DIFFERENCES.split())
        ]
        rows.append((METHODS[method].label, METHODS[control].label, *cells, percent(found[RELATIVE])))
    return table(("method", "minus", *_names(DIFFERENCES), "β0 error, relative"), rows)


def ledger_rows(
    suite: Suite, outcome: Outcome, trainings: Sequence[Training], num_passes: int, shared: Sequence[str]
) -> str:
    """Rows for docs/results.md, without ids: one with all controls, one for each RL method."""
    origins = [read_info(training.run).get("provenance", {}) for training in trainings if training.run]
    commits = dict.fromkeys((*(origin.get("git_commit") for origin in origins), git_commit()))
    short = [commit[:7] + commit[40:] if commit else "no commit" for commit in commits]
    devices = dict.fromkeys(
        f"{str(o.get('device', 'cpu')).upper()}, {o.get('cpu_count')} cores" for o in origins
    )
    command, seeds = shared
    cells = (command, ", ".join(short), seeds, date.today().isoformat(), "; ".join(devices))
    about = f"{suite.title}, {num_passes} image passes each"
    texts = {
        name: ", ".join(map(" ".join, zip(_names(LEDGER), _scores(evaluation, LEDGER), strict=True)))
        for name, evaluation in outcome.together.items()
    }
    controls = ". ".join(f"{METHODS[name].label}: {text}" for name, text in texts.items() if name not in RL)
    rows = [("R???", f"controls C0 to C7 on {about}; test patients", *cells, controls)]
    for name in (name for name in RL if name in texts):
        words = " ".join(h.words for h in outcome.hypotheses if h.method == name)
        what = f"{METHODS[name].label} against its controls on {about}"
        rows.append(("R???", what, *cells, f"{texts[name]}. {words}"))
    header = ("id", "what", "command", "commit", "seeds", "date", "device", "result with interval")
    return table(header, rows) + "\n"


def pareto_figure(outcome: Outcome) -> Figure:
    """Dice against β0 error, a grey ring marking the Pareto front, and recall against precision.

    RL methods, P1 to P4, are filled squares with solid curves over thresholds; a colour is a source.
    """
    figure = Figure((11.4, 6.2), layout="constrained")
    panels = (("dice", "beta0_error", "Dice", "β0 error"), ("recall", "precision", "recall", "precision"))
    for axes, (x, y, xlabel, ylabel) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.4)
        if y == "beta0_error":
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter("{x:g}")
        for name, evaluation in outcome.together.items():
            colour = COLOURS[outcome.results[name][0].source]
            symbol, fill, style = ("s", colour, "-") if name in RL else ("o", "white", "--")
            if curve := outcome.curves.get(name):
                axes.plot(curve[x], curve[y], color=colour, lw=1.1, ls=style, alpha=0.7)
            point = patient_mean(evaluation, x), patient_mean(evaluation, y)
            if y == "beta0_error" and name in outcome.front():
                axes.plot(*point, "o", ms=15, mfc="none", mec="grey")
            label = f"P{RL.index(name) + 1} {METHODS[name].label}" if name in RL else METHODS[name].label
            axes.plot(*point, symbol, ms=7, mfc=fill, mec=colour, mew=1.8, label=label)
            sign = label.split()[0]
            axes.annotate(sign, point, (6, 5), textcoords="offset points", fontsize=9)
    figure.axes[0].set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure
