"""The package from its wheel alone: an empty folder, an environment of its own, no clone."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_wheel_trains_evaluates_and_predicts_and_says_what_is_missing(repository, tmp_path) -> None:
    """In place of a long installation the environment sees the packages of this one, but not the clone."""
    source, place, home = tmp_path / "source", tmp_path / "venv", tmp_path / "an empty folder"
    home.mkdir()
    shutil.copytree(repository / "vesselrl", source / "vesselrl")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def call(*command: object, code: int = 0) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("vesselrl-*.whl")
    shutil.rmtree(source)
    call(sys.executable, "-m", "venv", "--without-pip", place)
    folder, suffix = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
    python, vesselrl = (place / folder / f"{name}{suffix}" for name in ("python", "vesselrl"))
    call(*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    said = call(vesselrl, "train", "--preset", "debug", code=1)
    assert "This Python lacks" in said
    assert "torch" in said
    assert said.endswith("Run: pip install vesselrl\n")

    (packages,) = place.rglob("site-packages")
    (packages / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert str(place) in call(python, "-c", "import vesselrl; print(vesselrl.__file__)")
    assert call(vesselrl, "--version").startswith("vesselrl ")
    for extra in [name for name in ("swanlab", "trackio", "mlflow", "wandb") if find_spec(name) is None][:1]:
        said = call(vesselrl, "train", "--preset", "debug", "--report_to", extra, code=2)
        assert said.endswith(f"needs the package {extra}: pip install 'vesselrl[{extra}]'.\n")
    assert not [*home.iterdir()]
    assert "Next: vesselrl predict" in call(vesselrl, "train", "--preset", "debug")
    (run,) = (home / "output").glob("sa2va_lora_ppo_*")
    assert {"report.html", "best_lora"} <= {path.name for path in run.iterdir()}
    (log,) = (home / "output").glob("train_debug_*.log")
    assert "Report: " in log.read_text(encoding="utf-8")
    image = next((home / "output" / "data").rglob("images/*.*"))
    assert "1 images written" in call(vesselrl, "predict", "--image", image)
    assert "# Comparison of experiments" in call(vesselrl, "compare")
    assert "problem" not in call(vesselrl, "doctor")
