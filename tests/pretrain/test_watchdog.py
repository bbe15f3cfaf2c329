"""Ranks that wait for others in vain end by themselves."""

import faulthandler
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from datamodules.synth import synth
from pretrain import watchdog
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
    shell = {
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_NAME": "bash",
    }  # srun --pty bash
    shell["SLURM_STEP_NUM_TASKS"] = "1"
    process = start([*SMALL, *TWO_RANKS, "--data.train", images, "--log_keys", "true", *more], **shell)
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


# In place of `trivit`: at the third step the second rank goes to sleep, and its own watchdog sleeps longer still. That
# of the first one has patience until then, however busy the machine is.
STUCK = """
import sys, os, time
import torch, torch.distributed as dist
from pathlib import Path
from datamodules.stream import TrainStream
from pretrain import watchdog
from pretrain.cli import main
images, asleep = TrainStream._images, Path(__file__).with_name("asleep")
def fall_asleep(stream, draws, *rest):
    if draws.position[0] // 16 == 3:
        for group in filter(lambda group: group.size() > 1, dist.distributed_c10d._world.pg_map):
            timeout = group._get_backend(torch.device("cpu")).options._timeout
            print("group waits", timeout.total_seconds(), file=sys.stderr)
        asleep.touch()
        time.sleep(1000)
    return images(stream, draws, *rest)
if os.environ["RANK"] == "1":
    TrainStream._images = fall_asleep
    sys.argv += ["--step_timeout", "7000"]
else:
    watchdog.Watchdog.step = property(lambda self: 4 if asleep.exists() else 1000, lambda self, seconds: None)
watchdog.GRACE = 10
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_every_rank_prints_its_stack_before_torchrun_ends_them(images: Path, tmp_path: Path) -> None:
    """The first to lose patience tells the others; process groups of either kind have more patience than that."""
    program = tmp_path / "stuck.py"
    program.write_text(STUCK)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    more = ["--step_timeout", 4, "--data.workers", 0, "--checkpoint_every", 2, "--checkpoint_async", "true"]
    sharded = ["--trainer.strategy", "fsdp2", "--trainer.devices", 2]
    code, error = end(start([*SMALL, *sharded, *more, "--data.train", images, "--output", tmp_path / "run"], torchrun))
    assert code == 1
    told = sorted(line for line in error.splitlines() if line.startswith("trivit: "))
    assert len(told) == 2, error
    assert told[0].startswith("trivit: rank 0 of 2 on ") and "no micro-batch has ended for 4 s" in told[0]
    assert told[1].startswith("trivit: rank 1 of 2 on ") and "rank 0 of 2 on " in told[1]
    stacks = {rank: [line for line in error.splitlines() if line.startswith(f"rank {rank} | ")] for rank in (0, 1)}
    for stack in stacks.values():
        assert "MainThread" in stack[0] and any("pretrain/run.py" in line for line in stack)
    assert "in fall_asleep" in stacks[1][1]
    waits = [float(wait) for wait in re.findall(r"group waits ([\d.]+)$", error, re.MULTILINE)]  # also behind a bar
    assert len(waits) >= 3 and min(waits) > 7000


def test_a_rank_that_never_lets_go_of_the_interpreter_ends_with_its_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(watchdog, "GRACE", 0.5)
    said = tmp_path / "said"
    child = os.fork()
    if not child:
        signal.alarm(60)  # should nothing else end it
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
        armed, arm = threading.Event(), faulthandler.dump_traceback_later

        def arm_and_tell(*about: Any, **more: Any) -> None:
            arm(*about, **more)
            armed.set()

        faulthandler.dump_traceback_later = arm_and_tell
        Watchdog(2, 2).watch(0, 2)
        armed.wait()
        re.match(r"(a+)+$", "a" * 60 + "b")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert "in test_a_rank_that_never_lets_go" in said.read_text()


@pytest.mark.parametrize(("start", "step", "looking", "after"), [(0.3, 100, [], [0.3]), (100, 0.3, [0.3], [])])
def test_looking_for_a_checkpoint_has_the_time_of_a_step_and_the_start_its_own_behind_it(
    start: float, step: float, looking: list[float], after: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[float] = []
    monkeypatch.setattr(watchdog, "_LOOK", 0.02)
    monkeypatch.setattr(Watchdog, "_end", lambda self, limit: ended.append(limit))
    watched = Watchdog(start, step)
    watched.watch(0, 2)
    with watched.looking():
        time.sleep(0.7)
        assert ended[:1] == looking
    ended.clear()
    time.sleep(0.7)
    watched.rest()
    assert ended[:1] == after


def test_a_run_of_one_rank_is_not_watched() -> None:
    watched = Watchdog(100, 100)
    before = threading.active_count()
    watched.watch(0, 1)
    assert threading.active_count() == before
    watched.watch(0, 2)
    assert threading.active_count() == before + 1
    watched.rest()
    assert threading.active_count() == before
