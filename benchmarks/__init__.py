"""Experiments beside the package: `python -m benchmarks.learning`, `.scoring`, `.caching`, `.memory` ..."""

import logging
import sys
from collections.abc import Callable

import tyro

from vesselrl.cli import fail
from vesselrl.experiment.stop import stops_on_signals


def run(command: Callable[..., int]) -> None:
    """Runs a benchmark with the options of the command line; exits with its code, or that of what ends it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with stops_on_signals():
        try:
            sys.exit(tyro.cli(command, prog=f"python -m benchmarks.{command.__name__}", use_underscores=True))
        except (ValueError, OSError, RuntimeError) as error:
            sys.exit(fail(error))
