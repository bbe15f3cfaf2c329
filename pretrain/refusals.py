"""What ends a run before its first step and can be known without its data: before a folder of images is packed."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from jsonargparse import Namespace

from datamodules.errors import DataError
from datamodules.shard_datamodule import ShardDataModule
from pretrain.checks import check_parts, check_sizes
from pretrain.errors import RunError
from pretrain.run_directory import launched_ranks
from tasks.errors import TaskError
from tasks.task import PretrainTask


def refuse(config: Namespace, task: PretrainTask, data: ShardDataModule, begins: bool) -> None:
    """RunError with all that is wrong, in one line; `begins`: this process looks for weights to start from, too."""
    if told := list(refusals(config, task, data, expected_ranks(config.trainer), begins)):
        raise RunError("; ".join(told))


def refusals(
    config: Namespace, task: PretrainTask, data: ShardDataModule, ranks: int | None, begins: bool
) -> Iterator[str]:
    """One line for each thing that is wrong.

    Args:
        config: checked and filled in.
        task, data: instantiated from it; the data need not be there.
        ranks: of the run; None: not known, what depends on it is not looked at.
        begins: the run does not go on from a checkpoint, so the weights that it is to start from are looked for.
    """
    checks: list[Callable[[], None]] = [
        lambda: check_parts(task, data.recipe),
        lambda: check_sizes(task, config.data.recipe.init_args),
    ]
    if config.epochs is None:
        checks.append(lambda: task.check_schedule(int(config.trainer.max_steps), 0))
    if ranks is not None:
        checks.append(lambda: task.check_trainer(trainer_to_be(config.trainer, data, ranks), data))
    if begins:
        checks.append(lambda: _try_start(task))
    for look in checks:
        try:
            look()
        except (DataError, RunError, TaskError) as error:
            yield " ".join(str(error).split())


def trainer_to_be(settings: Namespace, data: ShardDataModule, ranks: int) -> SimpleNamespace:
    """What a task asks of a Trainer before it begins; DataError when the ranks cannot share the batch."""
    return SimpleNamespace(
        accumulate_grad_batches=data.batches_per_step(ranks), world_size=ranks, global_step=0,
        gradient_clip_val=settings.gradient_clip_val, precision=str(settings.precision or "32-true"),
    )  # fmt: skip


def expected_ranks(settings: Namespace) -> int | None:
    """How many there will be, as far as launcher and settings tell before the Trainer is built."""
    if (started := launched_ranks()) is not None:
        return started
    if isinstance(settings.devices, int) and settings.devices > 0:
        return settings.devices * int(settings.num_nodes)
    no_gpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    on_cpu = settings.accelerator == "cpu" or (settings.accelerator == "auto" and no_gpu)
    return int(settings.num_nodes) if settings.devices == "auto" and on_cpu else None


def _try_start(task: PretrainTask) -> None:
    with torch.random.fork_rng(devices=[]):  # other encoders are built on the way; the run draws as if they were not
        task.take_weights()
