"""TERM while a run is starting, at several moments: it ends at once or after its first step, and loses nothing."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.checkpoint_files import find_checkpoint
from pretrain.run_lock import NAME as LOCK
from tasks.encoder_files import read_checkpoint
from tests.pretrain.conftest import pretrain
from tests.pretrain.processes import ENVIRONMENT, SMALL, end, losses, start

# Everything is imported once; each run is a forked child, in which the function at `where` first brings the signal.
PROGRAM = """
import json, os, signal, sys, threading, time
from importlib import import_module
from pathlib import Path
from pretrain.cli import main
import pretrain.run, tasks.mae_task, torch.distributed

def run(arguments, where, environment):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        os.environ.update(environment)
        if where:
            module, _, name = where.partition(":")
            *owners, name = name.split(".")
            owner = import_module(module)
            for each in owners:
                owner = getattr(owner, each)
            function = getattr(owner, name)
            def signalled(*arguments, **more):
                if environment:  # the function waits for others; so the signal comes while it does
                    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
                else:
                    os.kill(os.getpid(), signal.SIGTERM)
                setattr(owner, name, function)
                return function(*arguments, **more)
            setattr(owner, name, signalled)
        sys.argv = ["trivit", "pretrain", *arguments]
        code = main()
    finally:
        sys.stderr.flush()
        os._exit(code)

print(json.dumps([run(*each) for each in json.loads(Path(sys.argv[1]).read_text())]))
"""
WAITING = {
    "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test",
}  # fmt: skip
AT_ONCE, SAVED, FINISHED = -signal.SIGTERM, 99, 0
MOMENTS = {  # where it comes, how it ends, and whether in a new run or in one that goes on from step 3
    "building": ("pretrain.run:instantiate", AT_ONCE, 0),
    "reading": ("pretrain.run:ShardDataModule.setup", AT_ONCE, 3),
    "meeting": ("torch.distributed:init_process_group", AT_ONCE, 0),
    "restoring": ("tasks.mae_task:MAETask.configure_optimizers", AT_ONCE, 3),
    "loading": ("pretrain.run:ShardDataModule.train_dataloader", AT_ONCE, 0),
    "compiling": ("tasks.mae_task:MAETask.training_step", SAVED, 0),  # which is within the first forward pass
    "compiling again": ("tasks.mae_task:MAETask.training_step", SAVED, 3),
    "leaving": ("pretrain.run:RunDirectory.release", FINISHED, 3),  # as a second signal does after a first one
}


def forked(calls: list[tuple[list[object], str, dict[str, str]]], folder: Path) -> list[int]:
    """Exit codes of `trivit pretrain ARGUMENTS`, with a signal where the second of each says."""
    listed = folder / "calls.json"
    listed.write_text(json.dumps([([*map(str, words)], where, more) for words, where, more in calls]))
    command = [sys.executable, "-c", PROGRAM, str(listed)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=True)
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def step_of(run: Path) -> int:
    """Of the newest checkpoint; 0: there is none."""
    path, findings = find_checkpoint(run / "checkpoints")
    assert not findings
    return 0 if path is None else int(read_checkpoint(path)["global_step"])


@pytest.mark.slow
def test_term_at_any_moment_of_the_start_loses_nothing(drawn: Path, tmp_path: Path) -> None:
    """Before training it ends at once, later after its first step; then the same command ends as if undisturbed."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    command: list[object] = [*SMALL, "--data.train", drawn, "--checkpoint_every", 3, "--trainer.max_steps", 5]
    assert pretrain(*command, "--output", whole) == 0
    shutil.copytree(whole, half)
    (half / "checkpoints/last.ckpt").unlink()
    interrupted = []
    for name, (where, _, begun) in MOMENTS.items():
        if begun:
            shutil.copytree(half, tmp_path / name)
        waiting = WAITING | {"MASTER_PORT": "29583"} if name == "meeting" else {}
        more = ["--trainer.devices", 2, "--trainer.strategy", "ddp"] if waiting else []
        interrupted.append(([*command, *more, "--output", tmp_path / name], where, waiting))
    codes = forked(interrupted, tmp_path)
    for name, code in zip(MOMENTS, codes, strict=True):
        _, ends, begun = MOMENTS[name]
        assert code == ends, name
        assert step_of(tmp_path / name) == (5 if ends == FINISHED else begun + (ends == SAVED)), name
    again = [([*command, "--output", tmp_path / name], "", {}) for name in MOMENTS]
    assert set(forked(again, tmp_path)) == {0}
    for name in MOMENTS:
        assert losses(tmp_path / name) == pytest.approx(losses(whole), rel=1e-5), name
        assert not (tmp_path / name / LOCK).exists() and not list((tmp_path / name).rglob("*.part"))


def test_term_while_python_imports(drawn: Path, tmp_path: Path) -> None:
    process = start([*SMALL, "--data.train", drawn, "--output", tmp_path / "run"])
    time.sleep(0.3)
    process.terminate()
    code, error = end(process)
    assert code == -signal.SIGTERM and "Traceback" not in error and not (tmp_path / "run").exists()


SLOW_FIRST_RANK = """
import os, sys, time
import torch.distributed as dist
from pretrain.cli import main
meet = dist.init_process_group
def late(*arguments, **more):
    if os.environ["LOCAL_RANK"] == "0":
        time.sleep(100)
    print("waits", file=sys.stderr, flush=True)
    return meet(*arguments, **more)
dist.init_process_group = late
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_rank_whose_first_one_is_gone_ends(drawn: Path, tmp_path: Path) -> None:
    """It was started by that one and would wait five minutes for it."""
    program = tmp_path / "program.py"
    program.write_text(SLOW_FIRST_RANK)
    command = [*SMALL, "--data.train", drawn, "--output", tmp_path / "run", "--trainer.devices", 2]
    process = start([*command, "--trainer.strategy", "ddp"], [str(program)])
    assert process.stderr is not None
    error = ""
    while "waits" not in error:
        error += (line := process.stderr.readline())
        assert line, error
    process.terminate()
    error += process.communicate(timeout=20)[1]  # the second rank holds stderr open until it ends
    assert process.returncode == -signal.SIGTERM
    (line,) = [line for line in error.splitlines() if line.startswith("trivit: ")]
    assert line.startswith("trivit: rank 1 of 2 on ") and line.endswith("the process that started this one is gone")
