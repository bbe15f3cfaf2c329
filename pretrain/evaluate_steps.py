"""Scores of a run at its steps: `trivit evaluate RUN --by-step` keeps those of the newest checkpoint.

evaluations/step_00004000/results.json   as RUN/results.json, of the checkpoint after that step
evaluations/.newest-*/                   while it is evaluated: that checkpoint where training and others leave it alone
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.errors import EvaluationError
from evaluation.probes import TEXT_PROBES
from pretrain.checkpoint_files import LAST, remove
from pretrain.checkpoints import read_checkpoint
from pretrain.errors import RunError
from tasks.encoder_files import checkpoint_hash, checkpoint_path
from tasks.errors import TaskError

FOLDER, HELD = "evaluations", ".newest-"
DAY = 24 * 3600.0
TRIES, PAUSE = 5, 0.2  # a folder takes the place of another one in two renames, and one is removed file by file
GONE = (errno.ENOENT, errno.ESTALE)


def evaluate_step(
    run: Path, evaluate: Callable[..., Any], *, probes: Sequence[str], floors: bool = True, **options: Any
) -> Path:
    """Evaluate the newest checkpoint of a run by the probes that it has no scores of yet; the folder of its results.

    Args:
        run: its folder; training may go on there meanwhile.
        evaluate: `evaluation.together.evaluate_together`, or the like.
        probes, floors: of it; scores that shall have floors and have none are made again.
        options: of it, besides source, output and called.

    Raises:
        EvaluationError, TaskError: as `evaluate`; this is no run's folder, or has no checkpoint that can be read;
            several processes were started; the results that are there cannot be read.
    """
    if not (run / "config.yaml").is_file():
        raise EvaluationError(f"--by-step needs a run's folder, and {run} has no config.yaml")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EvaluationError("--by-step is for one process: start it without torchrun")
    with held(run) as (checkpoint, step):
        output = run / FOLDER / f"step_{step:08d}"
        there = _scores(place := output / "results.json")
        missing = _missing(there, probes, floors)
        if missing and {_hash(there[name]) for name in probes if name in there} - {checkpoint_hash(checkpoint)}:
            missing = tuple(probes)  # the step was trained again, and `evaluate` does not keep the scores of before
        if missing:
            print(f"step {step:,}:")
            called = f"{run} at step {step}"
            evaluate(str(checkpoint), output=output, called=called, probes=missing, floors=floors, **options)
        else:
            print(f"step {step:,} was evaluated before: {place}")
    return output


def _scores(place: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(place.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(result, dict) for result in found.values()):
        raise EvaluationError(f"{place} does not hold scores by probe: move it away and evaluate again")
    return found


def _missing(there: dict[str, dict[str, Any]], probes: Sequence[str], floors: bool) -> tuple[str, ...]:
    """Probes without a score, or without its floor, which takes as long and is written after it."""
    done = set(there)
    if floors:
        done &= {*there.get("floors", {}).get("untrained", {}), *TEXT_PROBES}
    return tuple(name for name in probes if name not in done)


def _hash(result: dict[str, Any]) -> Any:
    return result.get("protocol", {}).get("checkpoint")


@contextlib.contextmanager
def held(run: Path) -> Iterator[tuple[Path, int]]:
    """The newest checkpoint elsewhere, and its step: training may replace it, an evaluation reads it more than once.

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


def _hold(run: Path, place: Path) -> tuple[Path, int]:
    copy = place / "checkpoints" / LAST
    copy.parent.mkdir()
    _keep(run / "config.yaml", place / "config.yaml")
    tries = TRIES
    while True:
        tries -= 1
        try:
            _keep_all(checkpoint_path(run), copy)
            return copy, int(read_checkpoint(copy)["global_step"])
        except TaskError:
            if not tries:
                raise
        except (OSError, RunError) as error:
            if isinstance(error, OSError) and error.errno not in GONE:
                raise
            if not tries:
                last = run / "checkpoints" / LAST
                raise EvaluationError(f"{last} is damaged: evaluate the next one, or restore a copy") from error
        remove(copy)
        time.sleep(PAUSE)


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


def _keep_all(path: Path, copy: Path) -> None:
    """A checkpoint of either kind under another name; never files of two steps, perhaps not all of one."""
    if not path.is_dir():
        _keep(path, copy)
        return
    copy.mkdir()
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)  # the same one also when another takes its name
    try:
        for name in os.listdir(folder):  # noqa: PTH208 (there is no path to it)
            _keep(name, copy / name, folder)
    finally:
        os.close(folder)


def _keep(path: str | Path, copy: Path, folder: int | None = None) -> None:
    """A file, of the open folder if there is one."""
    try:
        os.link(path, copy, src_dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError:  # not every file system has hard links
        with (
            open(path, "rb", opener=lambda name, flags: os.open(name, flags, dir_fd=folder)) as file,
            copy.open("wb") as kept,
        ):
            shutil.copyfileobj(file, kept, 1 << 20)
