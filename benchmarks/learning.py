"""Does reinforcement learning beat its controls? Trains all methods, tunes on validation, judges on test."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from benchmarks import run
from benchmarks.scores import MethodResult, Scorer, patient_mean
from benchmarks.trainings import INFO_FILE, METHODS, SEED, SUITES, prepare_split, read_json, train_all
from vesselrl.evaluation.results import Evaluation, before_after_table, csv_text, group_means, summarise
from vesselrl.evaluation.statistics import DRAWS, MIN_PATIENTS, small_sample_stretch
from vesselrl.evaluation.words import Cell, metric_name, with_interval
from vesselrl.experiment.run_folder import check_writable, git_commit, hide_paths_of_command, write_text
from vesselrl.synthetic.dataset import builtin_data

# RL methods, without a detail head and with one; the controls of which the strongest on validation must be
# beaten; those that are compared at equal recall, too.
CONTESTS = (
    (
        ("rl", "rl_post", "sft_rl", "sft_rl_post"),
        ("sft", "sft_tuned", "sft_cldice", "sft_scnp", "sft_skeleton_recall", "sft_post"),
        ("base_tuned", "sft_tuned"),
    ),
    (("sft_rl_detail", "sft_rl_detail_post"), [n for n in METHODS if "sft_detail" in n], ["sft_detail_post"]),
)
RL = tuple(name for methods, _, _ in CONTESTS for name in methods)
DICE_MARGIN, BETA0_GAIN = 0.005, 20  # the second in percent
RECALL_TOLERANCE = 0.01  # of "equal" recall on validation; thresholds come in steps of 0.01
LEDGER = "dice recall precision cldice beta0_error length_ratio reward".split()
COMPARED = "dice recall precision cldice topology_score length_error reward".split()
SHOWN = [*COMPARED[:5], "beta0_error", "beta1_error", "length_ratio", *COMPARED[5:]]
READING = (
    "Means over patients on the test images, with 95 % intervals (bootstrap over patients); of several seeds "
    "the mean is taken first. Differences are paired, and not adjusted for their number."
)

Results = Mapping[str, Sequence[MethodResult]]  # by method, one per seed
Equal = Mapping[tuple[str, str], Sequence[tuple[Evaluation, float]]]  # `at_recall_of`, by RL method, control
Differences = dict[str, dict[str, Any]]  # lines of `before_after_table` by column; "beta0": change in percent
Verdicts = dict[tuple[str, str, str], tuple[bool, str]]  # by hypothesis, RL method and control


def learning(
    suite: Literal["synthetic", "coronary80", "chase_db1"] = "synthetic",
    seeds: int = 3,
    reduced: bool = False,
    methods: tuple[str, ...] = (),
    workers: int = 2,
    output_dir: str = "output/bench_learning",
    data_root: str | None = None,
) -> int:
    """Trains PPO and all its controls on one data split, and judges on test patients whether it beats them.

    Args:
        suite: images, sizes and schedule; see docs/benchmarks.md.
        seeds: trainings per method; the seeds are 42, 43, ...
        reduced: few images, to see the whole way in minutes, not to claim anything.
        methods: names in learning.toml of what is trained and judged; none: all.
        workers: trainings at a time, one thread each.
        output_dir: finished trainings are kept here and not trained again.
        data_root: data set of the suite; none: ../shared/data/SUITE, or the built-in synthetic angiograms.
    """
    if min(seeds, workers) < 1:
        raise ValueError(f"--seeds is {seeds} and --workers {workers}; give at least 1 of each.")
    folder = Path(output_dir) / (f"{suite}_reduced" if reduced else suite)
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"--methods has {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}.")
    check_writable(folder)
    chosen, taken = SUITES[folder.name], {"base", *(methods or METHODS)}
    published = chosen.num_val_patients and f"../shared/data/{suite}"
    root = Path(data_root or published or builtin_data(output_dir))
    split = prepare_split(chosen, root, folder / "data_split.json")
    failures, num_passes = train_all(chosen, root, folder, seeds, workers, taken)
    absent = {name.rpartition("_seed")[0] for name in failures}
    absent |= {name for name, method in METHODS.items() if name not in taken and not method.sources}
    scorers = [Scorer(split, folder, SEED + number) for number in range(seeds)]
    results, equal = {}, {}
    for name in filter(taken.__contains__, METHODS):
        if sources := [source for source in METHODS[name].sources or (name,) if source not in absent]:
            choose = len(sources) > 1  # by the tuned validation reward
            rewards = {s: choose and np.mean([one.best(name, s)[1] for one in scorers]) for s in sources}
            source = max(rewards, key=rewards.__getitem__)
            results[name] = [scorer.result(name, source) for scorer in scorers]
    for rl, _, controls in CONTESTS:
        for name, control in product(*(filter(results.__contains__, names) for names in (rl, controls))):
            pairs = zip(scorers, results[name], strict=True)
            equal[name, control] = [scorer.at_recall_of(control, name, one) for scorer, one in pairs]
    verdicts = judge(results, equal)
    missing = [f"Failed: {name}: {error}." for name, error in failures.items()]
    missing += [f"Left out: {method.label}." for name, method in METHODS.items() if name not in results]
    write_report(
        folder, f"on {chosen.title}, {seeds} seeds, {num_passes} image passes", results, verdicts, missing
    )
    print(*(words for _, words in verdicts.values()), f"Written: {folder / 'report.md'}", sep="\n")
    print(*missing, sep="\n", end="\n" * bool(missing), file=sys.stderr)
    return int(bool(failures))


def judge(results: Results, equal: Equal) -> Verdicts:
    """E2 of RL methods against the strongest control, E3 at equal recall; all seeds and each alone."""
    rewards = {n: np.mean([patient_mean(one.val, "reward") for one in r]) for n, r in results.items()}
    contests = {}
    for methods, controls, _ in CONTESTS:
        strong = filter(rewards.__contains__, reversed(controls))
        if best := max(strong, key=rewards.__getitem__, default=""):  # of equal ones the last
            tests = [(one.test, None) for one in results[best]]
            contests |= {("E2", name, best): tests for name in methods if name in results}
    contests |= {("E3", *pair): seeds for pair, seeds in equal.items()}
    verdicts = {}
    for (name, method, control), seeds in contests.items():
        tests, gaps = zip(*seeds, strict=True)
        together = compare(pooled(tests), pooled([one.test for one in results[method]]))
        holds, why = decide(together, None if name == "E2" else float(np.mean(np.abs(gaps))))
        pairs = zip(seeds, results[method], strict=True)
        num_alone = sum(decide(compare(test, one.test), gap)[0] for (test, gap), one in pairs)
        against = f"{METHODS[control].label}{' at equal recall' if name == 'E3' else ''}"
        words = f"{name}, {METHODS[method].label}, against {against}: {why}. Alone it holds in {num_alone}"
        verdicts[name, method, control] = holds, f"{words} of {len(seeds)} seeds."
    return verdicts


def pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several seeds: every score of an image is its mean over them; nan if any is."""
    first, rows = evaluations[0], []
    for same in zip(*(evaluation.rows for evaluation in evaluations), strict=True):
        means = {name: float(np.mean([row[name] for row in same])) for name in first.metrics}
        rows.append(same[0] | {"failed": any(row["failed"] for row in same)} | means)
    return summarise(rows, first.metric_spec, first.reward_spec)


