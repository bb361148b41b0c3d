"""The documentation names what exists, shows what runs, and leaves out nothing that a user meets."""

import ast
import csv
import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vesselrl
from vesselrl import cli
from vesselrl.data.samples import find_samples, load_mask
from vesselrl.scoring.rewards import MultiObjectiveReward
from vesselrl.training.credit import ConstrainedReward
from vesselrl.training.health import RULES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / f"{name}.md" for name in ("README", "README.zh-CN", "CONTRIBUTING", "CHANGELOG")]
PAGES += DOCS.rglob("*.md")
BENCHMARKS = "learning few_images scoring caching memory step pretrain pretrain_detail partial_labels".split()
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?<![\w/.<>-])((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|md|toml|yml|csv))(?![\w/])")
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9_]*)")
VERB = re.compile(r"(?<!from )\bvesselrl ([a-z]+)")
_spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
_spec.loader.exec_module(reference := importlib.util.module_from_spec(_spec))


def read(page: Path) -> str:
    """A page as the site shows it; without what is past: the ledger's commands, the prototype's names."""
    text = page.read_text(encoding="utf-8")
    if page.name == "from-rlsa2va.md":
        return re.sub(r"^\| .*? \| ", "| ", text, flags=re.MULTILINE)
    return text if page.name == "results.md" else reference.render(text)


def code_of(page: Path) -> str:
    return "\n".join(CODE.findall(read(page)))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(DOCS / page), re.DOTALL | re.MULTILINE)


def first_column(text: str) -> set[str]:
    """Names in code in the first column of the tables of a text."""
    return {name for cell in re.findall(r"^\| (.*?) \|", text, re.MULTILINE) for name in SPAN.findall(cell)}


def key_paths(values: dict, before: str = "") -> Iterator[str]:
    """All keys of nested objects, with dots between the levels."""
    for key, value in values.items():
        yield before + key
        yield from key_paths(value, f"{before}{key}.") if isinstance(value, dict) else ()


def check(missing: Callable[[Path], set[str]], pages: list[Path] = PAGES) -> None:
    assert {page.name: names for page in pages if (names := missing(page))} == {}


def test_every_file_and_link_named_exists() -> None:
    # A name without a folder may be a module, or a file that a run writes.
    modules = list(ROOT.glob("vesselrl/**/*.py"))
    loose = {path.name for path in modules} | first_column(read(DOCS / "reference" / "run-folder.md"))
    inside = {"vesselrl", "tests", "docs", "benchmarks"} | {path.parent.name for path in modules}

    def exists(page: Path, name: str) -> bool:
        is_ours = name.partition("/")[0] in inside if "/" in name else name not in loose
        return not is_ours or any((place / name).exists() for place in (ROOT, ROOT / "vesselrl", page.parent))

    check(lambda page: {name for name in FILE.findall(code_of(page)) if not exists(page, name)})
    links = re.compile(r"\]\((?!\w+://)([^)#\s]+)")  # mkdocs build --strict looks at the anchors
    check(lambda page: {link for link in links.findall(read(page)) if not (page.parent / link).exists()})


def test_every_import_command_and_option_exists() -> None:
    imported = re.compile(r"(?:^from vesselrl import |(?<!^), )(\w+)", re.MULTILINE)
    lines = re.compile(r"^from vesselrl import .+$", re.MULTILINE)
    check(lambda page: {*imported.findall("\n".join(lines.findall(read(page))))} - {*vesselrl.__all__})
    check(lambda page: set(VERB.findall(code_of(page))) - set(cli.VERBS))
    check(lambda page: set(re.findall(r"\bbenchmarks\.([a-z_]+)", code_of(page))) - set(BENCHMARKS))
    kinds = [kind for kinds in reference.OPTIONS.values() for kind in kinds]
    known = {name.lstrip("-") for kind in kinds for o in reference.options_of(kind) for name in o.names}
    for name in BENCHMARKS:
        tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
        known |= {a.arg for f in tree.body if getattr(f, "name", "") == name for a in f.args.args}
    pages = [page for page in PAGES if page.name not in ("CONTRIBUTING.md", "CHANGELOG.md")]
    # Of torchrun, Slurm, Docker and pip.
    known |= {*"standalone nproc nnodes rdzv nodes ntasks gpus cpus signal rm build no wheel".split()}
    accelerate = "use_fsdp fsdp_version fsdp_offload_params fsdp_reshard_after_forward"
    known |= {*accelerate.split(), "num_machines", "num_processes"}
    check(lambda page: set(OPTION.findall(read(page))) - known - {"preset", "config", "help", "no_"}, pages)


