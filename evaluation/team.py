"""Several processes, one evaluation: the first one does everything, the others help it with features.

Started by torchrun (RANK, WORLD_SIZE, MASTER_ADDR ...). The others wait for work: an encoder and
a data set, of which each takes every image of its share, and sends the features back. Nothing but features is shared,
and what the first one computes from them is what it would have computed alone, up to the rounding of other batches.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from evaluation.errors import EvaluationError

_CHUNK_BYTES = 64 << 20
_MEETING = timedelta(minutes=5)
_PATIENCE = timedelta(days=7)  # the others wait while the first one fits its probes


@dataclass(frozen=True)
class Team:
    """This process is number `rank` of `size`."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def hand_out(self, job: dict[str, Any] | None) -> dict[str, Any] | None:
        """Collective: what the first process gives, on all of them; None sends the others home."""
        box = [job]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def agree(self, failure: str | None) -> None:
        """Collective: EvaluationError on all processes when one of them failed."""
        told: list[str | None] = [None] * self.size
        dist.all_gather_object(told, failure, group=self.group)
        if first := next((each for each in told if each), None):
            raise EvaluationError(first)

    def send(self, file: Path, about: Any) -> None:
        """Give a file and something picklable to the first process."""
        dist.send_object_list([about, file.stat().st_size], dst=0, group=self.group)
        with file.open("rb") as source:
            while data := source.read(_CHUNK_BYTES):
                dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), dst=0, group=self.group)

    def receive(self, rank: int, write: Callable[[memoryview], Any]) -> Any:
        """Take what that process sends; the file goes to `write` piece by piece."""
        box: list[Any] = [None, None]
        dist.recv_object_list(box, src=rank, group=self.group)
        about, left = box
        while left:
            data = torch.empty(min(left, _CHUNK_BYTES), dtype=torch.uint8)
            dist.recv(data, src=rank, group=self.group)
            write(data.numpy().data)
            left -= len(data)
        return about


@contextmanager
def gather_team() -> Iterator[Team]:
    """The processes that were started together; alone where there is no launcher. The first one sends them home."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size <= 1 or dist.is_initialized() or "MASTER_ADDR" not in os.environ:
        yield Team()
        return
    try:
        dist.init_process_group("gloo", timeout=_MEETING)
    except (dist.DistError, RuntimeError) as error:
        minutes = int(_MEETING.total_seconds() // 60)
        raise EvaluationError(
            f"the {size} processes of this evaluation have not met within {minutes} minutes"
        ) from error
    if torch.cuda.is_available():  # "cuda" is the same word on all of them
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    team = Team(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=_PATIENCE))
    try:
        yield team
    finally:
        try:
            if team.rank == 0:
                team.hand_out(None)
        finally:
            dist.destroy_process_group()