def compare(control: Evaluation, method: Evaluation) -> Differences:
    """Paired differences to a control, and the change of the mean β0 error in %, nan if its own can be 0."""
    found = {line["metric"]: line for line in before_after_table(control, method, COMPARED)}
    means = [group_means(one.rows, "patient").values() for one in (control, method)]
    errors = np.array([[patient["beta0_error"] for patient in one] for one in means])
    num_patients = errors.shape[1]
    chosen = np.random.default_rng(0).integers(0, num_patients, (DRAWS, num_patients))
    before, after = np.column_stack([errors.mean(axis=1), errors[:, chosen].mean(axis=2)])
    change, *drawn = 100 * (after / np.where(before > 0, before, math.nan) - 1)
    limits = np.quantile(drawn, [0.025, 0.975]) - change
    stretch = small_sample_stretch(num_patients) if num_patients >= MIN_PATIENTS else math.nan
    low, high = change + stretch * limits
    reason = "" if high == high else f"fewer than {MIN_PATIENTS} patients, or the control's mean can be 0"
    line = {"metric": "beta0_error", "difference": change, "low": max(low, -100.0), "high": high}
    return found | {"beta0": line | {"reason": reason, "verdict": ""}}


def decide(found: Differences, recall_gap: float | None = None) -> tuple[bool, str]:
    """Whether E2 holds, or with the gap in validation recall E3, and what it rests or fails on.

    E2: Dice not lower by more than 0.005, β0 error lower by at least a fifth, |length ratio − 1| lower and
    reward higher. E3: recall within 0.01, and precision or topology score higher. All by the 95 % intervals.
    """
    met = {name: line["verdict"] == "better" for name, line in found.items()}
    words = {name: f"{metric_name(line['metric'])} {difference(line)}" for name, line in found.items()}
    if recall_gap is None:
        named = ("dice", "beta0", "length_error", "reward")
        met["dice"] = found["dice"]["low"] > -DICE_MARGIN
        met["beta0"] = found["beta0"]["difference"] <= -BETA0_GAIN and found["beta0"]["high"] < 0
        words["dice"] += f" against a margin of -{DICE_MARGIN}"
        words["beta0"] += f" in %, against -{BETA0_GAIN}"
        holds = all(met[name] for name in named)
    else:
        named = ("recall", "precision", "topology_score")
        met["recall"] = abs(recall_gap) <= RECALL_TOLERANCE
        words["recall"] = f"validation recall differs by {abs(recall_gap):.3f} (test: {words['recall']})"
        holds = met["recall"] and (met["precision"] or met["topology_score"])
    reasons = "; ".join(words[name] for name in named if met[name] == holds)
    return holds, f"{'holds' if holds else 'does not hold'}: {reasons}"


