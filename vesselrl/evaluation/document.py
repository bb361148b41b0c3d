"""A report as data: sections of text, tables, charts and pictures, and its form as Markdown.

The HTML form of the same document is made in `html.py`; both say the same because both are made from this.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True)
class Text:
    """One paragraph; `strong` for the sentence a reader must not miss."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Terms:
    """A glossary: (term, meaning) pairs."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """Rows of text cells under a header; the first `text_columns` are words, the others numbers.

    `stacked` puts what is in brackets on a line of its own in HTML, for tables with many columns.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    text_columns: int = 1
    stacked: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart as SVG text; `file` is a picture of it beside the report, for Markdown.

    Without a file the chart and its caption are in HTML only; its numbers stand in a table beside it.
    """

    svg: str
    caption: str
    file: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file; `file` is its path relative to the report."""

    path: Path
    file: str
    title: str
    caption: str


Block: TypeAlias = Text | Bullets | Terms | Table | Chart | Picture


@dataclass(frozen=True)
class Section:
    """A titled part of a report."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """The title as an identifier for links."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Document:
    """A whole report: what it is about, the answer, and the sections that back it."""

    title: str
    subtitle: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...]


def to_markdown(document: Document) -> str:
    """The document as Markdown; charts are links to their files, and left out where they have none."""
    lines = [f"# {_plain(document.title)}", "", _plain(document.subtitle), ""]
    for sentence in document.summary:
        lines += [_plain(sentence), ""]
    for section in document.sections:
        lines += [f"## {_plain(section.title)}", ""]
        for block in section.blocks:
            lines += [*_block_lines(block), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _block_lines(block: Block) -> list[str]:
    """One block as lines of Markdown."""
    if isinstance(block, Text):
        return [f"**{_plain(block.text)}**" if block.strong else _plain(block.text)]
    if isinstance(block, Bullets):
        return [f"- {_plain(item)}" for item in block.items]
    if isinstance(block, Terms):
        return [f"- **{_plain(term)}**: {_plain(meaning)}" for term, meaning in block.items]
    if isinstance(block, Table):
        marks = ["---" if place < block.text_columns else "--:" for place in range(len(block.header))]
        rows = [_row(block.header), _row(marks), *(_row(row) for row in block.rows)]
        return [*([_plain(block.caption), ""] if block.caption else []), *rows]
    if isinstance(block, Chart):
        return [f"![{_plain(block.caption)}]({block.file})"] if block.file else []
    heading = [f"### {_plain(block.title)}", ""]
    return [*heading, _plain(block.caption), "", f"![{_plain(block.title)}]({block.file})"]


def _row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text without line breaks, and without anything Markdown would take for HTML."""
    return " ".join(text.split()).replace("<", "\\<")
