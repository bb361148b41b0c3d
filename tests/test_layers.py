"""The house rules: direction of imports, what may be imported where, size of files and functions."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vesselrl"

# cli -> training -> evaluation -> inference -> data | models | synthetic -> scoring; experiment: nothing.
BELOW = "inference data models synthetic scoring experiment errors"
MAY_IMPORT = {
    "cli": f"training doctor demo evaluation {BELOW}",
    "training": f"evaluation {BELOW}",
    **{"demo": f"evaluation {BELOW}", "evaluation": BELOW},
    "inference": "data models scoring experiment errors",
    "synthetic": "data scoring experiment errors",
    "data": "scoring experiment errors",
    "models": "scoring experiment errors",
    "scoring": "experiment errors",
    "experiment": "errors",
    "doctor": "data models experiment errors",
    **{"errors": "", "launch": "cli experiment", "__main__": "launch", "__init__": ""},
}
WITHOUT_TORCH = (
    "scoring experiment errors evaluation.compare evaluation.report evaluation.results evaluation.statistics "
    "evaluation.tuning cli doctor launch __main__ __init__"
).split()
NEVER = {"torchvision", "timm", "pickle", "dill", "joblib", "benchmarks"}
# Leaves that can be deleted in one commit: cli apart, nothing imports them.
LEAVES = ("evaluation.compare",)
VAGUE_NAMES = {"utils", "common", "helpers", "misc", "base", "core", "manager"}
# Of the whole product; the house as first built had 60, 12,000 and 9,500.
MAX_MODULES, MAX_PACKAGE_LINES, MAX_TEST_LINES = 72, 17_018, 15_540
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 8


def find_violations(package: Path) -> list[str]:
    """Every break of the rules in a package folder, as `file: what`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        module = ".".join(name.with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        faults = [*check_name(module), *check_imports(module, tree), *check_size(path, tree)]
        faults += check_writes(module, tree)
        found += [f"{name}: {fault}" for fault in faults]
    return found


def check_name(module: str) -> Iterator[str]:
    if module.split(".")[0] not in MAY_IMPORT:
        yield f"{module.split('.')[0]} is no known layer; give it a row in MAY_IMPORT"
    for part in VAGUE_NAMES & set(module.split(".")):
        yield f"{part} says nothing about what the module holds"


def check_imports(module: str, tree: ast.Module) -> Iterator[str]:
    layer = module.split(".")[0]
    allowed = {layer, *MAY_IMPORT.get(layer, "").split()}
    for target in imported_modules(ast.walk(tree)):
        top, *rest = target.split(".")
        if top == "":
            yield "relative import"
        elif top in NEVER:
            yield f"imports {top}"
        elif top == "vesselrl" and (not rest or rest[0] not in MAY_IMPORT):
            yield f"imports {target}; import from the module that defines the name"
        elif top == "vesselrl" and rest[0] not in allowed:
            yield f"{layer} imports {rest[0]}"
        elif module not in ("cli", "evaluation.report", *LEAVES) and ".".join(rest[:2]) in LEAVES:
            yield f"only cli may import {target}"


def imported_modules(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names; `from a import b` gives a.b for the folders of vesselrl; a relative import gives ''."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield ""
        elif isinstance(node, ast.ImportFrom):
            inside = node.module.startswith("vesselrl") and node.module.count(".") < 2
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if inside else (node.module,)


def check_writes(module: str, tree: ast.Module) -> Iterator[str]:
    """One atomic write for all: experiment.run_folder's."""
    for node in ast.walk(tree):
        is_replace = isinstance(node, ast.Attribute) and node.attr == "replace"
        if is_replace and getattr(node.value, "id", "") == "os" and module != "experiment.run_folder":
            yield "calls os.replace; use atomic_write of experiment.run_folder"


def check_size(path: Path, tree: ast.Module) -> Iterator[str]:
    if num_lines([path]) > MAX_LINES:
        yield f"{num_lines([path])} lines, at most {MAX_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            num_parameters = len(names) - (names[:1] in (["self"], ["cls"]))
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
            if num_parameters > MAX_PARAMETERS:
                yield f"{node.name} has {num_parameters} parameters, at most {MAX_PARAMETERS}"


def num_lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_the_package_keeps_its_layers_and_the_house_stays_small() -> None:
    assert find_violations(PACKAGE) == []
    modules = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MAX_MODULES
    assert num_lines(PACKAGE.rglob("*.py")) <= MAX_PACKAGE_LINES
    assert num_lines(ROOT.glob("tests/**/*.py")) <= MAX_TEST_LINES
    assert num_lines(ROOT.glob("benchmarks/**/*.py")) <= 1_862
    for entry in json.loads((ROOT / "tests" / "breaks.json").read_text(encoding="utf-8")):
        assert (ROOT / entry["file"]).read_text(encoding="utf-8").count(entry["old"]) == 1, entry["name"]
    longest = max(ROOT.glob("tests/**/*.py"), key=lambda path: num_lines([path]))
    assert num_lines([longest]) <= MAX_LINES, longest


FREE_OF = {"__init__": "torch numpy transformers"}
FREE_OF |= {"scoring.rewards scoring.overlay scoring.postprocessing": "torch numba skimage scipy"}
FREE_OF |= {" ".join(name for name in WITHOUT_TORCH if not name.startswith("__")): "torch"}


@pytest.mark.parametrize("names", FREE_OF)
def test_light_modules_load_nothing_heavy_when_they_are_imported(names: str) -> None:
    places = [name.replace(".", "/") for name in names.split()]
    files = [path for place in places for end in (".py", "/[a-z]*.py") for path in PACKAGE.glob(place + end)]
    modules = ", ".join(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files)
    code = f"import sys, {modules}; print({{*{FREE_OF[names].split()}}} & {{*sys.modules}})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


VIOLATIONS = [
    ("data/splits.py", "from vesselrl.models.lora import attach", "data imports models"),
    ("models/sa2va.py", "def build():\n    from vesselrl.training import ppo", "models imports training"),
    ("training/ppo.py", "from vesselrl import Predictor", "imports vesselrl.Predictor"),
    ("data/splits.py", "from . import samples", "relative import"),
    ("training/ppo.py", "from vesselrl.evaluation.compare import table", "only cli may import"),
    ("training/train.py", "from benchmarks.learning import judge", "imports benchmarks"),
    ("plots/curves.py", "", "plots is no known layer"),
    ("data/utils.py", "", "utils says nothing"),
    ("data/splits.py", "import os\nos.replace(a, b)", "calls os.replace"),
    ("data/splits.py", "x = 1\n" * 401, "401 lines"),
    ("data/splits.py", "def split():\n" + "    x = 1\n" * 60, "split has 61 lines"),
    ("data/splits.py", "def split(a, b, c, d, e, f, g, *, h, i):\n    pass", "9 parameters"),
    ("training/ppo.py", "from vesselrl.scoring.overlap import dice", None),
]


@pytest.mark.parametrize(("file", "source", "expected"), VIOLATIONS)
def test_a_planted_violation_is_seen_and_nothing_else(tmp_path: Path, file, source, expected) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(source)
    found = find_violations(tmp_path)
    assert len(found) == (expected is not None)
    assert all(fault.startswith(file) and expected in fault for fault in found)
