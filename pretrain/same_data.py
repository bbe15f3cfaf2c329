"""Ranks that would train on different data are found before training: a node may hold an older copy of it."""

import socket
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pretrain.errors import AgreedFailure
from pretrain.stop import StopRequest


class SameData(Callback):
    """Compares, where the ranks first meet, what decides which samples each of them takes, and for how long."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Collective: AgreedFailure (exit code 2) on all ranks, with the first rank that differs from rank 0."""
        state = trainer.datamodule.state_dict()  # type: ignore[attr-defined]
        mine = {**state, "max_steps": trainer.max_steps, "host": socket.gethostname()}
        first, *others = self.stop.gather(mine)
        for rank, other in enumerate(others, start=1):
            if differ := _differences(first, other):
                raise AgreedFailure(
                    f"rank {rank} on {other['host']} would not train as rank 0 on {first['host']} does: "
                    f"{'; '.join(differ)}. Give all ranks the same command and the same copy of the data",
                    2,
                )


def _differences(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What is said of each; the folder itself may differ, nodes have their own disks."""
    differ = []
    if other["manifest"] != first["manifest"]:
        data, instead = (f"{each['train']} ({each['samples']:,} images)" for each in (other, first))
        differ.append(f"it has other data, {data} instead of {instead}")
    for name in ("seed", "global_batch_size", "lanes", "window", "max_steps"):
        if other[name] != first[name]:
            room = "trainer" if name == "max_steps" else "data"
            differ.append(f"its {room}.{name} is {other[name]} instead of {first[name]}")
    return differ
