"""Runs that are killed, in the ways in which runs are, and started again by the same command."""

import os
import random
import re
import signal
from pathlib import Path

import pytest

from datamodules.synth import synth
from tests.pretrain.conftest import pretrain
from tests.pretrain.processes import OBJECTIVES, end, kill_after, losses, samples, start, wait_for, workers_of

EPOCH, STEPS = 20, 50
MORE = [
    "--log_keys", "true", "--checkpoint_every", 4, "--data.device_batch_size", 8, "--data.workers", 2,
    "--trainer.max_steps", STEPS,
]  # fmt: skip
WITH_DROP_PATH = ["--model.encoder.drop_path", 0.3]
IBOT = [
    "--model.ibot.mask_probability", 0.5, "--model.ibot.head.prototypes", 24, "--model.ibot.head.hidden_width", 32,
    "--model.ibot.head.bottleneck_width", 16,
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """330 images in 9 shards: 20 steps of 16 an epoch, 10 images are left out of each."""
    folder = tmp_path_factory.mktemp("images") / "train"
    synth(folder, samples=330, size=24, seed=5, samples_per_shard=40)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)  # five to seven starts of the program, on a machine that others use
@pytest.mark.parametrize("objective", [*OBJECTIVES, "dino with iBOT"])
def test_killed_runs_end_as_if_they_had_not_been(objective: str, images: Path, tmp_path: Path) -> None:
    """SIGKILL to all processes in the first and in the second epoch, and to a single loader worker in the third."""
    name, _, terms = objective.partition(" with ")
    command = [
        *OBJECTIVES[name], *MORE, *WITH_DROP_PATH, *(IBOT if terms else []), "--data.train", images, "--output"
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start([*command, whole])
    draw = random.Random(objective)
    for epoch in range(2):
        first = epoch * EPOCH + 1
        reached = kill_after(start([*command, killed]), killed, draw.randrange(first, first + EPOCH // 2))
        assert first <= reached < first + EPOCH
    process = start([*command, killed])
    wait_for(process, killed, draw.randrange(2 * EPOCH, 2 * EPOCH + 4))
    os.kill(draw.choice(workers_of(process.pid)), signal.SIGKILL)
    code, error = end(process)
    assert code == 1 and "Traceback" not in error, error
    assert [line.split(":")[1] for line in error.splitlines() if line.startswith("trivit: ")] == [
        " a loader worker was killed"
    ]
    assert max(samples(killed)) < STEPS
    assert end(start([*command, killed]))[0] == 0

    code, error = end(undisturbed)
    assert code == 0, error
    assert samples(killed) == samples(whole)
    assert losses(killed) == losses(whole)
    assert list(losses(whole)) == list(samples(whole)) == list(range(1, STEPS + 1))
    for epoch in range(2):
        keys = [key for step in range(epoch * EPOCH, (epoch + 1) * EPOCH) for key in samples(whole)[step + 1]]
        assert len(set(keys)) == len(keys) == EPOCH * 16


KILLED_WHILE_WRITING = """
import os, pathlib, signal, sys
from pretrain.cli import main
rename, saves = pathlib.Path.replace, []
def replace(path, target):
    if path.name == "last.ckpt.part" and (saves.append(path) or len(saves) == 3):
        os.truncate(path, path.stat().st_size // 2)
        os.killpg(0, signal.SIGKILL)
    return rename(path, target)
pathlib.Path.replace = replace
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(images: Path, tmp_path: Path) -> None:
    """By the run itself, and in the background, where training has gone on meanwhile."""
    whole = tmp_path / "whole"
    command = [
        *OBJECTIVES["mae"], *MORE, *WITH_DROP_PATH, "--data.train", images, "--trainer.max_steps", 18, "--output",
    ]  # fmt: skip
    undisturbed = start([*command, whole])
    later = ["--checkpoint_async", "true"]
    killed = {tmp_path / "now": [], tmp_path / "later": later}
    processes = [start([*command, run, *more], ("-c", KILLED_WHILE_WRITING)) for run, more in killed.items()]
    assert [end(process)[0] for process in processes] == [-signal.SIGKILL] * 2
    for run in killed:
        assert (run / "checkpoints/last.ckpt.part").exists()
        assert max(samples(run)) == 12 or (run.name == "later" and 12 < max(samples(run)) <= 16)
    assert [end(process)[0] for process in [start([*command, run, *more]) for run, more in killed.items()]] == [0, 0]
    assert end(undisturbed)[0] == 0
    for run in killed:
        assert samples(run) == samples(whole) and losses(run) == losses(whole)
        assert not list(run.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.timeout(900)  # five to seven starts of the program, on a machine that others use
@pytest.mark.parametrize(("objective", "ranks"), [("mae", (2, 1, 2)), ("dino", (1, 2, 1)), ("clip", (2, 1, 2))])
def test_killed_on_two_ranks_resumed_on_one_and_back(
    objective: str, ranks: tuple[int, ...], images: Path, tmp_path: Path
) -> None:
    """The same samples at every step; losses differ by no more than the order of sums. (Drop path differs by rank.)"""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    command = [*OBJECTIVES[objective], *MORE, "--model.encoder.drop_path", 0, "--data.train", images]
    undisturbed = start([*command, "--output", whole])
    several = ["--trainer.strategy", "ddp", "--trainer.devices"]
    for step, devices in zip((9, 26, None), ranks, strict=True):
        process = start([*command, *(several if devices > 1 else several[2:]), devices, "--output", moved])
        if step is not None:
            assert step <= kill_after(process, moved, step) < STEPS
    code, error = end(process)
    assert code == 0, error
    assert end(undisturbed)[0] == 0
    assert samples(moved) == samples(whole)
    assert losses(moved) == pytest.approx(losses(whole), rel=2e-4)


@pytest.mark.parametrize("changed", ["data", "batch", "seed", "lanes"])
def test_another_order_under_a_checkpoint_is_refused_until_the_user_allows_it(
    changed: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    more = ["--checkpoint_every", 3, "--trainer.max_steps", 6, "--output", run]
    assert pretrain(*small, *more) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    synth(other, samples=96, size=32, seed=4)
    change, reason = {
        "data": (["--data.train", other], "other data: this run was trained on"),
        "batch": (["--data.global_batch_size", 32], "data.global_batch_size: 16 -> 32"),
        "seed": (["--seed", 7], "data.seed: 0 -> 7"),
        "lanes": (["--data.lanes", 4], "data.lanes: None -> 4"),
    }[changed]
    longer = ["--trainer.max_steps", 8, "--allow_changes", "[trainer.max_steps]"]
    capsys.readouterr()
    assert pretrain(*small, *more, *change, *longer) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: ")]
    assert reason in line and "another --output" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    override = re.search(r"--allow_changes '?\[(.*)\]", line)[1]  # type: ignore[index]
    assert pretrain(*small, *more, *change, *longer[:3], f"[trainer.max_steps,{override}]") == 0
    assert list(losses(run)) == list(range(1, 9))
