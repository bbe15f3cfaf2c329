"""Where files go that belong beside the data: beside it, or in the user's cache when the data is read-only."""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from datamodules.errors import DataError

READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_home() -> Path:
    """`$TRIVIT_CACHE`, or `~/.cache/trivit` (below `$XDG_CACHE_HOME` where that is set)."""
    if own := os.environ.get("TRIVIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "trivit"


def sidecar_places(path: Path) -> tuple[Path, Path]:
    """The two places of a sidecar: `path` itself, and its stand-in in the cache, keyed by the absolute folder."""
    folder = hashlib.sha256(os.fsencode(path.parent.resolve())).hexdigest()[:16]
    return path, cache_home() / "index" / folder / path.name


def read_sidecar(path: Path) -> list[tuple[Path, bytes]]:
    """What exists of a sidecar, the file beside the data first."""
    found = []
    for place in sidecar_places(path):
        with contextlib.suppress(OSError):
            found.append((place, place.read_bytes()))
    return found


def write_sidecar(path: Path, data: bytes) -> Path:
    """Write `data` to `path`, or into the cache when the folder of `path` cannot be written; returns where.

    Raises:
        DataError: when neither place can be written, or the disk is full.
    """
    beside, cached = sidecar_places(path)
    try:
        write_aside(beside, data)
        return beside
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise DataError(cannot_write(beside, error)) from error
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_aside(cached, data)
    except OSError as error:
        raise DataError(f"{beside.parent} is read-only, and so: {cannot_write(cached, error)}") from error
    return cached


def still_good(path: Path, place: Path, data: bytes) -> None:
    """Note that the sidecar `path`, found at `place`, fits its data, although that is newer: no need to look again.

    Where its time cannot be changed, it is written into the cache, whose time is now. Best effort.
    """
    cached = sidecar_places(path)[1]
    try:
        os.utime(place)
    except OSError:
        with contextlib.suppress(OSError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_aside(cached, data)


def write_aside(path: Path, data: bytes) -> None:
    """Write a file under another name, flush it to disk and rename it, so that it is either whole or absent."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock file `path` against other processes; a process that dies gives it back.

    Raises:
        DataError: when another process holds it and `wait` is false.
    """
    # Record locks, unlike flock, do not pass on to forked workers, which may outlive a killed parent for a moment.
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise DataError(f"another process is writing to {path.parent}: wait until it is done") from error
            # a file system without locks: two writers at once remain the user's business
        yield


def cannot_write(path: Path, error: OSError) -> str:
    """One line for the user that says why `path` could not be written and what to do."""
    if error.errno in DISK_FULL:
        return f"the disk of {path.parent} is full: free some space and run the same command again"
    if error.errno in READ_ONLY:
        return f"no permission to write {path}: choose another folder, or set TRIVIT_CACHE to one that you own"
    return f"cannot write {path}: {error.strerror or error}"
