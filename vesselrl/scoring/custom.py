"""Calls of the user's own reward function: with a time limit, and with failures skipped that are rare."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from numbers import Real

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
    """Calls the user's function, and counts the calls and those that failed, in several threads."""

    def __init__(self, function: CustomReward) -> None:
        self.function, self.name = function, getattr(function, "__qualname__", repr(function))
        self.num_calls, self.num_failed, self.hangs = 0, 0, False
        self.lock = threading.Lock()

    def to_json(self) -> dict[str, int]:
        """The numbers of all calls and of those that failed."""
        return {"custom_calls": self.num_calls, "custom_failures": self.num_failed}

    def score(self, pred: np.ndarray, gt: np.ndarray) -> float:
        """Calls the function on copies, in a thread of its own, which is left behind where it hangs."""
        outcome: Future = Future()

        def call() -> None:
            try:
                outcome.set_result(self.function(pred.copy(), gt.copy()))
            except BaseException as error:  # the user's code can raise anything, and call sys.exit
                outcome.set_exception(error)

        with self.lock:
            self.num_calls += 1
        if not self.hangs:  # else other images need not wait as long
            thread = threading.Thread(target=call, daemon=True)
            thread.start()
            thread.join(CALL_LIMIT_S)
        if not outcome.done():
            self.hangs = True
            limit = f"has not returned within {CALL_LIMIT_S:g} s"
            advice = "Make it faster, or look for a loop without an end."
            raise RewardError(f"custom reward {self.name} {limit}. {advice}")
        if error := outcome.exception():
            problem = f"failed with {type(error).__name__}: {error}"
            raise RewardError(f"custom reward {self.name} {problem}. Fix the function.") from error
        value = outcome.result()
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()  # a 0-d array or tensor
        if not isinstance(value, Real) or not abs(value) <= MAX_CUSTOM_SCORE:  # nan is not
            raise RewardError(f"custom reward {self.name} must return a finite number, got {value!r:.60}.")
        return float(value)

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
