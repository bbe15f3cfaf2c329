"""What measuring costs a run: the share of a step's CPU time that goes into telling where its time goes.

Within one run of `mae_demo` (one thread; a worker loads) every call is timed that tells the clock of a phase, and all
that the callbacks of metrics, progress and health verdicts do in a step, rows of metrics.csv among it. Timing them adds
to them, so the figure is an upper bound. RankMe is left out: it has its own hundredth of the time, to which it keeps.
The row has the limit, a two-hundredth of a step, as its baseline: a ratio above 1 is within it.

Run: python -m benchmarks.measuring
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.table import Row, show
from datamodules.synth import synth
from pretrain.config import parse
from pretrain.health_watch import HealthWatch
from pretrain.metrics import Metrics
from pretrain.phases import PhaseTimer
from pretrain.progress import Progress
from pretrain.run import train

LIMIT = 0.005
LOG_EVERY = WARM_UP = 10
IN_A_STEP = {
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
}  # fmt: skip


class _Marks(Callback):
    """CPU seconds at the end of each step: of the process, and of measuring."""

    def __init__(self, spent: list[float]) -> None:
        self.spent = spent
        self.ends: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ends.append((time.process_time(), self.spent[0]))


def measure(rows: int = 3, more: Sequence[str] = ()) -> list[Row]:
    """CPU milliseconds a step that measuring takes, over the steps of so many rows of metrics.csv.

    Args:
        rows: each of `LOG_EVERY` steps.
        more: arguments of `trivit pretrain`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spent = [0.0]
    marks = _Marks(spent)
    with tempfile.TemporaryDirectory() as folder, _timed(spent):
        synth(Path(folder) / "data", samples=256, size=64, seed=0)
        steps = WARM_UP + LOG_EVERY * rows
        settings = {
            "config": "mae_demo", "data.train": f"{folder}/data", "output": f"{folder}/run", "data.workers": 1,
            "model.warmup_steps": 4, "trainer.max_steps": steps, "trainer.accelerator": "cpu", "log_every": LOG_EVERY,
        }  # fmt: skip
        train(*parse([*(f"--{name}={value}" for name, value in settings.items()), *more]), [marks])
    torch.set_num_threads(threads)
    (began, before), (ended, after) = marks.ends[WARM_UP - 1], marks.ends[-1]
    counted = len(marks.ends) - WARM_UP
    step, measuring = (1e3 * seconds / counted for seconds in (ended - began, after - before))
    told = f"{measuring / step:.3%} of a step of {step:,.0f} CPU ms; RankMe apart"
    setting = "mae_demo: clock of the phases, metrics, progress, verdicts; 1 thread"
    return [Row("measuring", setting, "CPU ms per step", measuring, LIMIT * step, f"{LIMIT:.1%} of a step", note=told)]


@contextmanager
def _timed(spent: list[float]) -> Iterator[None]:
    """Within it, all that measures adds its CPU time to `spent`."""
    inside = False

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            nonlocal inside
            if inside:  # the metrics ask the clock, too
                return call(*arguments, **named)
            inside, start = True, time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                spent[0] += time.thread_time() - start
                inside = False

        return wrapper

    watched: dict[type, set[str]] = {PhaseTimer: {"start", "stop"}, Metrics: IN_A_STEP, Progress: IN_A_STEP}
    with ExitStack() as patches:
        for kind, names in (watched | {HealthWatch: IN_A_STEP}).items():
            for name in names & vars(kind).keys():
                patches.enter_context(patch.object(kind, name, timed(vars(kind)[name])))
        yield


if __name__ == "__main__":
    print(show(measure()))
