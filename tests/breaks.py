"""Proof that core tests can fail: breaks the code on purpose, one line at a time, and wants a red test each.

    python tests/breaks.py            all breaks of tests/breaks.json, each in a copy of the repository
    python tests/breaks.py clip gae   those whose name holds one of the words

It exits with 1 when a test stays green, or when the line to break is not there exactly once.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]


def try_break(entry: dict[str, str]) -> str:
    """Makes one break and returns what happened: red, or why that is no proof."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "clone"
        for name in ("vesselrl", "tests", "benchmarks", "docs"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if (shared := ROOT.parent / "shared").is_dir():  # optional real data
            (folder.parent / "shared").symlink_to(shared)
        file = folder / entry["file"]
        text = file.read_text(encoding="utf-8")
        if text.count(entry["old"]) != 1:
            return f"the line stands {text.count(entry['old'])} times in {entry['file']}, it must stand once"
        file.write_text(text.replace(entry["old"], entry["new"]), encoding="utf-8")
        command = [sys.executable, *"-m pytest -q -x -p no:cacheprovider -m".split(), "", entry["test"]]
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(command, **options, check=False)
        last = " ".join(done.stdout.splitlines()[-1:])
        return "red" if done.returncode == 1 else f"pytest ended with {done.returncode}: {last}"


def main(words: list[str]) -> int:
    """Tries the breaks that hold one of the words, all without words; 1 when one is not noticed."""
    entries = json.loads((ROOT / "tests" / "breaks.json").read_text(encoding="utf-8"))
    chosen = [entry for entry in entries if not words or any(word in entry["name"] for word in words)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(try_break, chosen))
    for entry, result in zip(chosen, results, strict=True):
        print(f"{entry['name']}, {entry['test']}: {result if result == 'red' else f'GREEN ({result})'}")
    num_red = sum(result == "red" for result in results)
    print(f"{num_red} of {len(results)} breaks turned a test red")
    return int(num_red < len(results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
