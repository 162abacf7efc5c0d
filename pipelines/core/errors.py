"""The two errors that a user is meant to read: each says what was expected, what was found, and what to do."""


class InputError(ValueError):
    """A model, a data set, a directory or a setting that cannot be used as it is."""


class VerificationError(RuntimeError):
    """An artifact is not the model it claims to be, or lost more quality than was allowed."""


def reason(error: BaseException) -> str:
    """What went wrong while a file was read, out of the "an error occurred" of `datasets`."""
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
