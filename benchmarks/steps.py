"""Training steps of two sides against each other: their CPU time in turns, and the memory each needs by itself."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.utils._pytree import tree_map

from benchmarks.memory import resident_mib
from benchmarks.table import Row, compared
from pretrain.checks import fill_in
from pretrain.config import instantiate, parse
from pretrain.cost import trainer_stand_in
from tasks.task import PretrainTask

Step = Callable[[], float]  # takes one training step and gives its loss


def task_of(config: str, *options: str) -> Any:
    """Task and datamodule (not set up) as a run builds them from a YAML of `configs/` and options on top."""
    fixed = [] if "--data.train" in options else ["--data.train", "nowhere"]
    cli, told = parse(["--config", config, "--output", "nowhere", "--seed", "0", *fixed, *options])
    fill_in(told)
    return instantiate(cli, told)


class TaskStep:
    """A task's own hooks as Lightning calls them in an optimiser step, without Lightning.

    Args:
        task: as built for a run.
        batch_size: samples of a step.
        next_batch: gives a batch, normalised; views may lie on the device, the rest is on the host.
        device: where to train.
        autocast: to this type, as trainer.precision of a run; None: float32.
    """

    def __init__(
        self, task: PretrainTask, batch_size: int, next_batch: Callable[[], dict[str, Any]],
        device: str = "cpu", autocast: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.place = trainer_stand_in(batch_size)
        task.trainer = self.place  # type: ignore[assignment]
        task.setup("fit")
        self.task, self.next_batch = task.train().to(device), next_batch
        self.optimizer = task.configure_optimizers()
        self.device, self.autocast = device, torch.autocast(device, autocast or torch.bfloat16, autocast is not None)

    def __call__(self) -> float:
        """One step; its loss."""
        return float(self.step())

    def step(self) -> torch.Tensor:
        """One step; its loss, without waiting for the device."""
        task, step = self.task, self.place.global_step
        losses: list[torch.Tensor] = []
        batch = task.on_before_batch_transfer(self.next_batch(), 0)
        batch = tree_map(lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else x, batch)
        task.on_train_batch_start(batch, step)

        def closure() -> torch.Tensor:
            with self.autocast:
                loss: torch.Tensor = task.training_step(batch, step)["loss"]
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if type(task).configure_gradient_clipping is not LightningModule.configure_gradient_clipping:
                task.configure_gradient_clipping(self.optimizer)
            losses.append(loss.detach())
            return loss

        task.optimizer_step(0, step, self.optimizer, closure)
        self.place.global_step += 1
        return losses[0]


def in_turns(sides: Sequence[Step], rounds: int, warm_up: int = 1) -> list[list[float]]:
    """CPU seconds of each round's step of each side; they take turns, and another one begins each round."""
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(warm_up + rounds):
        order = list(enumerate(sides))
        for i, step in order[turn % len(sides) :] + order[: turn % len(sides)]:
            start = time.process_time()
            step()
            if turn >= warm_up:
                seconds[i].append(time.process_time() - start)
    return seconds


def step_rows(name: str, setting: Any, ours: Callable[..., Step], baseline: Callable[[Any], Step], against: str,
              rounds: int) -> list[Row]:  # fmt: skip
    """Images per CPU second and peak memory of both sides, ours in bfloat16 too where the CPU multiplies it."""
    half = {"bf16-mixed": {"autocast": torch.bfloat16}} if multiplies_bfloat16() else {}
    variants: dict[str, dict[str, Any]] = {"": {}, **half}
    sides = [*(ours(setting, **options) for options in variants.values()), baseline(setting)]
    *times, base = in_turns(sides, rounds)
    del sides
    makers = [partial(baseline, setting), *(partial(ours, setting, **options) for options in variants.values())]
    most, *memories = peak_memories(makers)
    rows = []
    for variant, seconds, memory in zip(variants, times, memories, strict=True):
        told = f"{setting.name}; ours {variant}, baseline float32" if variant else setting.name
        rates = ([setting.batch / each for each in turns] for turns in (seconds, base))
        rows.append(compared(name, told, "images/s", *rates, against))
        rows.append(Row(name, f"{told}; peak memory", "MiB", memory, most, against))
    return rows


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def peak_memories(makers: Sequence[Callable[[], Step]]) -> list[float]:
    """MiB that a process of its own grows to at most while it builds a side and takes two steps, for each side.

    Two at a time: what else the machine does changes their time, not their memory.
    """
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        return list(pool.map(_grow, makers))


def _grow(make: Callable[[], Step]) -> float:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    before = resident_mib("VmRSS")
    step = make()
    for _ in range(2):  # the first one makes the moments that the second finds
        step()
    return resident_mib("VmHWM") - before
