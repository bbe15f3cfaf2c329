"""Shards from whatever the user has: tars where they lie, here or behind a URL; other images packed once."""

import contextlib
import hashlib
import os
import re
from pathlib import Path

from datamodules.class_labels import CLASSES
from datamodules.console import tell
from datamodules.errors import DataError
from datamodules.manifest import MANIFEST, UNFINISHED, Manifest, skipped_images
from datamodules.pack import pack
from datamodules.remote import is_remote
from datamodules.remote_set import expand, open_remote, short_names
from datamodules.sidecars import cache_home, cannot_write, locked, write_aside
from datamodules.sources import list_source
from datamodules.tar_index import INDEX_SUFFIX, cannot_read


def open_shards(path: str | os.PathLike[str]) -> Path:
    """The folder of shards to read: `path` itself when it holds tars, else one in the cache.

    A remote set (http, https, s3 or gs) is a folder in the cache whose tars come when they are needed; tars in brace
    notation are a folder of links. A plain folder of images or a tar of images is packed once, under `$TRIVIT_CACHE` or
    `~/.cache/trivit`, for as long as its files stay the same; processes that ask at the same time wait for the one that
    packs.

    Raises:
        DataError: when nothing is at `path`, it holds no image, is itself a shard, or the cache cannot be written; for
            URLs as `remote_set.open_remote`.
    """
    if (folder := named_tars(path)) is not None:
        return folder
    path = Path(path).expanduser()
    try:
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    except OSError as error:
        raise DataError(cannot_read(path, error)) from error
    if MANIFEST in names or UNFINISHED in names or any(name.endswith(".tar") for name in names):
        return path
    source = list_source(path)
    if path.is_file() and source.ignored[".cls"] + sum(map(bool, source.texts)) >= len(source.images) // 2 > 0:
        raise DataError(f"{path} is a shard already: give the folder that it is in")
    about = path.stat()
    identity = f"{path.resolve()} {source.digest()} {about.st_mtime_ns if path.is_file() else 0}"
    name = re.sub(r"[^\w-]+", "_", path.resolve().name.removesuffix(".tar"))[:40]
    packed = cache_home() / "packed" / f"{name}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]}"
    try:
        packed.parent.mkdir(parents=True, exist_ok=True)
        with locked(packed.with_name(f"{packed.name}.lock"), wait=True):
            if (packed / MANIFEST).is_file() and not (packed / UNFINISHED).exists():
                count = len(source.images) + len(source.skipped) - len(skipped_images(packed))
                tell(f"{path}: {count} images, packed before in {packed}")
            else:
                tell(f"{path}: packing {len(source.images)} images, once, into {packed} (TRIVIT_CACHE moves it)")
                pack(path, packed)
    except OSError as error:
        raise DataError(cannot_write(packed, error)) from error
    return packed


def named_tars(path: str | os.PathLike[str]) -> Path | None:
    """The folder in the cache for a URL or for tars in brace notation; None for any other path. DataError as above."""
    if is_remote(path):
        return open_remote(str(path))
    pattern = os.path.expanduser(path)  # noqa: PTH111 - Path would drop what makes a pattern
    return _linked(pattern) if "{" in pattern and not os.path.lexists(pattern) else None


def _linked(pattern: str) -> Path:
    """A folder of links to the tars that a pattern names, and to their indexes."""
    tars = [Path(tar).resolve() for tar in expand(pattern)]
    if gone := [tar for tar in tars if not tar.is_file()]:
        raise DataError(f"{gone[0]} does not exist: {len(gone)} of the {len(tars)} tars that {pattern} names")
    folder = cache_home() / "named" / hashlib.sha256("\n".join(map(str, tars)).encode()).hexdigest()[:24]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tar in zip(short_names([str(tar) for tar in tars]), tars, strict=True):
            _link(folder / name, tar)
            if (index := tar.with_name(tar.name + INDEX_SUFFIX)).is_file():
                _link(folder / f"{name}{INDEX_SUFFIX}", index)
        if not (folder / MANIFEST).is_file() and (classes := _classes(tars[0].parent)):
            write_aside(folder / CLASSES, "\n".join(classes).encode())
    except OSError as error:
        raise DataError(cannot_write(folder, error)) from error
    return folder


def _link(link: Path, target: Path) -> None:
    with contextlib.suppress(FileExistsError):
        link.symlink_to(target)


def _classes(folder: Path) -> tuple[str, ...]:
    """Names of the classes, which all tars of a folder share."""
    with contextlib.suppress(OSError):
        return tuple((folder / CLASSES).read_text("utf-8", "replace").splitlines())
    with contextlib.suppress(OSError, ValueError):
        return Manifest.from_bytes(folder, (folder / MANIFEST).read_bytes()).classes
    return ()
