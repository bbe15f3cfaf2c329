"""A run's folder that cannot be written: by this user, or by anybody, since its disk can only be read.

Permissions mean nothing to root, so the former is tried as another user, and the latter on a disk mounted so.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.errors import RunError
from pretrain.run_directory import RunDirectory
from tests.pretrain.conftest import SMALL
from tests.pretrain.processes import ENVIRONMENT

NOBODY = 65534


@pytest.fixture
def run() -> Iterator[Path]:
    """As a run leaves it, all of it nobody's if we are root; in a place that every user may enter."""
    base = Path(tempfile.mkdtemp(prefix="trivit-test-"))
    base.chmod(0o755)
    folder = base / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {}\ndata: {}\ntrainer: {}\n")
    (folder / "metrics.csv").write_text("step\n1\n")
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(base)


def claim_as_nobody(folder: Path) -> str:
    """What a user who is not root is told when he goes on with the run; nothing if he may."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        told = "the test itself failed"
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            directory = RunDirectory(folder)
            directory.claim()
            directory.release()
            told = ""
        except RunError as error:
            told = str(error)
        finally:
            os.write(theirs, told.encode())
            os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    with os.fdopen(ours) as pipe:
        return pipe.read()


@pytest.mark.parametrize("closed", ["", "checkpoints", "metrics.csv"])
def test_what_this_user_may_not_write_is_told_before_training(run: Path, closed: str) -> None:
    assert claim_as_nobody(run) == ""
    (run / closed).chmod(0o555)
    told = claim_as_nobody(run)
    assert told.startswith(f"--output {run}: {run / closed} cannot be written by this user") and "\n" not in told
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "metrics.csv"]


COMMANDS = """
import sys
from pretrain.cli import main
folder, data, *small = sys.argv[1:]
for output in ("run", "new"):
    print(main(["pretrain", *small, "--data.train", data, "--output", f"{folder}/{output}"]))
print(main(["report", f"{folder}/run"]))
"""


@pytest.mark.slow
def test_a_disk_that_can_only_be_read_is_told_in_one_line(run: Path, drawn: Path) -> None:
    """For a new run, one that would go on, and a report on it."""
    disk = run.parent
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    alone = ["unshare", "--mount", "sh", "-c", mount, "sh", str(disk)]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        assert "TRIVIT_REQUIRE_SLURM" not in os.environ, "CI must be able to mount"
        pytest.skip("mounting needs root")
    command = [sys.executable, "-c", COMMANDS, str(disk), str(drawn), *SMALL]
    done = subprocess.run([*alone, *command], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0 and done.stdout.split() == ["2", "2", "2"], done.stderr
    old, new, report = [line for line in done.stderr.splitlines() if line.startswith("trivit: ")]
    assert f"--output {run}: {run} cannot be written" in old
    assert f"--output {disk / 'new'}: this folder cannot be made (Read-only file system)" in new
    assert str(run / "report.html") in report and "Traceback" not in done.stderr
