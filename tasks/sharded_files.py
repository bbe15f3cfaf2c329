"""Checkpoints of sharded models: a folder with what each rank holds, readable on any number of ranks.

    last.ckpt/shard_00000.pt ...   {name: (first row, rows)} of the sharded tensors, one file a rank
    last.ckpt/about.pt             the checkpoint as one file would have it, with a note in the place of every sharded
                                   tensor, and the size of every shard; written last: without it the folder is not whole

Each of them has the id of the save that it belongs to, so that files of two saves are never taken for one checkpoint.
(Those of earlier versions have none and are read as they are.)

All are archives of `torch.save`, with a CRC-32 of every record, and are read with `weights_only=True`. Rows stay on the
disk until they are asked for.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tasks.sharding import local, rows

ABOUT, NOTE, SAVE = "about.pt", "trivit.sharded", "trivit.save"


@dataclass(frozen=True)
class Pieces:
    """A tensor whose rows lie in several files.

    Args:
        shape, dtype: of the whole.
        parts: first row and rows of each piece, in ascending order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[tuple[int, Tensor]]

    def __getitem__(self, wanted: Any) -> Tensor:
        """The rows from `wanted.start` to `wanted.stop`, or all (...)."""
        if wanted is ...:
            wanted = slice(0, self.shape[0])
        found = [
            part[max(wanted.start - first, 0) : wanted.stop - first]
            for first, part in self.parts
            if first < wanted.stop and wanted.start < first + len(part)
        ]
        return torch.cat(found) if found else torch.empty(0, *self.shape[1:], dtype=self.dtype)


def split_off(checkpoint: Any, copy: bool = False) -> tuple[Any, dict[str, tuple[int, Tensor]]]:
    """A checkpoint with a note in the place of each sharded tensor, and this rank's rows of those by name.

    They are on the host: with `copy` never the memory of the model itself.
    """
    mine: dict[str, tuple[int, Tensor]] = {}

    def note(tensor: Any, name: str) -> Any:
        if not isinstance(tensor, DTensor):
            return tensor
        held, here = rows(tensor), local(tensor).detach().to("cpu", copy=copy)
        if held is None:
            return here
        mine[name] = (held.start, here.clone() if here.untyped_storage().nbytes() > here.nbytes else here)
        return {NOTE: name, "shape": list(tensor.shape), "dtype": tensor.dtype}

    return mapped(checkpoint, note), mine


def save_flushed(content: Any, path: Path) -> int:
    """torch.save, down to the disk; its size in bytes. OSError when there is no room."""
    file = _Telling(path)
    try:
        torch.save(content, file)  # type: ignore[arg-type]  # a file that can only be written
    except RuntimeError:
        if file.error is None:
            raise
    file.close()
    return path.stat().st_size


class _Telling:
    """A file that keeps its OSError: torch's writer would make a RuntimeError without a reason of it."""

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._file = path.open("wb")

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = self.error or error

    def close(self) -> None:
        """To the disk; raises the first OSError that there was."""
        self.flush()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self.error = self.error or error
        try:
            self._file.close()
        except OSError as error:  # what is buffered still does not fit
            self.error = self.error or error
        if self.error is not None:
            raise self.error


def shard_name(rank: int) -> str:
    """The file of a rank."""
    return f"shard_{rank:05d}.pt"


def save_shard(mine: dict[str, tuple[int, Tensor]], save: str, path: Path) -> int:
    """Writes what `split_off` gave of a rank's rows, as part of this save; bytes. OSError when there is no room."""
    return save_flushed({SAVE: save, **mine}, path)


def save_about(rest: Any, shards: dict[str, int], save: str, folder: Path) -> None:
    """Writes the rest, which makes the folder whole; `shards`: their files, and the bytes of each."""
    save_flushed({SAVE: save, "shards": shards, "checkpoint": rest}, folder / ABOUT)


def read_shard(path: Path, about: dict[str, Any]) -> dict[str, tuple[int, Tensor]]:
    """Name -> first row and rows, mapped and not yet read; ValueError when they are of another save than `about`."""
    held: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if held.pop(SAVE, None) != about.get(SAVE):
        raise ValueError(f"{path.name} is of another save than {ABOUT}")
    return held


def read_about(folder: Path) -> dict[str, Any]:
    """What lies in `about.pt`: {"checkpoint": with notes, "shards": {file: bytes}, SAVE: id}."""
    return torch.load(folder / ABOUT, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def read_sharded(folder: Path) -> dict[str, Any]:
    """The checkpoint in a folder, with Pieces in the place of sharded tensors; ValueError when it is of two saves."""
    about = read_about(folder)
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for file in sorted(about["shards"]):
        for name, (first, part) in read_shard(folder / file, about).items():
            if len(part):
                parts.setdefault(name, []).append((first, part))

    def find(value: Any, name: str) -> Any:
        if isinstance(value, dict) and NOTE in value:
            return Pieces(tuple(value["shape"]), value["dtype"], parts.get(value[NOTE], []))
        return value

    return mapped(about["checkpoint"], find)  # type: ignore[no-any-return]


def whole(checkpoint: Any) -> Any:
    """A checkpoint from `read_sharded`, or a part of it, with whole tensors."""
    return mapped(checkpoint, lambda value, _: value[...] if isinstance(value, Pieces) else value)


def mapped(tree: Any, change: Callable[[Any, str], Any], name: str = "") -> Any:
    """New dicts, lists and tuples with every value changed that `change` changes; it is told the place of each."""
    changed = change(tree, name)
    if changed is not tree:
        return changed
    if isinstance(tree, dict):
        return {key: mapped(value, change, f"{name}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(mapped(value, change, f"{name}/{i}") for i, value in enumerate(tree))
    return tree
