"""Jobs on a real SLURM of two nodes, each with a network of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from datamodules.synth import synth
from slurm.job import Job, pretrain_script
from tests.pretrain.processes import OBJECTIVES, end, losses, samples, start
from tests.slurm import cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]
STEPS = 400
PROGRAM = f"{sys.executable} -m pretrain.cli"
TRAIN = [
    *OBJECTIVES["mae"], "--log_keys", "true", "--checkpoint_every", "1000", "--data.device_batch_size", "4",
    "--data.workers", "1", "--trainer.max_steps", str(STEPS),
]  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a user of the cluster."""
    if lacking := cluster.missing():
        assert "TRIVIT_REQUIRE_SLURM" not in os.environ, f"CI must have {lacking}"
        pytest.skip(f"no SLURM here: {', '.join(lacking)}")
    folder = tmp_path_factory.mktemp("slurm")
    config = cluster.start(folder)
    yield {**os.environ, "SLURM_CONF": str(config), "OMP_NUM_THREADS": "1"}
    cluster.stop(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "train"
    synth(folder, samples=330, size=24, seed=5, samples_per_shard=40)
    return folder


def call(slurm: dict[str, str], *command: object) -> str:
    done = subprocess.run(list(map(str, command)), env=slurm, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def submit(slurm: dict[str, str], images: Path, run: Path, *more: object) -> list[str]:
    """Numbers of the jobs."""
    program = [*PROGRAM.split(), "slurm", "submit", *TRAIN, "--data.train", images, "--output", run, "--nodes", 2]
    return re.findall(r"^job (\d+):", call(slurm, *program, "--program", PROGRAM, *more), re.MULTILINE)


def state(slurm: dict[str, str], job: str) -> str:
    return re.findall(r"JobState=(\S+)", call(slurm, "scontrol", "show", "job", "-o", job))[0]


def wait(slurm: dict[str, str], job: str, *states: str, seconds: float = 200) -> str:
    until = time.monotonic() + seconds
    while (now := state(slurm, job)) not in states:
        assert time.monotonic() < until, f"job {job} is {now}, not {states}"
        time.sleep(0.5)
    return now


def reach(slurm: dict[str, str], job: str, run: Path, step: int, seconds: float = 200) -> None:
    until = time.monotonic() + seconds
    while max(samples(run), default=0) < step:
        log = run / "slurm" / f"{job}.out"
        assert time.monotonic() < until, log.read_text() if log.exists() else "not started"
        time.sleep(0.05)


def test_preempted_requeued_resumed_evaluated(slurm: dict[str, str], images: Path, tmp_path: Path) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    several = ["--trainer.strategy", "ddp", "--trainer.devices", 2]
    network = cluster.network_of(Path(slurm["SLURM_CONF"]).parent)
    before = network.received(2)
    job, watch, evaluation = submit(
        slurm, images, run, "--evaluate-train", images, "--evaluate-test", images, "--probes", "knn", "--watch", 2
    )  # fmt: skip
    assert state(slurm, evaluation) == "PENDING"
    reach(slurm, job, run, 5)
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2"]
    preemptor = call(slurm, *urgent).strip()
    whole = start([*TRAIN, "--data.train", images, *several, "--output", undisturbed])
    wait(slurm, preemptor, "COMPLETED")
    assert end(whole)[0] == 0
    wait(slurm, job, "COMPLETED")
    log = (run / "slurm" / f"{job}.out").read_text()
    saved = re.search(r"SIGTERM received: saved .* at step (\d+) of", log)
    assert saved is not None and 5 <= int(saved[1]) < STEPS, log
    assert "interrupted with a checkpoint: queued again" in log and " start 1 on n[1-2]" in log
    assert f"resuming {run} at step {saved[1]} of {STEPS}" in log
    assert samples(run) == samples(undisturbed) and list(samples(run)) == list(range(1, STEPS + 1))
    assert losses(run) == losses(undisturbed)
    assert f"ranks meet at {network.address(1)}:" in log
    weights = sum(t.nbytes for t in torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"].values())
    assert network.received(2) - before > STEPS * weights / 4, "gradients come to the second node from the first one"
    wait(slurm, evaluation, "COMPLETED")
    assert json.loads((run / "results.json").read_text())["knn"]["top1"] > 0
    assert (run / "report.html").exists()
    wait(slurm, watch, "COMPLETED")
    steps = [int(path.parent.name.removeprefix("step_")) for path in run.glob("evaluations/step_*/results.json")]
    said = (run / "slurm" / f"{watch}-watch.out").read_text()
    assert max(steps) == STEPS and set(steps) <= {int(saved[1]), STEPS}, said


def test_term_while_starting_begins_anew_and_cancelled_saves(
    slurm: dict[str, str], images: Path, tmp_path: Path
) -> None:  # fmt: skip
    """Only a job that was cancelled is not queued again; nor one whose run another one trains, which it names."""
    run = tmp_path / "run"
    (job,) = submit(slurm, images, run, "--trainer.max_steps", 100_000)
    log = run / "slurm" / f"{job}.out"
    wait(slurm, job, "RUNNING")
    while "ranks meet at" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.1)
    time.sleep(1)  # Python imports
    call(slurm, "scancel", "--signal=TERM", job)
    wait(slurm, job, "PENDING")
    assert "interrupted before training began: queued again" in log.read_text() and not samples(run)
    reach(slurm, job, run, 3)
    second = call(slurm, "sbatch", "--parsable", "--nodes=1", run / "slurm/pretrain.sbatch").strip()  # beside it
    wait(slurm, second, "FAILED")
    last = (run / "slurm" / f"{second}.out").read_text().splitlines()[-1]
    assert re.search(
        rf"another process trains in {run}: process \d+ on n1 \(job {job}\), since .*not queued again$", last
    )
    call(slurm, "scancel", job)
    assert wait(slurm, job, "CANCELLED", "PENDING") == "CANCELLED"
    assert "SIGTERM received: saved" in log.read_text()
    assert (run / "checkpoints/last.ckpt").exists()


def test_a_lost_node_and_a_killed_rank(slurm: dict[str, str], images: Path, tmp_path: Path) -> None:
    """Both go on from the last checkpoint. The first rank waits for the lost one, until SLURM misses the node."""
    run, folder = tmp_path / "run", Path(slurm["SLURM_CONF"]).parent
    (job,) = submit(slurm, images, run, "--trainer.max_steps", 100_000, "--checkpoint_every", 50)
    reach(slurm, job, run, 60)
    lost = cluster.lose(folder, 2)
    assert {"slurmd", "slurmstepd"} <= set(lost) and any("python" in name for name in lost), lost
    wait(slurm, job, "PENDING")
    log = run / "slurm" / f"{job}.out"
    assert "Node failure on n2" in log.read_text() and "DUE TO NODE FAILURE" in log.read_text()
    made = max(samples(run))
    cluster.bring_back(folder, 2)
    wait(slurm, job, "RUNNING")
    reach(slurm, job, run, made + 60)
    resumed = set(map(int, re.findall(rf"resuming {run} at step (\d+) of 100000", log.read_text())))
    assert resumed == {made // 50 * 50} and made >= 50, "no rank could save when the node was lost"
    os.kill(ranks(run)[0], signal.SIGKILL)
    wait(slurm, job, "PENDING")
    assert "after a new checkpoint: queued again" in log.read_text()
    call(slurm, "scancel", job)


def test_a_rank_that_fails_alone_ends_the_job_with_its_reason(
    slurm: dict[str, str], images: Path, tmp_path: Path
) -> None:  # fmt: skip
    """The second node lacks the data; the first rank waits for it in vain, and SLURM ends it for that."""
    run, missing, program = tmp_path / "run", tmp_path / "missing", tmp_path / "trivit"
    hasty = "import sys; from pretrain import cli, late_files; late_files.PATIENCE = 1; sys.exit(cli.main())"
    second = f'exec {sys.executable} -c "{hasty}" "$@" --data.train {missing}'
    program.write_text(f'#!/bin/bash\n[ $SLURM_PROCID = 0 ] || {second}\n{PROGRAM} "$@"\n')
    program.chmod(0o755)
    script = run / "slurm/pretrain.sbatch"
    script.parent.mkdir(parents=True)
    command = [*TRAIN, "--data.train", images, "--output", run, "--trainer.num_nodes", 2, "--trainer.devices", 1]
    command = [program, "pretrain", *command, "--trainer.strategy", "ddp"]
    job = Job("alone", nodes=2, patience=5)
    script.write_text(pretrain_script(job, "test", script, run, list(map(str, command))))
    number = call(slurm, "sbatch", "--parsable", script).strip()
    wait(slurm, number, "FAILED")
    log = (run / "slurm" / f"{number}.out").read_text()
    assert f"trivit: rank 1 on n2: {missing}" in log and re.search(r"n1: task 0: (Killed|Terminated)", log), log
    assert f"{missing} is not there; a network disk may show it late, waiting up to 1 s" in log
    assert "the first rank to end was n2: task 1: Exited with exit code 2" in log
    assert log.splitlines()[-1].endswith("the settings are wrong, see above: not queued again"), log


def ranks(run: Path) -> list[int]:
    """Processes that train in this folder, loader workers too."""
    found = subprocess.run(
        ["pgrep", "-f", f"pretrain.cli pretrain.*{run} "], capture_output=True, text=True, check=False
    )
    own = [int(pid) for pid in found.stdout.split()]
    return [pid for pid in own if b"srun" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
