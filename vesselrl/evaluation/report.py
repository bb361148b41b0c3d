"""Reports as HTML without scripts and as Markdown: functions gather the values, templates word them."""

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vesselrl.evaluation import figures, results, words
from vesselrl.evaluation.figures import CASES_FOLDER, CASES_FORMAT, RANKS, nearest, read_metrics
from vesselrl.evaluation.results import Evaluation, group_means, read_evaluation, set_mismatch
from vesselrl.evaluation.tuning import read_threshold_curve
from vesselrl.evaluation.words import Cell, masks_in_words, metric_name, number, setting_text, with_interval
from vesselrl.experiment.run_folder import read_object, reading, write_text

if TYPE_CHECKING:
    from vesselrl.evaluation.compare import Comparison

PATIENT_METRICS = ("dice", "cldice", "recall", "precision")
SHOWN_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BEST, HUMAN = "test_best_lora", "test_human_agreement"
MAX_PICTURE_BYTES = 3_000_000


def write_run_report(run_folder: Path) -> tuple[Path, Path]:
    """Writes RUN/report.html and .md from the files of a finished run, and its best adapter's model card."""
    folder = Path(run_folder)
    with reading(folder, "Put its files back."):
        page = run_page(folder)
        if (folder / "best_lora").is_dir() and "args" in page["info"]:
            write_text(folder / "best_lora" / "README.md", render("card.j2", "md", page))
        return _write("run.j2", folder / "report", page, page["info"].get("args", {}).get("lang", "en"))


def write_evaluation_report(path: Path) -> tuple[Path, Path]:
    """Writes NAME.html and NAME.md beside NAME.json, from it and the files of the same evaluation."""
    with reading(path := Path(path), "Evaluate again."):
        page = evaluation_page(path)
        return _write("evaluation.j2", path.with_suffix(""), page, page["extra"]["plan"].get("lang", "en"))


def write_comparison_report(folder: Path, comparison: "Comparison") -> tuple[Path, Path, Path]:
    """Writes FOLDER/comparison.html, .md and .csv (one line per run) and returns their paths."""
    stem = Path(folder) / "comparison"
    write_text(csv_path := stem.with_suffix(".csv"), results.csv_text(comparison.lines))
    return *_write("comparison.j2", stem, comparison_page(comparison)), csv_path


def _write(template: str, stem: Path, page: Mapping[str, Any], lang: str = "en") -> tuple[Path, Path]:
    paths = Path(f"{stem}.html"), Path(f"{stem}.md")
    for path, form in zip(paths, ("html", "md"), strict=True):
        write_text(path, render(template, form, page, lang))
    return paths


