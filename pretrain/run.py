"""One run from beginning to end: check, assemble, resume, train, say what happened.

Read `train` from top to bottom: it is the whole life of a run.
"""

import contextlib
import logging
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from datamodules.manifest import SKIPPED
from datamodules.shard_datamodule import ShardDataModule
from pretrain.beginning import Beginning
from pretrain.checkpoint_files import CheckpointFiles
from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.checkpoints import Checkpoints
from pretrain.checks import check, fill_in, max_steps
from pretrain.config import PretrainCLI, instantiate, parse, plain
from pretrain.cost import peak_rate
from pretrain.errors import Interrupted, RunError
from pretrain.fsdp import NAME as FSDP2
from pretrain.fsdp import FSDP2Strategy
from pretrain.guard import FiniteGuard
from pretrain.health_watch import HealthWatch
from pretrain.key_log import KeyLog
from pretrain.late_files import newest_checkpoint, wait_for_data
from pretrain.meet import gone_ranks_told, meet, part
from pretrain.metrics import Metrics
from pretrain.phases import PhaseTimer
from pretrain.probe_config import ProbeConfig
from pretrain.probe_watch import ProbeWatch
from pretrain.progress import Progress
from pretrain.rank_watch import RankWatch
from pretrain.refusals import refuse
from pretrain.run_directory import RunDirectory, flatten, launched_rank, launched_ranks, srun_started
from pretrain.same_data import SameData
from pretrain.stop import StopRequest
from pretrain.vocabulary import vocabulary_of_the_run
from pretrain.watchdog import Watchdog, launcher_of
from tasks.task import PretrainTask


def pretrain_command(arguments: list[str], last: bool = False) -> int:
    """`trivit pretrain ...`: exit code 0, or an exception that carries its own. `last`: the process ends with it."""
    cli, config = parse(arguments)
    train(cli, config, stop=StopRequest(last))
    return 0


