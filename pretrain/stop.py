"""Stop requests: signal handlers that only set a flag, and the step at which all ranks agree on it.

Saving inside a handler is not safe (the handler may run in the middle of an optimiser step, or of another save), so a
handler only remembers the signal. Ranks are signalled at different moments; `agree` is collective and makes them stop
after the same optimiser step.
"""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from torch import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the first signal; a second Ctrl-C ends the process at once, for a user who does not want to wait."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.agreed: int | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def listen(self, *signals: signal.Signals) -> None:
        """Install the handlers for `signals` (again: Lightning replaces some when training starts)."""
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may; whoever calls us from another one stops the run by other means
        for signum in signals or SIGNALS:
            before = signal.signal(signum, self._remember)
            self._before.setdefault(signum, before)

    def silence(self) -> None:
        """Put back the handlers that were there before."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def agree(self, bad: bool) -> bool:
        """Collective: the ranks learn whether any was signalled (`agreed`) or has something `bad` (returned)."""
        signum = self.signum or 0
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            if self._group is None:  # over the CPU: reading an answer off an accelerator would wait for its whole queue
                self._group = distributed.new_group(backend="gloo")
            flags = torch.tensor([signum, int(bad)])
            distributed.all_reduce(flags, op=distributed.ReduceOp.MAX, group=self._group)
            signum, bad = int(flags[0]), bool(flags[1])
        self.agreed = signum or None
        return bad
