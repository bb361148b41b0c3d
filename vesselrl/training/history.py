"""The first and the latest values of a run's figures, for rules that look at more than one step."""

from collections import deque
from collections.abc import Mapping

import numpy as np


class History:
    """Keeps the first and the latest `length` values of every figure.

    A step without some figure (a supervised one has no reward) leaves that figure's values as they are.

    >>> history = History(2)
    >>> for value in (1.0, 2.0, 4.0):
    ...     history.add({"train/reward": value})
    >>> history.first("train/reward").tolist(), history.recent("train/reward").tolist()
    ([1.0, 2.0], [2.0, 4.0])
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._first: dict[str, list[float]] = {}
        self._recent: dict[str, deque[float]] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        """Takes the figures of one step."""
        for key, value in figures.items():
            first = self._first.setdefault(key, [])
            if len(first) < self.length:
                first.append(value)
            self._recent.setdefault(key, deque(maxlen=self.length)).append(value)

    def names(self, prefix: str) -> list[str]:
        """Figures that begin with `prefix`, in the order in which they came."""
        return [key for key in self._recent if key.startswith(prefix)]

    def first(self, key: str) -> np.ndarray | None:
        """The first values; None before there are `length` of them."""
        values = self._first.get(key, ())
        return np.array(values) if len(values) == self.length else None

    def start(self, key: str) -> float | None:
        """The median of the first five values, those that are no number left out.

        None before there are `length` of them, or if none is a number. One value would be that of one image.
        """
        first = self.first(key)
        finite = [] if first is None else [value for value in first[:5] if np.isfinite(value)]
        return float(np.median(finite)) if finite else None

    def recent(self, key: str) -> np.ndarray | None:
        """The latest values; None before there are `length` of them."""
        values = self._recent.get(key, ())
        return np.array(values) if len(values) == self.length else None

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """All values, ready for JSON."""
        return {"first": self._first, "recent": {key: list(values) for key, values in self._recent.items()}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, list[float]]]) -> None:
        """Puts back what `state_dict` gave."""
        self._first = {key: list(values) for key, values in state["first"].items()}
        self._recent = {key: deque(values, maxlen=self.length) for key, values in state["recent"].items()}

    def forget_recent(self) -> None:
        """Drops the latest values and keeps the first: after the run has been set back."""
        self._recent.clear()
