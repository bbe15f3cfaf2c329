import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from datamodules import loader
from datamodules.batches import empty_images
from datamodules.errors import DataError
from datamodules.loader import available_cores, check_workers, default_workers, iterate
from datamodules.manifest import load_manifest
from datamodules.order import Order
from datamodules.recipes import MAERecipe
from datamodules.shard_reader import ShardReader
from datamodules.stream import TrainStream
from tests.datamodules.pictures import write_pictures


class Numbers(Dataset):
    """Gives about the worker what a test wants to know; strikes at one index."""

    def __init__(self, at=None, strike=None):
        self.at, self.strike = at, strike

    def __getitem__(self, index):
        if index == self.at:
            self.strike()
        images = empty_images(2, 3, 4, 5)
        images.fill_(index)
        return {"index": index, "pid": os.getpid(), "threads": torch.get_num_threads(), "image": images}


def refuse():
    raise DataError("the 7th sample is bad: mend it")


def break_down():
    raise KeyError("a bug")


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order(workers):
    batches = list(iterate(Numbers(), range(5, 30), workers=workers))
    assert [batch["index"] for batch in batches] == list(range(5, 30))
    assert all((batch["image"] == batch["index"]).all() for batch in batches)
    assert all(batch["image"].permute(0, 2, 3, 1).is_contiguous() for batch in batches)
    pids = {batch["pid"] for batch in batches}
    assert pids == {os.getpid()} if workers == 0 else len(pids) == workers and os.getpid() not in pids
    if workers:
        assert {batch["threads"] for batch in batches} == {1}
        wait_until(lambda: not any(map(alive, pids)))


def test_nothing_to_do():
    assert list(iterate(Numbers(), range(3, 3), workers=2)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_error_arrives_as_its_own_line(workers):
    batches = iterate(Numbers(7, refuse), range(20), workers=workers)
    assert [next(batches)["index"] for _ in range(7)] == list(range(7))
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value) == "the 7th sample is bad: mend it"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_stays_a_bug(workers):
    with pytest.raises(KeyError, match="a bug"):
        list(iterate(Numbers(7, break_down), range(20), workers=workers))


def test_a_killed_worker_is_told_in_one_line():
    with pytest.raises(DataError, match="loader worker was killed") as caught:
        list(iterate(Numbers(3, lambda: os.kill(os.getpid(), signal.SIGKILL)), range(20), workers=1))
    assert "\n" not in str(caught.value) and "/dev/shm" in str(caught.value)


class Wordy(Dataset):
    """Messages so long that a worker that is ahead waits in the middle of one."""

    def __getitem__(self, index):
        return {"pid": os.getpid(), "key": [f"shard-{index:06d}.tar/some_image_{i:08d}" for i in range(3000)]}


def writes_into_a_pipe(pid: int) -> bool:
    return any("pipe_write" in (task / "wchan").read_text() for task in Path(f"/proc/{pid}/task").iterdir())


@pytest.mark.timeout(60)
def test_a_worker_that_is_killed_in_the_middle_of_a_message():
    batches = iterate(Wordy(), range(100), workers=3)
    workers = [next(batches)["pid"] for _ in range(3)]
    wait_until(lambda: any(map(writes_into_a_pipe, workers)))
    os.kill(next(filter(writes_into_a_pipe, workers)), signal.SIGKILL)
    with pytest.raises(DataError, match="loader worker was killed"):
        list(batches)
    wait_until(lambda: not any(map(alive, workers)))


class Nested(Dataset):
    def __getitem__(self, index):
        (batch,) = iterate(Numbers(), [index], workers=0)
        return {"image": batch["image"], "sum": int(batch["image"].sum())}


def test_a_loader_inside_a_worker_gives_tensors():
    for i, batch in enumerate(iterate(Nested(), range(8), workers=1)):
        assert (batch["image"] == i).all() and batch["sum"] == i * 2 * 3 * 4 * 5


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_workers_survive_signals_that_are_meant_for_the_run(name):
    batches = iterate(Numbers(), range(30), workers=1)
    worker = next(batches)["pid"]
    # Sent by another process: SIGTERM is how the parent itself ends a worker.
    subprocess.run([sys.executable, "-S", "-c", f"import os; os.kill({worker}, {getattr(signal, name)})"], check=True)
    assert [batch["pid"] for batch in batches] == [worker] * 29


def test_a_loader_that_is_left_early_leaves_no_worker():
    batches = iterate(Numbers(), range(1000), workers=2)
    pids = {next(batches)["pid"] for _ in range(4)}
    assert len(pids) == 2 and all(map(alive, pids))
    batches.close()
    wait_until(lambda: not any(map(alive, pids)))


