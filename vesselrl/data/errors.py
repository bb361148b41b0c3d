"""The one error that a person's data can cause."""


class DataError(ValueError):
    """A fault in the data: one line that says what is wrong, what was found and what to do.

    Messages name an image by its pseudonym or its place in a list, because file names carry patient names.

    Attributes:
        code: the kind of fault, one word of `vesselrl.data.findings.CODES`.
    """

    def __init__(self, message: str, code: str = "unusable"):
        super().__init__(message)
        self.code = code
