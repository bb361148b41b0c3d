"""Calls of the user's own reward function: with a time limit, and with failures skipped that are rare."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from vesselrl.errors import RewardError

logger = logging.getLogger(__name__)

# The user's function: seconds that a call may take, the largest number that float32 arithmetic bears, and the
# failures that are skipped: this share of all calls, or the first few.
CALL_LIMIT_S = 60.0
MAX_CUSTOM_SCORE = 1e30
MAX_FAILED_SHARE, MIN_FAILURES = 0.05, 5

CustomReward = Callable[[np.ndarray, np.ndarray], float]  # of two bool masks (H, W)


class CustomCalls:
    """Counts the calls of the user's function and those that failed, in several threads."""

    def __init__(self, name: str) -> None:
        self.name, self.num_calls, self.num_failed = name, 0, 0
        self.hangs = False
        self.lock = threading.Lock()

    def to_json(self) -> dict[str, int]:
        """The numbers of all calls and of those that failed."""
        return {"custom_calls": self.num_calls, "custom_failures": self.num_failed}

    def run(self, function: CustomReward, *masks: np.ndarray) -> Any:
        """Calls the function in a thread of its own, which is left behind where it hangs."""
        outcome: list[tuple[Any, BaseException | None]] = []

        def call() -> None:
            try:
                outcome.append((function(*masks), None))
            except BaseException as error:  # the user's code can raise anything, and call sys.exit
                outcome.append((None, error))

        with self.lock:
            self.num_calls += 1
        if not self.hangs:  # else other images need not wait as long
            thread = threading.Thread(target=call, daemon=True)
            thread.start()
            thread.join(CALL_LIMIT_S)
        if not outcome:
            self.hangs = True
            raise RewardError(
                f"custom reward {self.name} has not returned within {CALL_LIMIT_S:g} s. Make it faster, or "
                "look for a loop without an end."
            )
        value, error = outcome[0]
        if error is not None:
            problem = f"{type(error).__name__}: {error}"
            raise RewardError(
                f"custom reward {self.name} failed with {problem}. Fix the function."
            ) from error
        return value

    def skip(self, error: RewardError) -> None:
        """Counts and logs a failure; raises it where the function hangs or has failed too often."""
        with self.lock:
            self.num_failed += 1
            failed, calls = self.num_failed, self.num_calls
        if self.hangs:
            raise error
        counted = f"{failed} of {calls} calls so far"
        if failed > MIN_FAILURES and failed > MAX_FAILED_SHARE * calls:
            limit = f"more than {MAX_FAILED_SHARE:.0%} of the calls"
            raise RewardError(f"{error} This was one of {counted}, {limit}.") from error
        if failed & (failed - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
            logger.warning("%s The image is left without this term (%s).", error, counted)
