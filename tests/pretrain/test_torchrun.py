"""torchrun starts the ranks again when one of them dies, and the run goes on by itself."""

import os
import signal
from pathlib import Path

import pytest

from tests.pretrain.conftest import pretrain
from tests.pretrain.processes import SMALL, end, losses, samples, start, wait_for, workers_of

STEPS = 24
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2", "-m"]


def rank(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((v.decode() for v in variables if v.startswith(b"LOCAL_RANK=")), "")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_had_happened(
    strategy: str, drawn: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [
        *SMALL,
        "--data.train",
        drawn,
        "--log_keys",
        "true",
        "--checkpoint_every",
        2,
        "--trainer.max_steps",
        STEPS,
    ]
    assert pretrain(*command, "--output", whole) == 0
    several = ["--trainer.devices", 2, "--trainer.strategy", strategy, "--output", killed]
    job = {
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_NAME": "job",
    }  # not the ranks' own
    process = start([*command, *several], [*TORCHRUN, "pretrain.cli"], SLURM_STEP_NUM_TASKS="1", **job)
    wait_for(process, killed, 5)
    (second,) = [pid for pid in workers_of(process.pid) if rank(pid) == "LOCAL_RANK=1"]
    os.kill(second, signal.SIGKILL)
    code, error = end(process)
    assert code == 0, error[-3000:]
    assert samples(killed) == samples(whole) and len(samples(whole)) == STEPS
    assert losses(killed) == pytest.approx(losses(whole), rel=2e-4)
