"""Training and evaluation data over http: the same as from the folder, whatever the cache and the server do."""

import contextlib
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch

from datamodules import remote, shard_reader
from datamodules.bad_samples import BadSamples
from datamodules.errors import DataError, DataFailure
from datamodules.image_set import evaluation_loader
from datamodules.open_shards import open_shards
from datamodules.recipes import MAERecipe
from datamodules.remote_set import fetch
from datamodules.shard_cache import remote_cache, shrink
from datamodules.shard_datamodule import ShardDataModule
from datamodules.stream import StepLoader


def module(train: object, **settings) -> ShardDataModule:
    return ShardDataModule(str(train), MAERecipe(16), 20, seed=3, **{"lanes": 2, "window": 2, **settings})


def loader(data: ShardDataModule, steps: range, workers: int = 0, budget: float = 1.0, **ranks) -> StepLoader:
    account = BadSamples(None, budget, data.manifest.num_samples, data.manifest.name)
    return StepLoader(
        data.stream(**ranks), start=steps.start, stop=steps.stop, workers=workers, pin_memory=False, bad_samples=account
    )


def batches(train: object, steps: range, **options) -> list[tuple[list[str], torch.Tensor]]:
    return [(batch["key"], batch["image"]) for batch in loader(module(train), steps, **options)]


def assert_same(one, other) -> None:
    for (keys, images), (other_keys, other_images) in zip(one, other, strict=True):
        assert keys == other_keys and torch.equal(images, other_images)


def bytes_in_cache() -> int:
    """Of shards and indexes, whole or on their way, that are there at one time: while we look nothing comes or goes."""
    while True:
        before, after = sizes_in_cache(), sizes_in_cache()
        if before.keys() == after.keys():
            return sum(before.values())


def sizes_in_cache() -> dict[Path, int]:
    sizes = {}
    for path in remote_cache().glob("*/*.tar*"):
        with contextlib.suppress(FileNotFoundError):
            if path.suffix != ".lock":  # it says how much room is taken
                sizes[path] = path.stat().st_size
    return sizes


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_the_folder(web, picture_set, workers):
    steps = range(12)  # more than two epochs
    assert_same(batches(picture_set, steps), batches(web.url, steps, workers=workers))
    assert all(web.requests[f"/shard-00000{i}.tar"] == 1 for i in range(7))


def test_a_later_start_goes_on_with_the_same_batches(web, picture_set, cache):
    whole = batches(picture_set, range(10))
    assert_same(whole[:4], batches(web.url, range(4)))
    assert_same(whole[4:7], batches(web.url, range(4, 7)))
    shutil.rmtree(cache)  # on another node
    assert_same(whole[7:], batches(web.url, range(7, 10), workers=1))
    assert module(web.url)._settings() == module(picture_set)._settings()


def test_each_rank_has_its_slice(web, picture_set):
    whole = batches(picture_set, range(5))
    parts = [batches(web.url, range(5), world_size=2, rank=rank) for rank in range(2)]
    for i, (keys, _) in enumerate(whole):
        assert keys == parts[0][i][0] + parts[1][i][0]


@pytest.mark.parametrize("shards", [2.5, 0.5])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bound_below_the_set(web, picture_set, monkeypatch, shards, workers):
    """Two and a half shards hold what is read at once, half a one holds nothing: slow, but right."""
    shard_bytes, index_bytes = (max(path.stat().st_size for path in picture_set.glob(f"*.{e}")) for e in ("tar", "idx"))
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", str(int(shards * shard_bytes)))
    most = 0
    data = module(web.url, lanes=1, window=1)
    expected = [(b["key"], b["image"]) for b in loader(module(picture_set, lanes=1, window=1), range(10))]
    found = []
    for batch in loader(data, range(10), workers=workers):
        most = max(most, bytes_in_cache())
        found.append((batch["key"], batch["image"]))
    assert_same(expected, found)
    # What is fetched ahead, of whole shards, fits; what a worker needs comes even while that is on its way.
    at_once = int(shards) + workers if workers else 1
    assert most <= max(shards, at_once) * (shard_bytes + index_bytes)
    assert sum(web.requests[f"/shard-00000{i}.tar"] for i in range(7)) > 7


def test_the_next_window_is_there_before_it_is_needed(web, picture_set):
    data = module(web.url, lanes=1, window=1)
    stream = data.stream()
    order = data.order
    for step in range(order.steps_per_epoch):
        stream[step]
        for window in map(order.following, order.windows(step)):
            tars = [data.manifest.path(shard) for shard in order.shards_in(window)]
            until = time.monotonic() + 5
            while not all(tar.exists() for tar in tars) and time.monotonic() < until:
                time.sleep(0.01)
            assert all(tar.exists() for tar in tars)


