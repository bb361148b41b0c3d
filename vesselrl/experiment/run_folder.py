"""A run folder: settings, metrics and results of one training, written so that nothing is ever half there."""

import errno
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from vesselrl.errors import RefusedError, RewardError, RunError, Stopped, WriteError
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.options import hide_paths_of_command

if os.name == "nt":
    import msvcrt

    _TAKEN = PermissionError  # by another process
else:
    import fcntl

    _TAKEN = BlockingIOError

PREFIX = "sa2va_lora_ppo_"
CONFIG_FILE = "config.json"
SHARED_FILE = "vesselrl.json"  # beside an adapter on a hub: the settings that it predicts by
LOCK_FILE = "run.lock"
SUMS_FILE = "SHA256SUMS"  # of an adapter folder, as the command sha256sum reads it
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room there."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Make it writable."),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "Put its folder back."),
}
# The paths to data that `hide_paths` takes out of settings: they may name a patient.
PRIVATE_FILE = "paths.private.json"
# What comes of a file whose values are others than were written.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
_PACKAGES = "torch transformers peft safetensors numpy numba opencv-python-headless scikit-image".split()


@dataclass(eq=False)
class RunFolder:
    """`OUTPUT_DIR/sa2va_lora_ppo_<YYYYmmdd_HHMMSS>` and the files in it."""

    path: Path

    @classmethod
    def create(cls, output_dir: str | Path) -> "RunFolder":
        """A new, empty run folder named by the time of day; a RunError where none can be made."""
        base, stamp = Path(output_dir), datetime.now().strftime("%Y%m%d_%H%M%S")
        for suffix in ("", *(f"_{k}" for k in range(2, 100))):
            path = base / f"{PREFIX}{stamp}{suffix}"
            try:
                path.mkdir(parents=True)
            except OSError as error:
                if path.is_dir():
                    continue
                fault = f"Cannot write to the output folder {base} ({error.strerror or error})"
                raise RefusedError(f"{fault}; give another --output_dir.") from None
            return cls(path)
        raise RunError(f"{base} has a hundred runs of this second already; wait a moment.")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out for the length of a `with` block; a RefusedError where one is inside.

        The kernel takes the lock back when the process dies; what it was writing then is removed here.
        """
        path = self.path / LOCK_FILE
        in_use = RefusedError(f"{self.path} is in use by another training. Wait for its end, or stop it.")
        try:
            file = path.open("ab")
        except OSError as error:
            fault = f"{path} cannot be written ({error.strerror})"
            raise RefusedError(f"{fault}. {_ADVICE.get(error.errno, 'Check the disk.')}") from None
        with file:
            with suppress(OSError):  # a file system without locks
                try:
                    if os.name == "nt":
                        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                    else:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except _TAKEN:
                    raise in_use from None
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                raise in_use  # its owner has just ended and removed it
            try:
                for partial in [*self.path.rglob(".*.partial")]:
                    _discard(partial)
                yield
            finally:
                with suppress(OSError):  # the folder may be gone, or read-only; Windows keeps an open file
                    path.unlink()

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes a JSON file of the run; see the function `write_json`."""
        write_json(self.path / name, values)

    @property
    def metrics_file(self) -> Path:
        """One JSON object per line, with the step that it belongs to."""
        return self.path / "metrics.jsonl"

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        with writing(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(strict(values), allow_nan=False) + "\n")

    def cut_metrics(self, num_bytes: int) -> bool:
        """Keeps the whole lines within the first bytes of metrics.jsonl; returns whether any are missing."""
        there = self.metrics_file.read_bytes() if self.metrics_file.exists() else b""
        kept = b"".join(filter(_is_entry, there[:num_bytes].splitlines(keepends=True)))
        if kept != there or not self.metrics_file.exists():
            write_text(self.metrics_file, kept.decode())
        return len(kept) < num_bytes

    def check_there(self) -> None:
        """A WriteError where the folder was removed: writing a file would make it anew, with that alone."""
        with writing(self.path):
            (self.path / CONFIG_FILE).stat()

    @contextmanager
    def says_how_to_go_on(self) -> Iterator[None]:
        """Where signal, disk or a user's reward end the training, the message has the command to go on."""
        try:
            yield
        except (Stopped, OSError, RewardError) as error:
            with suppress(OSError):  # it may be out of reach
                if any(self.path.glob("resume.*safetensors")):
                    folder = shlex.quote(self.path.as_posix())
                    error.add_note(f"Go on with: vesselrl train --resume_from {folder}")
            raise


