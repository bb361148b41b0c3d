"""The result of an evaluation: rows, summary by patients, caveats, JSON and CSV files, before/after table."""

import csv
import hashlib
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from vesselrl.evaluation import statistics
from vesselrl.experiment.run_folder import read_object, reading, strict, write_json, write_text

FORMAT = "vesselrl evaluation 1"
IDENTITY_COLUMNS = ("key", "patient", "sequence", "failed", "truth_hash")
UNIT_METRICS = frozenset(
    "dice iou recall precision specificity cldice tprec tsens foreground nsd recall_thin recall_medium "
    "recall_thick topology_score".split()
)
LOWER_IS_BETTER = frozenset({"beta0_error", "beta1_error", "hd95", "length_error"})
UNBOUNDED = frozenset({"reward", "custom_score"})
NO_DIRECTION = frozenset({"length_ratio", "foreground"})
HEADLINE = ("reward", "dice", "recall", "precision", "cldice", "beta0_error", "length_ratio")
COUNTED = ("n_images", "n_patients", "n_undefined", "reason")
MAX_FAILED_SHARE = 0.05


class Caveat(Enum):
    """Reasons to distrust a score, each with the sentence shown beside it, whose heading names the reason."""

    PATIENT_LEAKAGE = "LEAKY: split by frame, so that frames of one patient are on several sides."
    NEAR_DUPLICATES = "NEAR DUPLICATES: images of different patients on two sides of the split look alike."
    UNCLEAR_PATIENTS = (
        "UNCLEAR PATIENTS: file names look like those of frames, but images count as a patient each, so that "
        "frames of one patient may be on several sides."
    )
    UNKNOWN_START = (
        "UNKNOWN START: --init_lora has no data_split.json beside it, so its adapter may have been trained "
        "on the patients of this test."
    )
    UNKNOWN_PATIENTS = (
        "UNKNOWN PATIENTS: no data_split.json tells whether the adapter was trained on patients of these "
        "images."
    )
    PRETRAINING_OVERLAP = (
        "IN-SAMPLE BASELINE: the base model was trained on patients of {seen} of {total} images; its scores "
        "there are flattered, and gains over it are understated."
    )
    SYNTHETIC = "SYNTHETIC DATA: the built-in angiograms; these scores say nothing about real images."
    MINIATURE = (
        "MINIATURE: the base model is the built-in one, a thousand times smaller than a Sa2VA; it shows how "
        "the tool works, not what a Sa2VA can do."
    )
    CONTROL = "CONTROL: a {model}; its gain over {start} is no gain over a base model."
    OTHER = "OTHER: {reason}"

    def text(self, **values: object) -> str:
        """The sentence with its values filled in."""
        return self.value.format(**values)


def read_caveats(sentences: Iterable[str]) -> dict[Caveat, str]:
    """Sorts stored sentences by their headings; unknown ones are put together under OTHER."""
    kinds = {kind.value.partition(":")[0]: kind for kind in Caveat}
    caveats: dict[Caveat, str] = {}
    for sentence in sentences:
        kind = kinds.get(sentence.partition(":")[0], Caveat.OTHER)
        caveats[kind] = f"{caveats[kind]} {sentence}" if kind in caveats else sentence
    return caveats


@dataclass(frozen=True)
class Evaluation:
    """Scores of one predictor on one set of images."""

    # One dict per image: IDENTITY_COLUMNS, metrics (nan: undefined), with a reward also reward, custom_score.
    rows: tuple[dict[str, Any], ...]
    # n_images, n_patients, n_failed, metrics: name -> image_mean, patient_mean (the headline), its Interval.
    summary: dict[str, Any]
    image_list_hash: str  # sha256 over the sorted keys
    label_hash: str  # sha256 over the keys with the hash of each true mask
    metric_spec: dict[str, Any]
    reward_spec: dict[str, Any] | None = None  # rewards of unequal ones are not compared
    calibration: dict[str, Any] | None = None  # of the probabilities; None if only masks were scored
    caveats: dict[Caveat, str] = field(default_factory=dict)  # reasons to distrust the scores
    extra: dict[str, Any] = field(default_factory=dict, repr=False)  # of a file: what it was made of, and how

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scored columns, in the order of the rows."""
        return metric_names(self.rows)

    @property
    def headline(self) -> dict[str, float]:
        """Patient-macro means of the headline metrics, and of the user's own term where there is one."""
        metrics, names = self.summary["metrics"], (*HEADLINE, "custom_score")
        return {name: metrics[name]["patient_mean"] for name in names if name in metrics}

    @property
    def too_many_failed(self) -> bool:
        """True if more than 5 % of the predictions failed; a command then ends with an error."""
        return self.summary["n_failed"] > MAX_FAILED_SHARE * self.summary["n_images"]

    def to_json(self) -> dict[str, Any]:
        """The whole evaluation as strict JSON values, nan as null, with patient and sequence means."""
        names = "image_list_hash label_hash metric_spec reward_spec summary calibration".split()
        document = {"format": FORMAT} | {name: getattr(self, name) for name in names}
        document["marks"] = list(self.caveats.values())
        document |= {f"{by}s": group_means(self.rows, by) for by in ("patient", "sequence")}
        return strict(document | {"rows": list(self.rows)})


