"""Finished runs on disk: their test results, read and checked to be of one set of images. Needs no torch."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vesselrl.errors import CompareError
from vesselrl.evaluation.results import Evaluation, read_evaluation, set_mismatch

logger = logging.getLogger(__name__)

HUMAN_FILE = "test_human_agreement.json"


@dataclass(frozen=True)
class Run:
    """One finished run: its name, its test scores after training and, if stored, those of its base before.

    `human` is the agreement of a second observer on the test images, from the run's `evaluation` folder.
    """

    name: str
    after: Evaluation
    before: Evaluation | None = None
    human: Evaluation | None = None


def find_runs(root: Path) -> list[Path]:
    """All folders at or below `root` that hold a `training_info.json`, sorted.

    Raises:
        CompareError: `root` is not a folder or holds no run.
    """
    root = Path(root)
    if not root.is_dir():
        raise CompareError(f"There is no folder {root}. Give the folder that holds the runs (--output_dir).")
    folders = sorted(path.parent for path in root.rglob("training_info.json"))
    if not folders:
        raise CompareError(f"No run found under {root}: no folder holds a training_info.json. Train first.")
    return folders


def load_runs(folders: Sequence[Path]) -> tuple[list[Run], dict[str, str]]:
    """Read run folders: the runs that have a test result, and for each other folder why it is left out.

    Raises:
        CompareError: a file is damaged, two folders share a name, or no folder has a test result.
    """
    names = Counter(folder.name for folder in folders)
    runs: list[Run] = []
    skipped: dict[str, str] = {}
    for folder in folders:
        name = folder.name if names[folder.name] == 1 else f"{folder.parent.name}/{folder.name}"
        if not (folder / "test_after.json").is_file():
            skipped[name] = "no test_after.json: the run did not finish, or was made without a test split"
            logger.warning("Run %s left out: %s", name, skipped[name])
            continue
        try:
            after = read_evaluation(folder / "test_after.json")
            before = None if after.is_control else _read_if_there(folder / "test_before.json")
            human = _read_if_there(folder / "evaluation" / HUMAN_FILE)
        except ValueError as error:
            raise CompareError(f"Run {name} cannot be read: {error}") from error
        runs.append(Run(name, after, before, human))
    if not runs:
        raise CompareError(
            f"None of the {len(folders)} runs has a test result ({'; '.join(skipped.values())})."
        )
    return runs, skipped


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse runs that were not scored on the same images, true masks and metric specification.

    The most frequent set (the first, if tied) is taken as the reference; every run that deviates is named.

    Raises:
        CompareError: some run deviates from the others, or from its own evaluation before training.
    """
    fingerprints = [_fingerprint(run.after) for run in runs]
    reference = runs[fingerprints.index(Counter(fingerprints).most_common(1)[0][0])]
    problems = []
    for run in runs:
        mismatch = set_mismatch(reference.after, run.after, reference.name, run.name)
        if mismatch:
            problems.append(f"{run.name} against {reference.name}: {mismatch}")
        elif run.before is not None:
            mismatch = set_mismatch(run.before, run.after, "test_before", "test_after")
            if mismatch:
                problems.append(f"{run.name}, before against after: {mismatch}")
    if problems:
        raise CompareError(
            "These runs cannot share a table. "
            + ". ".join(problems)
            + ". Train them on one split (--split_file), or keep the runs of each data set in a folder of "
            "their own and name it (--output_dir)."
        )


def _read_if_there(path: Path) -> Evaluation | None:
    """The evaluation in a file that a run need not have."""
    return read_evaluation(path) if path.is_file() else None


def _fingerprint(evaluation: Evaluation) -> tuple[str, str, str]:
    """What must be equal for two evaluations to share a table."""
    spec = json.dumps(evaluation.metric_spec, sort_keys=True)
    return evaluation.image_list_hash, evaluation.label_hash, spec
