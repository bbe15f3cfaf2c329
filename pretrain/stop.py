"""Stop requests and failures: remembered when they come, acted upon where all ranks agree on them.

Saving inside a signal handler is not safe (the handler may run in the middle of an optimiser step, or of another save),
so a handler only remembers the signal. Ranks are signalled at different moments, and one rank alone may fail (its disk
is full, its worker was killed): if it left at once, the others would wait for it in a collective. `agree` is collective
and makes all of them stop at the same place.
"""

import platform
import signal
import threading
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import distributed

from pretrain.errors import AgreedFailure

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the first signal; a second Ctrl-C ends the process at once, for a user who does not want to wait.

    Args:
        last: whether the process ends with the run. A scheduler may signal again while it is leaving, which would hide
            how the run ended; so what comes then is ignored.
    """

    def __init__(self, last: bool = False) -> None:
        self.last = last
        self.signum: int | None = None
        self.agreed: int | None = None
        self.timeout: timedelta | None = None  # of collectives; None: torch's own
        self._failure: Exception | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def listen(self) -> None:
        """Install the handlers; before that a signal does what it does to any program."""
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may; whoever calls us from another one stops the run by other means
        for signum in SIGNALS:
            self._before.setdefault(signum, signal.getsignal(signum))
            signal.signal(signum, self._remember)

    def silence(self) -> None:
        """Put back the handlers that were there before; if nothing comes after the run, none but that of Ctrl-C."""
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_IGN if self.last and signum != signal.SIGINT else handler)
        self._before.clear()

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def fail(self, error: Exception) -> None:
        """This rank cannot go on: the next `agree` raises the first such error on all ranks."""
        self._failure = self._failure or error

    def agree(self, bad: bool = False) -> bool:
        """Collective: the ranks learn whether any was signalled (`agreed`) or has something `bad` (returned).

        Raises:
            AgreedFailure: when a rank has failed; on a single one, the error itself.
        """
        signum, failure, self._failure = self.signum or 0, self._failure, None
        if _world_size() > 1:
            flags = torch.tensor([signum, int(bad), int(failure is not None)])
            distributed.all_reduce(flags, op=distributed.ReduceOp.MAX, group=self._over_cpu())
            signum, bad = int(flags[0]), bool(flags[1])
            if flags[2]:
                told = self.gather(failure and (platform.node(), str(failure), getattr(failure, "exit_code", 2)))
                rank, (host, text, code) = next((rank, line) for rank, line in enumerate(told) if line)
                raise AgreedFailure(text if rank == 0 else f"rank {rank} on {host}: {text}", code) from failure
        elif failure is not None:
            raise failure
        self.agreed = signum or None
        return bad

    def gather(self, value: Any) -> list[Any]:
        """Collective: one picklable value of each rank, on all of them."""
        values = [value] * _world_size()
        if len(values) > 1:
            distributed.all_gather_object(values, value, group=self._over_cpu())
        return values

    def _over_cpu(self) -> Any:
        """Collective at first: reading an answer off an accelerator would wait for its whole queue."""
        if self._group is None:
            self._group = distributed.new_group(backend="gloo", timeout=self.timeout)
        return self._group


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
