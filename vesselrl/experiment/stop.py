"""Ends by a signal (Ctrl-C, kill, a closed terminal): nothing is left half done, and no traceback shown."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vesselrl.errors import Stopped

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_depth = 0  # of `finish_first`
_first: int | None = None  # the first signal
_is_waiting = False  # for the end of `finish_first`
logger = logging.getLogger(__name__)


@contextmanager
def stops_on_signals() -> Iterator[None]:
    """Runs a command: the first signal ends it by `Stopped` with exit code 128 + n, the next one at once.

    A thread that cannot write says nothing: the error is raised again where its work is asked for.
    """
    hooks = sys.unraisablehook, threading.excepthook
    # One that is ignored stays so: that is what nohup and shells do with jobs in the background.
    taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _on_signal) for number in taken}
    sys.unraisablehook = lambda one: _stop_again() if one.exc_type is Stopped else hooks[0](one)
    threading.excepthook = lambda one: None if issubclass(one.exc_type, OSError) else hooks[1](one)
    try:
        yield
    except Stopped as stop:  # the handlers stay, for a signal while the process ends
        name, notes = signal.Signals(stop.exit_code - 128).name, getattr(stop, "__notes__", ())
        logger.warning("stopped by %s. %s", name, " ".join(notes) or "No file is half written.")
        sys.exit(stop.exit_code)
    finally:
        sys.unraisablehook, threading.excepthook = hooks
        if _first is None:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def finish_first() -> Iterator[None]:
    """What is inside is done before a signal stops the process: in one piece, or not at all."""
    global _depth, _is_waiting
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if _is_waiting and _depth == 0:
        _is_waiting = False
        raise Stopped(_first)


def waiting() -> int | None:
    """The signal that waits for the end of `finish_first`, if there is one."""
    return _first if _is_waiting else None


def _on_signal(number: int, frame: Any) -> None:
    global _first, _is_waiting
    if _first is not None:
        os._exit(128 + number)
    _first = number
    if _depth == 0:
        raise Stopped(number)
    _is_waiting = True
    # Not by the logger, which may be in the middle of a line.
    os.write(sys.__stderr__.fileno(), b"Stopping after this step; a second signal stops at once.\n")


def _stop_again() -> None:
    """Where the signal came in a place that no error leaves, such as `__del__`, it comes once more."""
    global _first
    number, _first = _first, None
    signal.raise_signal(number)