def render(template: str, form: str, page: Mapping[str, Any], lang: str = "en") -> str:
    """A template filled in, in a language: as "html", with all text escaped, or as "md"."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

    rules = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("vesselrl.evaluation"), autoescape=form == "html", **rules)
    say = partial(words.translate, lang=lang)
    environment.globals |= {"form": form, "lang": lang, "_": say}
    environment.filters |= {
        "translate": say,
        "anchor": lambda title: re.sub(r"\W+", "-", title.lower()).strip("-"),
        "definitions": lambda values: [(k.replace("_", " "), str(v)) for k, v in values.items()],
        "glossary": lambda metrics: [words.WORDS[metric] for metric in metrics if metric in words.WORDS],
        "headings": lambda body: re.findall(r'<section id="([^"]*)">\s*<h2>(.*?)</h2>', body),
        "metric_name": metric_name,
        "one_line": lambda text: " ".join(str(text).split()).replace("<", "\\<"),
        "png_uri": png_uri,
        "setting_text": setting_text,
        "settings": lambda values: [(k, setting_text(v)) for k, v in values.items() if v is not None],
        "subset_name": lambda subset: words.LABELS["subsets"].get(subset, subset),
        "svg": figures.svg,
    }
    try:
        text = environment.get_template(template).render(page)
    except UndefinedError as error:  # a value that a file lacks
        raise LookupError(str(error)) from error
    return re.sub(r"\n{2,}", "\n" if form == "html" else "\n\n", text).strip() + "\n"


def png_uri(path: Path, num_pictures: int = 1) -> str:
    """A PNG file as a `data:` address, shrunk where it exceeds its share of the 3 MB for all pictures."""
    from PIL import Image

    try:
        content = path.read_bytes()
        picture = Image.open(io.BytesIO(content)).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path.name} cannot be shown ({error}). Write the cases again.") from error
    width, height = picture.size
    while len(content) > MAX_PICTURE_BYTES // num_pictures and width > 64:
        width, height = round(0.9 * width), round(0.9 * height)
        smaller = picture.resize((width, height), Image.Resampling.LANCZOS)
        smaller.save(buffer := io.BytesIO(), format="PNG", optimize=True)
        content = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def run_page(folder: Path) -> dict[str, Any]:
    """The values of run.j2, from the files of a run folder."""
    info = read_object(folder / "training_info.json", "Train again.")
    test = _read_pair(folder, "test_before", "test_after")
    best = _read_pair(folder, "val_before", "val_best")
    validation = best or _read_pair(folder, "val_before", "val_latest")
    shown, issues = (test or validation or [None])[-1], info.get("findings") or []
    return {
        "folder": folder.resolve(),
        "info": info,
        "origin": _origin(info),
        "about": _about(info),
        "unknown": next((i for i in issues if i["code"] == "images_unknown"), None),
        "issues": [(str(i["step"]), i["code"].replace("_", " "), i["sign"], i["advice"]) for i in issues],
        "test": test and _change(*test),
        "patients": test and _patients(*test),
        "validation": validation and _change(*validation),
        "is_best": best is not None,
        "training": _training(folder / "metrics.jsonl"),
        "later": _later(folder / "evaluation", test and test[1]),
        "cases": sorted(read_cases(folder), key=lambda case: (*RANKS, case["rank"]).index(case["rank"])),
        "metrics": shown.metrics if shown else tuple(words.WORDS),
        "definitions": shown.metric_spec if shown else info.get("metric_spec") or {},
    }


def _about(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The base model and the images of a run, and how well it knew them before, as rows."""
    args, fit = info.get("args") or {}, info.get("fit") or {}
    if "model_path" not in args:
        return []
    model = args.get("control") or setting_text(args["model_path"] or "the built-in miniature")
    images = "your own" if args.get("data_root") else "the built-in synthetic angiograms"
    rows = [("base model", model), ("images", images)]
    for name in filter(fit.__contains__, words.LABELS["fit"]):
        form = "{:.1%}" if "foreground" in name else "{}" if name == "images" else "{:.3f}"
        rows.append((words.LABELS["fit"][name], form.format(fit[name])))
    return rows


