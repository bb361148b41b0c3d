"""Judges JUnit reports: were enough tests run, and is every skip one that was agreed on?"""

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def read_reports(paths: list[Path]) -> tuple[int, int, list[str]]:
    """Count passed and failed tests, and collect the reasons of those skipped."""
    passed, failed, reasons = 0, 0, []
    for case in (case for path in paths for case in ElementTree.parse(path).getroot().iter("testcase")):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif skip is not None:
            reasons.append(skip.get("message", ""))
        else:
            passed += 1
    return passed, failed, reasons


def read_allowed(path: Path, shared_present: bool) -> tuple[str, ...]:
    """The reasons that pass on this machine."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    allowed = []
    for line in lines:
        if line.startswith("shared:"):
            if not shared_present:
                allowed.append(line.removeprefix("shared:").strip())
        elif line and not line.startswith("#"):
            allowed.append(line)
    return tuple(allowed)


def main() -> int:
    """Print what is wrong with the report, then its counts; 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--floor", type=int, required=True)
    parser.add_argument("--reasons", type=Path, required=True)
    parser.add_argument("--shared", choices=("present", "absent"), required=True)
    options = parser.parse_args()

    try:
        passed, failed, reasons = read_reports(options.reports)
    except (OSError, ElementTree.ParseError) as error:
        print(f"CI: there is no report of the tests ({error}); they did not run to the end.", file=sys.stderr)
        return 1
    allowed = read_allowed(options.reasons, options.shared == "present")
    faults = [
        f"a test was skipped for a reason that is not agreed: {r}"
        for r in reasons
        if not r.startswith(allowed)
    ]
    if passed < options.floor:
        faults.append(f"{passed} tests passed, at least {options.floor} must")
    if failed:
        faults.append(f"{failed} tests failed")
    for fault in faults:
        print(f"CI: {fault}", file=sys.stderr)
    print(f"tests: {passed} passed, {failed} failed, {len(reasons)} skipped")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
