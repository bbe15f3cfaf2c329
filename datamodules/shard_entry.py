"""The manifest's entry for one tar, and what has become of that tar since the entry was made."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from datamodules.errors import DataError, DataFailure
from datamodules.tar_index import ROWS, ShardIndex, open_tar, read_index

CUT, DAMAGED, MISSING, UNREADABLE = "were cut off", "are damaged", "are missing", "cannot be read"
_OF_DAMAGE = frozenset({"corrupt header", "truncated", "no end marker", "data after the end", "empty file"})


@dataclass(frozen=True)
class Shard:
    """One tar of a set: file name, number of samples, bytes, digest of its index, number of findings in it."""

    name: str
    samples: int
    bytes: int
    digest: str
    findings: int = 0


def describe_shard(index: ShardIndex) -> Shard:
    """The manifest's entry for one indexed tar."""
    digest = hashlib.sha256(json.dumps(index.extensions).encode())
    for name in ROWS:
        digest.update(index.arrays[name].tobytes())
    return Shard(Path(index.path).name, len(index), index.tar_bytes, digest.hexdigest()[:32], len(index.findings))


def entry_now(path: Path, listed: Shard) -> tuple[Shard | None, str]:
    """The entry for a tar that has changed since `listed` was made, and what has become of it, empty when it is whole.

    What was lost stays in the count. The entry is the same as before where the index of before tells which samples
    those are. Without that index their numbers have shifted: another digest, and the last ones are missed instead.
    None when the tar was replaced by another one.
    """
    try:
        os.close(open_tar(os.fspath(path)))
        index = read_index(path)
    except (DataError, OSError) as error:
        if isinstance(error, DataFailure):
            raise
        return listed, UNREADABLE
    now = describe_shard(index)
    cut = CUT if now.bytes < listed.bytes else ""
    if now.digest == listed.digest:
        return listed, cut or (DAMAGED if index.lost else "")
    damaged = any(finding.kind in _OF_DAMAGE for finding in index.findings)
    if damaged and now.samples < listed.samples and now.bytes <= listed.bytes:
        return replace(now, samples=listed.samples), cut or DAMAGED
    return None, ""


def what_changed(listed: Sequence[Shard], kept: Mapping[str, Shard], tars: Set[str]) -> str:
    """In words, how many shards are no longer as `listed`, and the first of each kind.

    Args:
        listed: the entries of before.
        kept: name -> entry of those that keep their place.
        tars: names of those that are there.
    """
    former = {shard.name: shard for shard in listed}
    changes = {
        "new": tars - set(former),
        "replaced": (set(former) & tars) - set(kept),
        "dropped": set(former) - tars - set(kept),
        "damaged": {name for name, shard in kept.items() if shard != former[name]},
    }
    return ", ".join(f"{len(names)} {what}, {min(names)}" for what, names in changes.items() if names)
