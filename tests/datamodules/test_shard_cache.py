"""The cache by itself: bounded, whole or absent, one who fetches."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from datamodules import shard_cache
from datamodules.errors import DataError, DataFailure
from datamodules.manifest import Manifest
from datamodules.prefetch import Prefetcher
from datamodules.shard_cache import cached, remote_cache, space, touch
from datamodules.shard_entry import Shard


@pytest.fixture
def folder(cache) -> Path:
    folder = remote_cache() / "set"
    folder.mkdir(parents=True)
    return folder


def filler(size: int, log: list[str] | None = None):
    def fill(aside: Path) -> None:
        if log is not None:
            log.append(aside.name)
        aside.write_bytes(bytes(size))

    return fill


def tars(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.tar")}


def put(folder: Path, name: str, size: int = 100) -> Path:
    assert cached(folder / name, size, filler(size))
    return folder / name


def everything(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("text", "size"), [("200GB", 200 * 10**9), ("1.5 TB", 15 * 10**11), ("10M", 10**7), ("123", 123), ("7kib", 7000)]
)
def test_sizes(cache, monkeypatch, text, size):
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", text)
    assert space() == size


@pytest.mark.parametrize("text", ["much", "-1GB", "0", "1XB", "GB"])
def test_sizes_that_are_none(cache, monkeypatch, text):
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", text)
    with pytest.raises(DataError, match="is no size: write for example 200GB"):
        space()


def test_by_default_half_of_what_is_free(folder):
    disk = os.statvfs(folder)
    assert space() == pytest.approx(disk.f_bavail * disk.f_frsize / 2, rel=0.05)


def test_fetched_once_and_nothing_else_is_left(folder):
    log: list[str] = []
    for _ in range(3):
        assert cached(folder / "a.tar", 5, filler(5, log))
    assert len(log) == 1
    assert everything(folder) == {"a.tar"}


def test_the_longest_unused_goes_first(folder, monkeypatch):
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", "300")
    for name in ("a.tar", "b.tar", "c.tar"):
        put(folder, name)
        time.sleep(0.01)
    with (folder / "a.tar").open("rb") as file:
        touch(file.fileno())
    put(folder, "d.tar")
    assert tars(folder) == {"a.tar", "c.tar", "d.tar"}
    put(folder, "e.tar", 200)
    assert tars(folder) == {"d.tar", "e.tar"}


def test_the_index_counts_and_goes_with_its_tar(folder, monkeypatch):
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", "300")
    for name in ("a.tar", "b.tar"):
        put(folder, name)
        (folder / f"{name}.idx").write_bytes(bytes(50))
    put(folder, "c.tar")
    assert everything(folder) == {"b.tar", "b.tar.idx", "c.tar"}


def test_sets_share_the_space(folder, monkeypatch):
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", "250")
    other = remote_cache() / "other"
    other.mkdir()
    for place in (folder, other, folder):
        put(place, "x.tar" if place is other else f"{len(tars(folder))}.tar")
        time.sleep(0.01)
    assert tars(folder) == {"1.tar"} and tars(other) == {"x.tar"}


def test_what_is_larger_than_the_space_comes_alone(folder, monkeypatch):
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", "50")
    put(folder, "a.tar")
    put(folder, "b.tar")
    assert tars(folder) == {"b.tar"}


def test_eviction_does_not_break_an_open_file(folder, monkeypatch):
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", "100")
    with put(folder, "a.tar").open("rb") as file:
        put(folder, "b.tar")
        assert tars(folder) == {"b.tar"}
        assert file.read() == bytes(100)


def test_a_shard_under_way_has_its_place_reserved(folder, monkeypatch):
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", "250")
    put(folder, "old.tar")

    def slow(aside: Path) -> None:
        put(folder, "new.tar")
        aside.write_bytes(bytes(100))

    assert cached(folder / "slow.tar", 100, slow)
    assert tars(folder) == {"new.tar", "slow.tar"}


def test_nothing_is_fetched_ahead_where_others_fill_the_space(folder, monkeypatch):
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", "150")

    def slow(aside: Path) -> None:
        assert not cached(folder / "ahead.tar", 100, filler(100), wait=False)
        assert cached(folder / "needed.tar", 100, filler(100))
        aside.write_bytes(bytes(100))

    assert cached(folder / "slow.tar", 100, slow)
    assert tars(folder) == {"needed.tar", "slow.tar"}


def test_what_nobody_has_written_for_long_is_removed(folder):
    old, new = folder / ".manifest.json.1.aa.partial", folder / ".manifest.json.2.bb.partial"
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    shard_cache.shrink()
    assert everything(folder) == {new.name}


def test_a_lowered_limit(folder, monkeypatch):
    for name in ("a.tar", "b.tar", "c.tar"):
        put(folder, name)
        time.sleep(0.01)
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", "200")
    shard_cache.shrink()
    assert tars(folder) == {"b.tar", "c.tar"}


def test_a_failure_leaves_nothing(folder):
    def broken(aside: Path) -> None:
        aside.write_bytes(b"half")
        raise DataError("it is broken")

    with pytest.raises(DataError, match="it is broken"):
        cached(folder / "a.tar", 10, broken)
    assert everything(folder) == set()


def test_a_full_disk_makes_room_and_tries_again(folder):
    put(folder, "old.tar")

    def full(aside: Path) -> None:
        aside.write_bytes(b"some")
        if tars(folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    assert cached(folder / "new.tar", 4, full)
    assert everything(folder) == {"new.tar"}


def test_a_disk_that_stays_full_is_one_clear_line(folder):
    put(folder, "old.tar")

    def full(aside: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataFailure, match=r"the disk of .* is full: free some space") as caught:
        cached(folder / "new.tar", 4, full)
    assert "\n" not in str(caught.value)
    assert everything(folder) == set()


def test_a_cache_that_cannot_be_written(cache):
    with pytest.raises(DataFailure, match="cannot write"):
        cached(cache / "remote" / "nowhere" / "a.tar", 1, filler(1))


def test_file_systems_without_locks_are_named(folder, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(shard_cache.fcntl, "flock", no_locks)
    with pytest.raises(DataFailure, match="without locks: set TRIVIT_CACHE to a folder on a local disk"):
        put(folder, "a.tar")


def test_threads_share_one_download(folder):
    log: list[str] = []

    def slow(aside: Path) -> None:
        time.sleep(0.2)
        filler(10, log)(aside)

    threads = [threading.Thread(target=cached, args=(folder / "a.tar", 10, slow)) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert not cached(folder / "a.tar", 10, slow, wait=False)
    for thread in threads:
        thread.join()
    assert len(log) == 1
    assert everything(folder) == {"a.tar"}


def test_processes_share_one_download(folder):
    def slow(aside: Path) -> None:
        time.sleep(0.2)
        with (folder / "log").open("a") as log:
            log.write("x")
        aside.write_bytes(bytes(10))

    def work() -> None:
        for name in ("a.tar", "b.tar"):
            cached(folder / name, 10, slow)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (folder / "log").read_text() == "xx"
    assert everything(folder) == {"a.tar", "b.tar", "log"}


def test_a_killed_download_leaves_nothing_that_is_taken_for_whole(folder):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom datamodules.shard_cache import cached\n"
        "def fill(aside):\n    aside.write_bytes(bytes(50)); print('half', flush=True); time.sleep(60)\n"
        f"cached(Path({str(folder / 'a.tar')!r}), 100, fill)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    assert tars(folder) == set() and len(list(folder.glob(".a.tar.*.partial"))) == 1
    assert not cached(folder / "a.tar", 100, filler(100), wait=False)
    process.send_signal(signal.SIGKILL)
    process.wait()
    put(folder, "b.tar")  # anyone who needs space clears up after the dead
    assert everything(folder) == {"b.tar"}
    put(folder, "a.tar")
    assert everything(folder) == {"a.tar", "b.tar"}
    process.stdout.close()


def test_a_fetch_looks_once_through_the_cache_and_asking_ahead_seldom(folder, monkeypatch):
    scans: list[int] = []
    scan = shard_cache._scan
    monkeypatch.setattr(shard_cache, "_scan", lambda: scans.append(1) or scan())
    put(folder, "a.tar")
    assert len(scans) == 1
    prefetcher = Prefetcher(Manifest(folder, (Shard("a.tar", 1, 100, ""),)))
    for _ in range(20):
        prefetcher.want([0])
    assert len(scans) == 2


def test_odd_names(folder):
    name = "a [1]*?.tar"
    (folder / f".{name}.deadbeef.partial").touch()
    (folder / ".a 1.tar.deadbeef.partial").touch()
    (folder / f".{name}.b.tar.deadbeef.partial").touch()
    put(folder, name)
    assert everything(folder) == {name, ".a 1.tar.deadbeef.partial", f".{name}.b.tar.deadbeef.partial"}