def difference(line: Mapping[str, Any]) -> Cell:
    """A difference with its interval, or with the reason why there is none."""
    cell = with_interval(line["metric"], line["difference"], line["low"], line["high"], sign=True)
    return cell._replace(interval=line["reason"] or cell.interval, verdict=line["verdict"])


def scores(evaluation: Evaluation, metrics: Iterable[str]) -> list[str]:
    """Means over patients with their intervals."""
    found, keys = evaluation.summary["metrics"], ("patient_mean", "low", "high")
    return [str(with_interval(metric, *(found[metric][key] for key in keys))) for metric in metrics]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows))


def write_report(folder: Path, about: str, results: Results, verdicts: Verdicts, missing: list[str]) -> None:
    """Writes report.md with pareto.png, and ledger_rows.csv for docs/results.csv; `about`: images, passes."""
    together = {name: pooled([one.test for one in seeds]) for name, seeds in results.items()}
    labels = {name: method.label for name, method in METHODS.items()}
    methods, controls = ([name for name in together if (name in RL) == rl] for rl in (True, False))
    pairs = {(m, c): compare(together[c], together[m]) for m, c in product(methods, controls)}
    differences = [
        (labels[m], labels[c], *map(difference, found.values())) for (m, c), found in pairs.items()
    ]
    page = [
        f"# Reinforcement learning against its controls {about}",
        READING,
        *missing,
        "## Verdicts",
        "\n".join(f"- {words}" for _, words in verdicts.values()) or "Nothing can be judged.",
        "## All methods",
        table(["", *map(metric_name, SHOWN)], [(labels[n], *scores(e, SHOWN)) for n, e in together.items()]),
        "![Dice against β0 error](pareto.png)",
        "## RL methods minus each control",
        table(["method", "minus", *map(metric_name, COMPARED), "β0 error in %"], differences),
    ]
    write_text(folder / "report.md", "\n\n".join(page) + "\n")
    pareto_figure(results, together).savefig(folder / "pareto.png", dpi=130)
    origins = [read_json(path)["provenance"] for path in sorted(folder.glob(f"*/*/{INFO_FILE}"))]
    commits = dict.fromkeys((*(origin["git_commit"] for origin in origins), git_commit()))
    shared = {
        "data": about.partition(",")[0].removeprefix("on "),
        "real_or_synthetic": "synthetic" if "synthetic" in about else "real",
        "command": f"`python -m benchmarks.learning {' '.join(hide_paths_of_command(sys.argv[1:]))}`",
        "commit": ", ".join(commit[:7] + commit[40:] if commit else "no commit" for commit in commits),
        "seeds": ", ".join(str(SEED + number) for number in range(len(results["base"]))),
        "date": date.today().isoformat(),
        "device": "; ".join({f"{o['device'].upper()}, {o['cpu_count']} cores": o for o in origins}),
    }
    texts = {}
    for name, evaluation in together.items():
        named = zip(map(metric_name, LEDGER), scores(evaluation, LEDGER), strict=True)
        words = [words for (_, method, _), (_, words) in verdicts.items() if method == name]
        texts[name] = " ".join([f"{labels[name]}: {', '.join(map(' '.join, named))}.", *words])
    names = ", ".join(labels[name].partition(" ")[0] for name in controls)
    rows = [(f"controls {names} {about}; test patients", " ".join(texts[name] for name in controls))]
    rows += [(f"{labels[name]} against its controls {about}", texts[name]) for name in methods]
    ledger = [{"id": "R???", "what": what} | shared | {"result": result} for what, result in rows]
    write_text(folder / "ledger_rows.csv", csv_text(ledger))


def pareto_figure(results: Results, together: Mapping[str, Evaluation]) -> Figure:
    """Dice against β0 error; a grey ring is the Pareto front, a square an RL method, a colour a training."""
    figure = Figure((7, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("symlog", linthresh=1)
    sources = [name for name, method in METHODS.items() if not method.sources]
    points = {n: (patient_mean(e, "dice"), patient_mean(e, "beta0_error")) for n, e in together.items()}
    for name, (x, y) in points.items():
        colour = f"C{sources.index(results[name][0].source)}"
        symbol, fill, sign = ("s", colour, f"P{RL.index(name) + 1} ") if name in RL else ("o", "white", "")
        label = sign + METHODS[name].label
        if not any(a >= x and b <= y and (a, b) != (x, y) for a, b in points.values()):
            axes.plot(x, y, "o", ms=15, mfc="none", mec="grey")
        axes.plot(x, y, symbol, ms=7, mfc=fill, mec=colour, mew=1.8, label=label)
        axes.annotate(label.split()[0], (x, y), (6, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="Dice", ylabel="β0 error", ylim=(0, None))
    axes.grid(alpha=0.4)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


if __name__ == "__main__":
    run(learning)
