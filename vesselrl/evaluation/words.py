"""Names of metrics, numbers and tables for readers, in a language; the words are in templates/words*.toml."""

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from rich.table import Table

from vesselrl.evaluation.results import LOWER_IS_BETTER, NO_DIRECTION, Evaluation

TEMPLATES = files("vesselrl.evaluation").joinpath("templates")
LABELS = tomllib.loads(TEMPLATES.joinpath("words.toml").read_text("utf-8"))
LANGUAGES = {"en": {}, "zh": tomllib.loads(TEMPLATES.joinpath("words.zh.toml").read_text("utf-8"))}
NUMBER = re.compile(r"(?<![\w.-])[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")
WORDS = {column: tuple(name_and_meaning) for column, name_and_meaning in LABELS["metrics"].items()}
TUNED_FILES = LABELS["tuned"]


class Cell(NamedTuple):
    """A number as text, with its interval (or why it has none) and its verdict."""

    value: str
    interval: str = ""
    verdict: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.value, self.interval and f"({self.interval})", self.verdict)))


def translate(text: str | Cell, lang: str) -> Any:
    """A text in a language: the whole of it, or with # for its numbers, or part by part; else as it is.

    >>> translate("5 patients", "zh"), translate("P001", "zh")
    ('5 名患者', 'P001')
    """
    if isinstance(text, Cell):
        return Cell(*(translate(part, lang) for part in text))
    table, numbers = LANGUAGES[lang], NUMBER.findall(text)
    if (found := table.get(text)) or not table:
        return found or text
    if found := table.get(NUMBER.sub("#", text)):
        return found.replace("#", "{}").format(*numbers)
    sentences = (" ", text.replace(". ", ".\n").split("\n"))
    for sign, parts in (sentences, *((s, text.split(s)) for s in (": ", ", "))):
        if (said := [translate(part, lang) for part in parts if len(parts) > 1]) not in ([], parts):
            return type(text)(table[sign]).join(said)
    return text


def metric_name(metric: str) -> str:
    """The name a reader sees; an unknown column keeps its own, without underscores."""
    return WORDS[metric][0] if metric in WORDS else metric.replace("_", " ").capitalize()


def good_direction(metric: str) -> str:
    """`higher`, `lower` or `-`: which way is better."""
    return "-" if metric in NO_DIRECTION else "lower" if metric in LOWER_IS_BETTER else "higher"


def number(metric: str, value: float | None, sign: bool = False) -> str:
    """A score as text, with as many decimals as its kind deserves; nan and None are `undefined`.

    A difference (`sign`) that would round to nothing gets up to three decimals more: its sign is not hidden.

    >>> number("dice", 0.81234), number("dice", 0.012, sign=True), number("beta1_error", -0.012, sign=True)
    ('0.812', '+0.012', '-0.01')
    """
    if value is None or math.isnan(value):
        return "undefined"
    wanted = 1 if metric in ("beta0_error", "beta1_error", "hd95") else 3
    if not sign:
        return f"{value:.{wanted}f}"
    decimals = next((places for places in range(wanted, wanted + 4) if round(value, places)), None)
    return f"{0:.{wanted}f}" if decimals is None else f"{value:+.{decimals}f}"


def with_interval(metric: str, mean: float, low: float, high: float, sign: bool = False) -> Cell:
    """A mean with its interval, without one if there is none."""
    missing = any(value is None or math.isnan(value) for value in (mean, low, high))
    interval = "" if missing else f"{number(metric, low, sign)} to {number(metric, high, sign)}"
    return Cell(number(metric, mean, sign), interval)


def masks_in_words(post: Mapping[str, Any]) -> str:
    """How masks are made, from the fields of a `PostProcessing`; what is not done is left out."""
    if post.get("threshold") is None:
        return "threshold unknown"
    smallest, level = post.get("min_component_px"), post.get("close_gaps")
    words = [f"threshold {post['threshold']:g}", smallest and f"components from {smallest} px"]
    return ", ".join(filter(None, [*words, level and f"gaps closed above {level:g}"]))


def setting_text(value: Any) -> str:
    """A setting as text; of a path from the root or a home folder only its last part, also after `--option=`.

    >>> setting_text("--data_root=/home/somebody/angio"), setting_text("output/run"), setting_text(0.50)
    ('--data_root=.../angio', 'output/run', '0.5')
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting_text, value))
    text = f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
    option, equals, path = text.rpartition("=") if text.startswith("-") else ("", "", text)
    if not path.startswith(("/", "~", "\\\\")) and path[1:3] not in (":\\", ":/"):
        return text
    last = path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return f"{option}{equals}.../{last}"


def scores_table(title: str, columns: Mapping[str, Evaluation]) -> Table:
    """Patient means with intervals, a column for each evaluation, for the terminal."""
    table = Table("metric", *columns, title=f"{title}: patient means (95 % interval)")
    for metric in next(iter(columns.values())).metrics:
        scores = [one.summary["metrics"].get(metric) for one in columns.values()]
        texts = (f"{s['patient_mean']:.4f} ({s['low']:.4f} to {s['high']:.4f})" if s else "" for s in scores)
        table.add_row(metric, *texts)
    return table


def differences_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The lines of `before_after_table` for the terminal."""
    columns = ("metric", "before", "after", "difference", "95 % interval", "")
    table = Table(*columns, title=f"{title}: patient means")
    for row in rows:
        interval = row["reason"] or f"{row['low']:+.4f} to {row['high']:+.4f}"
        values = (f"{row['before']:.4f}", f"{row['after']:.4f}", f"{row['difference']:+.4f}")
        table.add_row(row["metric"], *values, interval, row["verdict"])
    return table
