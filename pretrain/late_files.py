"""What a network disk shows late: for a while one node may not see what another one has just written."""

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.remote import is_remote
from pretrain.checkpoint_files import LAST, PART, PREVIOUS, load_pieces
from pretrain.errors import AgreedFailure, RunError
from pretrain.run_directory import RunDirectory, launched_rank
from pretrain.stop import StopRequest

PATIENCE = 60.0
"""Seconds: NFS keeps what it knows of a folder for so long, unless its mount says otherwise."""
PAUSE = 1.0

Found = tuple[Path, dict[str, Any], list[str]] | None

LOOKED = "TRIVIT_LOOKED"
"""Variable of the environment by which a rank tells those that Lightning starts from it later what it has found."""


class Told(NamedTuple):
    """What the first rank tells the others about the checkpoints of a run.

    name, step: of the newest that is whole; "" and -1: there is none.
    findings: what is wrong with newer ones.
    refused: why the run cannot go on; "": it can.
    """

    name: str = ""
    step: int = -1
    findings: Sequence[str] = ()
    refused: str = ""


def wait_for_data(train: str) -> None:
    """Gives data that only this rank's node does not see some time to appear; the first rank refuses it at once."""
    path = Path(train).expanduser()
    if launched_rank() > 0 and not is_remote(train) and "{" not in train:
        _wait(path.exists, path.parent, f"{path} is not there")


def newest_checkpoint(directory: RunDirectory, stop: StopRequest, together: bool) -> Found:
    """What `RunDirectory.checkpoint` finds; the first rank alone reads all of it, for its checksums.

    If `together`, collective: a rank waits for what another one sees already. Otherwise Lightning starts the other
    ranks when this one has looked.

    Raises:
        RunError: there are checkpoints and none is whole; on all ranks, if together, also when one of them does not see
            in the end what another one does.
    """
    if not together:
        return _alone(directory)
    folder, found, told = directory.checkpoints, None, Told()
    newest = max(stop.gather(_newest_step(folder)))
    if launched_rank() == 0:
        found, told = _look(directory, newest)
    told = stop.gather(told)[0]
    if told.refused:
        raise AgreedFailure(told.refused, RunError.exit_code)
    if told.step >= 0 and found is None:

        def seen() -> bool:
            nonlocal found
            found = _open(directory, told)
            return found is not None

        _wait(seen, folder, f"the checkpoint of step {told.step} in {folder} is not there")
    lacks = f"rank {launched_rank()} on {platform.node()}" if told.step >= 0 and found is None else ""
    if lacking := next(filter(None, stop.gather(lacks)), None):
        raise AgreedFailure(_not_there(lacking, told.step, folder), RunError.exit_code)
    return found


def _alone(directory: RunDirectory) -> Found:
    parent, folder, *told = json.loads(os.environ.get(LOOKED, "[0, 0]"))
    if launched_rank() > 0 and parent == os.getppid() and folder == str(directory.checkpoints.resolve()):
        known = Told(*told)
        found = _open(directory, known)
        if found is not None or known.step < 0:
            return found
    found = directory.checkpoint()
    os.environ[LOOKED] = json.dumps([os.getpid(), str(directory.checkpoints.resolve()), *_in_words(found)])
    return found


def _look(directory: RunDirectory, newest: int) -> tuple[Found, Told]:
    """`newest`: the step that some rank sees, perhaps without having looked at all bytes."""
    folder = directory.checkpoints
    if _newest_step(folder) < newest:
        what = f"the checkpoint of step {newest} in {folder} is not there"
        _wait(lambda: _newest_step(folder) >= newest, folder, what)
        if _newest_step(folder) < newest:  # going on without it would write over it
            return None, Told(refused=_not_there(f"rank 0 on {platform.node()}", newest, folder))
    try:
        found = directory.checkpoint()
    except RunError as error:
        return None, Told(refused=str(error))
    return found, _in_words(found)


def _in_words(found: Found) -> Told:
    return Told() if found is None else Told(found[0].name, int(found[1]["global_step"]), found[2])


def _not_there(rank: str, step: int, folder: Path) -> str:
    return (
        f"{rank} does not see the checkpoint of step {step} in {folder}, as another rank does: the run must lie where "
        "all nodes see it; then run the same command again"
    )


def _newest_step(folder: Path) -> int:
    """Of the checkpoints that can be opened here; -1: there is none."""
    states = (_state(folder / name) for name in (LAST, PART, PREVIOUS))
    return next((int(state["global_step"]) for state in states if state is not None), -1)


def _open(directory: RunDirectory, told: Told) -> Found:
    """What another rank has found; None: it is not here, or still an older one."""
    path = directory.checkpoints / told.name
    state = _state(path)
    return None if state is None or int(state["global_step"]) != told.step else (path, state, list(told.findings))


def _state(path: Path) -> dict[str, Any] | None:
    try:
        state = load_pieces(path)
        int(state["global_step"])
        return state
    except Exception:  # it is not there, cannot be read, or half of it is seen; damage has many faces
        return None


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
