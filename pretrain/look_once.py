"""What takes long to look at is looked at once on a node, though every rank of it wants to know.

There is no process group yet when a run looks for its checkpoint, so ranks tell each other by a note in the temporary
folder of the node.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

STARTED = time.time()
"""When this process began, nearly: what was found before that is of another start."""


def look_once(path: Path, look: Callable[[], str | None]) -> str | None:
    """What `look` finds about `path`, or has found for another rank of this node since this process began.

    One rank looks while the others wait for it. Without a launcher there is one rank; where no note can be left, each
    looks for itself.

    Args:
        path: a file, or a folder of files.
        look: gives a text, or None; what it raises is told to nobody else.
    """
    if not any(name in os.environ for name in ("LOCAL_RANK", "SLURM_PROCID")):
        return look()
    try:
        note = _open_note(path)
    except OSError:
        return look()
    with note:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(note, fcntl.LOCK_EX)
        now, told = _state(path), _read(note)
        if told.get("state") == now and told["time"] >= STARTED:
            return told["found"]  # type: ignore[no-any-return]
        found = look()
        with contextlib.suppress(OSError):
            note.seek(0)
            note.truncate()
            json.dump({"state": now, "time": time.time(), "found": found}, note)
            note.flush()
        return found


def _open_note(path: Path) -> IO[str]:
    """In a folder that nobody else can write to."""
    folder = Path(tempfile.gettempdir()) / f"trivit-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise PermissionError(f"{folder} is somebody else's")
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return os.fdopen(os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+")


def _read(note: IO[str]) -> dict[str, Any]:
    try:
        told = json.load(note)
        return told if isinstance(told, dict) and {"state", "time", "found"} <= told.keys() else {}
    except ValueError:  # empty, or its writer was killed
        return {}


def _state(path: Path) -> list[list[Any]]:
    """What changes when a file is written or replaced."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, (about := file.stat()).st_size, about.st_mtime_ns, about.st_ino] for file in files]
