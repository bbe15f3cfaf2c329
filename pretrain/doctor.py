"""`trivit doctor`: what is here, what a run will need, what is wrong with it, before a queue or a night finds out."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from jsonargparse import Namespace

from datamodules.errors import DataError
from datamodules.shard_datamodule import Layout, ShardDataModule
from pretrain import doctor_run
from pretrain.checks import check, fill_in, max_steps
from pretrain.config import PretrainCLI, instantiate, parse
from pretrain.cost import step_cost
from pretrain.doctor_data import reading_rate, training_set
from pretrain.doctor_machine import machine
from pretrain.errors import RunError
from pretrain.findings import Finding
from pretrain.fsdp import NAME as FSDP2
from pretrain.hardware import GPU, gpu_called, gpu_here
from pretrain.refusals import refusals
from pretrain.scaling import Cluster, step_time
from tasks.errors import TaskError
from tasks.task import PretrainTask

Section = tuple[str, Iterator[Finding]]


def doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print what was found; exit code 1 if something is wrong.

    Args:
        arguments: of `doctor_options.add_options`.
        rest: the arguments of `trivit pretrain`; none: the machine alone.

    Raises:
        RunError: the config or an option cannot be understood.
    """
    for name in ("nodes", "gpus_per_node", "mfu", "network"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            raise RunError(f"--{name.replace('_', '-')} must be positive, not {value:g}")
    if arguments.mfu > 1:
        raise RunError(f"--mfu is a share of the peak, at most 1, not {arguments.mfu:g}")
    gpu = gpu_called(arguments.gpu) if arguments.gpu else gpu_here()
    wrong = 0
    for title, findings in _sections(arguments, rest, gpu):
        print(title)
        try:
            for level, text in findings:
                print(f"  {level:5}  {text}", flush=True)
                wrong += level == "wrong"
        except (DataError, RunError, TaskError) as error:  # what would end the run at its start
            print(f"  {'wrong':5}  {' '.join(str(error).split())}")
            wrong += 1
    print(f"{wrong} to mend, see above" if wrong else "nothing wrong was found")
    return 1 if wrong else 0


def _sections(arguments: argparse.Namespace, rest: list[str], gpu: GPU | None) -> Iterator[Section]:
    given = {word.partition("=")[0] for word in rest}
    if not rest:
        yield "This machine", machine(None)
        return
    stand_ins = [word for name in ("--output", "--data.train") if name not in given for word in (name, "unnamed")]
    cli, config = parse([*rest, *stand_ins])
    check(config)
    fill_in(config)
    yield "This machine", machine(Path(config.output) if "--output" in given else None)
    parts = instantiate(cli, config)
    run = _Run(cli, config, parts.model, parts.data, gpu, arguments, "--data.train" in given)
    yield "The data", run.of_data()
    if run.layout is not None and run.possible:
        yield f"The run, on {run.world_size} x {arguments.gpu or 'what is here'}", run.of_run()


class _Run:
    """What is found out about the data, and used for the run."""

    def __init__(
        self, cli: PretrainCLI, config: Namespace, task: PretrainTask, data: ShardDataModule, gpu: GPU | None,
        arguments: argparse.Namespace, has_data: bool,
    ) -> None:  # fmt: skip
        self.cli, self.config, self.task, self.data, self.gpu = cli, config, task, data, gpu
        self.arguments, self.has_data = arguments, has_data
        data.tokenize, data.whole_batches = task.tokenize, task.whole_batches
        self.gpus = arguments.gpus_per_node or max(1, torch.cuda.device_count())
        self.world_size = arguments.nodes * self.gpus
        self.layout: Layout | None = None
        self.possible = True
        self.steps = int(config.trainer.max_steps) if config.epochs is None else None
        self.rate: float | None = None

    def of_data(self) -> Iterator[Finding]:
        """The batch on the ranks, then the set, its schedule and its speed."""
        self.layout = self.data.layout(self.world_size)
        yield Finding(
            "ok",
            f"global batch {self.data.global_batch_size} = {self.world_size} rank{'s' * (self.world_size > 1)} x "
            f"{self.layout.micro_batch} x {self.layout.accumulate} accumulated",
        )
        yield from self.refused()
        if not self.has_data:
            yield Finding("note", "no --data.train was given: shards, epochs and reading are not looked at")
            return
        yield from training_set(self.data, self.world_size)
        self.steps = max_steps(self.config, self.data.steps_per_epoch)
        if self.possible:  # or a warm-up in steps would be told twice
            self.task.check_schedule(self.steps, self.data.steps_per_epoch)
        self.rate = reading_rate(self.data)
        if self.rate is not None:
            yield Finding("ok", f"a core here reads and augments {self.rate:,.0f} images/s")

    def refused(self) -> Iterator[Finding]:
        """What ends `trivit pretrain` before its first step, whatever the data."""
        begins = not (Path(self.config.output) / "checkpoints").exists()  # or no other weights are needed any more
        for refusal in refusals(self.config, self.task, self.data, self.world_size, begins):
            self.possible = False
            yield Finding("wrong", refusal)
        for note in self.task.notes():
            yield Finding("note", note)

    def of_run(self) -> Iterator[Finding]:
        """Memory, work and time."""
        assert self.layout is not None
        images = self.layout.micro_batch
        cost = step_cost(self.cli, self.config, images)
        other = step_cost(self.cli, self.config, images // 2 if images > 2 else 2 * images)
        sharded = self.config.trainer.strategy == FSDP2
        yield from doctor_run.memory(cost, other, self.gpu, self.world_size, sharded)
        yield doctor_run.work(cost)
        if self.gpu is None:
            yield Finding("note", "no GPU here that is known, and none named by --gpu: time is not estimated")
            return
        arguments = self.arguments
        cluster = Cluster(self.gpu, arguments.nodes, self.gpus, arguments.network / 8, arguments.mfu)
        each = step_time(cost, cluster, self.layout.rank_batch, sharded)
        yield from doctor_run.speed(each, self.layout, cluster, self.steps, self.rate, sharded)
        yield from doctor_run.precision(str(self.config.trainer.precision or "32-true"), self.gpu)
