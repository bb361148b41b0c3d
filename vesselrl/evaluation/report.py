"""Reports of a run, of an evaluation and of a comparison, as HTML without scripts and as Markdown. No torch.

One function gathers the values of each page from stored files; the templates word it, once for both forms.
Measured values only: what was hoped for or aimed at is not shown beside them.
"""

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vesselrl.evaluation import charts, results, words
from vesselrl.evaluation.figures import RANKS, curves_figure, read_cases, read_json, read_metrics
from vesselrl.evaluation.results import Evaluation, group_means, read_evaluation, read_extra, set_mismatch
from vesselrl.evaluation.tuning import read_threshold_curve
from vesselrl.evaluation.words import Cell, masks_in_words, metric_name, number, with_interval
from vesselrl.experiment.run_folder import write_text

if TYPE_CHECKING:
    from jinja2 import Environment

    from vesselrl.evaluation.compare import Comparison

STEP_METRICS = ("reward", "dice", "recall", "precision", "cldice", "beta0_error", "length_ratio")
PATIENT_METRICS = ("dice", "cldice", "recall", "precision")
SHOWN_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BEST, HUMAN = "test_best_lora", "test_human_agreement"
MAX_PICTURE_BYTES = 3_000_000


def write_run_report(run_folder: Path) -> tuple[Path, Path]:
    """Writes RUN/report.html and RUN/report.md from the files of a run folder and returns their paths.

    A part whose file is missing is left out.

    Raises:
        ValueError: the folder is no finished run, or a file is damaged; the message names the file.
    """
    folder = Path(run_folder)
    return _write("run.j2", folder / "report", run_page(folder))


def write_evaluation_report(path: Path) -> tuple[Path, Path]:
    """Writes FOLDER/NAME.html and FOLDER/NAME.md beside FOLDER/NAME.json and returns their paths.

    Reads NAME.json and, where they exist and belong to the same evaluation, those of `TUNED_FILES`,
    NAME_thresholds.json and SUBSET_human_agreement.json.

    Raises:
        ValueError: a file is damaged or no held-out evaluation; the message names it.
    """
    path = Path(path)
    return _write("evaluation.j2", path.with_suffix(""), evaluation_page(path))


def write_comparison_report(folder: Path, comparison: "Comparison") -> tuple[Path, Path, Path]:
    """Writes FOLDER/comparison.html, .md and .csv (one line per run) and returns their paths."""
    stem = Path(folder) / "comparison"
    paths = _write("comparison.j2", stem, comparison_page(comparison))
    write_text(stem.with_suffix(".csv"), results.csv_text(comparison.lines))
    return *paths, stem.with_suffix(".csv")


def markdown(comparison: "Comparison") -> str:
    """The comparison as a Markdown report."""
    return render("comparison.j2", "md", comparison_page(comparison))


def _write(template: str, stem: Path, page: Mapping[str, Any]) -> tuple[Path, Path]:
    html_path, markdown_path = Path(f"{stem}.html"), Path(f"{stem}.md")
    write_text(markdown_path, render(template, "md", page))
    write_text(html_path, render(template, "html", page))
    return html_path, markdown_path


def render(template: str, form: str, page: Mapping[str, Any]) -> str:
    """A template filled in: as "html", with all text escaped, or as "md"."""
    text = _environment(form).get_template(template).render(page)
    return re.sub(r"\n{2,}", "\n" if form == "html" else "\n\n", text).strip() + "\n"


def _environment(form: str) -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vesselrl.evaluation"),
        autoescape=form == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["form"] = form
    environment.filters |= {
        "anchor": lambda title: re.sub(r"\W+", "-", title.lower()).strip("-"),
        "glossary": lambda metrics: [words.WORDS[metric] for metric in metrics if metric in words.WORDS],
        "headings": lambda body: re.findall(r'<section id="([^"]*)">\s*<h2>(.*?)</h2>', body),
        "metric_name": metric_name,
        "number": partial(number, "dice"),
        "one_line": lambda text: " ".join(str(text).split()).replace("<", "\\<"),
        "png_uri": png_uri,
        "setting": words.setting_text,
        "subset_name": lambda subset: words.LABELS["subsets"].get(subset, subset),
        "svg": charts.svg,
    }
    return environment


