"""Charts as SVG, pictures as data addresses, documents as HTML and Markdown."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vesselrl.evaluation.charts import (
    Estimate,
    interval_figure,
    patient_figure,
    reliability_figure,
    svg,
    threshold_figure,
)
from vesselrl.evaluation.document import (
    Bullets,
    Chart,
    Document,
    Picture,
    Section,
    Table,
    Terms,
    Text,
    to_markdown,
)
from vesselrl.evaluation.html import png_uri, to_html
from vesselrl.evaluation.metric_words import number

SWEEP = {
    "thresholds": [0.25, 0.5, 0.75],
    "dice": [0.7, 0.8, 0.75],
    "recall": [0.9, 0.8, 0.65],
    "precision": [0.6, 0.8, 0.9],
    "chosen": 0.5,
}
VOID = {"meta", "link", "br", "img", "wbr", "path", "use", "rect", "line", "circle"}


class Page(HTMLParser):
    """Text, identifiers and open elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.texts, self.faults, self.rows = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.faults.append(tag)

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def forest():
    lines = [
        Estimate("first", 0.2, 0.1, 0.3, "better"),
        Estimate("second", -0.1, -0.2, -0.05, "worse"),
        Estimate("third", 0.0, math.nan, math.nan),
    ]
    return interval_figure({"Dice": lines})


def test_a_chart_is_one_element_without_outside_addresses_or_dates():
    text = svg(forest(), 'Runs <"&">')
    assert text.startswith('<svg role="img" aria-label="Runs &lt;&quot;&amp;&quot;&gt;"')
    assert text.endswith("</svg>")
    assert text.count("<svg") == 1
    assert "http" not in text
    assert "metadata" not in text
    assert ">first</text>" in text  # words stay words
    assert text == svg(forest(), 'Runs <"&">')


def test_charts_of_one_page_share_no_identifier_and_find_their_own():
    charts = [svg(forest(), "a"), svg(forest(), "b"), svg(threshold_figure(SWEEP), "c")]
    ids = [set(re.findall(r'\bid="([^"]+)"', chart)) for chart in charts]
    assert all(ids)
    assert not ids[0] & ids[1]
    assert not ids[1] & ids[2]
    for own, chart in zip(ids, charts, strict=True):
        assert set(re.findall(r'href="#([^"]+)"', chart)) <= own
        assert set(re.findall(r"url\(#([^)]+)\)", chart)) <= own


def test_an_interval_chart_draws_the_given_numbers():
    (axes,) = forest().axes
    drawn = [line.get_xdata() for line in axes.lines]
    assert [list(np.atleast_1d(x)) for x in drawn[1:]] == [[0.1, 0.3], [0.2], [-0.2, -0.05], [-0.1], [0.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second", "third"]
    top, bottom = axes.transData.transform([(0, 0), (0, 2)])[:, 1]
    assert top > bottom  # the first line is on top
    colours = [axes.lines[place].get_color() for place in (2, 4, 5)]
    assert len(set(colours)) == 3


def test_the_threshold_chart_marks_the_default_and_the_choice():
    left, right = threshold_figure(SWEEP | {"chosen": 0.75}).axes
    assert [list(line.get_ydata()) for line in left.lines[:3]] == [
        SWEEP["dice"], SWEEP["recall"], SWEEP["precision"],
    ]  # fmt: skip
    assert [line.get_xdata()[0] for line in left.lines[3:]] == [0.5, 0.75]
    points = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in right.lines[1:]]
    assert points == [(0.8, 0.8), (0.65, 0.9)]  # (recall, precision) at 0.5 and at 0.75


def test_patients_and_reliability_are_drawn_as_given():
    figure = patient_figure({"P2": 0.5, "P1": 0.8}, {"P2": 0.6, "P1": 0.7}, "Dice")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["P2", "P1"]
    assert [list(map(float, line.get_xdata())) for line in axes.lines[::3]] == [[0.5, 0.6], [0.8, 0.7]]
    assert axes.lines[0].get_color() != axes.lines[3].get_color()
    bins = [{"predicted": 0.1, "observed": 0.3}, {"predicted": 0.9, "observed": 0.7}]
    (axes,) = reliability_figure({"after": bins}).axes
    assert list(axes.lines[1].get_xdata()) == [0.1, 0.9]
    assert list(axes.lines[1].get_ydata()) == [0.3, 0.7]


def test_differences_never_round_to_a_signed_zero():
    assert number("dice", -0.0004, sign=True) == "-0.0004"
    assert number("beta1_error", -0.04, sign=True) == "-0.04"
    assert number("dice", 0.0, sign=True) == number("dice", -1e-9, sign=True) == "0.000"
    assert number("dice", math.nan) == number("dice", None) == "undefined"


def write_png(path, size=(40, 20), noise=False):
    pixels = (
        np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)) if noise else np.zeros((*size[::-1], 3))
    )
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def test_a_picture_is_embedded_as_it_is_or_smaller_if_it_is_too_large(tmp_path):
    small = write_png(tmp_path / "small.png")
    head, data = png_uri(small).split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == small.read_bytes()
    large = write_png(tmp_path / "large.png", (600, 300), noise=True)
    content = base64.b64decode(png_uri(large, 100_000).split(",")[1])
    assert len(content) <= 100_000 < large.stat().st_size
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.width == pytest.approx(2 * picture.height, abs=2)


