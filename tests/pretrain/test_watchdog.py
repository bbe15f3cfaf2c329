"""Ranks that wait for others in vain end by themselves."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from datamodules.synth import synth
from pretrain.watchdog import Watchdog
from tests.pretrain.processes import SMALL, end, start, wait_for

TWO_RANKS = ["--trainer.strategy", "ddp", "--trainer.devices", 2]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    synth(tmp_path / "train", samples=96, size=24, seed=5)
    return tmp_path / "train"


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "address"), [(0, "127.0.0.1"), (1, "192.0.2.1")])
def test_a_rank_that_meets_nobody_says_so(images: Path, tmp_path: Path, rank: int, address: str) -> None:
    """The other rank was never started, or the address is wrong (192.0.2.1 is nobody's)."""
    launcher = {
        "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": address, "MASTER_PORT": "29571",
    }  # fmt: skip
    process = start([*SMALL, *TWO_RANKS, "--data.train", images, "--output", tmp_path / "run", "--start_timeout", 3],
                    **launcher)  # fmt: skip
    code, error = end(process)
    assert code == 1 and "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("trivit: ")]
    assert line.startswith(f"trivit: rank {rank} of 2 on ") and "within 3 s (--start_timeout)" in line
    assert f"not all met at {address}:29571" in line


@pytest.mark.slow
def test_a_rank_that_is_stuck_ends_the_other_which_says_where_it_waits(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["--trainer.max_steps", 100_000, "--step_timeout", 4, "--data.workers", 0, "--output", run]
    process = start([*SMALL, *TWO_RANKS, "--data.train", images, "--log_keys", "true", *more])
    wait_for(process, run, 3)
    others = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    (other,) = (int(pid) for pid in others.stdout.split())
    os.kill(other, signal.SIGSTOP)
    try:
        code = process.wait(60)
    finally:
        os.kill(other, signal.SIGKILL)  # it holds stderr open
    _, error = process.communicate()
    assert code == 1
    (line,) = [line for line in error.splitlines() if line.startswith("trivit: ")]
    assert line.startswith("trivit: rank 0 of 2 on ") and "no micro-batch has ended for 4 s (--step_timeout)" in line
    assert "pretrain/run.py" in error[error.index(line) :], "the stack leads through the program"


def test_a_run_of_one_rank_is_not_watched() -> None:
    watchdog = Watchdog(1, 1)
    before = threading.active_count()
    watchdog.watch(0, 1)
    assert threading.active_count() == before
    watchdog.watch(0, 2)
    assert threading.active_count() == before + 1
    watchdog.rest()