def train(
    cli: PretrainCLI, config: Namespace, callbacks: Sequence[Callback] = (), stop: StopRequest | None = None
) -> Path:
    """Train, or go on training, the run that `config` describes; returns its folder.

    Args:
        cli, config: from `pretrain.config.parse`.
        callbacks: further ones, behind the run's own and before those of `trainer.callbacks`.
        stop: how it is told to stop; None: a new one.

    Raises:
        RunError: what the user gave cannot work; nothing was lost.
        RunFailure: something failed underneath; the same command goes on from the last checkpoint.
        NonFiniteError: the loss or a gradient was NaN or infinite.
        Interrupted: a signal came; a checkpoint was written first.
    """
    _quiet()
    stop = stop or StopRequest()
    check(config)
    fill_in(config)
    wait_for_data(config.data.train)
    directory = RunDirectory(Path(config.output))
    directory.claim()
    watchdog = Watchdog(config.start_timeout, config.step_timeout)
    stop.timeout = watchdog.outlasted_by
    try:
        # With fsdp2 the first rank alone builds the model in full; the others get their rows of it.
        hollow = config.trainer.strategy == FSDP2 and launched_rank() > 0
        with vocabulary_of_the_run(directory.path, config):
            with torch.device("meta") if hollow else contextlib.nullcontext():
                parts = instantiate(cli, config)
            peak = peak_rate(cli, config) if launched_rank() == 0 else None
        data: ShardDataModule = parts.data
        task: PretrainTask = parts.model
        if config.trainer.precision in ("64-true", "64", 64):
            task.double()  # Lightning would do it after a checkpoint has been read, which would be rounded
        data.bad_samples_file = directory.bad_samples
        data.tokenize, data.whole_batches = task.tokenize, task.whole_batches
        refuse(config, task, data, begins=launched_rank() == 0 and not directory.has_trained())
        if launched_rank() == 0:
            print(*(f"note: {note}\n" for note in task.notes()), sep="", end="", file=sys.stderr)
        data.setup("fit")
        config.trainer.max_steps = max_steps(config, data.steps_per_epoch)
        task.check_schedule(config.trainer.max_steps, data.steps_per_epoch)
        trainer, progress = _trainer(config, parts.trainer, directory, stop, (watchdog, *callbacks))
        progress.metrics.peak = peak
        if trainer.strategy.root_device.type == "cuda":  # on a CPU it would mean other things
            torch.set_float32_matmul_precision(config.float32_matmul)
        _lay_out(trainer, task, data, stop)

        resolved = plain(config)
        if config.epochs is not None:
            resolved["trainer"]["max_steps"] = -1  # the length is said once, so that config.yaml is itself a config
        if directory.config.exists() and directory.has_trained():
            directory.check_same_run(resolved, config.allow_changes)
        with gone_ranks_told(trainer.world_size):
            watchdog.watch(trainer.global_rank, trainer.world_size, launcher_of(trainer))
            together = meet(trainer.strategy, watchdog.outlasted_by)
            with watchdog.looking():
                found = newest_checkpoint(directory, stop, together)
        data.allow_changes = config.allow_changes
        checkpoint, saved, damaged = found if found is not None else (None, {}, [])
        if checkpoint is not None:
            data.load_state_dict(saved[type(data).__name__])  # refuses other data before anything is said or written
        done = None if checkpoint is None else int(saved["global_step"])
        if done is not None and done >= trainer.max_steps:
            print(f"{directory.path} is finished ({done} steps); {_next(directory, task)}")
            return directory.path
        if trainer.is_global_zero:
            directory.write_config(yaml.safe_dump(resolved, sort_keys=False))
            directory.keep_skipped(data.manifest.root)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.resumed = checkpoint
            elif isinstance(callback, SameData):
                callback.resumed = done
        if damaged and trainer.is_global_zero:
            print(f"{'; '.join(damaged)}: going on from {checkpoint}", file=sys.stderr)
        if done is not None:
            print(f"resuming {directory.path} at step {done} of {trainer.max_steps}")
        try:
            with gone_ranks_told(trainer.world_size):
                trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning has made an exit code 1 of it
                raise KeyboardInterrupt from error
            raise
        finally:
            progress.close()
        _say_how_it_ended(trainer, stop, directory, data)
        return directory.path
    finally:
        if stop.last:
            part(sys.exc_info()[1])
        watchdog.rest()
        stop.silence()
        directory.release()


def _trainer(
    config: Namespace, settings: Namespace, directory: RunDirectory, stop: StopRequest, more: Sequence[Callback]
) -> tuple[Trainer, Progress]:
    phases = PhaseTimer()
    writer = CheckpointWriter(config.checkpoint_async)
    guard = FiniteGuard(directory.checkpoints, stop, writer)
    metrics = Metrics(directory.metrics, config.log_every, phases, guard, stop)
    progress = Progress(metrics)
    # The order matters: the row of a step is written before the checkpoint that a resumed run cuts the file back to.
    probe = [] if config.probe is None else [ProbeWatch(metrics, ProbeConfig(**vars(config.probe)))]
    callbacks = [
        SameData(stop, flatten(plain(config))), guard, RankWatch(metrics), *probe, metrics, progress,
        HealthWatch(metrics, plain(config)), *([KeyLog(directory.samples, stop)] if config.log_keys else []),
        Beginning(), Checkpoints(directory.checkpoints, config.checkpoint_every, stop, guard, writer),
    ]  # fmt: skip
    own: dict[str, Any] = {
        "max_steps": config.trainer.max_steps,
        "max_epochs": -1,  # one long nominal epoch: everything is driven by the optimiser step
        "callbacks": [*callbacks, *more, *_as_list(settings.callbacks)],
        "logger": _wandb(config, directory) or False,
        "log_every_n_steps": min(config.log_every, config.trainer.max_steps),  # or Lightning warns of short runs
        "profiler": phases,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "default_root_dir": str(directory.path),
    }
    own["plugins"] = [*_as_list(settings.plugins), CheckpointFiles(writer)]
    if srun_started():
        # Lightning's own requeueing saves inside the signal handler; ours does where all ranks agree (`stop`).
        own["plugins"] += [SLURMEnvironment(auto_requeue=False)]
    try:
        trainer = Trainer(**{**dict(settings), **own})
    except (MisconfigurationException, ImportError, ValueError, TypeError, RuntimeError) as error:
        raise RunError(f"the trainer settings cannot work here: {error}") from error
    if isinstance(trainer.strategy, FSDP2Strategy):
        trainer.strategy.writer = writer
    timeout = getattr(trainer.strategy, "_timeout", None)
    if timeout is not None and stop.timeout is not None:
        trainer.strategy._timeout = max(timeout, stop.timeout)  # type: ignore[attr-defined]
    # Until training starts a signal ends the process at once, wherever it waits: nothing is lost by it, and the batch
    # script of a job sees it. Lightning's own handler would call a collective, for which the others may not be there.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    if str(settings.precision).startswith("16") and trainer.precision == "bf16-mixed" and launched_rank() == 0:
        print("trainer.precision 16-mixed needs a GPU: on this CPU the run takes bf16-mixed", file=sys.stderr)
    return trainer, progress


