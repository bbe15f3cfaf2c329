"""Work in processes: all results, the first error, and no process left."""

import os
import signal
import subprocess
import sys
import time

import pytest

from datamodules.errors import DataError
from datamodules.workers import Tick, available_cores, spread


def square(task: int, tick: Tick) -> tuple[int, int]:
    tick(task)
    return task * task, os.getpid()


def fail_at_three(task: int, tick: Tick) -> int:
    if task == 3:
        raise DataError("three")
    time.sleep(0.01)
    return task


def die_at_three(task: int, tick: Tick) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


@pytest.mark.parametrize("workers", [1, 3, 50, None])
def test_every_task_once_and_all_ticks(workers: int | None) -> None:
    ticks: list[int] = []
    results = dict(spread(square, range(20), workers=workers, tick=ticks.append))
    assert {task: value for task, (value, _) in results.items()} == {i: i * i for i in range(20)}
    assert sum(ticks) == sum(range(20))
    if workers == 3:
        pids = {pid for _, pid in results.values()}
        assert os.getpid() not in pids
        assert len(pids) <= 3


def test_no_tasks_and_cores() -> None:
    assert list(spread(square, [], tick=print)) == []
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_arrives_and_ends_the_rest(workers: int) -> None:
    with pytest.raises(DataError, match=r"^three$"):
        list(spread(fail_at_three, range(100), workers=workers, tick=print))


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(DataError, match="worker process was killed"):
        list(spread(die_at_three, range(10), workers=3, tick=print))


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed() -> None:
    code = (
        "import os, time\nfrom datamodules.workers import spread\n"
        "def work(task, tick):\n    os.write(1, b'%d\\n' % os.getpid())\n    time.sleep(1)\n    tick(1)\n"
        "list(spread(work, range(100), workers=3, tick=int))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(3)]
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}/exe") for pid in pids):  # noqa: PTH110
            time.sleep(0.1)
        assert not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids)  # noqa: PTH110
