"""Work spread over processes, with progress; nothing is left running when it is interrupted or its parent is killed."""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from datamodules.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[int], object]
"""Called with the number of things done since the last call."""


def available_cores(local_ranks: int = 1) -> int:
    """CPU cores of this rank: by affinity, container quota and SLURM, shared by the `local_ranks` of its node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max") as file:  # noqa: PTH123 - not a file of ours
            quota, period = file.read().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    of_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if of_task.isdecimal() and "SLURM_PROCID" in os.environ:
        return max(1, min(cores, int(of_task)))
    return max(1, cores // local_ranks)


def spread(
    work: Callable[[Task, Tick], Result], tasks: Sequence[Task], *, workers: int | None = None, tick: Tick
) -> Iterator[tuple[Task, Result]]:
    """Run `work(task, tick)` for every task in `workers` processes (all cores by default); results as they come.

    One worker, or one task, works in this process. An exception of `work` is raised here, after the others stopped.

    Raises:
        DataError: when a worker was killed from outside, as happens when memory is short.
    """
    workers = min(available_cores() if workers is None else max(1, workers), len(tasks))
    if workers <= 1:
        for task in tasks:
            yield task, work(task, tick)
        return
    # fork where it is safe: it needs no __main__ guard in the scripts of users, and no second import of torch.
    fork = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if fork else "spawn")
    running: dict[Connection, BaseProcess] = {}
    doing: dict[Connection, Task] = {}
    left = iter(tasks)
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            inherited = [*running, ours] if fork else []
            process = context.Process(target=_serve, args=(work, theirs, inherited), daemon=True)  # type: ignore[attr-defined]
            process.start()
            theirs.close()
            running[ours] = process
            doing[ours] = next(left)
            ours.send(doing[ours])
        while doing:
            for connection in wait(list(doing)):
                assert isinstance(connection, Connection)
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionError) as error:
                    raise DataError("a worker process was killed: is there enough memory?") from error
                if kind == "tick":
                    tick(value)
                elif kind == "error":
                    raise value
                else:
                    task = doing.pop(connection)
                    for following in left:
                        doing[connection] = following
                        connection.send(following)
                        break
                    yield task, value
    finally:
        for connection, process in running.items():
            connection.close()
            process.terminate()
        for process in running.values():
            process.join()


def _serve(work: Callable[[Task, Tick], Result], connection: Connection, inherited: list[Connection]) -> None:
    """A worker: tasks come through the connection until it is closed, by intent or because the parent is gone.

    `inherited` are the parent's ends of connections; as long as a worker holds one open, nobody sees the parent go.
    """
    for parents in inherited:
        parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent tells when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # one process per core already; OpenMP may hang after fork
    try:
        while True:
            task = connection.recv()
            try:
                connection.send(("result", work(task, lambda done: connection.send(("tick", done)))))
            except ConnectionError:
                return
            except Exception as error:
                if not isinstance(error, DataError):
                    error.add_note("".join(traceback.format_exception(error)))
                connection.send(("error", error))
    except (EOFError, ConnectionError):
        return
