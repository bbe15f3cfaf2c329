"""Ends a rank that waits for others in vain: ranks that never meet, a step that never ends, a first rank that is gone.

A process that waits inside a collective cannot see this itself, so a thread of its own looks at the clock. Every rank
has one. The first to find that a step does not end tells the others, and each prints where it is before any of them
ends: launchers (torchrun, Lightning, SLURM) end all ranks as soon as one is gone.
"""

import contextlib
import faulthandler
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from traceback import StackSummary, walk_stack
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed

from pretrain.alarm import Alarm

GRACE = 5.0
"""Seconds from what a rank says to its end: the others hear of it within two or three."""
_LOOK = 1.0


class Watchdog(Callback):
    """Watches a run of several ranks, from `watch` to its end.

    Args:
        start: seconds in which the ranks must have met; then, behind the look for a checkpoint, have begun to train.
        step: seconds that a micro-batch, and whatever comes between two of them (a checkpoint, say), may take.
    """

    def __init__(self, start: float, step: float) -> None:
        self.start, self.step = start, step
        self._rank = "this rank"
        self._begun = self._looks = False
        self._launcher: int | None = None
        self._beat = time.monotonic()
        self._over = threading.Event()
        self._alarm = Alarm()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    @property
    def outlasted_by(self) -> timedelta:
        """How long collectives have to wait at least: if they gave up by themselves, no stack would be printed."""
        return timedelta(seconds=max(self.start, self.step) + 600)

    def watch(self, rank: int, world_size: int, launcher: int | None = None) -> None:
        """Begin; a run of one rank waits for nobody. `launcher`: the process without which this one is to end."""
        if world_size > 1:
            self._launcher = launcher
            self._rank = f"rank {rank} of {world_size} on {platform.node()}"
            self._beat = time.monotonic()
            self._thread.start()

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """A checkpoint is read for its checksums, for as long as a step may take; then the start has its time anew."""
        self._beat, self._looks = time.monotonic(), True
        try:
            yield
        finally:
            self._beat, self._looks = time.monotonic(), False

    def rest(self) -> None:
        """The run is over, however it ended."""
        self._over.set()
        self._alarm.rest()
        if self._thread.is_alive():
            self._thread.join(_LOOK)  # or it would end this process some time later, see below

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The ranks have met."""
        self._begun, self._beat = True, time.monotonic()
        if self._thread.is_alive():
            self._alarm.listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Still alive."""
        self._beat = time.monotonic()

    def _look(self) -> None:
        while not self._over.is_set():
            if self._launcher not in (None, os.getppid()):
                print(f"\ntrivit: {self._rank}: the process that started this one is gone", file=sys.stderr, flush=True)
                os._exit(1)
            limit = self.step if self._begun or self._looks else self.start
            left = limit - (time.monotonic() - self._beat)
            if left < 0:
                self._end(limit)
            elif self._alarm.heard.is_set():
                self._say(f"{self._alarm.said} waits in vain; this is where this rank is:", stacks=True)
                self._leave()
            # Should the main thread never let go of the interpreter, this thread would not get here again.
            faulthandler.dump_traceback_later(max(left, 0) + 2 * _LOOK + GRACE, exit=True, file=2)
            self._over.wait(_LOOK)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, limit: float) -> None:
        where = f"{os.environ.get('MASTER_ADDR', 'an unknown address')}:{os.environ.get('MASTER_PORT', '?')}"
        late = f"training has not begun within {limit:g} s (--start_timeout)"
        if self._begun:
            self._alarm.ring(self._rank)
            text = (
                f"no micro-batch has ended for {limit:g} s (--step_timeout): another rank is gone or stuck. The same "
                "command goes on from the last checkpoint; this is where this rank waits:"
            )
        elif self._looks:
            text = f"no checkpoint has been read within {limit:g} s (--step_timeout); this is where this rank is:"
        elif distributed.is_initialized():
            text = f"{late}, though the ranks have met at {where}; this is where this rank is:"
        else:
            text = (
                f"{late}: the ranks have not all met at {where}. "
                "See what the other ranks say, and whether this node can reach that address"
            )
        self._say(text, stacks=self._begun or self._looks or distributed.is_initialized())
        self._leave()

    def _say(self, text: str, stacks: bool) -> None:
        """In one piece, and each line with its rank, since all ranks may write to the same place at once."""
        name = " ".join(self._rank.split()[:2])
        told = [f"\ntrivit: {self._rank}: {text}", *(f"{name} | {line}" for line in _stacks() if stacks)]
        print("\n".join(told), file=sys.stderr, flush=True)  # below the bar

    def _leave(self) -> None:
        time.sleep(GRACE)
        os._exit(1)  # the main thread is inside a collective and hears nothing


def _stacks() -> list[str]:
    """Where every thread of this process is, the main one first, its newest call first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    lines = []
    for ident, frame in frames:
        if ident != threading.get_ident():
            lines.append(f"thread {names.get(ident, ident)}, most recent call first:")
            calls = StackSummary.extract(walk_stack(frame), lookup_lines=False)  # reading the source may get stuck, too
            lines += [f'  File "{call.filename}", line {call.lineno}, in {call.name}' for call in calls]
    return lines


def launcher_of(trainer: Trainer) -> int | None:
    """The first rank of this node, where Lightning started this one from it: nobody else would end it."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return os.getppid() if isinstance(environment, LightningEnvironment) and environment.local_rank() > 0 else None
