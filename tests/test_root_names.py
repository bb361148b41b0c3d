"""The names a user types at the root: which there are, and that they pass everything on."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WRAPPERS = {
    "train_lora_ppo.py": "train", "evaluate_lora.py": "evaluate", "evaluate_lora_model.py": "evaluate",
    "inference_with_lora.py": "predict", "merge_lora.py": "merge", "compare_all_experiments.py": "compare",
}  # fmt: skip
SCRIPTS = ("install_dependencies.sh", "run_lora_ppo.sh", "run_tests.sh")
VARIABLES = (
    "MODEL_PATH DATA_ROOT OUTPUT_DIR GPU LORA_RANK LORA_ALPHA LORA_DROPOUT MAX_TRAIN_SAMPLES MAX_VAL_SAMPLES"
    " NUM_EPOCHS LEARNING_RATE VAL_FREQ SAVE_FREQ REWARD_TYPE REWARD_SPEC STAGE SEED DICE_WEIGHT"
    " RECALL_WEIGHT TOPOLOGY_WEIGHT LENGTH_WEIGHT RECALL_TARGET PROMPT"
).split()
# Both stand in for .venv/bin/python. One line per argument, then the exit code asked for:
FAKE_PYTHON = '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\nexit "${FAKE_EXIT:-0}"\n'


def run(command: list, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run with a clean environment, so that a developer's own LORA_RANK changes nothing."""
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_only_wrappers_of_verbs_and_scripts_that_stop_at_errors_stand_at_the_root(repository: Path) -> None:
    found = {path.name for pattern in ("*.py", "*.sh") for path in repository.glob(pattern)}
    assert found == {*WRAPPERS, *SCRIPTS}
    for name, verb in WRAPPERS.items():
        code = f'if __name__ == "__main__":\n    sys.exit(main(["{verb}", *sys.argv[1:]]))\n'
        assert (repository / name).read_text().endswith(code)
    assert all("set -euo pipefail" in (repository / name).read_text() for name in SCRIPTS)


def write_python(folder: Path, code: str) -> None:
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(code)
    python.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path, repository: Path) -> Path:
    """The script in a folder whose name has a space, with a Python that prints its arguments."""
    folder = tmp_path / "my clone"
    write_python(folder, FAKE_PYTHON)
    shutil.copy(repository / "run_lora_ppo.sh", folder)
    (folder / "install_dependencies.sh").write_text("exit 0\n")
    return folder


