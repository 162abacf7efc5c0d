"""The two errors that a user is meant to read: each says what was expected, what was found, and what to do."""


class InputError(ValueError):
    """A model, a data set, a directory or a setting that cannot be used as it is."""


class VerificationError(RuntimeError):
    """An artifact is not the model it claims to be, or lost more quality than was allowed."""