def png_uri(path: Path, num_pictures: int = 1) -> str:
    """A PNG file as a `data:` address, shrunk where it exceeds its share of the 3 MB for all pictures.

    Raises:
        ValueError: the file is missing or no picture.
    """
    from PIL import Image

    try:
        content = path.read_bytes()
        picture = Image.open(io.BytesIO(content)).convert("RGB")
    except OSError as error:
        raise ValueError(
            f"{path.name} cannot be shown in the report ({error}). Write the cases of the run again."
        ) from error
    width, height = picture.size
    while len(content) > MAX_PICTURE_BYTES // num_pictures and width > 64:
        width, height = round(0.9 * width), round(0.9 * height)
        smaller = picture.resize((width, height), Image.Resampling.LANCZOS)
        smaller.save(buffer := io.BytesIO(), format="PNG", optimize=True)
        content = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def run_page(folder: Path) -> dict[str, Any]:
    """The values of run.j2, from the files of a run folder."""
    if not (folder / "training_info.json").is_file():
        raise ValueError(f"{folder.name} is no finished run: it has no training_info.json. Train first.")
    info, order = read_json(folder / "training_info.json"), dict(zip(RANKS, range(3), strict=True))
    test = _read_pair(folder, "test_before", "test_after")
    best = _read_pair(folder, "val_before", "val_best")
    validation = best or _read_pair(folder, "val_before", "val_latest")
    shown = next((pair[1] for pair in (test, validation) if pair), None)
    return {
        "folder": folder.resolve(),
        "info": info,
        "test": test and _change(*test),
        "patients": test and _patients(*test),
        "validation": validation and _change(*validation),
        "is_best": best is not None,
        "training": _training(folder / "metrics.jsonl"),
        "later": _later(folder / "evaluation", test and test[1]),
        "cases": sorted(read_cases(folder), key=lambda case: order.get(case["rank"], 3)),
        "metrics": shown.metrics if shown else tuple(words.WORDS),
        "definitions": shown.metric_spec if shown else info.get("metric_spec") or {},
    }


def _read_pair(folder: Path, *names: str) -> tuple[Evaluation, ...] | None:
    paths = [folder / f"{name}.json" for name in names]
    return tuple(map(read_evaluation, paths)) if all(path.is_file() for path in paths) else None


def _score(evaluation: Evaluation, metric: str) -> Cell:
    score = evaluation.summary["metrics"][metric]
    return with_interval(metric, score["patient_mean"], score["low"], score["high"])