def test_a_missing_or_broken_picture_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png cannot be shown"):
        png_uri(tmp_path / "gone.png")
    (tmp_path / "bad.png").write_text("text")
    with pytest.raises(ValueError, match=r"bad\.png cannot be shown"):
        png_uri(tmp_path / "bad.png")


def full_document(tmp_path):
    rows = (("run_<b>", "0.800 (0.700 to 0.900)", "+0.1 (+0.0 to +0.2) better"), ("a|b", "-", "-0.1 worse"))
    blocks = (
        Text("A & B", strong=True),
        Bullets(("one <script>alert(1)</script>",)),
        Terms((("Dice", "overlap"),)),
        Table(("run", "Dice", "change"), rows, "Caption", stacked=True),
        Table(("run", "Dice", "change"), rows),
        Chart(svg(forest(), "Forest"), "The chart", "forest.png"),
        Picture(write_png(tmp_path / "case.png"), "cases/case.png", "Best: P001", "Dice 0.9"),
    )
    return Document("Report <x>", "of a run", ("Deploy it.",), (Section("Results & more", blocks),))


def test_the_page_is_whole_escaped_and_needs_nothing_from_outside(tmp_path):
    html = to_html(full_document(tmp_path))
    page = Page(html)
    assert page.open == page.faults == []
    assert len(page.ids) == len(set(page.ids))
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "http://" not in html
    assert "https://" not in html
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert 'id="results-more"' in html
    assert 'href="#results-more"' in html
    assert "default-src 'none'" in html


def test_html_and_markdown_hold_the_same_cells(tmp_path):
    document = full_document(tmp_path)
    plain = [re.sub(r"\s+", "", "".join(row)) for row in Page(to_html(document)).rows]
    stacked, flat = plain[:3], plain[3:]
    assert flat == ["runDicechange", "run_<b>0.800(0.700to0.900)+0.1(+0.0to+0.2)better", "a|b--0.1worse"]
    assert stacked[1] == "run_<b>0.800(0.700to0.900)+0.1better(+0.0to+0.2)"
    text = to_markdown(document)
    assert "| run | Dice | change |\n| --- | --: | --: |\n" in text
    assert "| run_\\<b> | 0.800 (0.700 to 0.900) | +0.1 (+0.0 to +0.2) better |" in text
    assert "| a\\|b | - | -0.1 worse |" in text
    assert "**A & B**" in text
    assert "- **Dice**: overlap" in text
    assert "![The chart](forest.png)" in text
    assert "### Best: P001\n\nDice 0.9\n\n![Best: P001](cases/case.png)" in text
