"""The cache of remote shards on this node: bounded, shared by all processes, least recently used out first.

Below `$TRIVIT_CACHE/remote` there is a folder for each set, and in it NAME.tar and NAME.tar.idx: whole, or absent.
While a shard is on its way there are also .NAME.tar.lock, held by whoever fetches it, which says how many bytes will
come, and .NAME.tar.TOKEN.partial. The system gives up the locks of a process that dies; what nobody holds is rubbish.

A shard may be evicted at any time: a reader has it open for the moment of a read, which goes well even then, and
otherwise asks for it again.
"""

import contextlib
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from datamodules.errors import DataError, DataFailure
from datamodules.sidecars import DISK_FULL, cache_home, cannot_write

LIMIT = "TRIVIT_CACHE_SIZE"
_NOBODY_WRITES_IT_AFTER = 3600.0
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class _Entry(NamedTuple):
    """A shard in the cache: when it was last used, its bytes with its index, and the tar."""

    used_ns: int
    bytes: int
    tar: Path


def remote_cache() -> Path:
    """The folder of all remote sets."""
    return cache_home() / "remote"


def cache_limit() -> int | None:
    """Most bytes that the cache may hold, as `$TRIVIT_CACHE_SIZE` says; None without it. DataError for nonsense."""
    text = os.environ.get(LIMIT, "").strip()
    if not text:
        return None
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text, re.IGNORECASE)
    if number is None or float(number[1]) == 0:
        raise DataError(f"{LIMIT}={text} is no size: write for example 200GB or 1.5TB")
    return int(float(number[1]) * _UNITS[number[2].upper()])


def space() -> int:
    """Most bytes that the cache may hold: `cache_limit`, or else half of the disk space not taken by others."""
    return _space(None)


def _space(held: int | None) -> int:
    """`space`, when so many bytes are in the cache; None: to be counted if need be."""
    limit = cache_limit()
    if limit is not None:
        return limit
    home = remote_cache()
    home.mkdir(parents=True, exist_ok=True)
    disk = os.statvfs(home)
    held = sum(entry.bytes for entry in _scan()[0]) if held is None else held
    return (disk.f_bavail * disk.f_frsize + held) // 2


def cached(path: Path, size: int, fill: Callable[[Path], object], *, wait: bool = True) -> bool:
    """Have the tar at `path`, by `fill(aside)` if it is not there; only one process of the node fills at a time.

    Args:
        path: of the tar in its set's folder.
        size: bytes that will come, 0 if unknown.
        fill: writes the tar to the path that it is given, and the index to its own place.
        wait: for another process that fetches it already, and fetch it even if the space is taken by others on their
            way; otherwise both are answered with False.

    Raises:
        DataFailure: the disk is full, or the cache cannot be written.
        DataError: what `fill` raises.
    """
    if path.exists():
        return True
    try:
        with _held(path.with_name(f".{path.name}.lock"), wait=wait) as lock:
            if lock is None:
                return False
            return path.exists() or _fill(path, size, fill, lock, wait)
    except OSError as error:
        raise DataFailure(cannot_write(path, error)) from error


def touch(fd: int) -> None:
    """Note that an open tar is being used: its access time, which no mount option keeps from being set like this."""
    with contextlib.suppress(OSError):
        os.utime(fd, ns=(time.time_ns(), os.fstat(fd).st_mtime_ns))


