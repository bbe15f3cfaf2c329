"""`metrics.csv`: one row every `log_every` optimiser steps, cut back to the checkpoint on resume.

Values are summed on the device and read only when a row is written, so an accelerator is not made to wait each step.
"""

import contextlib
import csv
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from evaluation.run_files import read_rows
from pretrain.cut_back import cut_back
from pretrain.errors import RunFailure, remedy
from pretrain.fsdp_clock import time_communication
from pretrain.guard import FiniteGuard
from pretrain.phases import COMMUNICATION, PhaseTimer
from pretrain.stop import StopRequest
from tasks.clip_loss import at_least_float32


class Metrics(Callback):
    """Averages what `training_step` returns and writes it, with rate, speed and waiting time, to CSV and loggers.

    Columns: step; epoch (fractional); seconds (training time since the run began, resumed parts included);
    train/loss and the task's other scalars (mean over the row's steps and all ranks; what a task returns as [numerator,
    denominator] is added up and divided); train/lr; train/grad_norm (of
    the row's last step); train/images_per_second (all ranks); train/data_wait (share of the time, 0 to 1); and what
    callbacks before this one have put into `extra` (on rank 0) when a row is `due`.
    """

    def __init__(self, path: Path, every: int, phases: PhaseTimer, guard: FiniteGuard, stop: StopRequest) -> None:
        self.path = path
        self.every = every
        self.phases = phases
        self.guard = guard
        self.stop = stop
        self.peak: float | None = None  # images/s of one device whose arithmetic never waits
        self.newest: dict[str, float] = {}
        self.extra: dict[str, float] = {}
        self._seconds = 0.0  # training time before this process and up to the last row
        self._sums: dict[str, Tensor] = {}  # over the whole steps of the row
        self._step_sums: dict[str, Tensor] = {}  # over the step that has begun; a run may end in the middle of it
        self._row_step = 0  # the step after which the next row begins
        self._clock_step = 0  # the step at which `_since` was read
        self._since = 0.0
        self._columns: list[str] = []
        self._sharded = False  # and its communication timed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut the file back to the step that training goes on from."""
        self._clock_step = trainer.global_step
        self._since = time.perf_counter()
        self._sharded = time_communication(pl_module, self.phases, trainer.strategy.root_device)
        self.phases.begin(trainer.strategy.root_device)
        if trainer.is_global_zero:
            with self._failures_told():
                cut_back(self.path, trainer.global_step)
                self._columns = _columns_of(self.path)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the micro-batch; write a row when it is time."""
        for name, value in outputs.items():
            value = at_least_float32(value.detach()) if isinstance(value, Tensor) else torch.tensor(float(value))
            if name != "loss":  # which Lightning has divided already
                value = value / trainer.accumulate_grad_batches
            _add(self._step_sums, name, value)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        for name, value in self._step_sums.items():
            _add(self._sums, name, value)
        self._step_sums = {}
        if self.due(trainer):
            self._write(trainer, pl_module, trainer.global_step)

    def due(self, trainer: Trainer) -> bool:
        """Whether the end of this optimiser step is one at which a row is written."""
        step = trainer.global_step
        return step > self._row_step and (step % self.every == 0 or step == trainer.max_steps)

    def _write(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        sums = self._over_ranks(trainer)
        steps = step - self._row_step
        values = {f"train/{name}": _mean(total.tolist(), steps) for name, total in sums.items()}  # waits here
        elapsed = time.perf_counter() - self._since
        self._seconds += elapsed
        data = trainer.datamodule  # type: ignore[attr-defined]
        values["train/lr"] = float(pl_module.lr_now)  # type: ignore[arg-type]
        if self.guard.grad_norm is not None:
            values["train/grad_norm"] = float(self.guard.grad_norm)
        rate = (step - self._clock_step) * data.global_batch_size / elapsed
        values["train/images_per_second"] = rate
        if self.peak is not None:
            values["train/mfu"] = rate / trainer.world_size / self.peak
        values |= self._shares(trainer)
        values["train/peak_memory"] = peak_memory(trainer.strategy.root_device)
        row = {"step": step, "epoch": step / data.steps_per_epoch, "seconds": self._seconds, **values, **self.extra}
        self.newest, self.extra = row, {}
        if trainer.is_global_zero:
            with self._failures_told():
                self._append(row)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=step)
        self._sums = {}
        self._row_step = self._clock_step = step
        self._since = time.perf_counter()

    def _shares(self, trainer: Trainer) -> dict[str, float]:
        """Share of the time since the last row that each phase took; together they are 1."""
        seconds: dict[str, float] = {str(phase): each for phase, each in self.phases.take().items()}
        if (waiting := exposed_communication(trainer.strategy.model)) is not None:
            seconds[COMMUNICATION] = waiting * seconds["backward"]
            seconds["backward"] -= seconds[COMMUNICATION]
        elif not self._sharded:
            del seconds[COMMUNICATION]
        whole = sum(seconds.values()) or 1.0
        return {f"time/{phase}": each / whole for phase, each in seconds.items()}

    def _append(self, row: dict[str, float]) -> None:
        if not set(row) <= set(self._columns):  # a column that appears late (a probe, say): write the file anew
            self._columns += [name for name in row if name not in self._columns]
            rows = read_rows(self.path)
            _write_all(self.path, self._columns, rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow({k: _number(v) for k, v in row.items()})

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        """Only the first rank writes; a full disk must end the others, too."""
        try:
            yield
        except OSError as error:
            self.stop.fail(RunFailure(
                f"cannot write {self.path} ({error.strerror or error}). {remedy(error)} and run the same command again"
            ))  # fmt: skip

    def _over_ranks(self, trainer: Trainer) -> dict[str, Tensor]:
        """Collective: the sums so far, as means over the ranks."""
        if trainer.world_size == 1 or not self._sums:
            return self._sums
        device = trainer.strategy.root_device
        flat = torch.cat([value.to(device).reshape(-1) for value in self._sums.values()])
        parts = trainer.strategy.reduce(flat, reduce_op="mean").split([value.numel() for value in self._sums.values()])
        sums = zip(self._sums.items(), parts, strict=True)
        return {name: part.view(value.shape) for (name, value), part in sums}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Collective (every rank assembles the checkpoint): training time so far, and the row that is half full."""
        checkpoint["metrics"] = {
            "seconds": self._seconds + time.perf_counter() - self._since,
            "sums": {name: total.cpu() for name, total in self._over_ranks(trainer).items()},
            "row_step": self._row_step,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on counting from the checkpoint."""
        state = checkpoint["metrics"]
        self._seconds, self._row_step = float(state["seconds"]), int(state["row_step"])
        self._sums = {name: total.to(trainer.strategy.root_device) for name, total in state["sums"].items()}


def exposed_communication(model: Any) -> float | None:
    """Share of the backward pass in which it only waits for gradients of other ranks; None: not DDP, or not known yet.

    DDP times itself, in its first ten steps and then in every hundredth.
    """
    if not isinstance(model, DistributedDataParallel):
        return None
    told = model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    if "backward_comm_time" not in told:
        return None
    alone = told["backward_comm_time"] - told["backward_compute_comm_overlap_time"]
    return float(alone / max(1, alone + told["backward_compute_time"]))


def peak_memory(device: torch.device) -> float:
    """The most memory in GiB that this process has held so far: of its GPU, by tensors; without one, of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError, StopIteration):
        # `ru_maxrss` begins with the memory of the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**20
    units = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units / 2**30


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _mean(total: float | list[float], steps: int) -> float:
    if not isinstance(total, list):
        return total / steps
    numerator, denominator = total
    return numerator / denominator if denominator else math.nan


def _columns_of(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


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
