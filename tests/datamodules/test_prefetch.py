"""What is fetched ahead: which shards, how far, and that nobody waits for it or dies of it."""

import multiprocessing
import pickle
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.manifest import Manifest, load_manifest
from datamodules.open_shards import open_shards
from datamodules.order import Order
from datamodules.prefetch import Prefetcher, TrainAhead
from datamodules.recipes import MAERecipe
from datamodules.shard_datamodule import ShardDataModule
from datamodules.shard_entry import Shard


def wait_for(condition, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return bool(condition())


def plain(counts, shard_bytes: int = 10) -> Manifest:
    return Manifest(Path("nowhere"), tuple(Shard(f"{i}.tar", count, shard_bytes, "") for i, count in enumerate(counts)))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_windows_hold_what_the_batches_are_drawn_from(data):
    counts = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=10).filter(lambda counts: sum(counts) > 3))
    lanes, window = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    batch = lanes * data.draw(st.integers(1, max(1, sum(counts) // lanes // 2)))
    order = Order(counts, seed=data.draw(st.integers(0, 5)), global_batch_size=batch, lanes=lanes, window=window)
    ranks = data.draw(st.sampled_from([n for n in (1, 2, 3) if batch % n == 0]))
    share = batch // ranks
    for rank in range(ranks):
        start, stop = rank * share, (rank + 1) * share
        ahead = TrainAhead(order, plain(counts), start=start, stop=stop)
        for step in range(2 * order.steps_per_epoch):
            asked = ahead.shards(order.windows(step, start, stop))
            assert set(order.batch(step, start, stop).shard.tolist()) <= set(asked)
            assert len(set(asked)) == len(asked)


def test_the_next_window_is_known_before_its_first_batch():
    order = Order([20] * 12, seed=1, global_batch_size=4, lanes=2, window=2)
    for step in range(1, 3 * order.steps_per_epoch):
        before = order.windows(step - 1)
        assert set(order.windows(step)) <= {*before, *map(order.following, before)}
    assert {window.epoch for window in order.windows(order.steps_per_epoch)} == {1}


def test_nothing_is_fetched_for_epochs_that_will_not_come():
    order = Order([20] * 12, seed=1, global_batch_size=4, lanes=2, window=2)
    last = order.steps_per_epoch - 1
    windows = order.windows(last)
    now = {shard for window in windows for shard in order.shards_in(window)}
    assert set(TrainAhead(order, plain([20] * 12), start=0, stop=4, last_step=last).shards(windows)) == now
    assert set(TrainAhead(order, plain([20] * 12), start=0, stop=4, last_step=last + 1).shards(windows)) > now


def test_shards_arrive_in_the_background(web):
    manifest = load_manifest(open_shards(web.url))
    prefetcher = Prefetcher(manifest)
    prefetcher.want([4, 2])
    assert wait_for(lambda: manifest.path(4).exists() and manifest.path(2).exists())
    prefetcher.want([2, 5])
    assert wait_for(manifest.path(5).exists)
    assert web.requests["/shard-000002.tar"] == 1 and not manifest.path(0).exists()


def test_failures_are_left_to_readers(web):
    manifest = load_manifest(open_shards(web.url))
    web.faults["/shard-000004.tar"] = ("404", None)
    prefetcher = Prefetcher(manifest)
    prefetcher.want([4, 2])
    assert wait_for(manifest.path(2).exists)
    prefetcher.want([4, 3])
    assert wait_for(manifest.path(3).exists)


def test_only_what_fits_is_fetched(web, monkeypatch):
    manifest = load_manifest(open_shards(web.url))
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", str(5 * manifest.shards[0].bytes))
    monkeypatch.setattr(Prefetcher, "_work", lambda _: None)  # so that the list stays as it is
    prefetcher = Prefetcher(manifest, ranks=2)
    prefetcher.want(range(7))
    assert list(prefetcher._wanted) == [manifest.path(0), manifest.path(1)]


def test_a_fork_and_a_pickle_begin_anew(web):
    manifest = load_manifest(open_shards(web.url))
    ahead = Prefetcher(manifest)
    ahead.want([0])
    assert wait_for(manifest.path(0).exists)
    process = multiprocessing.get_context("fork").Process(target=_want, args=(ahead, 1))
    process.start()
    process.join(20)
    assert process.exitcode == 0 and manifest.path(1).exists()
    _want(pickle.loads(pickle.dumps(ahead)), 2)


def _want(prefetcher: Prefetcher, shard: int) -> None:
    prefetcher.want([shard])
    assert wait_for(prefetcher.manifest.path(shard).exists)


def test_threads_are_few(web):
    before = threading.active_count()
    prefetcher = Prefetcher(load_manifest(open_shards(web.url)))
    for _ in range(10):
        prefetcher.want([0, 1, 2])
    assert threading.active_count() <= before + 4  # ours, and the event loop of fsspec


@pytest.mark.parametrize("little", [True, False])
def test_too_little_space_for_what_is_read_at_once_is_told(cache, monkeypatch, caplog, little):
    order = Order([20] * 12, seed=1, global_batch_size=4, lanes=2, window=2)
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", "3GB" if little else "5GB")
    TrainAhead(order, plain([20] * 12, 10**9), start=0, stop=4).warn_of_little_space()
    assert ("fetched again and again: raise TRIVIT_CACHE_SIZE" in caplog.text) == little


def test_little_space_is_told_by_the_first_rank_alone(web, monkeypatch, caplog):
    data = ShardDataModule(web.url, MAERecipe(16), 20)
    data.setup()
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", "1")
    data.stream(world_size=2, rank=1)
    assert "fetched again" not in caplog.text
    data.stream(world_size=2, rank=0)
    assert caplog.text.count("fetched again") == 1
