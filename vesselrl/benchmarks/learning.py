"""Does reinforcement learning beat its controls? Trains all arms, tunes on validation, judges on test.

1. Data: who is on which side, written once (`learning_data.py`).
2. Training: every arm and seed in a process of its own (`learning_runner.py`).
3. Scores: one prediction of each image, post-processing chosen on validation (`learning_scores.py`).
4. Verdicts: paired differences over patients (`learning_comparison.py`).
5. Report and rows for the ledger (`learning_report.py`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vesselrl.benchmarks.learning_arms import (
    ARMS,
    EQUAL_RECALL,
    RL_ARMS,
    STRONG_CONTROLS,
    get_seeds,
    get_suite,
)
from vesselrl.benchmarks.learning_comparison import (
    best_control,
    contest,
    patient_mean,
    pooled,
    verdict_e2,
    verdict_e3,
)
from vesselrl.benchmarks.learning_data import SuiteData, prepare_suite
from vesselrl.benchmarks.learning_outcome import Claim, EqualRecall, Outcome
from vesselrl.benchmarks.learning_report import write_learning_report
from vesselrl.benchmarks.learning_runner import (
    Job,
    arm_folder,
    check_equal_passes,
    finished_run,
    plan_jobs,
    train_jobs,
)
from vesselrl.benchmarks.learning_scores import ArmResult, ArmScorer, choose_post, choose_source
from vesselrl.experiment.run_folder import check_writable

logger = logging.getLogger(__name__)

# Arms that lie on the curve of their source, at `FIXED_POST` and any threshold.
CURVES = ("base_tuned", "sft", "sft_cldice", "rl", "sft_rl")


@dataclass(frozen=True)
class LearningResult:
    """What the command line prints: verdicts, files, and the trainings that failed, with the reason."""

    verdicts: tuple[str, ...]
    files: tuple[Path, ...]
    failures: dict[str, str]


def benchmark_learning(
    suite: str,
    num_seeds: int,
    output_dir: Path,
    *,
    reduced: bool = False,
    workers: int = 2,
    data_root: str | None = None,
    argv: Sequence[str] = (),
) -> LearningResult:
    """Runs a suite from where it was left; see the module's docstring for the steps.

    Args:
        suite: synthetic, coronary80 or chase_db1.
        num_seeds: trainings per arm, with seeds 42, 43, ...
        output_dir: everything goes into OUTPUT_DIR/SUITE.
        reduced: few images, to see the whole way.
        workers: trainings at a time, one thread each.
        data_root: in place of the suite's own folder.
        argv: the command line, for the ledger.

    Raises:
        DataError: unusable data.
        RunError: the folder holds something else, or the arms did not look at the same number of images.
        ValueError: an unknown suite, or numbers out of range.
    """
    if workers < 1:
        raise ValueError(f"--workers is {workers}; give at least 1.")
    chosen, seeds = get_suite(suite, reduced), get_seeds(num_seeds)
    check_writable(output_dir)
    data = prepare_suite(chosen, output_dir, data_root)
    jobs = plan_jobs(chosen, data, output_dir, seeds)
    failures = train_jobs(jobs, workers)
    passes = check_equal_passes(jobs)
    scorers = [make_scorer(data, jobs, seed, partial(arm_folder, output_dir, chosen)) for seed in seeds]
    results = score_arms(jobs, scorers)
    equal = score_at_equal_recall(results, scorers)
    outcome = judge(results, equal)
    outcome.curves.update(average_curves(results, scorers))
    files = write_learning_report(output_dir / chosen.name, chosen, outcome, jobs, passes, failures, argv)
    return LearningResult(outcome.words(), files, failures)


def make_scorer(data: SuiteData, jobs: Sequence[Job], seed: int, folder: "partial[Path]") -> ArmScorer:
    """The scorer of one seed."""
    own = [job for job in jobs if job.seed == seed]
    return ArmScorer(
        data.split,
        folder_of=lambda arm: folder(arm, seed),
        run_of=lambda arm: finished_run(folder(arm, seed)),
        base_settings=own[0].config,
    )


def score_arms(jobs: Sequence[Job], scorers: Sequence[ArmScorer]) -> dict[str, list[ArmResult]]:
    """Results of every arm, one per seed; an arm whose training failed for some seed is left out."""
    unfinished = {job.arm.name for job in jobs if job.run is None}
    there = [arm.name for arm in ARMS if arm.predicts and arm.name not in unfinished]
    results = {}
    for arm in ARMS:
        if arm.predicts and arm.name in there:
            source = arm.name
        elif set(arm.sources) & set(there):
            source = choose_source(arm, scorers, there)
        else:
            continue
        logger.info("scoring %s", arm.name)
        results[arm.name] = [
            scorer.result(arm, source, choose_post(arm, scorer, source)) for scorer in scorers
        ]
    return results


def score_at_equal_recall(
    results: dict[str, list[ArmResult]], scorers: Sequence[ArmScorer]
) -> dict[tuple[str, str], EqualRecall]:
    """C1 and C3 at the validation recall of every RL arm: (RL arm, control) -> scores."""
    equal = {}
    for rl_arm in (name for name in RL_ARMS if name in results):
        for control in (name for name in EQUAL_RECALL if name in results):
            pairs = list(zip(scorers, results[rl_arm], strict=True))
            done = [scorer.at_recall_of(control, rl_arm, result) for scorer, result in pairs]
            gaps = [
                patient_mean(result.val, "recall") - point.recall
                for (_, result), (_, point) in zip(pairs, done, strict=True)
            ]
            equal[rl_arm, control] = EqualRecall(
                tests=tuple(evaluation for evaluation, _ in done),
                thresholds=tuple(point.threshold for _, point in done),
                gaps=tuple(gaps),
            )
    return equal


def judge(results: dict[str, list[ArmResult]], equal: dict[tuple[str, str], EqualRecall]) -> Outcome:
    """All comparisons and verdicts, over the seeds together and for each alone."""
    together = {name: pooled([one.test for one in seeds]) for name, seeds in results.items()}
    rl_arms = [name for name in RL_ARMS if name in results]
    controls = [name for name in results if name not in RL_ARMS]
    contests = {(arm, control): contest(together[control], together[arm])
                for arm in rl_arms for control in controls}  # fmt: skip
    outcome = Outcome(results, together, contests, equal)
    strong = {name: [one.val for one in results[name]] for name in STRONG_CONTROLS if name in results}
    if strong:
        outcome.best_control = best_control(strong)
    for arm in rl_arms if strong else ():
        pairs = zip(results[outcome.best_control], results[arm], strict=True)
        alone = tuple(verdict_e2(contest(control.test, one.test)) for control, one in pairs)
        verdict = verdict_e2(contests[arm, outcome.best_control])
        outcome.claims.append(Claim("E2", arm, outcome.best_control, verdict, alone))
    for (arm, control), at_recall in equal.items():
        result = contest(pooled(at_recall.tests), together[arm])
        triples = zip(at_recall.tests, results[arm], at_recall.gaps, strict=True)
        alone = tuple(verdict_e3(contest(test, one.test), gap) for test, one, gap in triples)
        verdict = verdict_e3(result, float(np.mean(np.abs(at_recall.gaps))))
        outcome.claims.append(Claim("E3", arm, control, verdict, alone))
        outcome.at_recall[arm, control] = result
    return outcome


def average_curves(
    results: dict[str, list[ArmResult]], scorers: Sequence[ArmScorer]
) -> dict[str, dict[str, list[float]]]:
    """Test scores by threshold of the arms with a family of their own, as means over the seeds."""
    curves = {}
    for name in (name for name in CURVES if name in results):
        seeds = [scorer.test_curve(results[name][0].source) for scorer in scorers]
        curves[name] = {
            column: np.mean([seed[column] for seed in seeds], axis=0).tolist() for column in seeds[0]
        }
    return curves
