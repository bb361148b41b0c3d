"""Whether the compiled kernels can be used; decided once per process and logged."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

logger = logging.getLogger(__name__)


@functools.cache
def compiled_kernels() -> ModuleType | None:
    """The module `kernels`, or None where numba cannot be imported."""
    try:
        from vesselrl.scoring import kernels
    except ImportError as error:
        logger.warning("numba cannot be imported (%s): topology uses the slower plain backend.", error)
        return None
    return kernels
