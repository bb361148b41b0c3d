"""The result of an evaluation: rows, patient-level summary, JSON and CSV files, before/after table.

Every result carries the hash of its image list and of its labels and the metric specification, so that
results of different sets cannot be mixed later (`set_mismatch`). Nothing here computes a score; it needs
NumPy only.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vesselrl.evaluation.statistics import (
    bootstrap_interval,
    key_difference,
    paired_difference,
    patient_means,
)
from vesselrl.experiment.run_folder import write_json, write_text

FORMAT = "vesselrl evaluation 1"
IDENTITY_COLUMNS = ("key", "patient", "sequence", "failed", "truth_hash")
UNIT_METRICS = frozenset(
    {"dice", "iou", "recall", "precision", "specificity", "cldice", "tprec", "tsens", "foreground"}
    | {"nsd", "recall_thin", "recall_medium", "recall_thick", "topology_score"}
)
LOWER_IS_BETTER = frozenset({"beta0_error", "beta1_error", "hd95", "length_error"})
UNBOUNDED = frozenset({"reward", "custom_score"})
NO_DIRECTION = frozenset({"length_ratio", "foreground"})
MAX_FAILED_SHARE = 0.05
_REQUIRED = ("rows", "metric_spec", "image_list_hash", "label_hash")


@dataclass(frozen=True)
class Evaluation:
    """Scores of one predictor on one set of images.

    Attributes:
        rows: one dict per image: `key`, `patient`, `sequence`, `failed` (bool), `truth_hash`, then every
            metric of `score_mask` and, if a reward was given, `reward`, with `custom_score` where a user's
            own function is part of it. nan means undefined.
        summary: `n_images`, `n_patients`, `n_failed` and `metrics`: name -> dict with `image_mean`,
            `patient_mean` (the headline), `low`, `high` (95 %), `n_images`, `n_patients`, `n_undefined`,
            `reason`.
        image_list_hash: sha256 over the sorted keys.
        label_hash: sha256 over the sorted keys with the hash of each true mask.
        metric_spec: the metric specification the scores were computed with.
        reward_spec: what the `reward` column means, None without one; rewards of unequal specs are not
            compared.
        calibration: how far the predicted probabilities can be taken at their word (`calibration.py`); None
            if only masks were scored.
        marks: what must be shown beside the scores, such as a split that leaks; see `marks.py`.
    """

    rows: tuple[dict[str, Any], ...]
    summary: dict[str, Any]
    image_list_hash: str
    label_hash: str
    metric_spec: dict[str, Any]
    reward_spec: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    marks: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scored columns, in the order of the rows."""
        return metric_names(self.rows)

    @property
    def too_many_failed(self) -> bool:
        """True if more than 5 % of the predictions failed; a command then ends with an error."""
        return self.summary["n_failed"] > MAX_FAILED_SHARE * self.summary["n_images"]

    @property
    def is_leaky(self) -> bool:
        """True if frames of one patient were on both sides: this proves nothing about new patients."""
        return any(mark.startswith("LEAKY") for mark in self.marks)

    @property
    def is_control(self) -> bool:
        """True if the run was a control, whose start is no base model."""
        return any(mark.startswith("CONTROL") for mark in self.marks)

    def to_json(self) -> dict[str, Any]:
        """The whole evaluation as strict JSON values, nan as null, with patient and sequence means."""
        return _nan_to_none(
            {
                "format": FORMAT,
                "image_list_hash": self.image_list_hash,
                "label_hash": self.label_hash,
                "metric_spec": self.metric_spec,
                "reward_spec": self.reward_spec,
                "summary": self.summary,
                "calibration": self.calibration,
                "marks": list(self.marks),
                "patients": group_means(self.rows, "patient"),
                "sequences": group_means(self.rows, "sequence"),
                "rows": list(self.rows),
            }
        )


