"""Runs as processes of their own, to be killed, and what they leave behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.pretrain.conftest import SMALL

SMALL_DINO = [
    "--config", "dino_tin40", "--data.recipe.crop_size", "16", "--data.recipe.local_size", "8",
    "--data.recipe.local_views", "2", "--model.encoder.patch_size", "4", "--model.encoder.width", "24",
    "--model.encoder.depth", "2", "--model.encoder.heads", "2", "--model.head.prototypes", "32",
    "--model.head.hidden_width", "32", "--model.head.bottleneck_width", "16", "--model.warmup_steps", "2",
    "--data.global_batch_size", "16", "--trainer.accelerator", "cpu", "--log_every", "1",
]  # fmt: skip
SMALL_CLIP = [
    "--config", "clip_tin40", "--data.recipe.crop_size", "16", "--model.encoder.patch_size", "4",
    "--model.encoder.width", "24", "--model.encoder.depth", "2", "--model.encoder.heads", "2",
    "--model.text.width", "16", "--model.text.depth", "1", "--model.joint_width", "16", "--model.warmup_steps", "2",
    "--data.global_batch_size", "16", "--trainer.accelerator", "cpu", "--log_every", "1",
]  # fmt: skip
OBJECTIVES = {"mae": SMALL, "dino": SMALL_DINO, "clip": SMALL_CLIP}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def start(
    arguments: Sequence[object], program: Sequence[str] = ("-m", "pretrain.cli"), **environment: str
) -> subprocess.Popen[str]:
    """`trivit pretrain ARGUMENTS` as the leader of a process group of its own."""
    command = [sys.executable, *program, "pretrain", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=ENVIRONMENT | environment,
    )  # fmt: skip


def end(process: subprocess.Popen[str], seconds: float = 200) -> tuple[int, str]:
    """Exit code and stderr of a run that ends by itself; the whole group is killed when it does not in time."""
    try:
        _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, error


def kill_after(process: subprocess.Popen[str], run: Path, step: int) -> int:
    """SIGKILL to the whole group as soon as `step` has been made; the last step that the run has written down."""
    wait_for(process, run, step)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    return max(samples(run))


def wait_for(process: subprocess.Popen[str], run: Path, step: int, seconds: float = 200) -> None:
    """Wait until the run has made `step`."""
    deadline = time.monotonic() + seconds
    while max(samples(run), default=0) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run has not come so far in time"
        time.sleep(0.005)


def workers_of(pid: int) -> list[int]:
    """The children of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def samples(run: Path) -> dict[int, list[str]]:
    """Step -> keys, as far as samples.jsonl has whole lines."""
    if not (run / "samples.jsonl").exists():
        return {}
    lines = (run / "samples.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return {row["step"]: row["keys"] for row in rows}


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, from metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file)}
