"""The CI gate goes red for each thing it is there to see."""

import subprocess
import sys
from pathlib import Path

import pytest


def skipped(reason: str) -> str:
    return f'<testcase name="c"><skipped type="pytest.skip" message="{reason}">x</skipped></testcase>'


TWO = '<testcase name="a"/><testcase name="b"/>'
FAILED = '<testcase name="d"><failure message="no"/></testcase>'
BROKEN = '<testcase name="e"><error message="no"/></testcase>'


AGREED = skipped("needs a display, here") + skipped("needs ../shared")


@pytest.mark.parametrize(
    ("cases", "floor", "shared", "expected"),
    [
        (TWO + AGREED, 2, "absent", "tests: 2 passed, 0 failed, 2 skipped"),
        (TWO, 3, "absent", "2 tests passed, at least 3 must"),
        (TWO + FAILED, 2, "absent", "1 tests failed"),
        (TWO + BROKEN, 2, "absent", "1 tests failed"),
        (TWO + skipped("flaky today"), 2, "absent", "not agreed: flaky today"),
        (TWO + skipped("needs ../shared"), 2, "present", "not agreed: needs ../shared"),
        ("<testcase", 2, "absent", "no report"),
    ],
)
def test_only_a_good_run_passes(tmp_path: Path, repository: Path, cases, floor, shared, expected) -> None:
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    (tmp_path / "reasons.txt").write_text("# a comment\nneeds a display\nshared: needs ../shared\n")
    options = ["--floor", str(floor), "--reasons", tmp_path / "reasons.txt", "--shared", shared]
    command = [sys.executable, repository / ".ci" / "check_report.py", tmp_path / "report.xml", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if expected.startswith("tests:") else 1)
    assert expected in done.stdout + done.stderr
