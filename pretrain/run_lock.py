"""One process trains in a folder at a time; a second one is told who does."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from pathlib import Path
from typing import Any, TextIO

from pretrain.errors import RunError

NAME = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """`.lock` in a run's folder, locked and with {"host", "pid", "since"} of its holder.

    The kernel lets go of it when the process ends, however it ends. Where a file system has no locks at all, what is
    written in the file decides: a process of this host that is gone holds nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.place = folder / NAME
        self._file: TextIO | None = None

    def take(self) -> None:
        """RunError when another process has it, with its host, process and time, or when nothing can be written."""
        while self._file is None:
            self._file = self._try()
        self._file.seek(0)
        self._file.truncate()
        json.dump({"host": platform.node(), "pid": os.getpid(), "since": time.strftime("%F %T")}, self._file)
        self._file.flush()

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
            holder = _read(file)
            if error.errno in HELD or _may_live(holder):
                file.close()
                raise RunError(self._told(holder, error.errno in HELD)) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), self.place.stat()):
                return file
        file.close()
        return None

    def _told(self, holder: dict[str, Any], sure: bool) -> str:
        who = f": process {holder['pid']} on {holder['host']}, since {holder['since']}" if holder else ""
        unless = "" if sure else f" (if it no longer runs, remove {self.place})"
        return f"another process trains in {self.place.parent}{who}; wait for it or name another --output{unless}"


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
