"""What the documentation names exists."""

import re
from pathlib import Path

import pytest

import vesselrl

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")]
)
FOLDERS = ("vesselrl/", "tests/", "docs/", ".ci/", ".github/")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.<>-])((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|md|toml|yml))(?![\w/])")
IMPORT = re.compile(r"^from vesselrl import (.+)$", re.MULTILINE)


def named_files(page: Path) -> set[str]:
    """Links to files, and files of this project that are named in code."""
    text = page.read_text(encoding="utf-8")
    links = {
        link.split("#")[0] for link in LINK.findall(text) if "://" not in link and not link.startswith("#")
    }
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    return links | {name for name in PATH.findall(code) if "/" not in name or name.startswith(FOLDERS)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_named_exists(page: Path) -> None:
    if not (ROOT / "docs").exists():
        pytest.skip("docs/ is not written yet")
    # A name without a folder may be a module of the package, as in "`policy.py` samples the masks".
    modules = {path.name for path in ROOT.glob("vesselrl/**/*.py")}
    missing = {
        name
        for name in named_files(page)
        if not (ROOT / name).exists() and not (page.parent / name).exists() and name not in modules
    }
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_import_shown_is_public(page: Path) -> None:
    shown = {
        name.strip() for line in IMPORT.findall(page.read_text(encoding="utf-8")) for name in line.split(",")
    }
    assert shown <= set(vesselrl.__all__)


def test_the_first_command_is_on_the_first_screen() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines, start=1) if line.startswith("bash "))
    assert first <= 12
    assert len(lines) <= 150


def test_the_search_for_names_finds_what_it_should(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "See [rewards](docs/rewards.md#dice), [web](https://example.org/x.md), `vesselrl/cli.py`, `cli.py`,\n"
        "not plain.py, not `output/RUN/x.py`.\n```bash\npython old_name.py --image a.png\n```\n"
    )
    assert named_files(page) == {"docs/rewards.md", "vesselrl/cli.py", "cli.py", "old_name.py"}