def _origin(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where a run comes from, as rows: command, machine, versions, amounts of images and trained values."""
    origin, counts = info.get("provenance") or {}, info.get("counts") or {}
    rows = {"command": " ".join(map(setting_text, origin.get("command") or ()))}
    rows |= {name: origin.get(name) for name in ("date", "git_commit", "device", "platform")}
    rows |= origin.get("packages") or {}
    used = {name: counts[name] for name in ("train", "val", "test") if isinstance(counts.get(name), dict)}
    rows |= {f"{name} images": f"{n.get('used')} of {n.get('available')}" for name, n in used.items()}
    rows["patients"] = counts.get("patients")
    rows |= {f"trainable values, {part}": f"{n:,}" for part, n in (counts.get("trainable") or {}).items()}
    return [(name.replace("_", " "), str(value)) for name, value in rows.items() if value]


def read_cases(folder: Path) -> list[dict[str, Any]]:
    """The cases that `write_cases` described, empty if there are none."""
    path = Path(folder) / CASES_FOLDER / "cases.json"
    if not path.is_file():
        return []
    document = read_object(path, advice := "Write the cases again.")
    if document.get("format") != CASES_FORMAT:
        raise ValueError(f"cases.json of cases is not in the format {CASES_FORMAT!r}. {advice}")
    return document["cases"]


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
        undefined += [f"{name}: {line['n_undefined']}"] if line["n_undefined"] else []
    shares = results.UNIT_METRICS - results.NO_DIRECTION
    drawn = {metric_name(metric): line for metric, line in lines.items() if metric in shares}
    return {
        "before": before,
        "after": after,
        "rows": rows,
        "dice": lines["dice"],
        "proven": proven,
        "undefined": undefined,
        "draw": partial(figures.interval_figure, {"Difference, after minus before": drawn}),
    }


def _patients(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Dice and clDice of every patient before and after, lowest Dice after first."""
    means = [group_means(one.rows, "patient") for one in (before, after)]
    dice = [{patient: line["dice"] for patient, line in table.items()} for table in means]
    images = Counter(row["patient"] for row in after.rows)
    header, rows = ["patient", "images"], {patient: [patient, str(images[patient])] for patient in dice[1]}
    for metric in [name for name in ("dice", "cldice") if name in before.metrics]:
        header += [f"{metric_name(metric)} before", "after", "difference"]
        for patient, row in rows.items():
            first, last = (table[patient][metric] for table in means)
            row += [number(metric, first), number(metric, last), number(metric, last - first, sign=True)]
    return {
        "header": header,
        "rows": [rows[patient] for patient in sorted(rows, key=dice[1].get)],
        "num_risen": sum(dice[1][patient] > dice[0][patient] for patient in rows),
        "draw": partial(figures.patient_figure, *dice, "Dice"),
    }


def _training(path: Path) -> dict[str, Any] | None:
    """Curves over the steps and the scores of every validation; None if nothing was logged."""
    series = read_metrics(path) if path.is_file() else {}
    if not any(key.startswith(("train/", "val/")) for key in series):
        return None
    metrics = [metric for metric in results.HEADLINE if f"val/{metric}" in series]
    points = {metric: dict(zip(*map(list, series[f"val/{metric}"]), strict=True)) for metric in metrics}
    steps = sorted({step for values in points.values() for step in values})
    rows = [(str(step), *(number(metric, points[metric].get(step)) for metric in metrics)) for step in steps]
    sizes = {name: series.get(f"train/{name}", [None])[-1] for name in ("approx_kl", "clipfrac", "ratio_gap")}
    sizes = {k: (f"{np.median(v):.2g}", f"{max(v):.2g}") for k, v in sizes.items() if v is not None}
    return {"metrics": metrics, "rows": rows, "sizes": sizes, "draw": partial(figures.curves_figure, path)}


def _later(folder: Path, test: Evaluation | None) -> dict[str, Any] | None:
    """The best adapter as evaluated after training, but for other images, labels, base models or prompts."""
    paths = {name: folder / f"{name}.json" for name in words.LABELS["columns"]}
    found = {name: read_evaluation(path) for name, path in paths.items() if path.is_file()}
    if not found:
        return None
    plans = {name: one.extra["plan"] for name, one in found.items() if one.extra.get("plan")}
    current = plans.get(BEST) or plans.get(f"{BEST}_flips")
    reference = test or next(iter(found.values()))
    columns, left_out = {}, []
    for name, one in found.items():
        plan = plans.get(name, current)  # a second observer has none
        another = current and any(plan.get(key) != current.get(key) for key in ("base_model", "prompt"))
        if another or set_mismatch(reference, one, "the test", name):
            left_out.append(name)
        else:
            columns[words.LABELS["columns"][name].format(masks=masks_in_words(one.extra))] = one
    shown = found.keys() - left_out
    return {
        "scores": _side_by_side(columns) if columns else None,
        "left_out": left_out,
        "curve": _curve(folder / f"{BEST}_thresholds.json") if f"{BEST}_tuned" in shown else None,
        "calibration": _calibration(found[BEST]) if BEST in shown else None,
    }


def _side_by_side(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Scores of one set of images, one column each; a reward that means something else is not shown."""
    columns = list(evaluations.values())
    rows = [("Images", "-", *(str(one.summary["n_images"]) for one in columns))]
    rows += [("Failed predictions", "lower", *(str(one.summary["n_failed"]) for one in columns))]
    undefined = []
    for metric in dict.fromkeys(name for one in columns for name in one.metrics):
        cells: list[Cell | str] = []
        for label, one in evaluations.items():
            same_reward = metric not in results.UNBOUNDED or one.reward_spec == columns[0].reward_spec
            is_shown = metric in one.metrics and same_reward
            cells.append(_score(one, metric) if is_shown else "-")
            missing = one.summary["metrics"][metric]["n_undefined"] if is_shown else 0
            undefined += [f"{metric_name(metric)}, {label}: {missing}"] if missing else []
        rows.append((metric_name(metric), words.good_direction(metric), *cells))
    reasons = {score["reason"] for one in columns for score in one.summary["metrics"].values()} - {""}
    return {"labels": list(evaluations), "rows": rows, "undefined": undefined, "reasons": sorted(reasons)}


def _curve(path: Path) -> dict[str, Any] | None:
    """A stored threshold curve with the places that the table shows; None if there is none."""
    if not path.is_file():
        return None
    curve, rows = read_threshold_curve(path), []
    chosen, *places = (nearest(curve["thresholds"], one) for one in (curve["chosen"], *SHOWN_THRESHOLDS))
    for place in sorted({chosen, *places}):
        threshold = f"{curve['thresholds'][place]:.3g}{' (chosen)' if place == chosen else ''}"
        scores = (number(name, curve[name][place]) for name in ("dice", "recall", "precision"))
        rows.append((threshold, *scores))
    return curve | {"rows": rows, "draw": partial(figures.threshold_figure, curve)}


def _calibration(evaluation: Evaluation) -> dict[str, Any] | None:
    """The stored calibration with its chart; None without probabilities."""
    stored = evaluation.calibration
    if not stored or not stored["bins"]:
        return None
    rows = []
    for one in stored["bins"]:
        shares = (number("dice", one[name]) for name in ("predicted", "observed"))
        rows.append((f"{one['low']:.1f} to {one['high']:.1f}", *shares, f"{one['pixels']:,}"))
    return stored | {"rows": rows, "draw": partial(figures.reliability_figure, stored["bins"])}


def evaluation_page(path: Path) -> dict[str, Any]:
    """The values of evaluation.j2, from the files of one evaluation."""
    given, tuned, human = read_evaluation(path), {}, {}
    extra, plan = given.extra, given.extra["plan"]
    for ending, tuned_for in words.TUNED_FILES.items():
        other = path.with_name(f"{path.stem}_{ending}.json")
        # An earlier evaluation under the same name may have left files of another model or of other data.
        one = read_evaluation(other) if other.is_file() else None
        if one and one.extra.get("plan") == plan and not set_mismatch(given, one, "0.5", "tuned"):
            tuned[f"{masks_in_words(one.extra)}, {tuned_for}"] = one
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
    gains = {run: table for run, table in comparison.gains.items() if table}
    ranking, differences = [], []
    for line in lines:
        scores = [with_interval(m, line[m], line[f"{m}_low"], line[f"{m}_high"]) for m in metrics]
        ranking.append((str(line["rank"]), line["run"], *scores, str(line["n_failed"])))
        if line["rank"] != "":
            own = gains.get(line["run"], {})
            cells = (_gain(own.get(name)) for name in metrics)
            p = own.get(comparison.rank_by, {}).get("p_adjusted", math.nan)
            p_value = "-" if math.isnan(p) else "below 0.001" if p < 0.001 else f"{p:.3f}"
            differences.append((line["run"], *cells, p_value))
    compared = [line["run"] for line in lines if line["run"] in gains]
    drawn = [name for name in dict.fromkeys((comparison.rank_by, "dice", "cldice")) if name in metrics]
    panels = {metric_name(name): {run: gains[run].get(name) for run in compared} for name in drawn}
    left_out = [f"Left out: {run}: {why}." for run, why in comparison.skipped.items()]
    return {
        "comparison": comparison,
        "ranking": ranking,
        "num_runs": len(differences),
        "differences": differences if compared else None,
        "draw": partial(figures.interval_figure, panels),
        "notes": [*comparison.notes, *left_out],
    }


def _gain(gain: Mapping[str, Any] | None) -> Cell | str:
    if gain is None:
        return "-"
    cell = with_interval(gain["metric"], gain["difference"], gain["low"], gain["high"], sign=True)
    return cell._replace(interval=gain["reason"] or cell.interval, verdict=gain["verdict"])