def test_with_bandwidth_the_loader_does_not_wait(own_web, monkeypatch):
    """A step needs a new shard every other time; what is on its way comes before the next step begins."""
    data = module(own_web.url, lanes=1, window=1)
    data.global_batch_size = 5
    stream, step, waited = data.stream(), 0, []

    def read(tar: Path) -> bool:
        if not tar.exists():
            waited.append(step)
        return fetch(tar)

    monkeypatch.setattr(shard_reader, "fetch", read)
    for step in range(8):
        stream[step]
        coming = [window for now in data.order.windows(step) for window in (now, data.order.following(now))]
        tars = [data.manifest.path(shard) for window in coming for shard in data.order.shards_in(window)]
        until = time.monotonic() + 60
        while not all(tar.exists() for tar in tars) and time.monotonic() < until:
            time.sleep(0.01)
    assert set(waited) <= {0}  # of the first step nothing could be known before
    assert {path: count for path, count in own_web.requests.items() if path.endswith(".tar") and count > 1} == {}


@pytest.mark.parametrize("fault", ["500", "403", "404", "cut", "stall", "short"])
def test_a_lost_shard_is_counted_and_replaced(web, picture_set, monkeypatch, capfd, fault):
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.2)
    web.faults["/shard-000003.tar"] = (fault, None)
    data = module(web.url)
    steps = loader(data, range(data.steps_per_epoch), workers=2)
    began = time.monotonic()
    seen = [key for batch in steps for key in batch["key"]]
    assert time.monotonic() - began < 20
    assert len(seen) == 100 and not any("shard-000003" in key for key in seen)
    assert steps.bad_samples.count == 16  # each of its samples has a place in the epoch
    told = [line for line in capfd.readouterr().err.splitlines() if "(try 1 of 3, next in 0.05 s)" in line]
    assert len(told) == (0 if fault in ("403", "404") else 1)  # by the one worker that fetches it for both
    assert all(line.startswith(f"{web.url}/shard-000003.tar: ") for line in told)
    budget = loader(module(web.url), range(10), workers=1, budget=0.0)
    with pytest.raises(DataError, match=rf"bad samples in {web.url} are more than .*shard-000003.tar"):
        list(budget)


def test_a_network_that_vanishes_ends_in_one_line(own_pictures, cache, monkeypatch):
    from tests.datamodules.servers import web_server

    with web_server(own_pictures) as server:
        data = module(server.url, lanes=1, window=1)
        assert data.manifest.num_samples == 40
    with pytest.raises(DataError, match=r"none of 32 samples tried in http.* the server cannot be reached") as caught:
        list(loader(data, range(2), workers=1))
    assert "\n" not in str(caught.value)


def test_a_full_disk_stops_the_run_in_one_line(web, monkeypatch):
    data = module(web.url)
    assert data.manifest

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote, "download", full)
    with pytest.raises(DataFailure, match="is full: free some space"):
        list(loader(data, range(2), workers=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation(web, picture_set, monkeypatch, workers):
    shard_bytes = max(path.stat().st_size for path in picture_set.glob("*.tar"))
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", str(3 * shard_bytes))
    sets = [
        list(evaluation_loader(root, crop_size=16, resize=16, batch_size=8, workers=workers))
        for root in (picture_set, open_shards(web.url))
    ]
    for here, there in zip(*sets, strict=True):
        assert here["key"] == there["key"] and torch.equal(here["image"], there["image"])


@pytest.mark.slow
def test_two_processes_share_a_cache(web, picture_set, tmp_path, monkeypatch):
    """Two runs of two workers each, under a bound below the set: the right batches, and no shard is fetched at once."""
    shard_bytes = max(path.stat().st_size for path in picture_set.glob("*.tar"))
    expected = batches(picture_set, range(15))
    context = multiprocessing.get_context("fork")
    for shards in (100, 4):
        monkeypatch.setenv("TRIVIT_CACHE_SIZE", str(shards * shard_bytes))
        web.requests.clear()
        processes = [context.Process(target=_run, args=(web.url, tmp_path / f"{i}.pt")) for i in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]
        for i in range(2):
            assert_same(expected, torch.load(tmp_path / f"{i}.pt"))
        if shards == 100:
            assert all(web.requests[f"/shard-00000{i}.tar"] == 1 for i in range(7))
        else:  # some went to make room; what a worker waits for comes even beyond the bound, until the next start
            assert sum(web.requests[f"/shard-00000{i}.tar"] for i in range(7)) > 7
        shrink()
        assert not list(remote_cache().glob("*/.*.partial")) and bytes_in_cache() <= shards * shard_bytes * 1.1


def _run(url: str, out: Path) -> None:
    torch.save(batches(url, range(15), workers=2), out)