def summarise(
    rows: Sequence[Mapping[str, Any]],
    metric_spec: Mapping[str, Any],
    reward_spec: Mapping[str, Any] | None = None,
    **stored: Any,
) -> Evaluation:
    """Builds the Evaluation of finished rows: hashes, patient means and intervals; `stored` as it is."""
    if not rows:
        raise ValueError("There is nothing to evaluate: got 0 samples. Check split and max_val_samples.")
    keys = [row["key"] for row in rows]
    statistics.check_unique(keys)
    patients = [row["patient"] for row in rows]
    metrics = {}
    for name in metric_names(rows):
        values = np.array([row[name] for row in rows], dtype=np.float64)
        bounds = (-math.inf if name in UNBOUNDED else 0.0, 1.0 if name in UNIT_METRICS else math.inf)
        found = statistics.bootstrap_interval(values, patients, bounds=bounds)
        defined = values[~np.isnan(values)]
        image_mean = float(defined.mean()) if len(defined) else math.nan
        means = {"image_mean": image_mean, "patient_mean": found.mean}
        metrics[name] = means | {field: getattr(found, field) for field in ("low", "high", *COUNTED)}
    counted = {"n_images": len(rows), "n_patients": len(set(patients))}
    counted["n_failed"] = sum(bool(row["failed"]) for row in rows)
    return Evaluation(
        rows=tuple(dict(row) for row in rows),
        summary=counted | {"metrics": metrics},
        image_list_hash=_hash_lines(keys),
        label_hash=_hash_lines([f"{row['key']} {row['truth_hash']}" for row in rows]),
        metric_spec=dict(metric_spec),
        reward_spec=None if reward_spec is None else dict(reward_spec),
        **stored,
    )


