"""The errors that input, machine or settings can cause; the command line prints them in one line.

`exit_code` is that of the command: 1 failed at work, 2 refused before the work began, 128 + n stopped by
signal n. Without one of its own a ValueError, such as that of a setting, has 2 and any other error 1.
"""


class DataError(ValueError):
    """A fault in the data, with its `code`, a word of `vesselrl.data.records.CODES`.

    Messages name an image by its pseudonym or its place in a list, because file names carry patient names.
    """

    def __init__(self, message: str, code: str = "unusable"):
        super().__init__(message)
        self.code = code


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message names the file and what to do."""


class RewardError(ValueError):
    """A custom reward function failed, or returned something that is not a finite number."""

    exit_code = 1


class CompareError(ValueError):
    """The runs cannot be compared; the message says which and why."""


class RunError(RuntimeError):
    """A run folder cannot be made, read or written; the message names it and what to do."""


class PeerOutOfMemoryError(RuntimeError):
    """Another process of this training is out of memory: no process can finish the step."""


class RefusedError(RunError):
    """A run that cannot be begun or gone on with, or is in use; refused before anything was touched."""

    exit_code = 2


class WriteError(RunError, OSError):
    """A file that cannot be written, named in the message, and in a few words the `reason`."""

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason


class LearningError(RunError):
    """The run is not learning; the message says what was found and what to change."""


class NotFiniteError(LearningError):
    """A loss, a gradient or a prediction is nan or infinite; no weight was changed by it."""


class Stopped(BaseException):
    """A signal; no `except Exception` on the way out may take it for a fault."""

    def __init__(self, number: int):
        super().__init__(number)
        self.exit_code = 128 + number


EXPECTED = (ValueError, OSError, ModuleNotFoundError, RunError)
OUT_OF_MEMORY = (
    "The GPU's memory does not suffice. Give --use_bf16; in training also --batch_size 1, fewer "
    "--num_samples or a smaller --lora_scope."
)


def explanation(error: BaseException) -> str:
    """One line about what a user can mend; empty for a fault of ours."""
    out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
    if not (out_of_memory or isinstance(error, EXPECTED)):
        return ""
    text = f"{OUT_OF_MEMORY} {error}" if out_of_memory else str(error)
    if isinstance(error, OSError) and error.filename:  # it may be that of a patient
        text = f"A file cannot be used ({error.strerror}); VESSELRL_TRACEBACK=1 shows which."
    return " ".join(" ".join([text, *getattr(error, "__notes__", ())]).split())
