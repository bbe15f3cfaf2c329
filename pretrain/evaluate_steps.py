"""Scores of a run at its steps: `trivit evaluate RUN --by-step` keeps those of the newest checkpoint.

evaluations/step_00004000/results.json   as RUN/results.json, of the checkpoint after that step
evaluations/.newest-*/                   while it is evaluated: that checkpoint where training and others leave it alone
"""

import contextlib
import fcntl
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evaluation.errors import EvaluationError
from pretrain.checkpoint_files import LAST
from pretrain.checkpoints import read_checkpoint
from tasks.encoder_files import checkpoint_path

FOLDER, HELD = "evaluations", ".newest-"
DAY = 24 * 3600.0
TRIES, PAUSE = 5, 0.2  # a folder that takes the place of another one is moved in two renames


def evaluate_step(run: Path, evaluate: Callable[..., Any], **options: Any) -> Path:
    """Evaluate the newest checkpoint of a run once; the folder of its results.

    Args:
        run: its folder; training may go on there meanwhile.
        evaluate: `evaluation.together.evaluate_together`, or the like.
        options: of it, besides source, output and called.

    Raises:
        EvaluationError, TaskError, RunError: as `evaluate`; this is no run's folder; several processes were started.
    """
    if not (run / "config.yaml").is_file():
        raise EvaluationError(f"--by-step needs a run's folder, and {run} has no config.yaml")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EvaluationError("--by-step is for one process: start it without torchrun")
    with held(run) as checkpoint:
        step = int(read_checkpoint(checkpoint)["global_step"])
        output = run / FOLDER / f"step_{step:08d}"
        if (output / "results.json").is_file():
            print(f"step {step:,} was evaluated before: {output / 'results.json'}")
        else:
            print(f"step {step:,}:")
            evaluate(str(checkpoint), output=output, called=f"{run} at step {step}", **options)
    return output


@contextlib.contextmanager
def held(run: Path) -> Iterator[Path]:
    """The newest checkpoint elsewhere, for a while: training may replace it, an evaluation reads it often.

    It lies in a folder that looks like the run's, since its config says how captions were made, and that is of this
    evaluation alone: a watch job and a user may evaluate at once.
    """
    (run / FOLDER).mkdir(exist_ok=True)
    for place in (run / FOLDER).glob(f"{HELD}*"):
        if _abandoned(place):
            shutil.rmtree(place, ignore_errors=True)  # another process may be doing so
    place = Path(tempfile.mkdtemp(prefix=HELD, dir=run / FOLDER))
    try:
        with _in_use(place):
            yield _hold(run, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _hold(run: Path, place: Path) -> Path:
    copy = place / "checkpoints" / LAST
    copy.parent.mkdir()
    _link(run / "config.yaml", place / "config.yaml")
    for attempt in range(1, TRIES + 1):
        newest = checkpoint_path(run)
        try:
            _link(newest, copy)
            break
        except FileNotFoundError:
            if attempt == TRIES:
                raise
            time.sleep(PAUSE)
    return copy


@contextlib.contextmanager
def _in_use(place: Path) -> Iterator[None]:
    """Until this process ends, however it ends, `_abandoned` is false of a folder."""
    lock, aside = _lock(place), _lock(place).with_suffix(".part")
    with aside.open("a") as file:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        aside.rename(lock)  # after it was locked, so that nobody finds it free meanwhile
        yield


def _abandoned(place: Path) -> bool:
    """The process that made a folder is gone; where that cannot be known, the folder is older than a day."""
    try:
        with _lock(place).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - place.stat().st_mtime > DAY
        return False


def _lock(place: Path) -> Path:
    """Of this machine alone: file systems of clusters are often mounted so that others do not see a lock."""
    return place / f"{platform.node()}.lock"


def _link(path: Path, copy: Path) -> None:
    if path.is_dir():
        shutil.rmtree(copy, ignore_errors=True)  # of the try before
        copy.mkdir()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        target = copy / file.name if path.is_dir() else copy
        try:
            os.link(file, target)
        except FileNotFoundError:
            raise
        except OSError:  # not every file system has hard links
            shutil.copyfile(file, target)
