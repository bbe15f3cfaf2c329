"""`metrics.csv`: one row every `log_every` optimiser steps, cut back to the checkpoint on resume.

Values are summed on the device and read only when a row is written, so an accelerator is not made to wait each step.
"""

import csv
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from pretrain.guard import FiniteGuard
from pretrain.phases import PhaseTimer


class Metrics(Callback):
    """Averages what `training_step` returns and writes it, with rate, speed and waiting time, to CSV and loggers.

    Columns: step; epoch (fractional); seconds (training time since the run began, resumed parts included);
    train/loss and the task's other scalars (mean over the row's steps and all ranks); train/lr; train/grad_norm (of
    the row's last step); train/images_per_second (all ranks); train/data_wait (share of the time, 0 to 1).
    """

    def __init__(self, path: Path, every: int, phases: PhaseTimer, guard: FiniteGuard) -> None:
        self.path = path
        self.every = every
        self.phases = phases
        self.guard = guard
        self.newest: dict[str, float] = {}
        self._seconds = 0.0  # training time before this process and up to the last row
        self._sums: dict[str, Tensor] = {}
        self._micro_steps = 0
        self._row_step = 0
        self._since = 0.0
        self._columns: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut the file back to the step that training goes on from."""
        self._row_step = trainer.global_step
        self._since = time.perf_counter()
        if trainer.is_global_zero:
            self._columns = cut_back(self.path, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the micro-batch; write a row when it is time."""
        for name, value in outputs.items():
            value = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._micro_steps += 1
        step = trainer.global_step
        at_boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if at_boundary and step > self._row_step and (step % self.every == 0 or step == trainer.max_steps):
            self._write(trainer, pl_module, step)

    def _write(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        means = {name: total / self._micro_steps for name, total in self._sums.items()}
        if trainer.world_size > 1:
            reduced = trainer.strategy.reduce(torch.stack([v.to(pl_module.device) for v in means.values()]), "mean")
            means = dict(zip(means, reduced, strict=True))
        values = {f"train/{name}": float(value) for name, value in means.items()}  # waits for the device here
        elapsed = time.perf_counter() - self._since
        self._seconds += elapsed
        data = trainer.datamodule  # type: ignore[attr-defined]
        values["train/lr"] = float(pl_module.lr_now)  # type: ignore[arg-type]
        if self.guard.grad_norm is not None:
            values["train/grad_norm"] = float(self.guard.grad_norm)
        values["train/images_per_second"] = (step - self._row_step) * data.global_batch_size / elapsed
        values["train/data_wait"] = min(1.0, self.phases.take("data") / elapsed)
        row = {"step": step, "epoch": step / data.steps_per_epoch, "seconds": self._seconds, **values}
        self.newest = row
        if trainer.is_global_zero:
            self._append(row)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=step)
        self._sums, self._micro_steps, self._row_step = {}, 0, step
        self._since = time.perf_counter()

    def _append(self, row: dict[str, float]) -> None:
        if not set(row) <= set(self._columns):  # a column that appears late (a probe, say): write the file anew
            self._columns += [name for name in row if name not in self._columns]
            rows = read(self.path)
            _write_all(self.path, self._columns, rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow({k: _number(v) for k, v in row.items()})

    def state_dict(self) -> dict[str, Any]:
        """Training time so far, in seconds."""
        return {"seconds": self._seconds + (time.perf_counter() - self._since if self._since else 0.0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from the checkpoint."""
        self._seconds = float(state_dict["seconds"])


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics file; none when it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cut_back(path: Path, step: int) -> list[str]:
    """Drop the rows after `step` (and a half-written last one); returns the columns."""
    rows = [row for row in read(path) if row["step"].isdigit() and int(row["step"]) <= step]
    rows = [row for row in rows if None not in row.values()]
    columns = list(rows[0]) if rows else []
    _write_all(path, columns, rows)
    return columns


def _write_all(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    aside = path.with_suffix(".csv.part")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if columns:
            writer.writeheader()
        writer.writerows(rows)
    aside.replace(path)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"
