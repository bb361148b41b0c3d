"""`import vesselrl`: what it offers."""

import tomllib
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest

import vesselrl


def test_every_public_name_can_be_loaded_and_an_unknown_one_says_what_there_is() -> None:
    assert {name for name in vesselrl.__all__ if getattr(vesselrl, name) is None} == set()
    assert set(vesselrl.__all__) <= set(dir(vesselrl))
    with pytest.raises(AttributeError, match=r"no attribute 'Predicter'\. It offers: .*Predictor"):
        vesselrl.Predicter  # noqa: B018


def test_the_version_is_that_of_pyproject_installed_or_not(repository: Path) -> None:
    declared = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    assert vesselrl.__version__ == declared
    with mock.patch.object(metadata, "version", side_effect=metadata.PackageNotFoundError):
        assert vesselrl.__version__ == declared
