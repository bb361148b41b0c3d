"""Signals, full disks, folders that vanish: exit code, message, nothing half written, and the run goes on.

`pytest -s -m "slow or not slow" tests/test_faults.py | grep "^|"` prints a table of them.
"""

import ctypes
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from safetensors import safe_open

from vesselrl.cli import main

OPTIONS = "--preset debug --stage sft+rl --num_epochs 2 --num_passes 1 --batch_size 1 --val_freq 3"
OPTIONS += " --cache_gb 0 --output_dir out"


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    text: str  # all that it printed
    fault: str = ""  # and the place


# ---- In the child process: what goes wrong, and when


def at_call(number: int, owner: object, name: str, act: Callable[[], object]) -> None:
    """Does something when a function is called for the n-th time, before its work."""
    function, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args: object, **kwargs: object) -> object:
        if next(calls) == number:
            act()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def places() -> dict[str, tuple[int, object, str]]:
    """Moments of a training: call number, owner and name of a function that it calls then."""
    from vesselrl.data import check
    from vesselrl.inference import merge, predictor
    from vesselrl.synthetic import dataset
    from vesselrl.training import checkpoint, policy, ppo, setup, supervised, train

    return {
        "set-up": (1, setup, "make_model"),
        "step": (3, supervised.SupervisedUpdate, "step"),  # before a validation
        "rl step": (2, ppo.PPOUpdate, "step"),
        "validation": (5, policy.MaskPolicy, "predict_batch"),  # two images each, after steps 0, 3, 4, 6, 8
        "save": (4, checkpoint, "save_file"),  # first with config.json, then after steps 0, 3, 4
        "test": (1, train, "score_test"),
        "report": (1, train, "write_run_report"),
        "prediction": (2, predictor.Predictor, "predict"),
        "merging": (2, merge, "load_sa2va"),
        "checking": (1, check, "check_listing"),
        "drawing": (3, dataset, "_write_frame"),
    }


FAULTS: dict[str, Callable[[], object]] = {
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "SIGHUP": lambda: os.kill(os.getpid(), signal.SIGHUP),
    "SIGTERM and SIGINT": lambda: [os.kill(os.getpid(), one) for one in (signal.SIGTERM, signal.SIGINT)],
    "removed folder": lambda: shutil.rmtree(the_run(Path())),
    # For root no folder is read-only.
    "read-only": lambda: the_run(Path()).chmod(0o555) if os.geteuid() else os.seteuid(65534),
}  # fmt: skip


def limit_files(size: int) -> None:
    """No file can have more bytes than that from now on, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def mount_small_disk() -> None:
    """Makes `out` a disk of 64 MB for this process alone, where root may do that."""
    libc, new_mounts, private = ctypes.CDLL(None), 0x20000, 0x44000
    Path("out").mkdir()
    if libc.unshare(new_mounts) == 0:
        libc.mount(b"none", b"/", None, private, None)
        libc.mount(b"tmpfs", b"out", b"tmpfs", 0, b"size=64m")


def fill_disk(size: int) -> None:
    """Leaves that many bytes on the small disk; without one no file can have more."""
    if os.path.ismount("out"):
        with open("out/filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage("out").free - size)
    else:
        limit_files(size)


def run_child(words: list[str], place: str, fault: str | int, folder: Path, output: Connection) -> None:
    """Runs a command as `vesselrl` does, with a fault at a place; a number is a limit of `limit_files`."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.chdir(folder)
    from tests.training.runs import no_charts
    from vesselrl import launch
    from vesselrl.training import train

    train.draw = lambda t: None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell or nohup may have switched them off
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    kind, _, size = str(fault).rpartition(" ")
    filled = partial(fill_disk, int(size)) if kind == "full" else partial(limit_files, fault)
    if place:
        at_call(*places()[place], FAULTS.get(fault, filled))
    if kind == "full":
        mount_small_disk()
    try:
        with no_charts:
            sys.exit(launch.main(words))
    finally:
        if kind == "full":  # the disk goes with the process
            shutil.copytree("out", "left", ignore=shutil.ignore_patterns("filler"))


# ---- In the test


def run(words: str, folder: Path, place: str = "", fault: str | int = "") -> Ended:
    context = multiprocessing.get_context("forkserver")
    modules = ["tests.training.warm", "matplotlib.pyplot"]
    context.set_forkserver_preload(modules)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_child, args=(words.split(), place, fault, folder, sender))
    process.start()
    sender.close()
    text = b"".join(iter(lambda: os.read(receiver.fileno(), 65536), b"")).decode()
    process.join()
    if (left := folder / "left").is_dir():
        shutil.rmtree(folder / "out")
        left.rename(folder / "out")
    return Ended(process.exitcode, text, f"{fault}, {place}")


