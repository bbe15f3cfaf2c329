"""One process trains in a folder at a time; a second one is told who does."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import struct
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from pretrain.errors import RunError

NAME = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)
PATIENCE = 150.0
"""Seconds to wait for an earlier start of the same job: a file server keeps the lock of a lost node for a while."""
_FLOCK = "hhqqi0q"
"""`struct flock` of Linux with 64 bits: type, whence, start, length, process."""


class RunLock:
    """`.lock` in a run's folder, locked and with {"host", "pid", "since"} of its holder, in SLURM also "job", "start".

    The kernel lets go of it when the process ends, however it ends. Where a file system has no locks at all, what is
    written in the file decides: a process of this host that is gone holds nothing, nor does, after a while, an earlier
    start of this very job, which SLURM has ended.
    """

    def __init__(self, folder: Path) -> None:
        self.place = folder / NAME
        self._file: TextIO | None = None
        self._until: float | None = None  # to wait for an earlier start

    def take(self) -> None:
        """RunError when another process has it, with its host, process and time, or when nothing can be written."""
        while self._file is None:
            self._file = self._try()
        self._file.seek(0)
        self._file.truncate()
        holder = {"host": platform.node(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        json.dump(holder | _job(), self._file)
        self._file.flush()

    def look(self) -> None:
        """RunError as of `take`, where the kernel says that another process has it; it is not taken, nor waited for."""
        try:
            file = self.place.open()
        except OSError:
            return
        with file, contextlib.suppress(OSError):  # no locks here: whether that process lives can only be guessed
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            if struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK:
                raise RunError(self._told(_read(file), True))

    def release(self) -> None:
        """Take the file away; nothing where it was not taken."""
        if self._file is not None:
            self.place.unlink(missing_ok=True)  # still locked, so nobody else has begun here
            self._file.close()
            self._file = None

    @property
    def taken(self) -> bool:
        """By this process."""
        return self._file is not None

    def _try(self) -> TextIO | None:
        """The locked file, or None when the run that held it has just ended and taken it away."""
        try:
            file = self.place.open("a+")
        except OSError as error:
            folder = self.place.parent
            raise RunError(f"--output {folder} cannot be written ({error.strerror}); name another folder") from error
        try:
            # Unlike flock this does not pass on to loader workers, which may outlive a killed run for a moment.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder, sure = _read(file), error.errno in HELD
            if sure or _may_live(holder):
                earlier = _is_earlier_start(holder)
                if earlier and self._wait_for(holder):
                    file.close()
                    return None
                if sure or not earlier:
                    file.close()
                    raise RunError(self._told(holder, sure)) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), self.place.stat()):
                return file
        file.close()
        return None

    def _wait_for(self, holder: dict[str, Any]) -> bool:
        """A second; False when that was long enough."""
        now = time.monotonic()
        if self._until is None:
            self._until = now + PATIENCE
            print(
                f"an earlier start of this job still holds {self.place.parent} (process {holder['pid']} on "
                f"{holder['host']}): waiting up to {PATIENCE:.0f} s",
                file=sys.stderr,
            )
        if now >= self._until:
            return False
        time.sleep(1)
        return True

    def _told(self, holder: dict[str, Any], sure: bool) -> str:
        job = f" (job {holder['job']})" if holder.get("job") else ""
        who = f": process {holder['pid']} on {holder['host']}{job}, since {holder['since']}" if holder else ""
        unless = "" if sure else f" (if it no longer runs, remove {self.place})"
        return f"another process trains in {self.place.parent}{who}; wait for it or name another --output{unless}"


def _job() -> dict[str, str]:
    """The SLURM job of this process and which of its starts this is; nothing outside of SLURM."""
    if not (job := os.environ.get("SLURM_JOB_ID")):
        return {}
    return {"job": job, "start": os.environ.get("SLURM_RESTART_COUNT", "0")}


def _is_earlier_start(holder: dict[str, Any]) -> bool:
    own = _job()
    return bool(own) and own["job"] == holder.get("job") and own["start"] != holder.get("start")


def _read(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        holder = json.load(file)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and {"host", "pid", "since"} <= holder.keys() else {}


def _may_live(holder: dict[str, Any]) -> bool:
    if not holder or holder["host"] != platform.node():
        return bool(holder)
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return int(holder["pid"]) != os.getpid()
