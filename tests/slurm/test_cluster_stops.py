"""Of a throw-away cluster nothing is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm import cluster, daemons
from tests.slurm.daemons import Process


def started(folder: Path, program: str) -> Process:
    daemons.start(
        folder, "program", [sys.executable, "-c", f"import time\n{program}\nprint(flush=True)\ntime.sleep(99)"]
    )
    while not (folder / "program.out").read_text():
        time.sleep(0.05)
    (process,) = daemons.started(folder)
    return process


@pytest.mark.parametrize(("deaf", "how"), [(False, ""), (True, ", killed")])
def test_what_was_started_ends(deaf: bool, how: str, tmp_path: Path) -> None:
    ignores = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" if deaf else ""
    process = started(tmp_path, ignores)
    assert daemons.end(daemons.started(tmp_path), 1) == [f"program (process {process.pid}){how}"]
    assert not process.lives and daemons.started(tmp_path) == [] == daemons.end([process])


def test_another_process_of_that_number_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / daemons.STARTED).write_text(f"slurmd {os.getpid()} 1\n")
    assert daemons.started(tmp_path) == []


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_and_a_slurmd_that_hangs_end_with_it_and_are_told(tmp_path: Path) -> None:
    if lacking := cluster.missing():
        assert "TRIVIT_REQUIRE_SLURM" not in os.environ, f"CI must have {lacking}"
        pytest.skip(f"no SLURM here: {', '.join(lacking)}")
    user = os.environ | {"SLURM_CONF": str(cluster.start(tmp_path / "slurm"))}
    sbatch = ["sbatch", "-N2", "-o", str(tmp_path / "out"), "--wrap", "trap '' TERM; touch begun; srun sleep 1000"]
    subprocess.run(sbatch, env=user, cwd=tmp_path, check=True, capture_output=True)
    net, until = cluster.network_of(tmp_path / "slurm"), time.monotonic() + 60
    while "sleep" not in (names := [p.name for node in (1, 2) for p in map(Process.of, net.pids(node)) if p]):
        assert time.monotonic() < until, names
        time.sleep(0.2)
    for pid_file in (tmp_path / "slurm").glob("*.pid"):
        pid_file.unlink()
    known = {process.name: process for process in daemons.started(tmp_path / "slurm")}
    assert set(known) == {"munged", "slurmctld", "slurmd-n1", "slurmd-n2"}
    os.kill(known["slurmd-n2"].pid, signal.SIGSTOP)
    told = cluster.stop(tmp_path / "slurm", patience=3)
    assert f"slurmd-n2 (process {known['slurmd-n2'].pid}), killed" in told and len(told) > len(known), told
    assert any(line.startswith("slurmstepd (process ") for line in told)
    assert not daemons.started(tmp_path / "slurm") and not net.pids(1) + net.pids(2)
    assert cluster.stop(tmp_path / "slurm") == []
