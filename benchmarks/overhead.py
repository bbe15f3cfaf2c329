"""What the program adds to a training step: `trivit pretrain` against the same module in a bare PyTorch loop.

Both train the TIN-40 model on the same stream with the same optimiser, in turns within one process and with one thread.
A step is timed from the end of the one before, data waiting included, by the clock and by the CPU time of the process
(which other load on the machine hardly changes); the first steps of each turn (worker start-up, first allocations) are
left out. A turn counts with its median, and another side begins each turn. RankMe takes its hundredth of the time.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from benchmarks.table import Row, compared
from datamodules.normalize import normalize
from datamodules.shard_datamodule import ShardDataModule
from datamodules.synth import synth
from pretrain.checks import fill_in
from pretrain.config import instantiate, parse
from pretrain.run import train
from tasks.mae import MAE
from tasks.masks import random_noise
from tasks.task import PretrainTask

WARM_UP = 4
Moment = tuple[float, float]  # by the clock and by the CPU, in seconds
Side = Callable[[Path, Path, int], list[Moment]]


class _Clock(Callback):
    """Time between the ends of consecutive steps, in seconds."""

    def __init__(self) -> None:
        self.ends: list[Moment] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ends.append(_now())


def measure(rounds: int = 4, steps: int = 16) -> list[Row]:
    """Milliseconds a step of the program and of the bare loop, in `rounds` turns of `steps` steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        synth(data, samples=4096, size=64, seed=0)
        sides: dict[Side, list[Moment]] = {_program: [], _bare: []}
        for turn in range(rounds):
            for side in (_program, _bare) if turn % 2 else (_bare, _program):
                sides[side].append(_median(side(data, Path(folder) / f"run{turn}", steps)))
    torch.set_num_threads(threads)
    rows = []
    for clock, unit in enumerate(("ms per step", "CPU ms per step")):
        turns = ([1e3 * moment[clock] for moment in sides[side]] for side in (_program, _bare))
        rows.append(compared("overhead", "MAE 192x6, 64 px, batch 128, 1 thread", unit, *turns, "bare PyTorch loop"))
    return rows


def _config(data: Path, output: Path, steps: int) -> tuple[Any, Namespace]:
    return parse(["--config", "mae_tin40", "--data.train", str(data), "--output", str(output),
                  "--trainer.max_steps", str(steps), "--model.warmup_steps", "4"])  # fmt: skip


def _program(data: Path, output: Path, steps: int) -> list[Moment]:
    cli, config = _config(data, output, steps)
    clock = _Clock()
    train(cli, config, [clock])
    return _gaps(clock.ends)


def _bare(data: Path, output: Path, steps: int) -> list[Moment]:
    cli, config = _config(data, output, steps)
    fill_in(config)
    parts = instantiate(cli, config)
    task: PretrainTask = parts.model
    source: ShardDataModule = parts.data
    source.setup("fit")
    model: MAE = task.model  # type: ignore[assignment]
    optimizer = task.configure_optimizers()
    loader = DataLoader(source.stream(1, 0), batch_size=None, sampler=range(steps), num_workers=source.num_workers)
    ends = []
    for batch in loader:
        images = normalize(batch["image"], source.mean, source.std)
        noise = random_noise(batch["rng"], model.encoder.num_patches, "mask")
        loss = model(images, noise, loss_only=True).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ends.append(_now())
    return _gaps(ends)


def _now() -> Moment:
    return time.perf_counter(), time.process_time()


def _median(steps: Sequence[Moment]) -> Moment:
    return statistics.median(step[0] for step in steps), statistics.median(step[1] for step in steps)


def _gaps(ends: list[Moment]) -> list[Moment]:
    ends = ends[WARM_UP:]
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ends)]
