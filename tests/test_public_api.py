"""`import vesselrl`: what it offers, and what it costs."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import vesselrl


def test_every_public_name_can_be_loaded_and_an_unknown_one_says_what_there_is() -> None:
    assert {name for name in vesselrl.__all__ if getattr(vesselrl, name) is None} == set()
    assert set(vesselrl.__all__) <= set(dir(vesselrl))
    with pytest.raises(AttributeError, match=r"no attribute 'Predicter'\. It offers: .*Predictor"):
        vesselrl.Predicter  # noqa: B018


def test_the_import_alone_loads_nothing_heavy(repository: Path) -> None:
    code = "import sys, vesselrl; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_version_is_that_of_pyproject(repository: Path, monkeypatch) -> None:
    declared = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    assert vesselrl.__version__ == declared

    def not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert vesselrl.__version__ == declared
