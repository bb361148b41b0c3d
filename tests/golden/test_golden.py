"""Behaviour is what it was when `expected.json` was recorded."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_has_changed(repository: Path) -> None:
    command = [sys.executable, "tests/golden/golden.py", "check", "--portable"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