SCRIPT = """
import time
from tests.datamodules.test_loader import Numbers, Wordy
from datamodules.loader import iterate
batches = iterate(DATA(), range(100000), workers=2)
print(*{next(batches)["pid"] for _ in range(4)}, flush=True)
WHAT
"""


@pytest.mark.slow
@pytest.mark.parametrize("data", ["Numbers", "Wordy"])
@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT", "error"])
def test_workers_end_with_the_run(end, data):
    what = "raise KeyError" if end == "error" else "time.sleep(100)"
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.replace("WHAT", what).replace("DATA", data)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert len(pids) == 2
    if end.startswith("SIG"):
        for pid in [run.pid, *(pids if end == "SIGINT" else [])]:  # a terminal's Ctrl-C reaches all of them
            os.kill(pid, getattr(signal, end))
    _, errors = run.communicate(timeout=30)
    wait_until(lambda: not any(map(alive, pids)))
    assert errors.count("Traceback") == (end != "SIGKILL")  # the main process's own, none of a worker


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(iterate(Numbers(), range(3), workers=2))
    assert torch.equal(torch.rand(3), expected)


def test_forking_after_threads_does_not_hang():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        a = torch.rand(400, 400)
        (a @ a).sum()  # starts the parent's OpenMP threads
        torch.nn.functional.interpolate(torch.rand(4, 3, 200, 200), (300, 300), mode="bicubic")
        assert len(list(iterate(Interpolates(), range(6), workers=2))) == 6
    finally:
        torch.set_num_threads(before)


class Interpolates(Dataset):
    def __getitem__(self, index):
        a = torch.rand(400, 400)
        return (a @ a).sum() + torch.nn.functional.interpolate(torch.rand(4, 3, 200, 200), (300, 300)).sum()


def test_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setattr(loader, "open", lambda _: (_ for _ in ()).throw(OSError()), raising=False)
    assert available_cores() == 12 and available_cores(5) == 2 and available_cores(50) == 1
    assert default_workers(2, on_accelerator=True) == 5
    assert default_workers(1, on_accelerator=False) == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert available_cores(4) == 6  # what SLURM gave to this task alone


def test_negative_workers():
    check_workers(0)
    check_workers(None)
    with pytest.raises(DataError, match="workers -1"):
        check_workers(-1)


class SmallAndLarge(Dataset):
    """What small and large tensors of a batch look like."""

    def __getitem__(self, i):
        numbers = np.arange(3.0) + i
        return {"rng": torch.arange(5) + i, "image": torch.full((300, 300), i), "numbers": numbers, "key": ["a"]}


@pytest.mark.parametrize("workers", [0, 1])
def test_small_tensors_and_arrays_arrive_as_what_they_are(workers):
    for i, batch in enumerate(iterate(SmallAndLarge(), range(3), workers=workers)):
        assert torch.equal(batch["rng"], torch.arange(5) + i) and torch.equal(batch["image"], torch.full((300, 300), i))
        assert isinstance(batch["numbers"], np.ndarray) and batch["numbers"][0] == i and batch["key"] == ["a"]
        assert batch["image"].is_shared() == bool(workers) and not batch["rng"].is_shared()
        batch["rng"] += 1  # it can be written to


def test_nothing_piles_up_over_ten_epochs(tmp_path):
    """Neither open files, shared memory nor the memory of the two processes."""
    manifest = load_manifest(write_pictures(tmp_path, samples=120, per_shard=10))
    order = Order(manifest.counts, seed=0, global_batch_size=8)
    stream = TrainStream(order, ShardReader(manifest, open_shards=3), MAERecipe(crop_size=64))
    seen = []
    for step, _ in enumerate(iterate(stream, range(10 * order.steps_per_epoch), workers=1), 1):
        if step % order.steps_per_epoch == 0:
            worker = next(child for child in multiprocessing.active_children() if child.daemon)
            files = [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (os.getpid(), worker.pid)]
            memory = sum(resident_megabytes(pid) for pid in (os.getpid(), worker.pid))
            seen.append((*files, len(list(Path("/dev/shm").glob(f"torch_{worker.pid}_*"))), memory))
    assert len(seen) == 10
    early, late = np.max(seen[1:4], axis=0), np.max(seen[7:], axis=0)
    assert (late[:3] <= early[:3] + 2).all(), seen
    assert late[3] < early[3] + 10, seen


def resident_megabytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