def shrink() -> None:
    """Evict what is beyond the limit, which may have been lowered since, and remove what the dead left half-written."""
    remote_cache().mkdir(parents=True, exist_ok=True)
    for partial in remote_cache().glob("*/.*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _NOBODY_WRITES_IT_AFTER:
                partial.unlink()
    with _held(remote_cache() / ".room.lock", wait=True, keep=True):
        entries, locks = _scan()
        held = sum(entry.bytes for entry in entries)
        _evict(entries, _on_their_way(locks) + held - _space(held))


def _fill(path: Path, size: int, fill: Callable[[Path], object], lock: int, needed: bool) -> bool:
    _remove_partials(path)  # we hold the lock, so nobody is writing them
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    if not _make_room(size, lock, needed):
        return False
    try:
        while True:
            try:
                fill(aside)
                break
            except OSError as error:
                # The disk may be smaller than the limit, or others fill it.
                if error.errno not in DISK_FULL or not _evict(_scan()[0], max(size, 1)):
                    raise
        aside.replace(path)
        with path.open("rb") as file:
            touch(file.fileno())
        return True
    finally:
        aside.unlink(missing_ok=True)


def _make_room(size: int, lock: int, needed: bool) -> bool:
    """Reserve `size` bytes in our lock file, and evict until that and all the rest fit; what is needed comes anyway."""
    with _held(remote_cache() / ".room.lock", wait=True, keep=True):
        entries, locks = _scan()
        held, coming = sum(entry.bytes for entry in entries), _on_their_way(locks) + size
        there = _space(held)
        if coming > there and not needed:
            return False
        os.pwrite(lock, str(size).encode(), 0)
        _evict(entries, coming + held - there)
        return True


def _evict(entries: list[_Entry], excess: int) -> int:
    """Remove what was unused for longest until `excess` bytes are gone; returns how many are."""
    gone = 0
    for entry in sorted(entries) if excess > 0 else []:
        if gone >= excess:
            break
        entry.tar.unlink(missing_ok=True)
        entry.tar.with_name(f"{entry.tar.name}.idx").unlink(missing_ok=True)
        gone += entry.bytes
    return gone


def _scan() -> tuple[list[_Entry], list[Path]]:
    """The shards in the cache, and the lock files of those on their way; one pass, since all of a node wait for it."""
    found: list[_Entry] = []
    locks: list[Path] = []
    for folder in remote_cache().iterdir():
        tars: dict[str, os.stat_result] = {}
        indexes: dict[str, int] = {}
        with contextlib.suppress(NotADirectoryError, FileNotFoundError, PermissionError), os.scandir(folder) as files:
            for file in files:
                if file.name.startswith(".") and file.name.endswith(".tar.lock"):
                    locks.append(folder / file.name)
                with contextlib.suppress(FileNotFoundError):  # evicted by another process just now
                    if file.name.endswith(".tar"):
                        tars[file.name] = file.stat()
                    elif file.name.endswith(".tar.idx"):
                        indexes[file.name.removesuffix(".idx")] = file.stat().st_size
        found += [
            _Entry(about.st_atime_ns, about.st_size + indexes.get(name, 0), folder / name)
            for name, about in tars.items()
        ]
    return found, locks


def _on_their_way(locks: list[Path]) -> int:
    """Bytes that are reserved by those who fetch; the rubbish of the dead is removed."""
    total = 0
    for lock in locks:
        with _held(lock, wait=False) as held:
            if held is not None:
                _remove_partials(lock.with_name(lock.name[1 : -len(".lock")]))
                continue
        with contextlib.suppress(OSError, ValueError):
            total += int(lock.read_text() or 0)
    return total


def _remove_partials(path: Path) -> None:
    for partial in path.parent.glob(f".{_literally(path.name)}.{'?' * 8}.partial"):
        partial.unlink(missing_ok=True)


def _literally(name: str) -> str:
    """The name as a pattern that only it matches."""
    return re.sub(r"([*?[])", r"[\1]", name)


@contextlib.contextmanager
def _held(path: Path, *, wait: bool, keep: bool = False) -> Iterator[int | None]:
    """Hold the lock file `path` against threads and processes; yields its descriptor, or None when another has it.

    Unless it is to be kept, the file is removed at the end; those who waited for it find that out and look again.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, fd):
                break
        except BlockingIOError:
            os.close(fd)
            yield None
            return
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise DataFailure(
                    f"{path.parent} is on a file system without locks: set TRIVIT_CACHE to a folder on a local disk"
                ) from error
            raise
        os.close(fd)
    try:
        yield fd
    finally:
        if not keep:
            path.unlink(missing_ok=True)
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing would not do where a process was forked meanwhile
        os.close(fd)


def _is_still(path: Path, fd: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(fd))
    return False
