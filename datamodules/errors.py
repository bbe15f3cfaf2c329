"""The one exception of this room that a user can cause; the `trivit` command prints it as one line and exits with 2."""


class DataError(ValueError):
    """What the user gave cannot work; the message is one line that says what is wrong and what to do."""


class DataFailure(DataError):
    """The data may be in order, but something failed underneath: a full disk, a killed worker."""

    exit_code = 1