def summarise(
    rows: Sequence[Mapping[str, Any]],
    metric_spec: Mapping[str, Any],
    reward_spec: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Build the Evaluation of finished rows: hashes, patient means and intervals.

    Raises:
        ValueError: a key occurs twice.
    """
    keys = [row["key"] for row in rows]
    check_unique(keys)
    patients = [row["patient"] for row in rows]
    metrics = {}
    for name in metric_names(rows):
        values = np.array([row[name] for row in rows], dtype=np.float64)
        bounds = (-math.inf if name in UNBOUNDED else 0.0, 1.0 if name in UNIT_METRICS else math.inf)
        interval = dict(vars(bootstrap_interval(values, patients, bounds=bounds)))
        defined = values[~np.isnan(values)]
        image_mean = float(defined.mean()) if len(defined) else math.nan
        metrics[name] = {"image_mean": image_mean, "patient_mean": interval.pop("mean")} | interval
    summary = {
        "n_images": len(rows),
        "n_patients": len(set(patients)),
        "n_failed": sum(bool(row["failed"]) for row in rows),
        "metrics": metrics,
    }
    return Evaluation(
        rows=tuple(dict(row) for row in rows),
        summary=summary,
        image_list_hash=_list_hash(keys),
        label_hash=_list_hash([f"{row['key']} {row['truth_hash']}" for row in rows]),
        metric_spec=dict(metric_spec),
        reward_spec=None if reward_spec is None else dict(reward_spec),
    )


def check_unique(keys: Sequence[str]) -> None:
    """Raise ValueError, naming the key, if an image occurs more than once."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"Image {key} occurs twice among {len(keys)} images. Evaluate each image once.")
        seen.add(key)


def metric_names(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the scored columns of rows, in their order."""
    return tuple(name for name in rows[0] if name not in IDENTITY_COLUMNS)


def group_means(rows: Sequence[Mapping[str, Any]], by: str) -> dict[str, dict[str, float]]:
    """Mean of every metric within each `patient` or `sequence`: group -> metric -> mean or nan."""
    groups = [row[by] for row in rows]
    table: dict[str, dict[str, float]] = {group: {} for group in sorted(set(groups))}
    for name in metric_names(rows):
        means = patient_means([row[name] for row in rows], groups)
        for group, line in table.items():
            line[name] = means.get(group, math.nan)
    return table


def before_after_table(
    before: Evaluation, after: Evaluation, metrics: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Paired comparison of two evaluations of the same images, one dict per metric.

    Each dict has `metric`, `before`, `after` (patient-macro means over the images defined in both),
    `difference`, `low`, `high` (paired patient bootstrap, 95 %), `p` (not adjusted), `n_images`,
    `n_patients`, `n_undefined`, `reason` and `verdict`: "better", "worse" or "changed" if the interval
    excludes zero, else "".

    Args:
        before: scores before the change.
        after: scores after it.
        metrics: columns to compare; default: every column both have (`reward` and `custom_score` only if
            they mean the same in both).

    Raises:
        ValueError: image lists, labels or metric specifications differ, or `reward` is asked for and differs.
    """
    mismatch = set_mismatch(before, after, "before", "after")
    if mismatch:
        raise ValueError(
            f"The two evaluations cannot be compared: {mismatch}. Evaluate both on the same set."
        )
    same_reward = before.reward_spec == after.reward_spec
    if metrics is None:
        shared = [name for name in after.metrics if name in before.metrics]
        metrics = [name for name in shared if name not in UNBOUNDED or same_reward]
    elif "reward" in metrics and not same_reward:
        raise ValueError(
            f"The rewards cannot be compared: before is {before.reward_spec}, after is {after.reward_spec}. "
            "Score both with one reward, or compare the other metrics."
        )
    table = []
    for name in metrics:
        difference = paired_difference(before.rows, after.rows, name)
        before_mean, after_mean = _paired_means(before.rows, after.rows, name)
        line = {"metric": name, "before": before_mean, "after": after_mean, "difference": difference.mean}
        keep = ("low", "high", "p", "n_images", "n_patients", "n_undefined", "reason")
        line |= {field: getattr(difference, field) for field in keep}
        table.append(line | {"verdict": verdict(name, difference.mean) if difference.clear else ""})
    return table


def verdict(metric: str, difference: float) -> str:
    """What a proven difference of a metric means: "better", "worse", or "changed" where neither is meant."""
    if metric in NO_DIRECTION:
        return "changed"
    return "better" if (difference > 0) != (metric in LOWER_IS_BETTER) else "worse"


def set_mismatch(first: Evaluation, second: Evaluation, first_name: str, second_name: str) -> str:
    """Words for why two evaluations may not be compared, naming the images; "" if they may."""
    a, b = ({row["key"]: row["truth_hash"] for row in one.rows} for one in (first, second))
    if first.image_list_hash != second.image_list_hash:
        return f"the images differ: {key_difference(a, b, first_name, second_name)}"
    if first.label_hash != second.label_hash:
        changed = sorted(key for key in a if a[key] != b[key])
        listed = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
        return f"the true masks of {len(changed)} images differ ({listed})"
    if first.metric_spec != second.metric_spec:
        names = sorted(first.metric_spec.keys() | second.metric_spec.keys())
        pairs = [(name, first.metric_spec.get(name), second.metric_spec.get(name)) for name in names]
        changes = [
            f"{name} is {x!r} in {first_name}, {y!r} in {second_name}" for name, x, y in pairs if x != y
        ]
        return f"the metric specifications differ: {'; '.join(changes)}"
    return ""


def write_evaluation(
    folder: Path, name: str, evaluation: Evaluation, extra: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    """Write FOLDER/NAME.json (everything, plus `extra`) and FOLDER/NAME.csv (the rows), each atomically.

    nan is written as null in JSON and as an empty field in CSV.

    Args:
        folder: made if missing.
        name: file name without ending, e.g. "test_after".
        evaluation: what to write.
        extra: JSON values stored under "extra", e.g. threshold, adapter, command line.
    """
    folder = Path(folder)
    document = evaluation.to_json() | {"extra": dict(extra or {})}
    json_path, csv_path = folder / f"{name}.json", folder / f"{name}.csv"
    write_text(csv_path, csv_text(evaluation.rows))
    write_json(json_path, document)
    return json_path, csv_path


def read_evaluation(path: Path) -> Evaluation:
    """Read what `write_evaluation` wrote; the summary and the hashes are computed anew from the rows.

    Raises:
        ValueError: the file is not such a JSON file, or its rows no longer match its stored hashes.
        FileNotFoundError: there is no such file.
    """
    return evaluation_from_json(_read_document(path), path)


def evaluation_from_json(document: Mapping[str, Any], source: Path) -> Evaluation:
    """The evaluation of what `Evaluation.to_json` gave; summary and hashes are computed anew from the rows.

    Raises:
        ValueError: something is missing, or the rows do not match their hashes; the message names `source`.
    """
    missing = [name for name in _REQUIRED if not document.get(name)]
    if missing:
        raise ValueError(
            f"{source} is incomplete: {', '.join(missing)} is missing. Run the evaluation again."
        )
    rows = [
        {name: math.nan if value is None else value for name, value in row.items()}
        for row in document["rows"]
    ]
    evaluation = summarise(rows, document["metric_spec"], document.get("reward_spec"))
    evaluation = replace(
        evaluation, calibration=document.get("calibration"), marks=tuple(document.get("marks", ()))
    )
    for field in ("image_list_hash", "label_hash"):
        if getattr(evaluation, field) != document[field]:
            raise ValueError(
                f"{source} was changed: its rows do not match its {field}. Run the evaluation again."
            )
    return evaluation


def read_extra(path: Path) -> dict[str, Any]:
    """The `extra` that `write_evaluation` stored beside an evaluation, e.g. its threshold.

    Raises:
        ValueError: the file is not such a JSON file.
        FileNotFoundError: there is no such file.
    """
    return _read_document(path).get("extra") or {}


def _read_document(path: Path) -> dict[str, Any]:
    """What `write_evaluation` wrote, as it stands in the file."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Run the evaluation again.") from error
    found = document.get("format") if isinstance(document, dict) else type(document).__name__
    if found != FORMAT:
        raise ValueError(
            f"{path} is not an evaluation: its format is {found!r}, not {FORMAT!r}. Evaluate again."
        )
    return document


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header; nan and None become empty fields."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {name: "" if value is None or value != value else value for name, value in row.items()}
        )
    return buffer.getvalue()


def _paired_means(
    before_rows: Sequence[Mapping], after_rows: Sequence[Mapping], metric: str
) -> tuple[float, float]:
    """Patient-macro means of both sides over the images where the metric is defined on both."""
    after = {row["key"]: row[metric] for row in after_rows}
    pairs = [(row["patient"], row[metric], after[row["key"]]) for row in before_rows]
    pairs = [pair for pair in pairs if not (math.isnan(pair[1]) or math.isnan(pair[2]))]
    if not pairs:
        return math.nan, math.nan
    patients = [pair[0] for pair in pairs]
    means = [patient_means([pair[side] for pair in pairs], patients) for side in (1, 2)]
    return float(np.mean(list(means[0].values()))), float(np.mean(list(means[1].values())))


def _list_hash(lines: Sequence[str]) -> str:
    """sha256 over sorted lines: the order of the images does not matter."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _nan_to_none(value: Any) -> Any:
    """The same nested value with every nan replaced by None."""
    if isinstance(value, Mapping):
        return {name: _nan_to_none(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