def _is_entry(line: bytes) -> bool:
    """Whether a line of metrics.jsonl is complete."""
    try:
        return line.endswith(b"\n") and "step" in json.loads(line)
    except MALFORMED:
        return False


def find_run(lora_weights: str | Path | None) -> Path | None:
    """The run an adapter belongs to: the folder itself or its parent, whichever has a data_split.json."""
    if lora_weights is None:
        return None
    folder = Path(lora_weights)
    return next((f for f in (folder, folder.parent) if (f / "data_split.json").exists()), None)


def run_settings(run: Path | None, may_be_changed: bool = False, name: str = CONFIG_FILE) -> dict[str, Any]:
    """The flat settings that a run was trained with, empty without a run; damaged ones are a RefusedError.

    Without the private file, as in a run that was passed on, paths to data stay hidden.
    """
    if run is None or not (path := run / name).exists():
        return {}
    try:
        values = read_json(path)
        settings = dict(values["args"])
        hidden = read_json(run / PRIVATE_FILE) if (run / PRIVATE_FILE).exists() else {}
        is_changed = values.get("args_sha256", json_hash(settings)) != json_hash(settings)
        # One that is lost would mean other data, such as the built-in ones.
        settings |= {name: p for name, p in hidden.items() if settings.get(name) in (None, name.upper())}
    except MALFORMED:
        raise RefusedError(f"{path} is damaged: it holds no settings of a run. Put it back.") from None
    types = {field.name: field.type for group in vars(TrainConfig()).values() for field in fields(group)}
    if wrong := [name for name, value in settings.items() if name in types and not _fits(value, types[name])]:
        found = type(settings[wrong[0]]).__name__  # the value may be a path
        raise RefusedError(f"{path} is damaged: {wrong[0]} is a {found}. Put it back.")
    if is_changed and not may_be_changed:
        advice = "Put it back; if the change is meant, remove its line args_sha256."
        raise RefusedError(f"{path} is damaged: its settings are not those that the run wrote. {advice}")
    return settings


def _fits(value: object, hint: Any) -> bool:
    """Whether a value read from JSON is of the type of a setting."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is Literal:  # of any version
        return isinstance(value, str)
    if kind is tuple:
        return isinstance(value, list | tuple) and all(_fits(one, inner[0]) for one in value)
    return type(value) in ((int, float) if hint is float else (hint,))


def read_json(path: Path) -> Any:
    """Reads a JSON file, with or without a byte order mark; a ValueError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file of a run; a ValueError that names the file where it holds none."""
    try:
        return {**read_json(path)}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). {advice}") from error


@contextmanager
def reading(path: Path, advice: str) -> Iterator[None]:
    """Turns what comes of other values than this program writes to a file into a ValueError that names it."""
    try:
        yield
    except ValueError:
        raise
    except MALFORMED as error:
        fault = f"{path} is damaged: it holds other values than were written"
        raise ValueError(f"{fault} ({type(error).__name__}: {error}). {advice}") from error


def json_hash(values: Mapping[str, Any]) -> str:
    """The sha256 of values as JSON, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Writes the sha256 of every file in a folder beside them."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS_FILE)
    write_text(folder / SUMS_FILE, "".join(f"{file_hash(path)}  {path.name}\n" for path in files))


