"""Experiments beside the package: `python -m benchmarks.learning`, `.scoring`, `.caching`, `.pretrain`."""

import logging
import sys
from collections.abc import Callable

import tyro


def run(command: Callable[..., int]) -> None:
    """Runs a benchmark with the options of the command line and exits with its code, 1 after an error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        sys.exit(tyro.cli(command, prog=f"python -m benchmarks.{command.__name__}", use_underscores=True))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
