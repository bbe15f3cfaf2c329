"""What a user can cause in this room; the `trivit` command prints the message as one line and exits with its code."""


class SlurmError(ValueError):
    """The job cannot be submitted; the message is one line that says what is wrong and what to do."""

    exit_code = 2
