"""A run folder: settings, metrics and results of one training, written so that nothing is ever half there."""

import errno
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
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from vesselrl.errors import RefusedError, RunError, Stopped, WriteError

PREFIX = "sa2va_lora_ppo_"
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room there."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Make it writable."),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "Put its folder back."),
}
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

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    def remove(self) -> None:
        """Deletes the folder, for a run that failed before its first result."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write_json(self, name: str, values: Mapping[str, Any]) -> Path:
        """Writes a JSON file of the run; see the function `write_json`."""
        path = self.path / name
        write_json(path, values)
        return path

    @property
    def metrics_file(self) -> Path:
        """One JSON object per line, with the step that it belongs to."""
        return self.path / "metrics.jsonl"

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        with writing(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(strict(values), allow_nan=False) + "\n")

    def check_there(self) -> None:
        """A WriteError where the folder was removed: writing a file would make it anew, with that alone."""
        with writing(self.path):
            (self.path / "config.json").stat()

    @contextmanager
    def says_how_to_go_on(self) -> Iterator[None]:
        """Where a signal or a disk ends the training, the message has the command that goes on with it."""
        try:
            yield
        except (Stopped, OSError) as error:
            with suppress(OSError):  # it may be out of reach
                if any(self.path.glob("resume.*safetensors")):
                    error.add_note(f"Go on with: vesselrl train --resume_from {shlex.quote(str(self.path))}")
            raise


def find_run(lora_weights: str | Path | None) -> Path | None:
    """The run an adapter belongs to: the folder itself or its parent, whichever has a data_split.json."""
    if lora_weights is None:
        return None
    folder = Path(lora_weights)
    return next((f for f in (folder, folder.parent) if (f / "data_split.json").exists()), None)


def run_settings(run: Path | None) -> dict[str, Any]:
    """The flat settings that a run was trained with, empty without a run; damaged ones are a RunError."""
    if run is None or not (run / "config.json").exists():
        return {}
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8"))["args"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise RunError(f"{run / 'config.json'} is damaged: it holds no settings of a run.") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or folder to, which takes its place when the block ends.

    After an error nothing of it is left, and what `path` held before stays. The folder of `path` is made.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path, partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with suppress(OSError):  # the folder may be gone or read-only, and has nothing of it then
                partial.unlink(missing_ok=True)


@contextmanager
def writing(*paths: Path) -> Iterator[None]:
    """Turns the error of a disk or folder into a WriteError that names the first path.

    Errors of other files pass, such as one that is read meanwhile.
    """
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


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file that appears only when complete, with the line ends that the text has."""
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


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
        "command": argv,
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
