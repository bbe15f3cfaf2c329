"""What a user installs: the wheel owns our packages, their configs and templates, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_wheel_owns_our_packages_and_their_data(tmp_path: Path) -> None:
    # the build back end of this environment: CI must not need the network for a test
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("trivit-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"pretrain", "datamodules", "tasks", "evaluation", "slurm", "configs"}
    data = {"tasks/py.typed", "configs/mae_demo.yaml", "configs/suites/imagenet1k.yaml", "evaluation/report.html.jinja"}
    assert data <= set(names)
    assert not [name for name in names if "test" in name or name.endswith((".pyc", ".tar"))]
    for room in ("pretrain", "datamodules", "tasks", "evaluation"):
        ours = {str(path.relative_to(ROOT)) for path in (ROOT / room).rglob("*.py")}
        assert ours == {name for name in names if name.startswith(f"{room}/") and name.endswith(".py")}


def test_the_command_is_installed() -> None:
    done = subprocess.run([Path(sys.executable).parent / "trivit", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("trivit 0.")
