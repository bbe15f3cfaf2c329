"""Shards from whatever the user has: a folder of tars as it is, other images packed once into the cache."""

import hashlib
import os
import re
from pathlib import Path

from datamodules.console import tell
from datamodules.errors import DataError
from datamodules.manifest import MANIFEST, UNFINISHED
from datamodules.pack import pack
from datamodules.sidecars import cache_home, cannot_write, locked
from datamodules.sources import list_source
from datamodules.tar_index import cannot_read


def open_shards(path: str | os.PathLike[str]) -> Path:
    """The folder of shards to read: `path` itself when it holds tars, else the cache with its images packed.

    A plain folder of images or a tar of images is packed once, under `$TRIVIT_CACHE` or `~/.cache/trivit`, for as long
    as its files stay the same; processes that ask at the same time wait for the one that packs.

    Raises:
        DataError: when nothing is at `path`, it holds no image, is itself a shard, or the cache cannot be written.
    """
    path = Path(path).expanduser()
    try:
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    except OSError as error:
        raise DataError(cannot_read(path, error)) from error
    if MANIFEST in names or UNFINISHED in names or any(name.endswith(".tar") for name in names):
        return path
    source = list_source(path)
    if path.is_file() and source.ignored[".cls"] + source.ignored[".txt"] >= len(source.images) // 2 > 0:
        raise DataError(f"{path} is a shard already: give the folder that it is in")
    about = path.stat()
    identity = f"{path.resolve()} {source.digest()} {about.st_mtime_ns if path.is_file() else 0}"
    name = re.sub(r"[^\w-]+", "_", path.resolve().name.removesuffix(".tar"))[:40]
    packed = cache_home() / "packed" / f"{name}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]}"
    try:
        packed.parent.mkdir(parents=True, exist_ok=True)
        with locked(packed.with_name(f"{packed.name}.lock"), wait=True):
            if (packed / MANIFEST).is_file() and not (packed / UNFINISHED).exists():
                tell(f"{path}: {len(source.images)} images, packed before in {packed}")
            else:
                tell(f"{path}: packing {len(source.images)} images, once, into {packed} (TRIVIT_CACHE moves it)")
                pack(path, packed)
    except OSError as error:
        raise DataError(cannot_write(packed, error)) from error
    return packed
