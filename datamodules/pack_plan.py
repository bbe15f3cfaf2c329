"""What goes into which shard under which key; the same plan for the same images on every machine."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from datamodules.shard_writer import shard_name
from datamodules.sources import Image, Source

PREFIX = "shard"
_SEED = 0
_LONGEST_KEY = 80


class Entry(NamedTuple):
    """One image on its way into a shard; label -1: unlabelled; `texts`: files beside it that go with it."""

    key: str
    image: Image
    label: int
    captions: list[str]
    texts: tuple[Image, ...] = ()


class Job(NamedTuple):
    """One shard to be written to `path`; number `number` of this pack, counted from 0."""

    number: int
    path: Path
    source: Path
    resize: int | None
    quality: int
    entries: list[Entry]


class Settings(NamedTuple):
    """How images become shards."""

    resize: int | None
    quality: int
    samples_per_shard: int


def make_entries(source: Source, captions: list[list[str]]) -> list[Entry]:
    """The images of a source, for a set of their own."""
    texts = source.texts or [()] * len(source.images)
    return list(map(Entry, safe_keys(source), source.images, source.labels(), captions, texts))


def plan(root: Path, entries: Iterable[Entry], dst: Path, settings: Settings, first_shard: int = 0) -> list[Job]:
    """Shuffle entries, whose files lie in `root`, and deal them out to shards with numbers from `first_shard` on."""
    shuffled = sorted(entries, key=_shuffled)
    size = settings.samples_per_shard
    parts = [shuffled[first : first + size] for first in range(0, len(shuffled), size)]
    return [
        Job(number, dst / shard_name(PREFIX, first_shard + number), root, settings.resize, settings.quality, part)
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
            key = with_hash(key, image.name)
        unique, number = key, 1
        while unique in used:
            number += 1
            unique = f"{key}-{number}"
        used.add(unique)
        keys.append(unique)
    return keys


def with_hash(key: str, text: str) -> str:
    """A key made unique by a hash of `text`, and not too long."""
    head = key.encode()[: _LONGEST_KEY - 13].decode("utf-8", "ignore").rstrip("/")
    return f"{head}-{hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:12]}"


def _safe(part: str) -> str:
    """A folder or file name that is harmless on every system and in every tar; webdataset skips names like __this__."""
    clean = re.sub(r"[^\w-]", "_", unicodedata.normalize("NFC", part))
    return re.sub("^__+", "_", clean)


def _shuffled(entry: Entry) -> bytes:
    """A sort key that shuffles: by hash, so that no version of a random generator can change the order."""
    return hashlib.blake2b(f"{_SEED}/{entry.key}".encode(), digest_size=16).digest()
