"""The lock on a run's folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.errors import RunError
from pretrain.run_directory import RunDirectory, launched_rank, srun_started
from tests.pretrain.conftest import pretrain

TRAINS = """
import os, sys, time
from pathlib import Path
from pretrain.run_directory import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
directory.claim()
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(100)
"""


def test_one_process_trains_in_a_folder_and_a_killed_one_does_not(tmp_path: Path) -> None:
    """A loader worker may live on for a moment; the same command must be able to go on at once."""
    run = subprocess.Popen([sys.executable, "-c", TRAINS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    try:
        with pytest.raises(RunError, match="another process trains in"):
            RunDirectory(tmp_path).claim()
        run.kill()
        run.wait()
        directory = RunDirectory(tmp_path)
        directory.claim()
        assert Path(f"/proc/{worker}").exists()
        directory.release()
    finally:
        run.kill()
        os.kill(worker, signal.SIGKILL)


def test_what_a_start_left_before_its_config_does_not_block_the_next(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    directory = RunDirectory(tmp_path)
    directory.claim()
    directory.release()
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(RunError, match="holds files but no trivit run"):
        RunDirectory(tmp_path).claim()


def test_settings_are_those_of_the_first_step(small: list[str], tmp_path: Path) -> None:
    """A folder in which nothing was trained takes a corrected command; after a step, other settings are refused."""
    run = tmp_path / "run"
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 3, "--model.mask_ratio", 0.5) == 0
    saved = (run / "config.yaml").read_text()
    directory = RunDirectory(run)
    assert directory.has_trained()
    directory.metrics.unlink()
    assert directory.has_trained()  # by its checkpoint
    (run / "checkpoints/last.ckpt").unlink()
    assert not directory.has_trained()
    directory.metrics.write_text("step,train/loss\n1,0.5\n")
    assert directory.has_trained()
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 3) == 2
    assert (run / "config.yaml").read_text() == saved
    directory.metrics.write_text("step,train/loss\n")
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 3) == 0
    assert "mask_ratio: 0.75" in (run / "config.yaml").read_text()


JOB = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "b16"}
SHELL = JOB | {"SLURM_JOB_NAME": "bash"}
TORCHRUN = {"RANK": "9", "LOCAL_RANK": "1", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize(
    ("places", "rank", "by_srun"),
    [
        ({}, 0, False),
        (JOB | {"SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, 5, True),
        (JOB | {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "LOCAL_RANK": "1"}, 5, True),  # a script that says so itself
        (SHELL, 0, False),  # srun --pty bash, and what Lightning starts from there
        (SHELL | {"LOCAL_RANK": "0", "NODE_RANK": "0"}, 0, False),
        (SHELL | {"LOCAL_RANK": "3", "NODE_RANK": "0"}, 3, False),
        (JOB | TORCHRUN, 9, False),
        ({"LOCAL_RANK": "2", "NODE_RANK": "0"}, 2, False),  # Lightning
        ({"NODE_RANK": "1"}, 1, False),
    ],
)
def test_each_process_knows_its_rank_whoever_started_it(
    places: dict[str, str], rank: int, by_srun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*JOB, *TORCHRUN, "NODE_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == rank and srun_started() == by_srun
