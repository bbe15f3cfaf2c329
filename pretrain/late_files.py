"""What a network disk shows late: for a while one node may not see what another one has just written."""

import contextlib
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.remote import is_remote
from pretrain.errors import RunError
from pretrain.run_directory import RunDirectory, launched_rank
from pretrain.stop import StopRequest

PATIENCE = 60.0
"""Seconds: NFS keeps what it knows of a folder for so long, unless its mount says otherwise."""
PAUSE = 1.0

Found = tuple[Path, dict[str, Any], list[str]] | None


def wait_for_data(train: str) -> None:
    """Gives data that only this rank's node does not see some time to appear; the first rank refuses it at once."""
    path = Path(train).expanduser()
    if launched_rank() > 0 and not is_remote(train) and "{" not in train:
        _wait(path.exists, path.parent, f"{path} is not there")


def newest_checkpoint(directory: RunDirectory, stop: StopRequest, together: bool) -> Found:
    """What `RunDirectory.checkpoint` finds; if `together`, collective, and a rank waits for what another one sees.

    One that does not see it in the end goes on with what it has, and is refused where all compare (`SameData`).

    Raises:
        RunError: there are checkpoints and none is whole.
    """
    if not together:
        return directory.checkpoint()
    found, refused = _look(directory)
    newest: int = max(stop.gather(_step(found)))

    def seen() -> bool:
        nonlocal found, refused
        if _step(found) < newest:
            found, refused = _look(directory)
        return _step(found) >= newest

    if _step(found) < newest:
        _wait(seen, directory.checkpoints, f"the checkpoint of step {newest} in {directory.checkpoints} is not there")
    if refused is not None:
        raise refused
    return found


def _look(directory: RunDirectory) -> tuple[Found, RunError | None]:
    try:
        return directory.checkpoint(), None
    except RunError as error:  # half of a file may be seen, too
        return None, error


def _step(found: Found) -> int:
    """-1: there is none."""
    return -1 if found is None else int(found[1]["global_step"])


def _wait(there: Callable[[], bool], folder: Path, what: str) -> None:
    if there():
        return
    rank = f"rank {launched_rank()} on {platform.node()}"
    print(f"{rank}: {what}; a network disk may show it late, waiting up to {PATIENCE:g} s", file=sys.stderr, flush=True)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(PAUSE)
        with contextlib.suppress(OSError):
            list(folder.iterdir())  # which makes NFS look again
        if there():
            return
