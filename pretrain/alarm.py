"""What one rank of a run calls out and all others hear, even while their main threads wait inside a collective.

It goes over the store at which the ranks met, by a connection of its own: the process group's is locked as long as
somebody waits at it.
"""

import threading
from datetime import timedelta

import torch.distributed as dist

PAUSE = 1.0
"""Seconds between two looks into the store."""
_KEY = "trivit/alarm"
_ANSWER = timedelta(seconds=60)  # of a store whose process does not run


class Alarm:
    """Set off by `ring` on one rank, it is `heard` on the others some seconds later, with what was said."""

    def __init__(self) -> None:
        self.heard = threading.Event()
        self.said = ""
        self._own = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="alarm", daemon=True)

    def listen(self) -> None:
        """Begin; the ranks have met."""
        self._thread.start()

    def ring(self, text: str) -> None:
        """Call it out; does not wait until it has been heard, nor even sent."""
        self._own = text

    def rest(self) -> None:
        """Nobody needs to be heard any more. Python must not end while the thread is inside torch: that aborts it."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(2 * PAUSE)

    def _serve(self) -> None:
        try:
            store = dist.distributed_c10d._get_default_store().clone()
            store.set_timeout(_ANSWER)
            while not self._over.wait(PAUSE):
                if self._own:
                    store.set(_KEY, self._own)
                    return
                if store.check([_KEY]):
                    self.said = store.get(_KEY).decode()
                    self.heard.set()
                    return
        except (RuntimeError, ValueError):  # the process with the store is gone; now each rank has its own clock only
            return
