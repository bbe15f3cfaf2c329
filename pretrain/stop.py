"""Stop requests: signal handlers that only set a flag, and the step at which all ranks agree on it.

Saving inside a handler is not safe (the handler may run in the middle of an optimiser step, or of another save), so a
handler only remembers the signal. Ranks are signalled at different moments; `agree` is collective and makes them stop
after the same optimiser step.
"""

import signal
from types import FrameType

import torch
from torch import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the first signal; a second Ctrl-C ends the process at once, for a user who does not want to wait."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.agreed: int | None = None

    def listen(self, *signals: signal.Signals) -> None:
        """Install the handlers for `signals` (again: Lightning replaces some when training starts)."""
        for signum in signals or SIGNALS:
            signal.signal(signum, self._remember)

    def silence(self) -> None:
        """Put Python's own handlers back."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for signum in SIGNALS[1:]:
            signal.signal(signum, signal.SIG_DFL)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def agree(self, bad: bool, device: torch.device) -> bool:
        """Collective: the ranks learn whether any was signalled (`agreed`) or has something `bad` (returned)."""
        signum = self.signum or 0
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            flags = torch.tensor([signum, int(bad)], device=device)
            distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
            signum, bad = int(flags[0]), bool(flags[1])
        self.agreed = signum or None
        return bad
