"""Scores of a run at its steps: `trivit evaluate RUN --by-step` keeps those of the newest checkpoint.

evaluations/step_00004000/results.json   as RUN/results.json, of the checkpoint after that step
evaluations/.newest.ckpt                 while it is evaluated: that checkpoint under a name that training leaves alone
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evaluation.errors import EvaluationError
from pretrain.checkpoint_files import remove
from pretrain.checkpoints import read_checkpoint
from tasks.encoder_files import checkpoint_path

FOLDER, HELD = "evaluations", ".newest.ckpt"
TRIES, PAUSE = 5, 0.2  # a folder that takes the place of another one is moved in two renames


def evaluate_step(run: Path, evaluate: Callable[..., Any], **options: Any) -> Path:
    """Evaluate the newest checkpoint of a run once; the folder of its results.

    Args:
        run: its folder; training may go on there meanwhile.
        evaluate: `evaluation.together.evaluate_together`, or the like.
        options: of it, besides source and output.

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
            evaluate(str(checkpoint), output=output, **options)
    return output


@contextlib.contextmanager
def held(run: Path) -> Iterator[Path]:
    """The newest checkpoint under another name, for a while: training may replace it, an evaluation reads it often."""
    copy = run / FOLDER / HELD
    copy.parent.mkdir(exist_ok=True)
    for attempt in range(1, TRIES + 1):
        newest = checkpoint_path(run)
        try:
            _link(newest, copy)
            break
        except FileNotFoundError:
            if attempt == TRIES:
                raise
            time.sleep(PAUSE)
    try:
        yield copy
    finally:
        remove(copy)


def _link(path: Path, copy: Path) -> None:
    remove(copy)
    if path.is_dir():
        copy.mkdir()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        target = copy / file.name if path.is_dir() else copy
        try:
            os.link(file, target)
        except FileNotFoundError:
            raise
        except OSError:  # not every file system has hard links
            shutil.copyfile(file, target)