def test_the_exit_code_is_that_of_usage_or_python_or_a_failed_install(clone: Path, tmp_path: Path) -> None:
    for arguments in ([], ["fast"], ["--help"]):
        done = run(["bash", clone / "run_lora_ppo.sh", *arguments], tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Usage: bash run_lora_ppo.sh quick|full" in done.stderr
    assert run(["bash", clone / "run_lora_ppo.sh", "quick"], tmp_path, FAKE_EXIT="7").returncode == 7
    (clone / "install_dependencies.sh").write_text("exit 3\n")
    done = run(["bash", clone / "run_lora_ppo.sh", "quick"], tmp_path)
    assert (done.returncode, done.stdout) == (3, "")


def test_options_and_shell_variables_arrive_whole_from_any_directory(clone: Path, tmp_path: Path) -> None:
    typed = ["--prompt", "Please segment  the 'vessel'.", "--data_root", "a b/*"]
    values = {name: f"value of {name}" for name in VARIABLES}
    expected = [word for name, value in values.items() for word in (f"--{name.lower()}", value)]
    for given, options in (({}, []), (values, expected)):
        done = run(["bash", clone / "run_lora_ppo.sh", "full", *typed], tmp_path, **given)
        passed = [str(clone / "train_lora_ppo.py"), "--preset", "full", *options, *typed]
        assert done.stdout.splitlines() == passed


# Notes what pip is asked for and pretends that it worked.
FAKE_PIP = """#!/usr/bin/env bash
asked="$*"
case "$asked" in
  *"pip install"*) echo "${asked#*vesselrl_constraints.txt }" >>pip.log; exit "${FAKE_EXIT:-0}" ;;
  *importlib*) echo "torch==9.9+cpu" ;;
esac
"""


@pytest.fixture
def install(repository: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Runs the script with these arguments and variables; the lines that pip got, or what went wrong."""
    for name in ("install_dependencies.sh", "constraints.txt", "pyproject.toml"):
        shutil.copy(repository / name, tmp_path)
    log = tmp_path / "pip.log"

    def call(*arguments: str, code: int = 0, **variables: str) -> list[str]:
        log.write_text("")
        done = run(["bash", tmp_path / "install_dependencies.sh", *arguments], Path("/"), **variables)
        assert done.returncode == code, done.stderr
        return (log.read_text() or done.stderr).splitlines()

    return call


def test_install_refuses_what_is_unknown_and_asks_for_torch_first(install: Callable, tmp_path: Path) -> None:
    assert "unknown argument 'gpu'" in install("gpu", code=2)[0]
    assert "no Python 3.11 or newer" in install(code=1, PYTHON="no-such-python")[0]
    assert not (tmp_path / ".venv").exists()
    write_python(tmp_path, FAKE_PIP)
    asked = install("dev")
    assert asked == ["setuptools", "torch==2.13.0", "--no-build-isolation --editable .[dev]"]
    constraints = (tmp_path / ".venv" / "vesselrl_constraints.txt").read_text().splitlines()
    assert [line for line in constraints if line.startswith("torch==")] == ["torch==9.9+cpu"]


def test_install_works_only_where_something_changed(install: Callable, tmp_path: Path) -> None:
    write_python(tmp_path, FAKE_PIP)
    assert install(code=4, FAKE_EXIT="4") == ["setuptools"]  # a failure is not taken for a finished one
    assert install("dev") != []
    assert install("dev") == install() == []
    with (tmp_path / "constraints.txt").open("a") as file:
        file.write("one-more==1.0\n")
    assert install()[1] == "torch==2.13.0"
    assert install(VESSELRL_TORCH="torch==2.12.0")[1] == "torch==2.12.0"
    assert install() == []  # it is remembered


def test_a_bare_python_hands_over_to_the_venv_or_says_what_to_run(clone, repository, tmp_path) -> None:
    (clone / "vesselrl").mkdir()
    for name in ("vesselrl/__init__.py", "vesselrl/__main__.py", "vesselrl/launch.py", "train_lora_ppo.py"):
        shutil.copy(repository / name, clone / name)
    script, python = clone / "train_lora_ppo.py", clone / ".venv" / "bin" / "python"
    done = run([sys.executable, "-S", script, "two words"], tmp_path, FAKE_EXIT="5")
    assert (done.returncode, done.stdout.splitlines()) == (5, ["-S", str(script), "two words"])
    python.unlink()
    python.symlink_to(Path(sys.executable).resolve())  # it lacks the packages, and is tried only once
    for _ in range(2):
        done = run([sys.executable, "-S", script], tmp_path)
        assert done.returncode == 1
        assert re.search(f"lacks.*torch.*bash {clone / 'install_dependencies.sh'}", done.stderr)
        shutil.rmtree(clone / ".venv", ignore_errors=True)


COMMAND = re.compile(
    r"(?:^|`)((?:[A-Z_]+=\S+ )*(?:bash|python|\.venv/bin/vesselrl|vesselrl(?! fine)) [^`#\n]+|data \w+(?=`))",
    re.M,
)
# CI, a browser, a stand-in of the hub, a shell, test_faults.py.
ELSEWHERE = ("install_dep", "run_tests", " demo", " push", "completion", "--resume_from")
TRAIN = "--model_path @model --data_root @data --output_dir output --max_train_samples 2 --max_val_samples 2 "
TRAIN += "--num_epochs 2 --val_freq 100 --num_samples 2 --num_regions 1 --lora_rank 2"
PREDICT = "--image @data/images --output_dir predictions --format labelme"
MORE = {  # beside what stands in the README; the first that is in a command counts
    "data check": "", "data merge": "@data predictions/labelme --output joined",
    "show": "@data --output sheet.png",
    "draw": "--root drawn --num_patients 3 --size 64", "merge_lora": "--output_model merged",
    " merge": "--output_model merged_too", "--preset debug": "--output_dir output", "benchmarks": "--help",
    **dict.fromkeys((" train", "train_lora", "run_lora"), TRAIN),
    **dict.fromkeys((" predict", "inference"), PREDICT),
}  # fmt: skip


@pytest.mark.long  # three minutes
@pytest.mark.timeout(600)
def test_every_command_of_the_readmes_runs(repository, angiograms, tiny_checkpoint, tmp_path) -> None:
    """Those of README.md, which README.zh-CN.md has too, in small: trainings first, whose runs others use."""
    write_python(tmp_path, f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    for path in (*repository.glob("*.py"), repository / "run_lora_ppo.sh"):
        shutil.copy(path, tmp_path)
    (tmp_path / "install_dependencies.sh").write_text("exit 0\n")
    (tmp_path / "vesselrl").symlink_to(repository / "vesselrl")
    (tmp_path / "benchmarks").symlink_to(repository / "benchmarks")
    found = dict.fromkeys(COMMAND.findall((repository / "README.md").read_text(encoding="utf-8")))
    commands = [one.strip() for one in found if not any(word in one for word in ELSEWHERE)]
    assert len(commands) > 15
    for command in sorted(commands, key=lambda one: "train" not in one and "run_lora" not in one):
        more = next((text for name, text in MORE.items() if name in f" {command}"), "")
        command = f"vesselrl {command}" if command.startswith("data ") else command
        command += " @data" * command.endswith("data check")
        command = re.sub(r"^(\.venv/bin/)?vesselrl", ".venv/bin/python -m vesselrl", f"{command} {more}")
        command = re.sub(r"^python", ".venv/bin/python", command)
        for name, place in (("/data/vessels|@data", angiograms), ("/models/sa2va|@model", tiny_checkpoint)):
            command = re.sub(name, str(place), command)
        done = run(["bash", "-c", command], tmp_path, OMP_NUM_THREADS="1")
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
