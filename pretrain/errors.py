"""What a user can cause in this room; the `trivit` command prints the message as one line and exits with its code."""

import errno
import signal


class RunError(ValueError):
    """What the user gave cannot work; the message is one line that says what is wrong and what to do.

    `told_once`: all ranks raise it together with the same message, so that the first rank alone has to print it.
    """

    exit_code = 2
    told_once = False


class RunFailure(RunError):
    """What was given can work, but something failed underneath: a full disk, a killed worker, another rank."""

    exit_code = 1


class AgreedFailure(RunFailure):
    """The failure of one rank, raised on all of them with its message and exit code."""

    told_once = True

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NonFiniteError(RunFailure):
    """The loss or a gradient became NaN or infinite; the message names the step and where the state was saved."""


class Interrupted(RunError):
    """A signal stopped the run after a checkpoint; 130 for Ctrl-C, 99 ("please requeue") for what a scheduler sends."""

    told_once = True

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 130 if signum == signal.SIGINT else 99


def remedy(error: Exception) -> str:
    """What to do, in two words, about a file that could not be written."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "Make room" if full else "Mend that"
