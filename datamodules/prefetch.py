"""Remote shards on their way before they are needed, by a few threads in every loader worker.

Workers of one node do not agree on who fetches what: each takes the next shard that nobody is fetching.
"""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import DataError
from datamodules.manifest import Manifest
from datamodules.order import Order, Window
from datamodules.remote_set import fetch
from datamodules.shard_cache import LIMIT, space

_THREADS = 2
_ROOM_SECONDS = 10.0
log = logging.getLogger("trivit")


class Prefetcher:
    """Fetches the shards that it was last asked for, in that order, in the background; what fails is left to readers.

    What does not fit into the cache, or this rank's share of it, is left to the readers too, or it would drive out what
    they read.

    Args:
        manifest: of the set.
        ranks: how many share the node's cache.
    """

    def __init__(self, manifest: Manifest, ranks: int = 1) -> None:
        self.manifest, self.ranks = manifest, ranks
        self._pid, self._room, self._room_until = 0, 0, 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "ranks": self.ranks, "_pid": 0, "_room": 0, "_room_until": 0.0}

    def want(self, shards: Sequence[int]) -> None:
        """Fetch these, instead of those of before that have not been begun."""
        ends = np.cumsum([self.manifest.shards[shard].bytes for shard in shards])
        if time.monotonic() > self._room_until:  # finding out may mean looking at every file of the cache
            self._room, self._room_until = space() // self.ranks, time.monotonic() + _ROOM_SECONDS
        fitting = shards[: int(np.searchsorted(ends, self._room, side="right"))]
        if self._pid != os.getpid():  # threads do not survive a fork, and a lock may be held for ever
            self._pid, self._wanted, self._news = os.getpid(), deque[Path](), threading.Condition()
            for _ in range(_THREADS):
                threading.Thread(target=self._work, daemon=True).start()
        with self._news:
            self._wanted.clear()
            self._wanted.extend(map(self.manifest.path, fitting))
            self._news.notify_all()

    def _work(self) -> None:
        while True:
            with self._news:
                while not self._wanted:
                    self._news.wait()
                tar = self._wanted.popleft()
            with contextlib.suppress(DataError):
                fetch(tar, wait=False)


class TrainAhead:
    """Called with each step that a rank loads: has the shards of its windows fetched, and of the windows after them.

    Args:
        order, manifest: of the run.
        start, stop: the places of every global batch that are this rank's.
        ranks: how many share the node's cache.
        last_step: the run's last one, if known; nothing is fetched for epochs that will not come.
    """

    def __init__(
        self, order: Order, manifest: Manifest, *, start: int, stop: int, ranks: int = 1, last_step: int | None = None
    ) -> None:
        self.order, self.start, self.stop = order, start, stop
        self.last_epoch = None if last_step is None else last_step // order.steps_per_epoch
        self._prefetcher, self._windows = Prefetcher(manifest, ranks), list[Window]()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_windows": []}

    def __call__(self, step: int) -> None:
        """Ask for what step `step` and the steps after it need; quick unless a lane has come to its next window."""
        windows = self.order.windows(step, self.start, self.stop)
        if windows != self._windows:
            self._windows = windows
            self._prefetcher.want(self.shards(windows))

    def shards(self, windows: list[Window]) -> list[int]:
        """The shards of these windows and of the next ones, in the order of need."""
        last = windows[0].epoch + 1 if self.last_epoch is None else self.last_epoch
        following = [window for window in map(self.order.following, windows) if window.epoch <= last]
        return list(dict.fromkeys(shard for window in windows + following for shard in self.order.shards_in(window)))

    def warn_of_little_space(self) -> None:
        """Tell the user when the shards that are read at once do not fit into the cache: it works, but slowly."""
        windows = self.order.windows(0, self.start, self.stop)
        shards = {shard for window in windows for shard in self.order.shards_in(window)}
        manifest, ranks = self._prefetcher.manifest, self._prefetcher.ranks
        needed, there = ranks * sum(manifest.shards[shard].bytes for shard in shards), space()
        if needed > there:
            log.warning(
                "%s: %.2f GB of shards are read at once, but the cache may hold only %.2f GB, so they will be fetched "
                "again and again: raise %s, or lower data.lanes or data.window",
                manifest.name, needed / 1e9, there / 1e9, LIMIT,
            )  # fmt: skip
