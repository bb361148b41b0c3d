"""Things whose trained values can be taken out and put back."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Restorable(ABC):
    """A policy or a learner."""

    @abstractmethod
    def values(self) -> Any:
        """A copy of what training changes."""

    @abstractmethod
    def restore(self, values: Any) -> None:
        """Puts back what `values` gave."""

    @contextmanager
    def at(self, values: Any) -> Iterator[None]:
        """The same with other values, for the length of a `with` block."""
        now = self.values()
        self.restore(values)
        try:
            yield
        finally:
            self.restore(now)