def the_run(folder: Path) -> Path:
    (run,) = folder.glob("out/sa2va_*")
    return run


def contents(run: Path) -> dict[str, object]:
    """All that must be the same however often a run was stopped."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]
    files = [*run.glob("*/*.safetensors"), *run.glob("test_*.csv"), *run.glob("val_*.csv")]
    return {"metrics": entries} | {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a run without any fault gives."""
    folder = tmp_path_factory.mktemp("whole")
    ended = run(f"train {OPTIONS}", folder)
    assert ended.code == 0, ended.text
    return contents(the_run(folder))


def check_words(ended: Ended, folder: Path, code: int, words: str) -> None:
    """The exit code, one line at the end, no traceback, no half-written file; prints a line of the table."""
    last = ended.text.splitlines()[-1]
    print(f"\n| {ended.fault} | {ended.code} | {last.replace(str(folder), '')} | {left_over(folder)} |")
    assert ended.code == code, ended.text
    assert "Traceback" not in ended.text
    assert re.search(words, last), ended.text
    assert [path for path in folder.rglob("*") if path.name.endswith(".partial")] == []


def left_over(folder: Path) -> str:
    """What a command left of its runs, in words."""
    found = [f"{sum(path.is_file() for path in one.rglob('*'))} files" for one in folder.glob("out/sa2va_*")]
    for state in folder.glob("out/sa2va_*/resume.safetensors"):
        with safe_open(state, framework="pt") as file:
            found.append(f"state of step {json.loads(file.metadata()['state'])['step']}")
    return ", ".join(found) or "no run"


def go_on(folder: Path, whole: dict[str, object]) -> None:
    ended = run(f"train --resume_from {the_run(folder).relative_to(folder)}", folder)
    assert ended.code == 0, ended.text
    got = contents(the_run(folder))
    assert [name for name in whole | got if whole.get(name) != got.get(name)] == []


GO_ON = r"Go on with: vesselrl train --resume_from out/sa2va_\w+"
# Place, signal, exit code, and the step that the saved state is of.
STOPS = [
    ("step", "SIGTERM", 143, 3), ("rl step", "SIGINT", 130, 6), ("validation", "SIGHUP", 129, 4),
    ("save", "SIGTERM", 143, 4), ("test", "SIGINT", 130, 8), ("report", "SIGTERM", 143, 8),
    ("validation", "SIGTERM", 143, 4), ("test", "SIGTERM", 143, 8),
]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "name", "code", "step"),
    [
        pytest.param(*stop, marks=pytest.mark.slow if number else (), id=", ".join(stop[:2]))
        for number, stop in enumerate(STOPS)
    ],
)
def test_a_stopped_run_ends_as_if_never_stopped(
    tmp_path: Path, whole: dict, place: str, name: str, code: int, step: int
) -> None:
    ended = run(f"train {OPTIONS}", tmp_path, place, name)
    check_words(ended, tmp_path, code, f"stopped by {name}. {GO_ON}$")
    assert left_over(tmp_path).endswith(f"files, state of step {step}")
    go_on(tmp_path, whole)


def test_before_the_first_state_nothing_is_left(tmp_path: Path) -> None:
    ended = run(f"train {OPTIONS}", tmp_path, "set-up", "SIGINT")
    check_words(ended, tmp_path, 130, "stopped by SIGINT. No file is half written.")
    assert list(tmp_path.glob("out/sa2va_*")) == []


def test_a_second_signal_ends_at_once(tmp_path: Path, whole: dict) -> None:
    ended = run(f"train {OPTIONS}", tmp_path, "step", "SIGTERM and SIGINT")
    check_words(ended, tmp_path, 130, "Stopping after this step; a second signal stops at once.")
    go_on(tmp_path, whole)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


GONE = r"Put its folder back\."
DISKS = [  # bytes that a file may have, or what happens; where; which file is named; the advice
    (0, "step", r"metrics\.jsonl", rf"Make room there\. {GO_ON}"),
    (3_000, "rl step", r"metrics\.jsonl|tensorboard", rf"Make room there\. {GO_ON}"),
    (100_000, "set-up", r"model\.safetensors", r"Make room there\."),
    (300_000, "validation", r"resume\.safetensors", rf"Make room there\. {GO_ON}"),
    ("removed folder", "rl step", r"metrics\.jsonl", GONE),
    ("removed folder", "test", r"sa2va_\w+", GONE),
    ("read-only", "step", r"metrics\.jsonl", rf"Make it writable\. {GO_ON}"),
    *((f"full {size}", place, r"sa2va_\w+/\S+", rf"Make room there\. {GO_ON}") for place, size in {
        "step": 0, "rl step": 4096, "validation": 300_000, "save": 100_000, "test": 20_000}.items()),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "place", "file", "advice"), DISKS, ids=[f"{d[0]}, {d[1]}" for d in DISKS])
