"""Ranks that would not train alike are found before training: a node may hold other data, settings or code."""

import hashlib
import os
import socket
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.manifest import Manifest
from pretrain.errors import AgreedFailure
from pretrain.stop import StopRequest

LOCAL = (
    "data.train", "data.seed", "data.global_batch_size", "data.lanes", "data.window", "data.workers",
    "trainer.max_steps", "epochs", "start_timeout", "step_timeout",
)  # fmt: skip
"""Settings that may differ between nodes, or of which the data's own account tells."""


class SameData(Callback):
    """Compares, where the ranks first meet, their samples, settings, code, and the step that they go on from.

    Args:
        stop: how the ranks talk.
        settings: of this rank, by dotted key.
    """

    def __init__(self, stop: StopRequest, settings: dict[str, Any] | None = None) -> None:
        self.stop = stop
        self.settings = settings or {}
        self.resumed: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Collective: AgreedFailure (exit code 2) on all ranks, with the first rank that differs from rank 0."""
        state = trainer.datamodule.state_dict()  # type: ignore[attr-defined]
        mine = {**state, "max_steps": trainer.max_steps, "host": socket.gethostname()}
        mine["absent"], mine["sizes"] = on_disk(trainer.datamodule.manifest)  # type: ignore[attr-defined]
        mine |= {"settings": self.settings, "code": code_version(), "resumed": self.resumed}
        first, *others = self.stop.gather(mine)
        for rank, other in enumerate(others, start=1):
            if differ := _differences(first, other):
                raise AgreedFailure(
                    f"rank {rank} on {other['host']} would not train as rank 0 on {first['host']} does: "
                    f"{'; '.join(differ)}. Give all ranks the same command, code and data",
                    2,
                )


def on_disk(manifest: Manifest) -> tuple[list[str], str]:
    """Shards that a manifest lists and that are not here, and a hash of the sizes of those that are."""
    if manifest.url:
        return [], ""
    with os.scandir(manifest.root) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".tar")}
    found = [sizes.get(shard.name) for shard in manifest.shards]
    absent = [shard.name for shard, size in zip(manifest.shards, found, strict=True) if size is None]
    return absent, hashlib.sha256(repr(found).encode()).hexdigest()


def _differences(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What is said of each; the folder itself may differ, nodes have their own disks."""
    differ = []
    if other["manifest"] != first["manifest"]:
        data, instead = (f"{each['train']} ({each['samples']:,} images)" for each in (other, first))
        differ.append(f"it has other data, {data} instead of {instead}")
    elif lost := sorted({*other["absent"]} ^ {*first["absent"]}):
        lacks = "it lacks" if lost[0] in other["absent"] else "rank 0 lacks"
        differ.append(f"{lacks} {len(lost)} of the shards of {other['train']} (first: {lost[0]})")
    elif other["sizes"] != first["sizes"]:
        differ.append(
            f"its shards in {other['train']} have other sizes (trivit shards verify tells which were cut off)"
        )
    for name in ("seed", "global_batch_size", "lanes", "window", "max_steps"):
        if other[name] != first[name]:
            room = "trainer" if name == "max_steps" else "data"
            differ.append(f"its {room}.{name} is {other[name]} instead of {first[name]}")
    mine, its = first.get("settings", {}), other.get("settings", {})
    keys = [key for key in sorted(mine.keys() | its.keys()) if mine.get(key) != its.get(key) and key not in LOCAL]
    differ += [f"its {key} is {its.get(key)} instead of {mine.get(key)}" for key in keys[:3]]
    if other.get("code") != first.get("code"):
        differ.append(f"its code is {other.get('code')} instead of {first.get('code')}")
    if other.get("resumed") != first.get("resumed"):
        steps = (f"step {r['resumed']}" if r.get("resumed") else "the beginning" for r in (other, first))
        differ.append("it would go on from {} instead of {}: the run must lie where all ranks see it".format(*steps))
    return differ


@cache
def code_version() -> str:
    """Versions of trivit, torch and Lightning, and a hash of trivit's own files, which may be ahead of its version."""
    house = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for room in ("datamodules", "pretrain", "tasks"):
        for file in sorted((house / room).glob("*.py")):
            digest.update(file.read_bytes())
    others = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    return f"trivit {version('trivit')} ({digest.hexdigest()[:8]}), {others}"
