"""Says on the console how a run is, in words, whenever that changes and at the end."""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm.auto import tqdm

from evaluation.health import ROWS, Health, by_medians, judge_health
from evaluation.health_words import told
from evaluation.run_files import Run, non_finite_step, read_metrics
from evaluation.time_shares import bottleneck
from pretrain.errors import NonFiniteError
from pretrain.metrics import Metrics

TIMES, TIMES_AGAIN = 2, 5
"""A verdict is told when it has been the same so many times; good news after another verdict needs more."""
MOST_ROWS = 1000
"""With n times as many, only every n-th is judged."""


class HealthWatch(Callback):
    """Judges the run after every row of metrics.csv, as `trivit report` will; rank 0 speaks.

    Args:
        metrics: it writes the rows, and stands before this callback.
        config: the resolved config, as plain values.
    """

    def __init__(self, metrics: Metrics, config: dict[str, Any]) -> None:
        self.metrics = metrics
        self.run = Run(metrics.path.parent, metrics.path.parent.name, "", config, {}, {}, [])
        self.told: Health | None = None
        self._columns: dict[str, list[float]] = {}
        self._candidate = ("", 0)  # a state, and how many times it has been found

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the rows that are there already."""
        if trainer.is_global_zero:
            self._columns = {name: column.tolist() for name, column in read_metrics(self.metrics.path).items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge, when a row has been written in this step."""
        steps, newest = self._columns.get("step", []), self.metrics.newest
        if not trainer.is_global_zero or newest.get("step") in (None, *steps[-1:]):
            return
        self._add(newest)
        if len(self._columns["step"]) % (1 + len(steps) // MOST_ROWS):
            return  # a long run is not looked at as often, for all that its curve takes more time
        health = judge_health(self._now())
        state, times = self._candidate
        self._candidate = (health.state, times + 1 if health.state == state else 1)
        before = self.told.state if self.told else "early"  # that it is early needs no telling
        good = not health.ill and (health.state != "early" or (self.told is not None and self.told.ill))
        needed = TIMES_AGAIN if self.told and good else TIMES
        if self._candidate[1] >= needed and health.state != before:
            self.told = health
            _say(f"step {newest['step']}: {health.line}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last word, and the numbers behind it."""
        if trainer.is_global_zero and self._columns:
            run = self._now()
            numbers = [f"  {line}" for line in told(run)]
            basis = f" (By the medians of the last {ROWS} rows, as the numbers below.)" if by_medians(run) else ""
            _say("\n".join([f"verdict at step {run.step}: {judge_health(run).line}{basis}", *numbers]))
            if limit := bottleneck(run):
                _say(limit.sentence)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A run that ends with NaN has a verdict, too."""
        if trainer.is_global_zero and isinstance(exception, NonFiniteError):
            step = non_finite_step(self.run.checkpoint.parent, 0) or trainer.global_step + 1
            _say(f"step {step}: {judge_health(replace(self._now(), non_finite=step)).line}")

    def _add(self, row: dict[str, float]) -> None:
        before = len(self._columns.get("step", []))
        for name in {*self._columns, *row}:
            self._columns.setdefault(name, [np.nan] * before).append(float(row.get(name, np.nan)))

    def _now(self) -> Run:
        return replace(self.run, metrics={name: np.array(column) for name, column in self._columns.items()})


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # above the bar
