"""What a user can cause in this room; the `trivit` command prints the message as one line and exits with its code."""

import signal


class RunError(ValueError):
    """What the user gave cannot work; the message is one line that says what is wrong and what to do."""

    exit_code = 2


class NonFiniteError(RunError):
    """The loss or a gradient became NaN or infinite; the message names the step and where the state was saved."""

    exit_code = 1


class Interrupted(RunError):
    """A signal stopped the run after a checkpoint; 130 for Ctrl-C, 99 ("please requeue") for what a scheduler sends."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 130 if signum == signal.SIGINT else 99
