"""Does reinforcement learning beat its controls? Trains all methods, tunes on validation, judges on test.

1. Data: who is in which subset, written once (`methods.py`).
2. Training: every method and seed in a process of its own (`trainings.py`).
3. Scores: one prediction of each image, post-processing chosen on validation (`scores.py`).
4. Verdicts: paired differences over patients (`verdicts.py`).
5. Report and rows for the ledger (`report.py`).
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks import run
from benchmarks.methods import EQUAL_RECALL, FIRST_SEED, METHODS, RL, get_suite, prepare_suite
from benchmarks.report import write_report
from benchmarks.scores import MethodResult, Scorer, choose_source
from benchmarks.trainings import check_equal_passes, plan_trainings, train_all
from benchmarks.verdicts import AtRecall, judge, patient_mean
from vesselrl.experiment.run_folder import check_writable

logger = logging.getLogger(__name__)

# Methods that lie on the curve of their source, at `FIXED_POST` and any threshold.
CURVES = ("base_tuned", "sft", "sft_cldice", "rl", "sft_rl")


def learning(
    suite: Literal["synthetic", "coronary80", "chase_db1"] = "synthetic",
    seeds: int = 3,
    reduced: bool = False,
    workers: int = 2,
    output_dir: str = "output/bench_learning",
    data_root: str | None = None,
) -> int:
    """Trains PPO and all its controls on one data split, and judges on test patients whether it beats them.

    Args:
        suite: images, sizes and schedule; see docs/bench-learning.md.
        seeds: trainings per method; the seeds are 42, 43, ...
        reduced: few images, to see the whole way in minutes, not to claim anything.
        workers: trainings at a time, one thread each.
        output_dir: finished trainings are kept here and not trained again.
        data_root: data set of the suite; none: ../shared/data/SUITE, or the built-in synthetic angiograms.
    """
    if min(seeds, workers) < 1:
        raise ValueError(f"--seeds is {seeds} and --workers {workers}; give at least 1 of each.")
    chosen, output = get_suite(suite, reduced), Path(output_dir)
    folder = output / chosen.name
    check_writable(output)
    root, split = prepare_suite(chosen, output, data_root)
    trainings = plan_trainings(chosen, root, folder, seeds)
    failures = train_all(trainings, workers)
    num_passes = check_equal_passes(trainings)
    scorers = [Scorer(split, folder, FIRST_SEED + number) for number in range(seeds)]
    results = score_methods({training.method for training in trainings if training.run is None}, scorers)
    curves = {name: mean_curve(scorers, results[name][0].source) for name in CURVES if name in results}
    outcome = judge(results, score_at_equal_recall(results, scorers), curves)
    command = f"python -m benchmarks.learning {' '.join(sys.argv[1:])}".strip()
    files = write_report(folder, chosen, outcome, trainings, num_passes, failures, command)
    print("\n".join(outcome.words()))
    print(f"Written: {', '.join(map(str, files))}")
    for name, error in failures.items():
        print(f"error: {name} failed: {error}", file=sys.stderr)
    return int(bool(failures))


def score_methods(unfinished: set[str], scorers: Sequence[Scorer]) -> dict[str, list[MethodResult]]:
    """Results of every method, one per seed; one whose training failed for some seed is left out."""
    there = [name for name, method in METHODS.items() if not method.sources and name not in unfinished]
    results = {}
    for name, method in METHODS.items():
        if name in there or set(method.sources) & set(there):
            logger.info("scoring %s", name)
            source = name if name in there else choose_source(method, scorers, there)
            results[name] = [scorer.result(name, source) for scorer in scorers]
    return results


def score_at_equal_recall(
    results: dict[str, list[MethodResult]], scorers: Sequence[Scorer]
) -> dict[tuple[str, str], list[AtRecall]]:
    """C1 and C3 at the validation recall of every RL method, by (RL method, control), one per seed."""
    equal = {}
    for method in (name for name in RL if name in results):
        for control in (name for name in EQUAL_RECALL if name in results):
            equal[method, control] = seeds = []
            for scorer, result in zip(scorers, results[method], strict=True):
                test, point = scorer.at_recall_of(control, method, result)
                seeds.append(
                    AtRecall(test, point.threshold, patient_mean(result.val, "recall") - point.recall)
                )
    return equal


def mean_curve(scorers: Sequence[Scorer], source: str) -> dict[str, list[float]]:
    """Test scores of a source by threshold, as means over the seeds."""
    seeds = [scorer.test_curve(source) for scorer in scorers]
    return {column: np.mean([seed[column] for seed in seeds], axis=0).tolist() for column in seeds[0]}


if __name__ == "__main__":
    run(learning)
