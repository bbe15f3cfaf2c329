"""What a SLURM job asks for, and the batch scripts that ask for it."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from slurm.errors import SlurmError

_SIGNAL_EARLY, _START_UP = 60, 60  # seconds; the first is of sbatch --signal
EVALUATE_TIME = "4:00:00"
"""What the evaluation of a finished run asks for when the training asks for more."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Job:
    """A training job: one process for each GPU, or `tasks` processes of a node without GPUs.

    Args:
        name: shown by squeue.
        nodes: how many.
        gpus_per_node: 0: train on CPUs.
        tasks: processes of a node; None: one for each GPU, or one.
        cpus_per_task: cores of a process.
        mem: memory of a node, in SLURM's manner (64G), also for the jobs that evaluate.
        partition, account, qos: as the cluster calls them.
        time: limit, in SLURM's manner (24:00:00, 2-00:00:00).
        grace: seconds before the limit at which the run is told to write a checkpoint; None: it is not told.
        patience: seconds that ranks get to end by themselves when one has ended.
        attempts: starts from one checkpoint, after which a job that is interrupted again is not queued again.
        container: command that runs another one inside a container, e.g. `apptainer exec --nv trivit.sif`.
        setup: shell lines before the start, e.g. `module load cuda`.
        environment: variables to export.
        sbatch: further #SBATCH options, e.g. `--constraint=h100`.

    Raises:
        SlurmError: a value that SLURM or the script could not take.
    """

    name: str
    nodes: int = 1
    gpus_per_node: int = 0
    tasks: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    grace: int | None = 180
    patience: int = 120
    attempts: int = 10
    container: str = ""
    setup: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    sbatch: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("tasks", 1), ("cpus_per_task", 1), ("grace", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                option = "tasks-per-node" if name == "tasks" else name.replace("_", "-")
                raise SlurmError(f"--{option} {value} must be at least {least}")
        if self.gpus_per_node and self.tasks not in (None, self.gpus_per_node):
            raise SlurmError(
                f"each process trains on one GPU: leave --tasks-per-node out, or make it {self.gpus_per_node}"
            )
        limit = None if self.time is None else seconds(self.time)
        if self.grace is not None and limit is not None and limit < self.grace + _SIGNAL_EARLY + _START_UP:
            raise SlurmError(
                f"--time {self.time} leaves no time to train: SLURM tells the run {self.grace} (--grace) to "
                f"{self.grace + _SIGNAL_EARLY} s before, and it needs a minute to start"
            )
        for name in ("name", "mem", "partition", "account", "qos"):
            value = getattr(self, name)
            if value is not None and (not value or re.search(r"\s", value)):
                raise SlurmError(f"--{name} {value!r} must be one word")
        if self.name in ("bash", "interactive"):
            raise SlurmError(
                f"--name {self.name} (default: the last part of --output) is what SLURM calls a shell: give another one"
            )
        for variable in self.environment:
            if not _NAME.fullmatch(variable):
                raise SlurmError(f"--env {variable!r}: write NAME=VALUE")
        for line in self.sbatch:
            if not line.startswith("-") or "\n" in line:
                raise SlurmError(f"--sbatch {line!r} must be one option of sbatch, such as --constraint=h100")

    @property
    def tasks_per_node(self) -> int:
        """Processes of a node."""
        return self.tasks or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.tasks_per_node


def seconds(limit: str, option: str = "--time") -> int:
    """A time limit of SLURM: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]].

    Raises:
        SlurmError: another form; `option` is what gave it.
    """
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not (all(map(str.isdecimal, parts)) and len(parts) <= 3 and (days.isdecimal() or not dash)):
        raise SlurmError(f"{option} {limit} is no time limit of SLURM: write minutes, 24:00:00 or 2-00:00:00")
    numbers = [int(part) for part in parts]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))


def pretrain_script(job: Job, made_by: str, script: Path, output: Path, program: Sequence[str]) -> str:
    """The batch script of a training job.

    Args:
        job: what it asks for.
        made_by: the command that asked.
        script: where the script will lie.
        output: folder of the run; its checkpoint tells whether a failed attempt made progress.
        program: `trivit pretrain ...`, of each process.
    """
    return _render(
        "pretrain.sbatch.jinja", job, made_by, output, script=script, output=output, command=_lines(program)
    )  # fmt: skip


def evaluate_script(
    job: Job, made_by: str, script: Path, output: Path, evaluate: Sequence[str], report: Sequence[str],
    time: str | None = None,
) -> str:  # fmt: skip
    """The batch script that evaluates the finished run with one process and writes its report.

    Args:
        job: what the training job asked for.
        made_by, script, output: as of `pretrain_script`.
        evaluate, report: the commands.
        time: limit; None: `EVALUATE_TIME`, or that of the training where it is shorter or SLURM's own.

    Raises:
        SlurmError: no time limit of SLURM.
    """
    if time is None:
        time = job.time
        if time is not None and seconds(time) > seconds(EVALUATE_TIME):
            time = EVALUATE_TIME
    else:
        seconds(time, "--evaluate-time")
    return _render(
        "evaluate.sbatch.jinja", _alone(job, "evaluate", time=time, grace=None), made_by, output, script=script,
        evaluate=shlex.join(evaluate), report=shlex.join(report),
    )  # fmt: skip


def watch_script(
    job: Job, made_by: str, script: Path, output: Path, evaluate: Sequence[str], pause: int
) -> str:  # fmt: skip
    """The batch script that evaluates each checkpoint as it appears; its argument is the number of the training job.

    Args:
        job, made_by, script, output: as of `pretrain_script`.
        evaluate: the command that evaluates the newest checkpoint, once.
        pause: seconds between two looks.

    Raises:
        SlurmError: no pause at all.
    """
    if pause < 1:
        raise SlurmError(f"--watch {pause} must be at least 1 second")
    return _render(
        "watch.sbatch.jinja", _alone(job, "watch", time=job.time, grace=job.grace), made_by, output, script=script,
        output=output, evaluate=shlex.join(evaluate), pause=pause,
    )  # fmt: skip


def _alone(job: Job, what: str, time: str | None, grace: int | None) -> Job:
    """One process with the surroundings of the training job."""
    gpus = min(job.gpus_per_node, 1)
    return replace(job, name=f"{job.name}-{what}", nodes=1, gpus_per_node=gpus, tasks=None, time=time, grace=grace)


def _lines(program: Sequence[str]) -> str:
    """A command with an option and its value on each line."""
    words = [shlex.quote(word) for word in program]
    lines: list[str] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n        ".join(lines)


def _render(template: str, job: Job, made_by: str, run: Path, **values: object) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("slurm", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    # Paths in the commands may be relative to where they were given.
    given = {"job": job, "made_by": made_by, "logs": logs(run), "folder": Path.cwd()}
    return environment.get_template(template).render(**given, **values)


def logs(run: Path) -> Path:
    """Where scripts and what jobs print lie."""
    return run / "slurm"
