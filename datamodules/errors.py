"""What a user can cause in this room; the `trivit` command prints the message as one line and exits with its code."""


class DataError(ValueError):
    """What the user gave cannot work; the message is one line that says what is wrong and what to do."""


class DataFailure(DataError):
    """The data may be in order, but something failed underneath: a full disk, a killed worker."""

    exit_code = 1
