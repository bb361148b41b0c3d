"""The errors that input, machine or settings can cause; the command line prints them in one line."""


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


class CompareError(ValueError):
    """The runs cannot be compared; the message says which and why. The command ends with exit code 2."""


class RunError(RuntimeError):
    """A run folder cannot be made, read or written; the message names it and what to do."""


class RefusedError(RunError):
    """A run that cannot be gone on with, or is in use; it was refused before anything was touched."""


class LearningError(RunError):
    """The run is not learning; the message says what was found and what to change."""


class NotFiniteError(LearningError):
    """A loss, a gradient or a prediction is nan or infinite; no weight was changed by it."""
