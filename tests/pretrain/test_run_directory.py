"""The lock on a run's folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.errors import RunError
from pretrain.run_directory import RunDirectory

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
