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


@pytest.mark.parametrize("sure", [True, False], ids=["locked", "no locks"])
@pytest.mark.parametrize(("job", "start"), [("31", "0"), ("31", "1"), ("32", "0")])
def test_an_earlier_start_of_the_same_job_is_waited_for(
    sure: bool,
    job: str,
    start: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file server may hold the lock of a lost node for a while; where there are no locks, its words stay for ever."""
    lockf, tries = fcntl.lockf, []

    def late(*how: int) -> None:
        tries.append(1)
        if not sure or len(tries) < 3:
            raise OSError(errno.EAGAIN if sure else errno.ENOLCK, "no")
        lockf(*how)

    ticks = iter(range(1000))
    monkeypatch.setattr("pretrain.run_lock.time.monotonic", lambda: 50.0 * next(ticks))
    monkeypatch.setattr("pretrain.run_lock.time.sleep", lambda seconds: None)
    monkeypatch.setattr(fcntl, "lockf", late)
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    holder = {"host": "lost", "pid": 12, "since": "then", "job": job, "start": start}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    lock = RunLock(tmp_path)
    if (job, start) == ("31", "0"):
        lock.take()
        told = json.loads((tmp_path / ".lock").read_text())
        assert (told["pid"], told["job"], told["start"]) == (os.getpid(), "31", "1")
        assert len(tries) == (3 if sure else 4), "without locks as long as a file server may take"
        assert "an earlier start of this job still holds" in capsys.readouterr().err
    else:
        with pytest.raises(RunError, match=rf"process 12 on lost \(job {job}\), since then"):
            lock.take()
        assert len(tries) == 1


def test_a_lock_that_stays_is_told_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(*_: object) -> None:
        raise OSError(errno.EAGAIN, "no")

    monkeypatch.setattr("pretrain.run_lock.PATIENCE", 0.0)
    monkeypatch.setattr(fcntl, "lockf", held)
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    holder = {"host": "lost", "pid": 12, "since": "then", "job": "31", "start": "0"}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    with pytest.raises(RunError, match="process 12 on lost"):
        RunLock(tmp_path).take()
