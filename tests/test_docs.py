"""What the documentation names exists, what it shows runs, and what a run writes is explained."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vesselrl.training.goals import Goals

import vesselrl
from vesselrl import cli
from vesselrl.data.samples import find_samples, load_mask
from vesselrl.experiment.config import TrainConfig
from vesselrl.scoring.rewards import MultiObjectiveReward

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")]
)
USER_PAGES = [page for page in PAGES if page.name not in ("CONTRIBUTING.md", "CHANGELOG.md")]
HOW_IT_WORKS = ROOT / "docs" / "how-it-works.md"
# Pages may name a module from the root or from the package, as in `training/ppo.py`.
PARTS = tuple(f"{path.parent.name}/" for path in ROOT.glob("vesselrl/*/__init__.py"))
FOLDERS = ("vesselrl/", "tests/", "docs/", ".ci/", ".github/", *PARTS)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?<![\w/.<>-])((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|md|toml|yml))(?![\w/])")
IMPORT = re.compile(r"^from vesselrl import (.+)$", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9_]*)")
VERB = re.compile(r"(?<!from )\bvesselrl ([a-z]+)")


def read(page: Path) -> str:
    """The text of a page; of the one for users of the prototype, without the column "before"."""
    text = page.read_text(encoding="utf-8")
    if page.name != "from-rlsa2va.md":
        return text
    return re.sub(r"^\| .*? \| ", "| ", text, flags=re.MULTILINE)


def code_of(page: Path) -> str:
    """Code blocks and code in the lines of a page."""
    return "\n".join(CODE.findall(read(page)))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def section(page: Path, title: str) -> str:
    """The text below one heading of the second level."""
    _, found, rest = page.read_text(encoding="utf-8").partition(f"\n## {title}\n")
    assert found, f"{page.name} has no section {title!r}"
    return rest.partition("\n## ")[0]


def first_column(text: str) -> set[str]:
    """What stands in code in the first column of the tables of a text."""
    cells = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return {name for cell in cells for name in SPAN.findall(cell)}


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings can be linked to."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def local_links(page: Path) -> Iterator[tuple[Path, str]]:
    """File and anchor of every link that stays in the project."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            yield page.parent / name if name else page, anchor


def named_files(page: Path) -> set[str]:
    """Files of this project that a page names in code."""
    return {name for name in PATH.findall(code_of(page)) if "/" not in name or name.startswith(FOLDERS)}


# ---- Names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_named_exists(page: Path) -> None:
    # A name without a folder may be a module of the package, as in "`policy.py` samples the masks".
    modules = {path.name for path in ROOT.glob("vesselrl/**/*.py")}
    made = first_column(section(HOW_IT_WORKS, "The run folder"))
    places = (ROOT, ROOT / "vesselrl", page.parent)
    missing = {
        name
        for name in named_files(page)
        if name not in modules | made and not any((place / name).exists() for place in places)
    }
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = list(local_links(page))
    assert [str(path) for path, _ in links if not path.exists()] == []
    assert [anchor for path, anchor in links if anchor and anchor not in anchors(path)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_import_shown_is_public(page: Path) -> None:
    shown = {name.strip() for line in IMPORT.findall(read(page)) for name in line.split(",")}
    assert shown <= set(vesselrl.__all__)


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.name)
def test_every_option_named_exists(page: Path) -> None:
    settings = [TrainConfig, *(kind for kind in vars(cli).values() if is_dataclass(kind))]
    known = {field.name for kind in settings for field in fields(kind)} | {"preset", "help"}
    assert set(OPTION.findall(read(page))) - known == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_verb_named_exists(page: Path) -> None:
    assert set(VERB.findall(code_of(page))) - set(cli.VERBS) == set()


def test_the_readme_names_every_verb() -> None:
    assert set(VERB.findall(code_of(ROOT / "README.md"))) == set(cli.VERBS)


def test_every_option_of_training_is_explained() -> None:
    assert first_column(section(HOW_IT_WORKS, "Every option")) == {
        field.name for field in fields(TrainConfig)
    }


def test_every_shell_variable_is_named() -> None:
    script = (ROOT / "run_lora_ppo.sh").read_text(encoding="utf-8")
    (names,) = re.findall(r"^for name in (.+?); do$", script.replace("\\\n", ""), re.MULTILINE)
    page = (ROOT / "docs" / "from-rlsa2va.md").read_text(encoding="utf-8")
    assert set(names.split()) - set(SPAN.findall(page)) == set()