@pytest.mark.parametrize("name", ["README.md", "docs/tutorial/first-run.md", "docs/tutorial/your-data.md"])
def test_both_languages_have_the_same_commands_figures_and_links(name: str) -> None:
    """The text is free; what a reader types, compares or opens is not."""
    pages = name, name.replace(".md", ".zh-CN.md" if name == "README.md" else ".zh.md")
    texts = ((ROOT / page).read_text(encoding="utf-8") for page in pages)
    english, chinese = (re.sub(r"\.zh(-CN)?\.md", ".md", text) for text in texts)
    for pattern in (r"```.*?```", r"\d+(?:\.\d+)?", r"\]\(([^)]+)\)"):
        one, other = (re.findall(pattern, text, re.DOTALL) for text in (english, chinese))
        assert (one == other) if "`" in pattern else (set(one) == set(other)), pattern


def test_every_shell_variable_and_verb_is_named() -> None:
    script = (ROOT / "run_lora_ppo.sh").read_text(encoding="utf-8")
    (names,) = re.findall(r"^for name in (.+?); do$", script.replace("\\\n", ""), re.MULTILINE)
    assert set(names.split()) - set(SPAN.findall(read(DOCS / "from-rlsa2va.md"))) == set()
    assert set(VERB.findall(code_of(ROOT / "README.md"))) == set(cli.VERBS)


@pytest.mark.parametrize("verb", reference.OPTIONS)
def test_the_reference_has_every_option_and_no_other(verb: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main([*verb.split(), "--help"]) == 0
    shown = {n for n in OPTION.findall(capsys.readouterr().out) if n != "help" and not n.startswith("no_")}
    section = reference.option_tables().partition(f"## vesselrl {verb}\n")[2].partition("\n## ")[0]
    assert {name.lstrip("-") for name in first_column(section) if name.startswith("--")} == shown
    assert not re.search(r"\|\s*\|$", section, re.MULTILINE), "an option has no comment"


def test_the_reference_has_every_verb_rule_and_public_name_and_the_ledger_one_row_per_run() -> None:
    assert {verb.split()[0] for verb in reference.OPTIONS} == set(cli.VERBS)
    codes = {name for name in first_column(read(DOCS / "diagnostics.md")) if "/" not in name}
    assert codes == {rule.code for rule in RULES} - {"correction"}
    names = set(re.findall(r"^## (\w+)$", reference.api(), re.MULTILINE))
    assert names == set(vesselrl.__all__) - {"__version__"}
    rows = list(csv.DictReader((DOCS / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["id"] for row in rows] == [f"R{number:03}" for number in range(1, len(rows) + 1)]
    assert {row["real_or_synthetic"] for row in rows} == {"real", "synthetic"}
    assert all(value and len(value) < 1500 for row in rows for value in row.values())


def test_the_first_examples_reach_what_they_state(tmp_path: Path) -> None:
    exec(blocks("rewards.md", "python")[0], names := {})
    assert names["total"] == pytest.approx(6.15)
    assert {"dice", "recall", "precision", "dice_term", "recall_term"} <= names["details"].keys()
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations.json").write_text(*blocks("data.md", "json"))
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(tmp_path / "images" / "frame_001.jpg")
    (sample,) = find_samples(tmp_path)
    assert load_mask(sample).any()


def test_what_a_run_writes_is_explained_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    """By the command of docs/how-to/own-reward.md, with the function that is printed there."""
    page = "how-to/own-reward.md"
    code = next(block for block in blocks(page, "python") if "def few_loops" in block)
    (tmp_path / "vessel_rewards.py").write_text(code)
    setting, program, *arguments = shlex.split(next(b for b in blocks(page, "bash") if "--preset debug" in b))
    assert (setting, program) == ("PYTHONPATH=.", "vesselrl")
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main([*arguments, "--output_dir", str(tmp_path / "output")]) == 0
    (debug_run,) = (tmp_path / "output").glob("sa2va_lora_ppo_*")
    names = ("metrics", "training-info", "run-folder")
    metrics, info, folder = (reference.csv_table(f"reference/{name}.csv") for name in names)
    logged = {key for line in (debug_run / "metrics.jsonl").open() for key in json.loads(line)}
    bounds = dict.fromkeys(("dice", "recall", "precision"), 0.5)  # --objective constrained
    terms = ConstrainedReward(MultiObjectiveReward(), bounds).overlap_terms(1, 1, 1)
    logged |= {f"train/{kind}/{name}" for kind in ("reward", "reward_std") for name in terms}
    assert first_column(metrics) == logged | {f"train/price/{name}" for name in bounds}

    paths = set(key_paths(json.loads((debug_run / "training_info.json").read_text())))
    ends = {path: path.rpartition(".")[2] for path in paths if not path.startswith("args.")}
    parts = {"counts", "test_metrics"}  # explained part by part
    assert {p for p, end in ends.items() if not {p, end} & {*SPAN.findall(info)}} == parts
    assert first_column(info) <= {*ends, *ends.values()}

    found = {path.name + "/" * path.is_dir() for path in debug_run.iterdir()}
    assert first_column(folder) == {re.sub(r"_epoch_\d+/$", "_epoch_N/", name) for name in found}
