"""Ends a rank that waits for others in vain: ranks that never meet, a step that never ends, a first rank that is gone.

A process that waits inside a collective cannot see this itself, so a thread of its own looks at the clock. Every rank
has one, and all that wait say where they are.
"""

import faulthandler
import os
import platform
import sys
import threading
import time
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer


class Watchdog(Callback):
    """Watches a run of several ranks, from `watch` to its end.

    Args:
        start: seconds in which training must have begun on all ranks.
        step: seconds that a micro-batch, and whatever comes between two of them (a checkpoint, say), may take.
    """

    def __init__(self, start: float, step: float) -> None:
        self.start, self.step = start, step
        self._rank = "this rank"
        self._begun = False
        self._launcher: int | None = None
        self._beat = time.monotonic()
        self._over = threading.Event()

    def watch(self, rank: int, world_size: int, launcher: int | None = None) -> None:
        """Begin; a run of one rank waits for nobody. `launcher`: the process without which this one is to end."""
        if world_size > 1:
            self._launcher = launcher
            self._rank = f"rank {rank} of {world_size} on {platform.node()}"
            self._beat = time.monotonic()
            threading.Thread(target=self._look, name="watchdog", daemon=True).start()

    def rest(self) -> None:
        """The run is over, however it ended."""
        self._over.set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The ranks have met."""
        self._begun, self._beat = True, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Still alive."""
        self._beat = time.monotonic()

    def _look(self) -> None:
        while not self._over.wait(1.0):
            if self._launcher not in (None, os.getppid()):
                print(f"\ntrivit: {self._rank}: the process that started this one is gone", file=sys.stderr, flush=True)
                os._exit(1)
            limit = self.step if self._begun else self.start
            if time.monotonic() - self._beat > limit:
                self._end(limit)

    def _end(self, limit: float) -> None:
        if self._begun:
            text = (
                f"no micro-batch has ended for {limit:g} s (--step_timeout): another rank is gone or stuck. The same "
                "command goes on from the last checkpoint; this is where this rank waits:"
            )
        else:
            where = f"{os.environ.get('MASTER_ADDR', 'an unknown address')}:{os.environ.get('MASTER_PORT', '?')}"
            text = (
                f"training has not begun within {limit:g} s (--start_timeout): the ranks have not all met at {where}. "
                "See what the other ranks say, and whether this node can reach that address"
            )
        print(f"\ntrivit: {self._rank}: {text}", file=sys.stderr, flush=True)  # below the bar
        if self._begun:
            faulthandler.dump_traceback(file=sys.stderr)
        os._exit(1)  # the main thread is inside a collective and hears nothing


def launcher_of(trainer: Trainer) -> int | None:
    """The first rank of this node, where Lightning started this one from it: nobody else would end it."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return os.getppid() if isinstance(environment, LightningEnvironment) and environment.local_rank() > 0 else None
