"""Rows for the table of docs/results.md; the ids are left to whoever enters them."""

from collections.abc import Sequence
from datetime import date

from vesselrl.benchmarks.learning_arms import BY_NAME, RL_ARMS, Suite
from vesselrl.benchmarks.learning_outcome import Outcome
from vesselrl.benchmarks.learning_runner import Job, read_info
from vesselrl.evaluation.metric_words import metric_name, with_interval
from vesselrl.evaluation.results import Evaluation
from vesselrl.experiment.run_folder import git_commit

METRICS = ("dice", "recall", "precision", "cldice", "beta0_error", "length_ratio", "reward")
HEADER = (
    "| id | what | command | commit | seeds | date | device | result with interval |",
    "|---|---|---|---|---|---|---|---|",
)


def ledger_rows(suite: Suite, outcome: Outcome, jobs: Sequence[Job], passes: int, argv: Sequence[str]) -> str:
    """A Markdown table: one row with all controls, one for each RL arm with its verdicts."""
    runs = [job.run for job in jobs if job.run is not None]
    origins = [read_info(run).get("provenance", {}) for run in runs]
    commits = dict.fromkeys(_short(o.get("git_commit")) for o in (*origins, {"git_commit": git_commit()}))
    devices = dict.fromkeys(
        f"{str(o.get('device', 'cpu')).upper()}, {o.get('cpu_count')} cores" for o in origins
    )
    shared = (
        f"`{' '.join(argv)}`",
        ", ".join(commits),
        ", ".join(dict.fromkeys(str(job.seed) for job in jobs)),
        date.today().isoformat(),
        "; ".join(devices),
    )
    about = f"{suite.title}, {passes} image passes each"
    controls = [
        f"{BY_NAME[name].label}: {_scores(evaluation)}"
        for name, evaluation in outcome.together.items()
        if name not in RL_ARMS
    ]
    lines = [
        *HEADER,
        _row("R???", f"controls C0 to C7 on {about}; test patients", *shared, ". ".join(controls)),
    ]
    for name in (name for name in RL_ARMS if name in outcome.together):
        verdicts = " ".join(claim.words for claim in outcome.claims if claim.arm == name)
        result = f"{_scores(outcome.together[name])}. {verdicts}"
        lines.append(_row("R???", f"{BY_NAME[name].label} against its controls on {about}", *shared, result))
    return "\n".join(lines) + "\n"


def _scores(evaluation: Evaluation) -> str:
    """The headline scores of an arm with their intervals."""
    texts = []
    for metric in METRICS:
        score = evaluation.summary["metrics"][metric]
        text = with_interval(metric, score["patient_mean"], score["low"], score["high"])
        texts.append(f"{metric_name(metric)} {text}")
    return ", ".join(texts)


def _short(commit: str | None) -> str:
    """Seven digits of a commit, with the + that says files were changed."""
    return "no commit" if not commit else commit[:7] + ("+" if commit.endswith("+") else "")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