def test_the_first_command_is_on_the_first_screen() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines, start=1) if line.startswith("bash "))
    assert first <= 12
    assert len(lines) <= 150


# ---- What the pages show runs


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the command in docs/rewards.md, with the reward function that is printed there."""
    page = ROOT / "docs" / "rewards.md"
    folder = tmp_path_factory.mktemp("docs")
    (folder / "vessel_rewards.py").write_text(next(b for b in blocks(page, "python") if "def few_loops" in b))
    command = next(block for block in blocks(page, "bash") if "--preset debug" in block)
    setting, program, *arguments = shlex.split(command)
    assert (setting, program) == ("PYTHONPATH=.", "vesselrl")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        assert cli.main([*arguments, "--output_dir", str(folder / "output")]) == 0
    (run,) = (folder / "output").glob("sa2va_lora_ppo_*")
    return run


def test_the_first_example_of_the_rewards_reaches_the_maximum_it_states() -> None:
    page = ROOT / "docs" / "rewards.md"
    names: dict = {}
    exec(blocks(page, "python")[0], names)
    assert names["total"] == pytest.approx(6.15)
    assert {"dice", "recall", "precision", "dice_term", "recall_term"} <= names["details"].keys()


def test_the_records_shown_can_be_read(tmp_path: Path) -> None:
    (example,) = blocks(ROOT / "docs" / "data.md", "json")
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations.json").write_text(example)
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(tmp_path / "images" / "frame_001.jpg")
    (sample,) = find_samples(tmp_path)
    assert load_mask(sample).any()


# ---- What a run writes is explained


def test_the_glossary_has_every_logged_key_and_no_other(debug_run: Path) -> None:
    lines = (debug_run / "metrics.jsonl").read_text().splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    floors = ("dice", "recall", "precision")
    goals = Goals(MultiObjectiveReward(), dict.fromkeys(floors, 0.5))  # --objective constrained
    logged |= goals.figures().keys()
    terms = goals.overlap_terms(1, 1, 1)
    logged |= {f"train/{kind}/{name}" for kind in ("reward", "reward_std") for name in terms}
    assert first_column(section(HOW_IT_WORKS, "Every logged key")) == logged


def test_the_glossary_has_every_key_of_training_info_and_no_other(debug_run: Path) -> None:
    info = json.loads((debug_run / "training_info.json").read_text())
    text = section(HOW_IT_WORKS, "Every key of training_info.json")
    written = set(key_paths(info))
    explained = set(SPAN.findall(text)) | first_column(section(HOW_IT_WORKS, "Every option"))
    top = set(info) - {"counts", "test_metrics"}  # explained part by part
    assert top - explained == set()
    assert {path for path in written if path not in explained and path.split(".")[-1] not in explained} <= {
        "counts",
        "test_metrics",
    }
    ends = written | {path.split(".")[-1] for path in written}
    assert first_column(text) - ends == set()


def test_the_run_folder_is_as_described(debug_run: Path) -> None:
    found = {
        re.sub(r"_epoch_\d+$", "_epoch_N", path.name) + ("/" if path.is_dir() else "")
        for path in debug_run.iterdir()
    }
    assert first_column(section(HOW_IT_WORKS, "The run folder")) == found


def key_paths(values: dict, before: str = "") -> Iterator[str]:
    """All keys of nested objects, with dots between the levels."""
    for key, value in values.items():
        yield before + key
        if isinstance(value, dict):
            yield from key_paths(value, f"{before}{key}.")


# ---- The searches above find what they should


def test_the_search_for_names_finds_what_it_should(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "See [rewards](docs/rewards.md#dice), [web](https://example.org/x.md), `vesselrl/cli.py`, `cli.py`,\n"
        "`training/ppo.py`, not plain.py, not `output/RUN/x.py`.\n"
        "```bash\npython old_name.py --image a.png\nvesselrl wish --data_root x\n```\n"
    )
    assert named_files(page) == {"vesselrl/cli.py", "cli.py", "training/ppo.py", "old_name.py"}
    assert list(local_links(page)) == [(tmp_path / "docs/rewards.md", "dice")]
    assert VERB.findall(code_of(page)) == ["wish"]
    assert OPTION.findall(read(page)) == ["image", "data_root"]


def test_the_past_may_name_what_is_gone(tmp_path: Path) -> None:
    page = tmp_path / "from-rlsa2va.md"
    page.write_text("| before | now |\n|---|---|\n| `gone.py` | `here.py` |\n")
    assert named_files(page) == {"here.py"}
    assert first_column(page.read_text()) == {"gone.py"}
