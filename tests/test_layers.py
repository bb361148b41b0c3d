"""The direction of imports: cli -> training -> evaluation -> inference -> data | models -> scoring.

`experiment` is a leaf that training, evaluation and cli may read. `test_the_package_keeps_its_layers` checks
vesselrl; the rest of this file plants each kind of violation in a small tree and asserts that it is seen.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vesselrl"

MAY_IMPORT = {
    "cli": "options benchmarks training evaluation inference data models scoring experiment doctor errors",
    "benchmarks": "training evaluation data scoring experiment errors",
    "training": "evaluation inference data models scoring experiment errors",
    "evaluation": "inference data models scoring experiment errors",
    "inference": "data models scoring experiment errors",
    "data": "scoring experiment errors",
    "models": "scoring experiment errors",
    "scoring": "errors",
    "errors": "",
    "experiment": "errors",
    "doctor": "data models experiment",
    "options": "",
    "launch": "cli",
    "__main__": "launch",
    "__init__": "",
}
WITHOUT_TORCH = (
    "scoring",
    "experiment",
    "evaluation.calibration",
    "evaluation.compare",
    "evaluation.decision",
    "evaluation.evaluation_report",
    "evaluation.finished_runs",
    "evaluation.report",
    "evaluation.report_sections",
    "evaluation.results",
    "evaluation.run_report",
    "evaluation.statistics",
    "evaluation.thresholds",
    "cli",
    "options",
    "doctor",
    "launch",
    "__main__",
    "__init__",
)
HEAVY = {"torch", "transformers", "peft", "accelerate", "monai"}
NEVER = {"torchvision", "timm", "pickle", "dill", "joblib"}
# Leaves that can be deleted in one commit: cli and each other apart, nothing imports them.
LEAVES = ("inference.demo", "evaluation.compare", "evaluation.report")
VAGUE_NAMES = {"utils", "common", "helpers", "misc", "base", "core", "manager"}
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8


def find_violations(package: Path) -> list[str]:
    """Every break of the rules in a package folder, as `file: what`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        module = ".".join(name.with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        faults = [*check_name(module), *check_imports(module, tree), *check_size(path, tree)]
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
        elif module not in ("cli", *LEAVES) and ".".join(rest[:2]) in LEAVES:
            yield f"only cli may import {target}"
    if any(f"{module}.".startswith(f"{light}.") for light in WITHOUT_TORCH):
        for target in imported_modules(module_level(tree)):
            if target.split(".")[0] in HEAVY:
                yield f"imports {target} at module level"


def imported_modules(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names; `from a import b` gives a.b for the folders of vesselrl; a relative import gives ''."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield ""
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module.count(".") < 2
            and node.module.startswith("vesselrl")
        ):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run at import: everything outside functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from module_level(node)


def check_size(path: Path, tree: ast.Module) -> Iterator[str]:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    if num_lines > MAX_LINES:
        yield f"{num_lines} lines, at most {MAX_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            num_parameters = len(names) - (names[:1] in (["self"], ["cls"]))
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
            if num_parameters > MAX_PARAMETERS:
                yield f"{node.name} has {num_parameters} parameters, at most {MAX_PARAMETERS}"


def test_the_package_keeps_its_layers() -> None:
    assert find_violations(PACKAGE) == []


def test_test_files_are_short() -> None:
    long = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.parent.glob("tests/**/*.py")}
    assert {name: lines for name, lines in long.items() if lines > MAX_LINES} == {}


LIGHT = sorted(
    path
    for name in WITHOUT_TORCH
    if not name.startswith("__")
    for path in (*PACKAGE.glob(f"{name.replace('.', '/')}.py"), *PACKAGE.glob(f"{name}/*.py"))
)


def test_light_modules_import_without_torch() -> None:
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in LIGHT]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


VIOLATIONS = {
    "sideways": ("data/splits.py", "from vesselrl.models.lora import attach", "data imports models"),
    "upward": ("scoring/metrics.py", "import vesselrl.data.splits", "scoring imports data"),
    "upward inside a function": (
        "models/sa2va.py",
        "def build():\n    from vesselrl.training import ppo",
        "models imports training",
    ),
    "config leak": (
        "inference/predictor.py",
        "from vesselrl.experiment.config import TrainConfig",
        "imports experiment",
    ),
    "a leaf with roots": (
        "experiment/runs.py",
        "from vesselrl.scoring import metrics",
        "experiment imports scoring",
    ),
    "by way of the package": (
        "training/ppo.py",
        "from vesselrl import Predictor",
        "imports vesselrl.Predictor",
    ),
    "the whole package": ("training/ppo.py", "import vesselrl", "imports vesselrl;"),
    "relative": ("data/splits.py", "from . import annotations", "relative import"),
    "the demo from below": (
        "evaluation/evaluate.py",
        "from vesselrl.inference import demo",
        "only cli may import",
    ),
    "the comparison from below": (
        "training/ppo.py",
        "from vesselrl.evaluation.compare import table",
        "only cli may import",
    ),
    "torch in scoring": (
        "scoring/masks.py",
        "try:\n    import torch.nn\nexcept ImportError:\n    pass",
        "torch.nn at module",
    ),
    "torch in the comparison": (
        "evaluation/compare.py",
        "from torch import nn",
        "imports torch at module level",
    ),
    "torch in cli": ("cli.py", "import torch", "imports torch at module level"),
    "a forbidden package": ("models/sa2va.py", "import torchvision.transforms", "imports torchvision"),
    "a pickle": ("data/cache.py", "import pickle", "imports pickle"),
    "a new folder": ("plots/curves.py", "", "plots is no known layer"),
    "a new file at the top": ("engine.py", "", "engine is no known layer"),
    "a vague name": ("data/utils.py", "", "utils says nothing"),
    "a long file": ("data/splits.py", "x = 1\n" * 401, "401 lines"),
    "a long function": ("data/splits.py", "def split():\n" + "    x = 1\n" * 60, "split has 61 lines"),
    "many parameters": (
        "data/splits.py",
        "def split(a, b, c, d, e, f, g, *, h, i):\n    pass",
        "9 parameters",
    ),
}


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_a_planted_violation_is_seen(tmp_path: Path, kind: str) -> None:
    file, source, expected = VIOLATIONS[kind]
    write_module(tmp_path, file, source)
    (fault,) = find_violations(tmp_path)
    assert fault.startswith(file)
    assert expected in fault


ALLOWED = {
    "downward": (
        "training/ppo.py",
        "from vesselrl.scoring.metrics import dice\nfrom vesselrl.models import lora",
    ),
    "within a layer": ("data/splits.py", "from vesselrl.data.annotations import Sample"),
    "settings at the top": ("evaluation/evaluate.py", "from vesselrl.experiment.runs import open_run"),
    "torch where it belongs": ("models/sa2va.py", "import torch"),
    "torch when it is needed": ("cli.py", "def train():\n    import torch"),
    "the demo from cli": ("cli.py", "def demo():\n    from vesselrl.inference.demo import serve"),
}


@pytest.mark.parametrize("kind", ALLOWED)
def test_what_is_allowed_passes(tmp_path: Path, kind: str) -> None:
    write_module(tmp_path, *ALLOWED[kind])
    assert find_violations(tmp_path) == []


def write_module(package: Path, file: str, source: str) -> None:
    path = package / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