def _lay_out(trainer: Trainer, task: PretrainTask, data: ShardDataModule, stop: StopRequest) -> None:
    started = launched_ranks()
    if started is not None and started != trainer.world_size:
        raise RunError(
            f"{started} processes were started, but trainer.devices and trainer.num_nodes make {trainer.world_size}; "
            "set --trainer.devices to the processes of a node, --trainer.num_nodes, and --trainer.strategy ddp"
        )
    layout = data.layout(trainer.world_size)
    trainer.accumulate_grad_batches = data.batches_per_step(trainer.world_size)
    # As its schedule before: now, and not when all ranks have met. A task asks for both again in `on_fit_start`, for
    # those who fit it with a Trainer of their own.
    task.check_trainer(trainer, data)
    data.on_failure = stop.fail if trainer.world_size > 1 else None
    if trainer.is_global_zero:
        ranks = f"{trainer.world_size} rank{'s' if trainer.world_size > 1 else ''}"
        print(
            f"{data.manifest.num_samples:,} images, {data.steps_per_epoch:,} steps an epoch, "
            f"{trainer.max_steps:,} steps; global batch {data.global_batch_size} = {ranks} x "
            f"{layout.micro_batch} x {layout.accumulate} accumulated",
            file=sys.stderr,
        )
        if skipped := data.num_skipped:
            print(
                f"{skipped:,} of {skipped + data.manifest.num_samples:,} images of {data.train} could not be read and "
                f"are not in it, {data.manifest.root / SKIPPED} names them",
                file=sys.stderr,
            )
        if findings := sum(shard.findings for shard in data.manifest.shards):
            print(
                f"{findings} findings in the tars of {data.manifest.name}: trivit shards verify lists them",
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


def _say_how_it_ended(trainer: Trainer, stop: StopRequest, directory: RunDirectory, data: ShardDataModule) -> None:
    step, total = trainer.global_step, trainer.max_steps
    if trainer.is_global_zero and data.bad_samples is not None and (bad := data.bad_samples.count):
        print(f"{bad} bad samples were replaced, {data.bad_samples.where} names them", file=sys.stderr)
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
        print(f"finished {directory.path} ({total} steps); {_next(directory, trainer.lightning_module)}")


def _next(directory: RunDirectory, task: Any) -> str:
    by_texts = "" if task.tokenize is None else ", or by its texts --test DIR --probes zeroshot,retrieval"
    run = shlex.quote(str(directory.path))
    return (
        f"next: trivit evaluate {run} --train DIR --test DIR (labelled images){by_texts}; without labels: "
        f"trivit report {run}"
    )


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
        ".*AMP with fp16 is not supported on CPU.*",  # told in our own words
        ".*in eval mode at the start.*",
        ".*`srun` command is available.*",
        ".*overridden .on_before_batch_transfer.*",
    ):
        warnings.filterwarnings("ignore", message=message)
