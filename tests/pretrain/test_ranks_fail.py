"""What ends one rank ends all of them, soon, and in one line."""

import fcntl
import signal
import time
from pathlib import Path

import pytest

from tasks.encoder_files import read_checkpoint
from tests.pretrain.processes import SMALL, end, samples, start

# In place of `trivit`: on the rank and at the step that the file's name says something goes wrong.
PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
import pretrain.fsdp
import torch
from datamodules.errors import DataError
from datamodules.stream import TrainStream
from pretrain.cli import main

what, rank, at = Path(__file__).stem.split("-")
images = TrainStream._images
def strike(stream, draws, *rest):
    if draws.position[0] // 16 == int(at) and os.environ.get("LOCAL_RANK", "0") == rank:
        if what == "unreadable":
            raise DataError("nothing can be read: mend it")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "memory":
            def save(*_):
                raise RuntimeError("not enough memory\\nat some place")
            torch.save = save
            return images(stream, draws, *rest)
        if what == "copy":
            def split_off(*_, **__):
                raise RuntimeError("not enough memory")
            pretrain.fsdp.split_off = split_off
            return images(stream, draws, *rest)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(what.removeprefix("disk")),) * 2)
    return images(stream, draws, *rest)
TrainStream._images = strike
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "workers", "code", "message", "strategy"),
    [
        ("unreadable-1-3", 1, 2, "nothing can be read: mend it", "ddp"),
        ("kill-1-3", 1, 1, "a loader worker was killed", "ddp"),
        ("kill-1-3", 0, 1, "another rank ended", "ddp"),
        ("disk250-0-3", 0, 1, "metrics.csv (File too large). Make room", "ddp"),
        ("disk9000-0-3", 0, 1, "could not write a checkpoint", "ddp"),
        ("disk9000-1-3", 0, 1, "(rank 1: File too large)", "fsdp2"),
        ("disk9000-0-3", 0, 1, "could not write a checkpoint", "ddp, in the background"),
        ("disk9000-1-3", 0, 1, "(rank 1: File too large)", "fsdp2, in the background"),
        ("memory-1-3", 0, 1, "(rank 1: RuntimeError: not enough memory)", "fsdp2, in the background"),
        ("copy-1-3", 0, 1, "(rank 1: RuntimeError: not enough memory)", "fsdp2, in the background"),
        ("memory-0-3", 0, 1, "(RuntimeError: not enough memory)", "ddp"),
    ],
)
def test_two_ranks_end_together(
    fault: str, workers: int, code: int, message: str, strategy: str, drawn: Path, tmp_path: Path
) -> None:
    program, run = tmp_path / f"{fault}.py", tmp_path / "run"
    program.write_text(PROGRAM)
    more = ["--data.train", drawn, "--output", run, "--checkpoint_every", 2, "--data.device_batch_size", 4]
    strategy, _, background = strategy.partition(",")
    more += ["--trainer.devices", 2, "--trainer.strategy", strategy, "--data.workers", workers, "--log_keys", "true"]
    more += ["--checkpoint_async", "true"] if background else []
    began = time.monotonic()
    returned, error = end(start([*SMALL, *more], (str(program),)))
    assert time.monotonic() - began < 90
    assert "Traceback" not in error, error
    lines = [line for line in error.splitlines() if line.startswith("trivit: ")]
    assert len(lines) == 1 and message in lines[0], lines
    # Lightning kills the first rank when it sees another one gone, which may be while the first one is leaving, too
    assert returned in (code, -signal.SIGKILL)
    made = 4 if fault.startswith(("disk9", "memory", "copy")) else 3
    # A killed worker takes what it had ready along; in the background a write fails some steps later.
    assert max(samples(run)) in ({2, made} if workers else {4, 5, 6} if background else {made})
    saved = int(read_checkpoint(run / "checkpoints/last.ckpt")["global_step"])
    assert saved == (max(samples(run)) if workers else 2)  # what was learned is kept where that is possible


@pytest.mark.slow
def test_what_only_the_first_rank_refuses_ends_the_others(drawn: Path, tmp_path: Path) -> None:
    """Another run trains in the folder: the second rank would wait for the first one half an hour."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pretrain.cli"]
    more = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.train", drawn, "--output", tmp_path]
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        code, error = end(start([*SMALL, *more], torchrun), 60)
    assert code == 1
    lines = [line for line in error.splitlines() if line.startswith("trivit: ")]
    assert len(lines) == 1 and "another process trains in" in lines[0]