def _change(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Scores before and after on one subset: a table, a chart, and what is said of them."""
    lines = {line["metric"]: line for line in results.before_after_table(before, after)}
    rows, undefined = [], []
    proven: dict[str, list[str]] = {"better": [], "worse": [], "changed": [], "": []}
    for metric, line in lines.items():
        name = metric_name(metric)
        line["cell"] = with_interval(metric, line["difference"], line["low"], line["high"], sign=True)
        verdict = Cell("", verdict=line["verdict"]) if line["verdict"] else line["reason"]
        scores = _score(before, metric), _score(after, metric), line["cell"]
        rows.append((name, words.good_direction(metric), *scores, verdict))
        proven[line["verdict"]].append(name)
        undefined += [f"{name} {line['n_undefined']}"] if line["n_undefined"] else []
    shares = results.UNIT_METRICS - results.NO_DIRECTION
    drawn = {metric_name(metric): line for metric, line in lines.items() if metric in shares}
    return {
        "before": before,
        "after": after,
        "rows": rows,
        "dice": lines["dice"],
        "proven": proven,
        "undefined": undefined,
        "draw": partial(charts.interval_figure, {"Difference, after minus before": drawn}),
    }


def _patients(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Dice and clDice of every patient before and after, lowest Dice after first."""
    means = [group_means(one.rows, "patient") for one in (before, after)]
    dice = [{patient: line["dice"] for patient, line in table.items()} for table in means]
    images = Counter(row["patient"] for row in after.rows)
    header, rows = ["patient", "images"], {patient: [patient, str(images[patient])] for patient in dice[1]}
    for metric in ("dice", "cldice"):
        if metric not in before.metrics:
            continue
        header += [f"{metric_name(metric)} before", "after", "difference"]
        for patient, row in rows.items():
            first, last = (table[patient][metric] for table in means)
            row += [number(metric, first), number(metric, last), number(metric, last - first, sign=True)]
    return {
        "header": header,
        "rows": [rows[patient] for patient in sorted(rows, key=dice[1].get)],
        "num_risen": sum(dice[1][patient] > dice[0][patient] for patient in rows),
        "draw": partial(charts.patient_figure, *dice, "Dice"),
    }


def _training(path: Path) -> dict[str, Any] | None:
    """Curves over the steps and the scores of every validation; None if nothing was logged."""
    series = read_metrics(path) if path.is_file() else {}
    if not any(key.startswith(("train/", "val/")) for key in series):
        return None
    metrics = [metric for metric in STEP_METRICS if f"val/{metric}" in series]
    points = {metric: dict(zip(*map(list, series[f"val/{metric}"]), strict=True)) for metric in metrics}
    steps = sorted({step for values in points.values() for step in values})
    rows = [(str(step), *(number(metric, points[metric].get(step)) for metric in metrics)) for step in steps]
    return {"metrics": metrics, "rows": rows, "draw": partial(curves_figure, path)}


def _later(folder: Path, test: Evaluation | None) -> dict[str, Any] | None:
    """The best adapter at other settings, its threshold and its calibration, as evaluated after training.

    An evaluation of other images or labels than those of the run's test, or with another base model or prompt
    than the one at the plan's threshold, is left out, and that is said.
    """
    paths = {name: folder / f"{name}.json" for name in words.LABELS["columns"]}
    found = {name: read_evaluation(path) for name, path in paths.items() if path.is_file()}
    if not found:
        return None
    extras = {name: read_extra(paths[name]) for name in found}
    plans = {name: extra["plan"] for name, extra in extras.items() if extra.get("plan")}
    current = plans.get(BEST) or plans.get(f"{BEST}_flips")
    reference = test or next(iter(found.values()))
    columns, left_out = {}, []
    for name, one in found.items():
        plan = plans.get(name, current)  # a second observer has none
        another = current and any(plan.get(key) != current.get(key) for key in ("base_model", "prompt"))
        if another or set_mismatch(reference, one, "the test", name):
            left_out.append(name)
        else:
            columns[words.LABELS["columns"][name].format(masks=masks_in_words(extras[name]))] = one
    shown = found.keys() - left_out
    return {
        "scores": _side_by_side(columns) if columns else None,
        "left_out": left_out,
        "curve": _curve(folder / f"{BEST}_thresholds.json") if f"{BEST}_tuned" in shown else None,
        "calibration": _calibration(found[BEST]) if BEST in shown else None,
    }


def _side_by_side(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Evaluations of one set of images, label -> scores: rows, and what is undefined or has no interval.

    A reward that means something else than the first column's is not shown.
    """
    columns = list(evaluations.values())
    rows = [("Images", "-", *(str(one.summary["n_images"]) for one in columns))]
    rows += [("Failed predictions", "lower", *(str(one.summary["n_failed"]) for one in columns))]
    undefined = []
    for metric in dict.fromkeys(name for one in columns for name in one.metrics):
        cells: list[Cell | str] = []
        for label, one in evaluations.items():
            if metric not in one.metrics or (
                metric == "reward" and one.reward_spec != columns[0].reward_spec
            ):
                cells.append("-")
                continue
            cells.append(_score(one, metric))
            missing = one.summary["metrics"][metric]["n_undefined"]
            undefined += [f"{metric_name(metric)} ({label}) {missing}"] if missing else []
        rows.append((metric_name(metric), words.good_direction(metric), *cells))
    reasons = {score["reason"] for one in columns for score in one.summary["metrics"].values()} - {""}
    return {"labels": list(evaluations), "rows": rows, "undefined": undefined, "reasons": sorted(reasons)}


def _curve(path: Path) -> dict[str, Any] | None:
    """A stored threshold curve with the places that the table shows; None if there is none."""
    if not path.is_file():
        return None
    curve = read_threshold_curve(path)
    place, *shown = (charts.nearest(curve["thresholds"], one) for one in (curve["chosen"], *SHOWN_THRESHOLDS))
    return curve | {
        "place": place,
        "shown": sorted({place, *shown}),
        "draw": partial(charts.threshold_figure, curve),
    }


def _calibration(evaluation: Evaluation) -> dict[str, Any] | None:
    """The stored calibration with its chart; None without probabilities."""
    stored = evaluation.calibration
    if not stored or not stored["bins"]:
        return None
    return stored | {"draw": partial(charts.reliability_figure, stored["bins"])}


def evaluation_page(path: Path) -> dict[str, Any]:
    """The values of evaluation.j2, from the files of one evaluation."""
    given, extra = read_evaluation(path), read_extra(path)
    if "plan" not in extra:
        raise ValueError(
            f"{path} is no evaluation of held-out patients: it has no plan. Give a file of vesselrl evaluate."
        )
    plan, tuned, human = extra["plan"], {}, {}
    for ending, tuned_for in words.TUNED_FILES.items():
        other = path.with_name(f"{path.stem}_{ending}.json")
        # An earlier evaluation under the same name may have left files of another model or of other data.
        if other.is_file() and (facts := read_extra(other)).get("plan") == plan:
            tuned[f"{masks_in_words(facts)}, {tuned_for}"] = read_evaluation(other)
    observer = path.with_name(f"{plan['side']}_human_agreement.json")
    if observer.is_file():
        human = {words.LABELS["columns"][HUMAN]: read_evaluation(observer)}
        human = {} if set_mismatch(given, *human.values(), "model", "observer") else human
    columns = {masks_in_words(extra): given} | tuned | human
    metrics = [metric for metric in PATIENT_METRICS if metric in given.metrics]
    images = Counter(row["patient"] for row in given.rows)
    failed = Counter(row["patient"] for row in given.rows if row["failed"])
    patients = []
    for patient, line in sorted(group_means(given.rows, "patient").items(), key=lambda item: item[1]["dice"]):
        scores = (number(metric, line[metric]) for metric in metrics)
        patients.append((patient, str(images[patient]), str(failed[patient]), *scores))
    return {
        "name": path.stem,
        "extra": extra,
        "adapter": plan["lora_weights"] and Path(plan["lora_weights"]).resolve().name,
        "not_test": plan["lora_weights"] and words.LABELS["not_test"].get(plan["side"]),
        "given": given,
        "masks": masks_in_words(extra),
        "dice": {label: _score(one, "dice") for label, one in columns.items()},
        "tuned": list(tuned),
        "human": list(human),
        "max_failed": 100 * results.MAX_FAILED_SHARE,
        "scores": _side_by_side(columns),
        "metrics": metrics,
        "patients": patients,
        "curve": _curve(path.with_name(f"{path.stem}_thresholds.json")) if tuned else None,
        "calibration": _calibration(given),
    }


def comparison_page(comparison: "Comparison") -> dict[str, Any]:
    """The values of comparison.j2."""
    metrics, lines = comparison.metrics, comparison.lines
    gains = {run: {one["metric"]: one for one in table} for run, table in comparison.gains.items() if table}
    ranking, differences = [], []
    for line in lines:
        scores = (
            with_interval(name, line[name], line[f"{name}_low"], line[f"{name}_high"]) for name in metrics
        )
        ranking.append((str(line["rank"]), line["run"], *scores, str(line["n_failed"])))
        if line["rank"] != "":
            own = gains.get(line["run"], {})
            cells = (_gain(own.get(name)) for name in metrics)
            differences.append((line["run"], *cells, _p_value(own.get(comparison.rank_by))))
    compared = [line["run"] for line in lines if line["run"] in gains]
    drawn = [name for name in dict.fromkeys((comparison.rank_by, "dice", "cldice")) if name in metrics]
    panels = {metric_name(name): {run: gains[run].get(name) for run in compared} for name in drawn}
    left_out = [f"Left out: {name}: {why}." for name, why in comparison.skipped.items()]
    return {
        "comparison": comparison,
        "ranking": ranking,
        "num_runs": len(differences),
        "differences": differences if compared else None,
        "draw": partial(charts.interval_figure, panels),
        "notes": [*comparison.notes, *left_out],
    }


def _gain(gain: Mapping[str, Any] | None) -> Cell | str:
    if gain is None:
        return "-"
    metric, difference = gain["metric"], gain["difference"]
    if gain["reason"]:
        return Cell(number(metric, difference, sign=True), gain["reason"])
    return with_interval(metric, difference, gain["low"], gain["high"], sign=True, verdict=gain["verdict"])


def _p_value(gain: Mapping[str, Any] | None) -> str:
    p = math.nan if gain is None else gain["p_adjusted"]
    return "-" if math.isnan(p) else "below 0.001" if p < 0.001 else f"{p:.3f}"
