"""Starts the command line, with the Python of .venv where the calling one lacks what vesselrl needs.

`python train_lora_ppo.py` is often typed with the system's: this has to load in a Python 3 with nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = (3, 11)
RELAUNCHED = "VESSELRL_RELAUNCHED"  # set in the second process, so that there is never a third
NEEDS_NO_TORCH = ("completion", "doctor")
LIGHT_PACKAGES = ("matplotlib", "numpy", "rich", "tyro")
MODEL_PACKAGES = ("cv2", "numba", "peft", "PIL", "safetensors", "scipy", "skimage", "torch", "transformers")


def main(argv: list[str] | None = None) -> int:
    """Run `vesselrl` with these arguments, by default those typed, and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    obstacle = find_obstacle(arguments[0] if arguments else "")
    if obstacle is None:
        from vesselrl.experiment.stop import stops_on_signals

        with stops_on_signals():
            from vesselrl.cli import main as run

            return run(arguments)

    on_windows = os.name == "nt"
    python = ROOT / ".venv" / ("Scripts/python.exe" if on_windows else "bin/python")
    if python.is_file() and RELAUNCHED not in os.environ:
        typed = getattr(sys, "orig_argv", [sys.executable, *sys.argv])
        command, environment = [str(python), *typed[1:]], {**os.environ, RELAUNCHED: "1"}
        if on_windows:  # whose exec returns to the shell at once
            return subprocess.call(command, env=environment)
        os.execve(command[0], command, environment)
    script = ROOT / "install_dependencies.sh"
    has_script = script.is_file() and not on_windows
    print(f"{obstacle} Run: {f'bash {script}' if has_script else 'pip install vesselrl'}", file=sys.stderr)
    return 1


def find_obstacle(verb: str) -> str | None:
    """Say what keeps this Python from running `vesselrl verb`; None when nothing does."""
    if sys.version_info < OLDEST_PYTHON:
        return f"vesselrl needs Python 3.11 or newer; this is {sys.version.split()[0]}."
    packages = LIGHT_PACKAGES if verb in NEEDS_NO_TORCH else LIGHT_PACKAGES + MODEL_PACKAGES
    missing = [name for name in packages if find_spec(name) is None]
    return f"This Python lacks {', '.join(missing)}." if missing else None
