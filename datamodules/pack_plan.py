"""What goes into which shard under which key; the same plan for the same images on every machine."""

import hashlib
import re
import unicodedata
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from datamodules.shard_writer import shard_name
from datamodules.sources import Image, Source

PREFIX = "shard"
_SEED = 0
_LONGEST_KEY = 80


class Entry(NamedTuple):
    """One image on its way into a shard; label -1: unlabelled."""

    key: str
    image: Image
    label: int
    captions: list[str]


class Job(NamedTuple):
    """One shard to be written to `path`."""

    number: int
    path: Path
    source: Path
    resize: int | None
    quality: int
    entries: list[Entry]


def plan(
    source: Source, captions: list[list[str]], dst: Path, *, resize: int | None, quality: int, samples_per_shard: int
) -> list[Job]:
    """Shuffle the images of a source and deal them out to shards."""
    rows = zip(safe_keys(source), source.images, source.labels(), captions, strict=True)
    entries = sorted((Entry(*row) for row in rows), key=_shuffled)
    parts = [entries[first : first + samples_per_shard] for first in range(0, len(entries), samples_per_shard)]
    return [
        Job(number, dst / shard_name(PREFIX, number), source.path, resize, quality, part)
        for number, part in enumerate(parts)
    ]


def default_samples_per_shard(images: int) -> int:
    """Large enough for fast reading, small enough that even a small set is shuffled over several shards."""
    return min(1000, max(50, -(-images // 16)))


def safe_keys(source: Source) -> list[str]:
    """A key for every image, after its path: only letters, digits, '-', '_' and '/', short, and each one once."""
    used: set[str] = set()
    keys = []
    for image in source.images:
        path = PurePosixPath(source.inner_name(image)).with_suffix("")
        key = "/".join(_safe(part) for part in path.parts if part not in ("..", "/"))
        if len(key.encode()) > _LONGEST_KEY:
            head = key.encode()[: _LONGEST_KEY - 13].decode("utf-8", "ignore").rstrip("/")
            key = f"{head}-{hashlib.sha256(image.name.encode()).hexdigest()[:12]}"
        unique, number = key, 1
        while unique in used:
            number += 1
            unique = f"{key}-{number}"
        used.add(unique)
        keys.append(unique)
    return keys


def _safe(part: str) -> str:
    """A folder or file name that is harmless on every system and in every tar; webdataset skips names like __this__."""
    clean = re.sub(r"[^\w-]", "_", unicodedata.normalize("NFC", part))
    return re.sub("^__+", "_", clean)


def _shuffled(entry: Entry) -> bytes:
    """A sort key that shuffles: by hash, so that no version of a random generator can change the order."""
    return hashlib.blake2b(f"{_SEED}/{entry.key}".encode(), digest_size=16).digest()