def test_a_disk_that_fails_is_named_and_the_run_goes_on(
    open_folder: Path, whole: dict, fault: int | str, place: str, file: str, advice: str
) -> None:
    ended = run(f"train {OPTIONS}", open_folder, place, fault)
    check_words(ended, open_folder, 1, rf"^error: \S*({file}) cannot be written \(.+\)\. {advice}$")
    if GO_ON in advice:
        go_on(open_folder, whole)
    else:
        assert list(open_folder.glob("out/sa2va_*")) == []


@pytest.mark.slow
def test_two_at_once(tmp_path: Path, whole: dict) -> None:
    """New runs share data and cache and change nothing; of two that resume one run the later is refused."""
    words = f"train {OPTIONS.replace('cache_gb 0', 'cache_gb 0.1')} --lora_scope projector mask_decoder"
    with ThreadPoolExecutor(2) as pool:
        for ended in [*pool.map(run, [words] * 2, [tmp_path] * 2)]:  # when both have ended
            check_words(ended._replace(fault="two new runs at once"), tmp_path, 0, "")
        one, other = map(contents, tmp_path.glob("out/sa2va_*"))
        assert one == other
        for shared in ("data", "cache/features", "cache/states"):  # one data set, the outputs of one model
            assert sum(path.is_dir() for path in (tmp_path / "out" / shared).iterdir()) == 1, shared
        shutil.rmtree(tmp_path / "out")
        run(f"train {OPTIONS}", tmp_path, "step", "SIGTERM")
        words = f"train --resume_from {the_run(tmp_path).relative_to(tmp_path)}"
        both = sorted(pool.map(run, [words] * 2, [tmp_path] * 2), key=lambda ended: ended.code)
    for ended, code, said in zip(both, (0, 2), ("", "in use by another|has finished"), strict=True):
        check_words(ended._replace(fault="two resumes at once"), tmp_path, code, said)
    assert contents(the_run(tmp_path)) == whole


@pytest.fixture(scope="module")
def things(whole: dict, tmp_path_factory: pytest.TempPathFactory, angiograms: Path) -> Path:
    """A folder with data and an adapter of the embedded model."""
    folder = tmp_path_factory.mktemp("things")
    shutil.copytree(angiograms, folder / "data")
    words = "train --preset debug --model_path None --data_root data --output_dir out --stage sft"
    ended = run(words, folder)
    assert ended.code == 0, ended.text
    the_run(folder).rename(folder / "run")
    return folder


VERBS = [
    ("evaluate --lora_weights run", "prediction", "SIGTERM", 143),
    ("predict --lora_weights run --image data/images --output_dir new", "prediction", "SIGHUP", 129),
    ("merge --lora_weights run --output_model new", "merging", "SIGINT", 130),
    ("data check data", "checking", "SIGTERM", 143),
    ("data draw --root new", "drawing", "SIGTERM", 143),
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "place", "name", "code"), VERBS)
def test_other_commands_stop_with_one_line(things: Path, words: str, place, name, code) -> None:
    before = {path for path in things.rglob("*") if path.is_file()}
    ended = run(words, things, place, name)
    check_words(ended, things, code, f"stopped by {name}. No file is half written.")
    made = {path for path in things.rglob("*") if path.is_file()} - before
    num_mappings = len(list(things.glob("new/*.mapping.json")))
    assert len(made) == num_mappings + (3 if words.startswith("predict") else 0)
    shutil.rmtree(things / "new", ignore_errors=True)


def test_too_little_room_is_said_before_anything_is_written(things: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(things)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    before = sorted(things.rglob("*"))
    for words in (
        "train --preset debug --model_path None --data_root data --output_dir out",
        "merge --lora_weights run --output_model new", "data draw --root new",
        "predict --lora_weights run --image data/images --output_dir out",
    ):  # fmt: skip
        assert main(words.split()) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"^error: \S+ has 0 MB free; \d+ MB are needed for .* Make room", line), line
    assert sorted(things.rglob("*")) == before
