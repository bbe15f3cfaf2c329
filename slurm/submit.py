"""`trivit slurm submit`: write the batch scripts of a run and hand them to SLURM."""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from slurm.asked import Asked
from slurm.before_queue import check_asked, not_here
from slurm.errors import SlurmError
from slurm.job import EVALUATE_TIME, Job, evaluate_script, logs, pretrain_script, watch_script

Look = Callable[[Path, float | None, float | None], Iterable[str]]
LAYOUT = ("--trainer.num_nodes", "--trainer.devices")  # they follow from the job


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the job; all others are those of `trivit pretrain`."""
    number = partial(parser.add_argument, type=int, metavar="N")
    number("--nodes", default=1, help="default 1")
    number("--gpus-per-node", default=0, help="one process each (default 0: train on CPUs)")
    number("--tasks-per-node", help="processes of a node without GPUs (default 1)")
    number("--cpus-per-task", help="cores of a process; loader workers need some")
    parser.add_argument("--mem", metavar="SIZE", help="memory of a node (64G), for evaluation, too")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--qos", metavar="NAME")
    parser.add_argument("--time", metavar="LIMIT", help="24:00:00, 2-00:00:00; the run goes on in a new job after it")
    number("--grace", default=180, help="seconds before the limit at which the run saves and stops (default 180)")
    parser.add_argument("--name", metavar="NAME", help="of the job (default: the last part of --output)")
    parser.add_argument("--container", default="", metavar="COMMAND", help='e.g. "apptainer exec --nv trivit.sif"')
    parser.add_argument("--setup", action="append", default=[], metavar="LINE", help='e.g. "module load cuda"')
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="exported to the job")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="further option, e.g. --sbatch=--constraint=h100",
    )
    parser.add_argument(
        "--evaluate-train", metavar="DIR", help="evaluate the finished run: labelled data to learn from"
    )
    parser.add_argument("--evaluate-test", metavar="DIR", help="evaluate the finished run: labelled data to score on")
    parser.add_argument(
        "--evaluate-time",
        metavar="LIMIT",
        help=f"of that evaluation (default {EVALUATE_TIME}, or --time where that is shorter or not given)",
    )
    parser.add_argument("--probes", help="of that evaluation (default: those of trivit evaluate)")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=int,
        const=60,
        metavar="SECONDS",
        help="evaluate each checkpoint on the way, too, in a job that looks for one so often (default 60); "
        "--checkpoint_every says how often there is one",
    )
    parser.add_argument("--program", default="trivit", metavar="COMMAND", help="how the nodes call trivit (default so)")
    parser.add_argument("--dry-run", action="store_true", help="show the scripts and do nothing")


def submit(arguments: argparse.Namespace, rest: Sequence[str], look: Look = lambda *_: ()) -> int:
    """Write the scripts under OUTPUT/slurm and submit them, or show them.

    What would end the job at its start is looked for first, as far as this machine sees the folders of the job.

    Args:
        arguments: of `add_options`.
        rest: the arguments of `trivit pretrain`; --output is needed, and the numbers of
            nodes and of their devices, which follow from the job, must not be among them.
        look: folder of the run, steps and epochs, as far as they are known -> what the user should know of that folder;
            it raises an error of its own kind when no run can begin there.

    Raises:
        SlurmError: something is missing or cannot work, or SLURM refuses.
    """
    asked = Asked(rest)
    rest = asked.words
    output = Path(asked.word("--output", "name the folder of the run, on a disk that all nodes share")).absolute()
    job = Job(
        name=arguments.name or output.name, nodes=arguments.nodes, gpus_per_node=arguments.gpus_per_node,
        tasks=arguments.tasks_per_node, cpus_per_task=arguments.cpus_per_task, mem=arguments.mem,
        partition=arguments.partition, account=arguments.account, qos=arguments.qos, time=arguments.time,
        grace=arguments.grace, container=arguments.container, setup=arguments.setup,
        environment=_environment(arguments.env), sbatch=arguments.sbatch,
    )  # fmt: skip
    program = shlex.split(arguments.program)
    made_by = shlex.join(["trivit", *sys.argv[1:]]) if sys.argv else "trivit slurm submit"
    script = logs(output) / "pretrain.sbatch"
    texts = {script: pretrain_script(job, made_by, script, output, [*program, *_pretrain(job, rest)])}
    watch, evaluate = logs(output) / "watch.sbatch", logs(output) / "evaluate.sbatch"
    if arguments.evaluate_test is not None:
        given = {"--train": arguments.evaluate_train, "--test": arguments.evaluate_test, "--probes": arguments.probes}
        options = [word for name, value in given.items() if value is not None for word in (name, value)]
        command = [*program, "evaluate", str(output), *options]
        if arguments.watch is not None:
            texts[watch] = watch_script(job, made_by, watch, output, [*command, "--by-step"], arguments.watch)
        texts[evaluate] = evaluate_script(
            job, made_by, evaluate, output, command, [*program, "report", str(output)], arguments.evaluate_time
        )
    elif any(getattr(arguments, name) is not None for name in ("evaluate_train", "evaluate_time", "probes", "watch")):
        raise SlurmError("--evaluate-train, --evaluate-time, --probes and --watch need --evaluate-test DIR")
    check_asked(asked, job)
    folders = {"--data.train": asked.text("data.train")}
    folders |= {"--evaluate-train": arguments.evaluate_train, "--evaluate-test": arguments.evaluate_test}
    for told in (*not_here(folders), *look(output, asked.number("trainer.max_steps"), asked.number("epochs"))):
        print(told, file=sys.stderr)
    if arguments.dry_run:
        print("\n".join(f"# ---- {path}\n{text}" for path, text in texts.items()), end="")
        return 0
    _write(texts)
    job_id = _sbatch(str(script))
    print(f"job {job_id}: {job.world_size} processes on {job.nodes} nodes, output in {logs(output)}/{job_id}.out")
    if watch in texts:
        beside = _sbatch(f"--dependency=after:{job_id}", str(watch), job_id)
        print(f"job {beside}: evaluates each checkpoint on the way, output in {logs(output)}/{beside}-watch.out")
    if evaluate in texts:
        after = _sbatch("--kill-on-invalid-dep=yes", f"--dependency=afterok:{job_id}", str(evaluate))
        print(f"job {after}: evaluates when job {job_id} has finished, output in {logs(output)}/{after}-evaluate.out")
    return 0


def _pretrain(job: Job, rest: Sequence[str]) -> list[str]:
    for word in rest:
        if word.partition("=")[0] in LAYOUT:
            raise SlurmError(f"{word.partition('=')[0]} follows from --nodes and --gpus-per-node: leave it out")
    layout = ["--trainer.num_nodes", job.nodes, "--trainer.devices", job.tasks_per_node]
    if "--trainer.accelerator" not in rest:
        layout += ["--trainer.accelerator", "gpu" if job.gpus_per_node else "cpu"]
    if "--trainer.strategy" not in rest and job.world_size > 1:
        layout += ["--trainer.strategy", "ddp"]
    return ["pretrain", *rest, *map(str, layout)]


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    if bad := [pair for pair in pairs if "=" not in pair]:
        raise SlurmError(f"--env {bad[0]!r}: write NAME=VALUE")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def _write(texts: dict[Path, str]) -> None:
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except OSError as error:
        raise SlurmError(f"{path} cannot be written ({error.strerror}); name another --output") from error


def _sbatch(*arguments: str) -> str:
    """Submit; the number of the job."""
    if shutil.which("sbatch") is None:
        raise SlurmError("there is no sbatch here: submit from a login node of the cluster, or see --dry-run")
    done = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SlurmError(f"SLURM refuses the job: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().partition(";")[0]
