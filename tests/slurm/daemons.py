"""Programs that run until they are ended, known by process and by when it began: no pid file has to be right for it."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

STARTED = "started"


@dataclass(frozen=True)
class Process:
    """`began`: ticks since the machine started, since its number may be another one's later."""

    name: str
    pid: int
    began: str

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The one that has this number now; None where it has ended, also if nobody has asked how."""
        with contextlib.suppress(OSError):
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            state, began = (rest.split()[field] for field in (0, 19))
            return None if state in "ZX" else cls(name, pid, began)
        return None

    @property
    def lives(self) -> bool:
        """Whether it has not ended."""
        now = Process.of(self.pid)
        return now is not None and now.began == self.began

    def send(self, signum: int) -> None:
        """A signal, if it still lives."""
        if self.lives:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)


def start(folder: Path, name: str, command: Sequence[object]) -> None:
    """Run it; what it says goes to a file, and `started` finds it, from other processes, too."""
    with (folder / f"{name}.out").open("ab") as out:
        pid = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        ).pid  # fmt: skip
    if (process := Process.of(pid)) is not None:
        with (folder / STARTED).open("a") as file:
            file.write(f"{name} {pid} {process.began}\n")


def started(folder: Path) -> list[Process]:
    """What has been started for this folder and lives."""
    lines = (folder / STARTED).read_text().splitlines() if (folder / STARTED).exists() else []
    found = (Process(name, int(pid), began) for name, pid, began in map(str.split, lines))
    return [process for process in found if process.lives]


def end(processes: Iterable[Process], patience: float = 15) -> list[str]:
    """Tell all to end, kill those that have not in `patience` seconds, and wait for them; in words, what has ended.

    RuntimeError when one of them lives on, as one does that waits for a disk.
    """
    living = [process for process in processes if process.lives]
    for process in living:
        process.send(signal.SIGTERM)
    _wait(living, patience)
    killed = [process for process in living if process.lives]
    for process in killed:
        process.send(signal.SIGKILL)
    if left := _wait(killed, 10):
        raise RuntimeError(f"{left[0].name} (process {left[0].pid}) does not end")
    return [f"{each.name} (process {each.pid}){', killed' if each in killed else ''}" for each in living]


def _wait(processes: Sequence[Process], seconds: float) -> list[Process]:
    """Those that live after these seconds."""
    until = time.monotonic() + seconds
    while (living := [process for process in processes if process.lives]) and time.monotonic() < until:
        time.sleep(0.1)
    return living
