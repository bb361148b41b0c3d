"""Run folders: unique, complete or absent, readable by any JSON reader, and where a result comes from."""

import json
import math
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from vesselrl.errors import RefusedError, RunError
from vesselrl.experiment import run_folder
from vesselrl.experiment.run_folder import LOCK_FILE, RunFolder, check_writable, git_commit


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path)


def test_runs_of_one_second_get_folders_of_their_own_and_their_parents(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_folder, "datetime", SimpleNamespace(now=lambda: datetime(2026, 3, 4, 5, 6, 7)))
    runs = [RunFolder.create(tmp_path / "deep" / "output") for _ in range(3)]
    start = "sa2va_lora_ppo_20260304_050607"
    assert [run.path.name for run in runs] == [start, f"{start}_2", f"{start}_3"]
    assert runs[0].path.parent == tmp_path / "deep" / "output"
    assert list(runs[0].path.iterdir()) == []


def test_a_file_in_the_way_and_a_place_without_permission(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "output").write_text("kept")
    with pytest.raises(RunError, match=r"output is a file\. Give another --output_dir"):
        check_writable(tmp_path / "output" / "below")
    monkeypatch.setattr(run_folder.os, "access", lambda path, mode: False)
    with pytest.raises(RunError, match=f"no permission in {tmp_path}"):
        check_writable(tmp_path / "new")


def test_a_failed_write_keeps_the_old_file(run: RunFolder, monkeypatch) -> None:
    run.write_json("info.json", {"old": 1})
    with pytest.raises(TypeError):
        run.write_json("info.json", {"new": object()})
    monkeypatch.setattr(run_folder.os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        run.write_json("info.json", {"new": 2})
    assert json.loads((run.path / "info.json").read_text()) == {"old": 1}
    assert [path.name for path in run.path.iterdir()] == ["info.json"]


def test_json_is_strict_and_whole_and_metrics_are_one_line_each(run: RunFolder) -> None:
    values = {"b": [math.inf, {"c": -math.inf}], "d": (1.0, math.nan), "a": [1, None, "ü"], 3: (True, "nan")}
    run.write_json("info.json", values)
    path = run.path / "info.json"
    stored = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert stored == {"b": [None, {"c": None}], "d": [1.0, None], "a": [1, None, "ü"], "3": [True, "nan"]}
    assert list(run.path.iterdir()) == [path]
    for step, loss in ((1, 0.5), (2, math.nan)):
        run.append_metrics({"step": step, "train/loss": loss})
    assert (run.path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "train/loss": 0.5}', '{"step": 2, "train/loss": null}'
    ]  # fmt: skip


def test_settings_of_other_kinds_are_refused(run: RunFolder) -> None:
    for text in ("[" * 10**5, '{"args": ' + "[" * 10**5, '{"args": 3}', '{"args": {"lora_scope": [1]}}'):
        (run.path / "config.json").write_text(text)
        with pytest.raises(RefusedError, match=r"config\.json is damaged"):
            run_folder.run_settings(run.path)
    (run.path / run_folder.PRIVATE_FILE).write_text('{"data_root": "/angio/ylva"}')
    for text in ('{"args": {}}', '{"args": {"data_root": null}}', '{"args": {"data_root": "DATA_ROOT"}}'):
        (run.path / "config.json").write_text(text)
        assert run_folder.run_settings(run.path)["data_root"] == "/angio/ylva"  # never the built-in data
    (run.path / run_folder.PRIVATE_FILE).write_text('{"data_root": ["/angio/ylva"]}')
    with pytest.raises(RefusedError, match=r"data_root is a list\. Put it back"):
        run_folder.run_settings(run.path)


def test_a_torn_metrics_file_keeps_its_whole_lines(run: RunFolder) -> None:
    for step in range(4):
        run.append_metrics({"step": step})
    whole = run.metrics_file.read_bytes()
    assert not run.cut_metrics(len(whole))
    assert run.metrics_file.read_bytes() == whole
    assert not run.cut_metrics(len(whole) // 2)
    assert run.metrics_file.read_bytes() == whole[: len(whole) // 2]
    run.metrics_file.write_bytes(b'{"step": 0}\n\xff\n{"st\0p": 1}\n[2]\n{"step": 3}\n{"step"')
    assert run.cut_metrics(len(whole))
    assert run.metrics_file.read_bytes() == b'{"step": 0}\n{"step": 3}\n'
    run.metrics_file.unlink()
    assert run.cut_metrics(len(whole))
    assert run.metrics_file.read_bytes() == b""


def test_only_one_process_is_inside_a_run(run: RunFolder) -> None:
    """Also after another one died inside, which leaves the file, but no lock."""
    code = (
        "import sys; from pathlib import Path; from vesselrl.experiment.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): print('inside', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", code, run.path], **pipes)
    assert other.stdout.readline() == b"inside\n"
    with pytest.raises(RefusedError, match="in use by another training"), run.locked():
        pytest.fail("two are inside")
    other.kill()
    other.communicate()
    (run.path / f".config.json.{other.pid}.partial").touch()  # it died while it wrote
    assert (run.path / LOCK_FILE).exists()
    with run.locked():
        assert [path.name for path in run.path.iterdir()] == [LOCK_FILE]
        with pytest.raises(RefusedError), RunFolder(run.path).locked():
            pytest.fail("two are inside")
    assert list(run.path.iterdir()) == []


def test_git_commit_says_whether_files_were_changed(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "clone" / "package"
    package.mkdir(parents=True)
    file = package / "runs.py"
    file.write_text("x = 1\n")
    monkeypatch.setattr(run_folder, "__file__", str(file))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("GIT_DIR", raising=False)
    assert git_commit() is None  # outside git
    commit = "init -q", "add runs.py", "-c user.name=a -c user.email=a@b commit -q -m first", "rev-parse HEAD"
    for words in commit:
        command = ["git", "-C", str(package), *words.split()]
        done = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    (package / "results.txt").write_text("a file that git does not know")
    assert git_commit() == done
    file.write_text("x = 2\n")
    assert git_commit() == f"{done}+"
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
