"""What several tests of data share."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def aliases(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an alias file from its lines, `file name,patient`."""

    def write(*lines: str) -> Path:
        path = tmp_path / "aliases.csv"
        path.write_text("\n".join(["file_name,patient", *lines]) + "\n", encoding="utf-8")
        return path

    return write
