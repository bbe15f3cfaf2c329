"""Who trains in a folder: told to whoever comes second, and forgotten with the process."""

import errno
import fcntl
import json
import os
import platform
from pathlib import Path

import pytest

from pretrain.errors import RunError
from pretrain.run_lock import RunLock


def test_the_second_one_is_told_who_has_it(tmp_path: Path) -> None:
    ready, hold = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        held = RunLock(tmp_path)
        held.take()
        os.write(ready[1], b"x")
        os.close(hold[1])
        os.read(hold[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(
        RunError, match=rf"process {child} on {platform.node()}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d;"
    ):
        RunLock(tmp_path).take()
    os.write(hold[1], b"x")
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()  # it has died without a word
    lock = RunLock(tmp_path)
    lock.take()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    ("pid", "host", "free"),
    [(2**22 + 1, "", True), (1, "", False), (1, "another", False)],
    ids=["dead", "alive", "far"],
)
def test_without_locks_what_is_written_decides(
    pid: int, host: str, free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    (tmp_path / ".lock").write_text(json.dumps({"host": host or platform.node(), "pid": pid, "since": "then"}))
    lock = RunLock(tmp_path)
    if free:
        lock.take()
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    else:
        with pytest.raises(RunError, match=f"process {pid} on .* since then.*if it no longer runs, remove"):
            lock.take()
