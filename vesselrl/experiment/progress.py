"""Signs of life: a bar in a terminal, and where there is none a line in the log every few seconds."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.markup import escape

from vesselrl.errors import explanation

logger = logging.getLogger(__name__)

T = TypeVar("T")
Progress = Callable[[int, int], None]  # takes how much is done, and of how much in all
QUIET_S = 15  # the longest silence that fast work may keep


class Pace:
    """How long a task will take yet, by its pace since it was first asked."""

    def __init__(self) -> None:
        self.told = time.monotonic()
        self.begun: tuple[int, float] | None = None

    def is_due(self) -> bool:
        """Whether nothing has been told for a while; what is said now is told."""
        if time.monotonic() - self.told < QUIET_S:
            return False
        self.told = time.monotonic()
        return True

    def left(self, done: int, total: int) -> str:
        """The time that is left, in words; empty as long as it cannot be known."""
        now = time.monotonic()
        self.begun = self.begun or (done, now)
        first, started = self.begun
        if done in (first, total):
            return ""
        seconds = (now - started) / (done - first) * (total - done)
        minutes, hours = round(seconds / 60), int(seconds // 3600)
        words = f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min"
        return f", {f'{hours} h {minutes % 60} min' if minutes >= 90 else words} left"


def log_progress(label: str) -> Progress:
    """A callback that logs how much is done and how long the rest will take, unless it has just done so."""
    pace = Pace()
    pace.left(0, 1)  # it begins now

    def tell(done: int, total: int) -> None:
        if done < total and pace.is_due():
            logger.info("%s: %d of %d%s", label, done, total, pace.left(done, total))

    return tell


def logged(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """The items, with `log_progress` told of each when the next is asked for; `total`: their number."""
    tell, total = log_progress(label), len(items) if total is None else total
    for done, item in enumerate(items, start=1):
        yield item
        tell(done, total)


class LogFile(logging.FileHandler):
    """The log of a `with` block and its end, FOLDER/train_NAME_TIME.log; removed again where no run began."""

    def __init__(self, folder: str | Path, name: str, line: logging.Formatter) -> None:
        self.folder, stamp = Path(folder), datetime.now().strftime("%Y%m%d_%H%M%S")
        super().__init__(self.folder / f"train_{name}_{stamp}.log", encoding="utf-8", delay=True)
        self.setFormatter(line)

    def _open(self) -> TextIOWrapper | None:
        with suppress(OSError):  # the training itself says what is wrong with the folder
            self.folder.mkdir(parents=True, exist_ok=True)
            return super()._open()
        return None

    def _runs(self) -> set[tuple]:
        return {(file, file.stat().st_mtime_ns) for file in self.folder.glob("*/metrics.jsonl")}

    def __enter__(self) -> "LogFile":
        self.before, self.is_new = self._runs(), not self.folder.exists()
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        logging.getLogger().removeHandler(self)
        if error:
            self.add(escape(f"ended by {kind.__name__}: {explanation(error) or error}"))
        with suppress(OSError):
            self.close()
            if error and self._runs() == self.before:
                Path(self.baseFilename).unlink(missing_ok=True)
                if self.is_new:
                    self.folder.rmdir()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the training reports a full disk)
        """Lets a line go that cannot be written."""

    def add(self, *lines: object) -> None:
        """Adds lines or tables as a terminal shows them, if there is a file."""
        if self.stream:
            with suppress(OSError):
                Console(file=self.stream, width=100, highlight=False).print(*lines, sep="\n", soft_wrap=True)


@contextmanager
def bar(console: Console, label: str) -> Iterator[Progress]:
    """A callback that moves a progress bar, or logs where the console is no terminal."""
    from rich import progress

    if not console.is_terminal:
        yield log_progress(label)
        return
    with progress.Progress(console=console) as shown:
        task = shown.add_task(label, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