def _hash_lines(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def metric_names(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the scored columns of rows, in their order."""
    return tuple(name for name in rows[0] if name not in IDENTITY_COLUMNS)


def group_means(rows: Sequence[Mapping[str, Any]], by: str) -> dict[str, dict[str, float]]:
    """Mean of every metric within each `patient` or `sequence`: group -> metric -> mean or nan."""
    groups = [row[by] for row in rows]
    table: dict[str, dict[str, float]] = {group: {} for group in sorted(set(groups))}
    for name in metric_names(rows):
        means = statistics.patient_means([row[name] for row in rows], groups)
        for group, line in table.items():
            line[name] = means.get(group, math.nan)
    return table


def before_after_table(
    before: Evaluation, after: Evaluation, metrics: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Compares two evaluations of the same images in pairs, one dict per metric.

    Each has `metric`, `before`, `after` (means over the images defined in both), `difference`, the fields of
    its `Interval` and a `verdict`: "better", "worse" or "changed" if the interval excludes zero, else "".
    What one of the two lacks, or rewards that are not the same, are left out. ValueError if the sets differ.
    """
    if mismatch := set_mismatch(before, after, "before", "after"):
        raise ValueError(f"The evaluations cannot be compared: {mismatch}. Evaluate both on the same set.")
    others = {row["key"]: row for row in after.rows}
    pairs = [(row, others[row["key"]]) for row in sorted(before.rows, key=lambda row: row["key"])]
    for first, last in pairs:
        if first["patient"] != last["patient"]:
            people = f"{first['patient']} before and {last['patient']} after"
            raise ValueError(f"Image {first['key']} belongs to {people}.")
    patients, table = [row["patient"] for row, _ in pairs], []
    same = [name for name in metrics or after.metrics if name in after.metrics and name in before.metrics]
    for name in same:
        if name in UNBOUNDED and before.reward_spec != after.reward_spec:
            continue
        values = np.array([[row[name] for row in pair] for pair in pairs], np.float64)
        values[np.isnan(values).any(axis=1)] = math.nan
        first, last = (statistics.patient_mean(column, patients) for column in values.T)
        found = statistics.paired_difference(*values.T, patients)
        line = {"metric": name, "before": first, "after": last, "difference": found.mean}
        line |= {field: getattr(found, field) for field in ("low", "high", "p", *COUNTED)}
        table.append(line | {"verdict": verdict(name, found.mean) if found.clear else ""})
    return table


def verdict(metric: str, difference: float) -> str:
    """Names a proven difference: "better", "worse", or "changed" where the metric has no direction."""
    if metric in NO_DIRECTION:
        return "changed"
    return "better" if (difference > 0) != (metric in LOWER_IS_BETTER) else "worse"


def set_mismatch(first: Evaluation, second: Evaluation, first_name: str, second_name: str) -> str:
    """Says why two evaluations may not be compared, naming the images; "" if they may."""
    a, b = ({row["key"]: row["truth_hash"] for row in one.rows} for one in (first, second))
    if first.image_list_hash != second.image_list_hash:
        only = {first_name: a.keys() - b, second_name: b.keys() - a}
        parts = [f"{len(keys)} only in {name} ({_some(keys)})" for name, keys in only.items() if keys]
        return f"the images differ: {' and '.join(parts)}"
    if first.label_hash != second.label_hash:
        changed = {key for key in a if a[key] != b[key]}
        return f"the true masks of {len(changed)} images differ ({_some(changed)})"
    if first.metric_spec != second.metric_spec:
        old, new = first.metric_spec, second.metric_spec
        changed = (name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name))
        named = (f"{n} is {old.get(n)!r} in {first_name}, {new.get(n)!r} in {second_name}" for n in changed)
        return f"the metric specifications differ: {'; '.join(named)}"
    return ""


def _some(keys: Collection[str]) -> str:
    return ", ".join(sorted(keys)[:5]) + (", ..." if len(keys) > 5 else "")


def write_evaluation(
    folder: Path, name: str, evaluation: Evaluation, extra: Mapping[str, Any] | None = None
) -> Path:
    """Writes FOLDER/NAME.json (everything, with `extra` under that key) and FOLDER/NAME.csv (the rows)."""
    write_text(Path(folder) / f"{name}.csv", csv_text(evaluation.rows))
    write_json(path := Path(folder) / f"{name}.json", evaluation.to_json() | {"extra": dict(extra or {})})
    return path


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header; nan and None become empty fields."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value != value else value for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def read_evaluation(path: Path) -> Evaluation:
    """Reads a file of `write_evaluation`; ValueError if it is none, or its rows do not match its hashes."""
    document = read_object(path, "Evaluate again.")
    if (found := document.get("format")) != FORMAT:
        raise ValueError(f"{path} is no evaluation: its format is {found!r}, not {FORMAT!r}. Evaluate again.")
    return evaluation_from_json(document, path)


def evaluation_from_json(document: Mapping[str, Any], source: Path) -> Evaluation:
    """Restores an evaluation from `Evaluation.to_json`, its summary anew; errors name `source`."""
    required = ("rows", "metric_spec", "image_list_hash", "label_hash")
    if missing := [name for name in required if not document.get(name)]:
        raise ValueError(f"{source} is incomplete: {', '.join(missing)} is missing. Evaluate again.")
    extra = document.get("extra")
    with reading(source, "Evaluate again."):
        rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in document["rows"]]
        caveats = read_caveats(document.get("marks", ()))
        stored = {"calibration": document.get("calibration"), "caveats": caveats}
        stored["extra"] = extra if isinstance(extra, dict) else {}
        evaluation = summarise(rows, document["metric_spec"], document.get("reward_spec"), **stored)
    for name in ("image_list_hash", "label_hash"):
        if getattr(evaluation, name) != document[name]:
            raise ValueError(f"{source} was changed: its rows do not match its {name}. Evaluate again.")
    return evaluation
