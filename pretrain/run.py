"""One run from beginning to end: check, assemble, resume, train, say what happened.

Read `train` from top to bottom: it is the whole life of a run.
"""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from datamodules.open_shards import open_shards
from datamodules.shard_datamodule import ShardDataModule
from pretrain.checkpoints import Checkpoints
from pretrain.checks import check, fill_in, max_steps
from pretrain.config import PretrainCLI, instantiate, parse, plain
from pretrain.errors import Interrupted, RunError
from pretrain.guard import FiniteGuard
from pretrain.metrics import Metrics
from pretrain.phases import PhaseTimer
from pretrain.progress import Progress
from pretrain.run_directory import RunDirectory, launched_rank
from pretrain.stop import StopRequest
from tasks.task import PretrainTask


def pretrain_command(arguments: list[str]) -> int:
    """`trivit pretrain ...`: exit code 0, or an exception that carries its own."""
    cli, config = parse(arguments)
    train(cli, config)
    return 0


def train(cli: PretrainCLI, config: Namespace, callbacks: Sequence[Callback] = ()) -> Path:
    """Train, or go on training, the run that `config` describes; returns its folder.

    Args:
        cli, config: from `pretrain.config.parse`.
        callbacks: further ones, behind the run's own and before those of `trainer.callbacks`.

    Raises:
        RunError: what the user gave cannot work; nothing was lost.
        NonFiniteError: the loss or a gradient was NaN or infinite.
        Interrupted: a signal came; a checkpoint was written first.
    """
    _quiet()
    stop = StopRequest()
    check(config)
    fill_in(config)
    directory = RunDirectory(Path(config.output))
    directory.claim()
    try:
        config.data.train = str(open_shards(config.data.train))
        parts = instantiate(cli, config)
        data: ShardDataModule = parts.data
        task: PretrainTask = parts.model
        data.bad_samples_file = directory.path / "bad_samples.jsonl"
        data.setup("fit")
        config.trainer.max_steps = max_steps(config, data.steps_per_epoch)
        task.check_schedule(config.trainer.max_steps, data.steps_per_epoch)
        trainer, progress = _trainer(config, parts.trainer, directory, stop, callbacks)
        _lay_out(trainer, data)

        resolved = plain(config)
        if config.epochs is not None:
            resolved["trainer"]["max_steps"] = -1  # the length is said once, so that config.yaml is itself a config
        if directory.config.exists():
            directory.check_same_run(resolved, config.allow_changes)
        done = directory.step()
        if done is not None and done >= trainer.max_steps:
            print(f"{directory.path} is finished ({done} steps); next: trivit evaluate {directory.path} ...")
            return directory.path
        if trainer.is_global_zero:
            directory.write_config(yaml.safe_dump(resolved, sort_keys=False))
        if done is not None:
            print(f"resuming {directory.path} at step {done} of {trainer.max_steps}")
        stop.listen(signal.SIGTERM, signal.SIGUSR1)  # until training starts Ctrl-C ends at once: nothing is lost by it
        data.allow_changes = any(key.split(".")[0] == "data" for key in config.allow_changes)
        try:
            checkpoint = directory.last if done is not None else None
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning has made an exit code 1 of it
                raise KeyboardInterrupt from error
            raise
        finally:
            progress.close()
        _say_how_it_ended(trainer, stop, directory)
        return directory.path
    finally:
        stop.silence()
        directory.release()


def _trainer(
    config: Namespace, settings: Namespace, directory: RunDirectory, stop: StopRequest, more: Sequence[Callback]
) -> tuple[Trainer, Progress]:
    phases = PhaseTimer()
    guard = FiniteGuard(directory.checkpoints, stop)
    metrics = Metrics(directory.metrics, config.log_every, phases, guard)
    progress = Progress(metrics)
    # The order matters: the row of a step is written before the checkpoint that a resumed run cuts the file back to.
    callbacks = [
        guard, metrics, progress, Checkpoints(directory.checkpoints, config.checkpoint_every, stop, guard),
    ]  # fmt: skip
    own: dict[str, Any] = {
        "max_steps": config.trainer.max_steps,
        "max_epochs": -1,  # one long nominal epoch: everything is driven by the optimiser step
        "callbacks": [*callbacks, *more, *_as_list(settings.callbacks)],
        "logger": _wandb(config, directory) or False,
        "profiler": phases,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "default_root_dir": str(directory.path),
    }
    try:
        return Trainer(**{**dict(settings), **own}), progress
    except (MisconfigurationException, ImportError, ValueError, TypeError, RuntimeError) as error:
        raise RunError(f"the trainer settings cannot work here: {error}") from error


def _lay_out(trainer: Trainer, data: ShardDataModule) -> None:
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or trainer.world_size)
    if started != trainer.world_size:
        raise RunError(
            f"{started} processes were started, but trainer.devices and trainer.num_nodes make {trainer.world_size}; "
            "set --trainer.devices to the processes of a node, --trainer.num_nodes, and --trainer.strategy ddp"
        )
    layout = data.layout(trainer.world_size)
    trainer.accumulate_grad_batches = layout.accumulate
    if trainer.is_global_zero:
        ranks = f"{trainer.world_size} rank{'s' if trainer.world_size > 1 else ''}"
        print(
            f"{data.manifest.num_samples:,} images, {data.steps_per_epoch:,} steps an epoch, "
            f"{trainer.max_steps:,} steps; global batch {data.global_batch_size} = {ranks} x "
            f"{layout.micro_batch} x {layout.accumulate} accumulated",
            file=sys.stderr,
        )


def _wandb(config: Namespace, directory: RunDirectory) -> Logger | None:
    if config.wandb is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise RunError('--wandb needs the wandb package: pip install "trivit[wandb]"') from error
    from lightning.pytorch.loggers import WandbLogger

    try:
        logger = WandbLogger(
            name=directory.path.name, save_dir=str(directory.path), project="trivit", offline=config.wandb == "offline",
            id=directory.wandb_id(), resume="allow", config=plain(config), log_model=False,
        )  # fmt: skip
        if launched_rank() == 0:
            assert logger.experiment is not None  # signs in now, not after the data has been read
    except (wandb.errors.Error, ValueError) as error:
        raise RunError(f"wandb: {error}; log in with `wandb login`, or use --wandb offline") from error
    return logger


def _say_how_it_ended(trainer: Trainer, stop: StopRequest, directory: RunDirectory) -> None:
    step, total = trainer.global_step, trainer.max_steps
    if step < total and stop.agreed is None:
        raise RunError(f"a callback ended the run at step {step} of {total}; it goes on from the last checkpoint")
    if step < total:
        assert stop.agreed is not None
        raise Interrupted(
            f"{signal.Signals(stop.agreed).name} received: saved {directory.last} at step {step} of {total}; "
            "the same command goes on from there",
            stop.agreed,
        )
    if trainer.is_global_zero:
        print(f"finished {directory.path} ({total} steps); next: trivit evaluate {directory.path} ...")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _quiet() -> None:
    """Lightning's hints speak of loaders and loggers that are not used here; real errors are exceptions."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",
        ".*no .*validation_step.*",
        ".*max_epochs.*",
        ".*litlogger.*",
        ".*isinstance.*LeafSpec.*",
        ".*in eval mode at the start.*",
        ".*overridden .on_before_batch_transfer.*",
    ):
        warnings.filterwarnings("ignore", message=message)
