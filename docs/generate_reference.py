"""Makes the tables of the reference from the code and from the CSV files beside the pages; a hook of mkdocs.

A line `<!-- table: NAME -->` of a page becomes that table when the site is built: a CSV file below docs/, or
one of `GENERATED`.
"""

import csv
import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

import vesselrl
from vesselrl.experiment.config import PRESETS, TrainConfig
from vesselrl.experiment.options import OPTIONS

DOCS = Path(__file__).parent
TABLE = re.compile(r"^<!-- table: (\S+) -->$", re.MULTILINE)
VALUES = {str: "text", int: "whole number", float: "number", bool: "switch"}


class Option(NamedTuple):
    """One option of a verb."""

    names: tuple[str, ...]  # without `--` if it has a fixed place on the command line
    values: str
    default: str
    help: str


def options_of(kind: type) -> Iterator[Option]:
    """The options of a dataclass; those of a dataclass inside it have no prefix."""
    hints, comments = typing.get_type_hints(kind, include_extras=True), comments_of(kind)
    for one in fields(kind):
        hint = hints[one.name]
        extras = getattr(hint, "__metadata__", ())
        plain = typing.get_args(hint)[0] if extras else hint
        if is_dataclass(plain):
            yield from options_of(plain)
            continue
        is_positional = set(tyro.conf.Positional[str].__metadata__) & set(extras)
        aliases = [alias for extra in extras for alias in getattr(extra, "aliases", None) or ()]
        name = one.name.upper() if is_positional else f"--{one.name}"
        text = comments[one.name].replace("<", "&lt;")
        yield Option((name, *aliases), values_of(plain), default_of(one), text)


def comments_of(kind: type) -> dict[str, str]:
    """The comment above each field of a dataclass, which is its help text on the command line."""
    comments, lines = {}, []
    sources = [inspect.getsource(one) for one in kind.__mro__[::-1] if is_dataclass(one)]
    for line in "\n".join(sources).splitlines():
        if found := re.match(r"    # (.+)", line):
            lines.append(found[1])
        else:
            if found := re.match(r"    (\w+): ", line):
                comments[found[1]] = " ".join(lines)
            lines = []
    return comments


def values_of(hint: Any) -> str:
    """The values that a type allows, in words."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(hint) is tuple:
        return "several: " + values_of(arguments[0])
    if arguments:
        return values_of(next(one for one in arguments if one is not type(None)))
    return VALUES[hint]


def default_of(one: Field) -> str:
    """The default of an option; a switch is off unless it says otherwise."""
    if one.default is MISSING:
        return "needed"
    if one.default in (None, ()):
        return "none"
    if isinstance(one.default, bool):
        return "on" if one.default else "off"
    value = one.default
    return f"`{' '.join(value) if isinstance(value, tuple) else value}`"


def option_tables() -> str:
    """A section for every verb, for `train` one for every group of settings."""
    parts = []
    for verb, kinds in OPTIONS.items():
        parts.append(f"## vesselrl {verb}\n\n{inspect.getdoc(kinds[0]).splitlines()[0]}\n")
        for kind in kinds:
            groups = [typing.get_args(one.type) for one in fields(kind)]
            for group in [found[0] for found in groups if found and is_dataclass(found[0])] or [kind]:
                if group is not kinds[0]:
                    parts.append(f"### {group.__name__}\n\n{inspect.getdoc(group).splitlines()[0]}\n")
                parts.append(option_table(options_of(group)))
        if verb == "train":
            parts.append("### Presets\n\n" + preset_table())
    return "\n".join(parts)


def option_table(rows: "Iterator[Option] | Sequence[Option]") -> str:
    """Options as a table."""
    cells = [[" or ".join(f"`{name}`" for name in o.names), o.values, o.default, o.help] for o in rows]
    return table(["option", "values", "default", "meaning"], cells)


def preset_table() -> str:
    """What each preset changes."""
    usual = TrainConfig().to_dict()
    changed = {n: {k: v for k, v in c.to_dict().items() if v != usual[k]} for n, c in PRESETS.items()}
    rows = [
        [f"`{name}`", ", ".join(f"`--{k} {v}`" for k, v in values.items())]
        for name, values in changed.items()
    ]
    return table(["preset", "sets"], rows)


def api() -> str:
    """The public names of the package with their signatures, fields and methods."""
    parts = []
    for name in (name for name in vesselrl.__all__ if name != "__version__"):
        thing = getattr(vesselrl, name)
        about, _, rest = inspect.getdoc(thing).partition("\n\n")
        parts.append(f"## {name}\n\n```python\n{name}{signature(thing)}\n```\n\n{about}\n")
        if rest:
            parts.append(f"```text\n{rest}\n```\n")
        methods = [getattr(m, "__func__", m) for m in vars(thing).values()] if inspect.isclass(thing) else []
        shown = [m for m in methods if inspect.isfunction(m) and not m.__name__.startswith("_") and m.__doc__]
        if shown:
            rows = [[f"`{m.__name__}{signature(m)}`", inspect.getdoc(m).splitlines()[0]] for m in shown]
            parts.append(table(["method", "does"], rows))
    return "\n".join(parts)


def signature(thing: Any) -> str:
    """Names and defaults of the arguments, without types."""
    found = inspect.signature(thing)
    empty = inspect.Parameter.empty
    kept = [p.replace(annotation=empty) for p in found.parameters.values() if p.name not in ("self", "cls")]
    return str(found.replace(parameters=kept, return_annotation=inspect.Signature.empty))


def csv_table(name: str) -> str:
    """A CSV file below docs/ as a table; its cells are Markdown."""
    with (DOCS / name).open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    return table([title.replace("_", " ") for title in head], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines) + "\n"
    )


GENERATED = {"options": option_tables, "api": api}


def render(text: str) -> str:
    """A page with its tables in place."""
    return TABLE.sub(lambda m: GENERATED[m[1]]() if m[1] in GENERATED else csv_table(m[1]), text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return render(markdown)
