"""Whether a folder can be that of a run. Nothing heavy is imported here: it is also asked before a job is queued."""

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from pretrain.errors import RunError
from pretrain.run_lock import RunLock

WRITTEN_BEFORE = (".lock", "config.yaml.part", "slurm", "wandb")
"""What may be in the folder before config.yaml is."""


def check_ours(path: Path) -> None:
    """RunError when the folder of a run is a file, or holds files that are no run's."""
    if path.is_file():
        raise RunError(f"--output {path} is a file; name a folder")
    if path.is_dir() and any(p.name not in WRITTEN_BEFORE for p in path.iterdir()) and not _holds_a_run(path):
        raise RunError(f"--output {path} holds files but no trivit run; name a new or empty folder")


def check_writable(path: Path) -> None:
    """RunError now, and not after hours, when something that the run goes on writing cannot be written."""
    for part in (path, path / "checkpoints", path / "metrics.csv", path / "samples.jsonl"):
        if part.exists() and not os.access(part, os.W_OK):
            raise RunError(
                f"--output {path}: {part} cannot be written by this user, or lies on a disk that can only be "
                "read; name another folder, or make it writable"
            )


def check_before_queue(path: Path, steps: float | None, epochs: float | None) -> Iterator[str]:
    """What the one who submits a job that trains in this folder should know; nothing is written or locked.

    Args:
        path: the folder, which need not be there.
        steps, epochs: length of the run, as far as it is known.

    Raises:
        RunError: the job would end at its start, as the folder is now.
    """
    check_ours(path)
    check_writable(path)
    above = next(place for place in (path, *path.parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise RunError(f"--output {path}: this folder cannot be made in {above}; name another one")
    try:
        RunLock(path).look()
    except RunError as error:  # a job may be meant to begin when that one has ended (sbatch --dependency)
        yield f"{error}; the job ends at its start if that is still so"
    done, epoch = _last_row(path / "metrics.csv")
    if not (done and epoch and (path / "checkpoints/last.ckpt").exists()):
        return
    asked = steps if epochs is None else round(epochs * done / epoch)
    if asked is not None and 0 < asked <= done:
        yield f"{path} has {done:,} of {asked:,.0f} steps: the job will say that it is finished, and end"


def _holds_a_run(path: Path) -> bool:
    """Whether config.yaml is one of ours, or so damaged that it may have been."""
    if not (path / "config.yaml").exists():
        return False
    try:
        config = yaml.safe_load((path / "config.yaml").read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return True
    return isinstance(config, dict) and {"model", "data", "trainer"} <= config.keys()


def _last_row(metrics: Path) -> tuple[int, float]:
    """Step and epoch of the last row of metrics.csv; zeros where there is none, or none that can be read."""
    try:
        names, *rows = metrics.read_text().splitlines()
        last = dict(zip(names.split(","), rows[-1].split(","), strict=True))
        return int(last["step"]), float(last["epoch"])
    except (OSError, ValueError, KeyError, IndexError):
        return 0, 0.0