def damaged_files(folder: Path) -> list[str]:
    """The files of a folder that are not as `write_sums` saw them; none where it was never called."""
    path = folder / SUMS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    sums = {Path(name).name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    return [n for n, digest in sums.items() if not (folder / n).is_file() or file_hash(folder / n) != digest]


@contextmanager
def atomic_write(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or folder to, which takes its place when the block ends.

    It is on the disk before it has the name, so that a power cut leaves the old or the new. After an error
    nothing of it is left; what `path` held before stays, or stays as `previous`. The folder of it is made.
    """
    # Random, as on other machines that write to the same folder a process may have the same number.
    partial = path.with_name(f".{path.name}.{os.getpid()}{os.urandom(2).hex()}.partial")
    try:
        with writing(path, partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            for file in partial.rglob("*") if partial.is_dir() else (partial,):
                _flush(file)
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(partial, path)
            with suppress(OSError):  # not every file system can flush a folder
                _flush(path.parent)
    finally:
        _discard(partial)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # a file may be read-only
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with suppress(OSError):  # the folder may be gone or read-only, and has nothing of it then
            partial.unlink(missing_ok=True)


@contextmanager
def writing(*paths: Path) -> Iterator[None]:
    """Turns the error of a disk about these paths, not others, into a WriteError that names the first."""
    tensors = sys.modules.get("safetensors")  # needed by few commands
    faults = (OSError, tensors.SafetensorError) if tensors else (OSError,)
    try:
        yield
    except WriteError:
        raise
    except faults as error:
        code = re.search(r"os error (\d+)", str(error))  # as safetensors writes it
        number = int(code[1]) if code else getattr(error, "errno", None)
        file = Path(os.fsdecode(getattr(error, "filename", None) or paths[0]))
        if not any(path.is_relative_to(file) or file.is_relative_to(path) for path in paths):
            raise
        reason = os.strerror(number) if number else str(error)
        fault = f"{paths[0]} cannot be written ({reason})"
        raise WriteError(f"{fault}. {_ADVICE.get(number, 'Check the disk.')}", reason) from None


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Writes a UTF-8 file with the line ends and rights given (less the umask's), complete or not at all."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    with atomic_write(path) as place, open(place, "w", encoding="utf-8", newline="", opener=opener) as file:
        file.write(text)


def write_json(path: Path, values: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes a JSON file that appears only when complete; nan and infinity become null."""
    write_text(path, json.dumps(strict(values), indent=2, allow_nan=False) + "\n")


def check_writable(folder: Path) -> None:
    """A RefusedError where a folder can be neither made nor written to; changes nothing."""
    place = _existing(folder)
    if not place.is_dir():
        raise RefusedError(f"Cannot write to {folder}: {place} is a file. Give another --output_dir.")
    if not os.access(place, os.W_OK):
        raise RefusedError(f"Cannot write to {folder}: no permission in {place}. Give another --output_dir.")


def check_room(folder: Path, num_bytes: float, purpose: str) -> None:
    """A RefusedError where a disk has not that many bytes free for a purpose; changes nothing."""
    if (free := shutil.disk_usage(_existing(folder)).free) < num_bytes:
        fault = f"{folder} has {free / 1e6:,.0f} MB free; {num_bytes / 1e6:,.0f} MB are needed for {purpose}"
        raise RefusedError(f"{fault}. Make room, or choose another folder.")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next((p for p in (folder, *folder.resolve().parents) if p.exists()), Path("/"))


def strict(value: object) -> object:
    """The value with every nan and infinity replaced by None, so that any JSON reader takes it."""
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def provenance(argv: list[str], device: str) -> dict:
    """Where a result comes from: command, commit, versions, machine."""
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in _PACKAGES}
    return {
        "command": hide_paths_of_command(argv),
        "git_commit": git_commit(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: package and package.version for name, package in found.items()},
        "platform": f"{sys.platform} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "device": device,
    }


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with `+` when files were changed; None outside git."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    try:
        commit = git(["git", "rev-parse", "HEAD"], timeout=10).stdout.strip()
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"], timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")
