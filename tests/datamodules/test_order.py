import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import order as order_module
from datamodules.errors import DataError
from datamodules.order import Order, default_lanes, permute


@st.composite
def orders(draw):
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(sum))
    per_lane, lanes = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    batch = per_lane * lanes
    if batch > sum(counts):
        batch = lanes = 1
    window, seed = draw(st.integers(1, 5)), draw(st.integers(-(2**70), 2**70))
    return Order(counts, seed=seed, global_batch_size=batch, lanes=lanes, window=window)


def epoch_of(order: Order, epoch: int) -> list[tuple[int, int]]:
    first = epoch * order.steps_per_epoch
    draws = [order.batch(step) for step in range(first, first + order.steps_per_epoch)]
    assert all(d.epoch == epoch for d in draws)
    assert np.concatenate([d.position for d in draws]).tolist() == list(range(sum(len(d.shard) for d in draws)))
    return [pair for d in draws for pair in zip(d.shard.tolist(), d.sample.tolist(), strict=True)]


@settings(max_examples=50, deadline=None)
@given(orders(), st.integers(0, 5))
def test_an_epoch_has_every_sample_once_but_less_than_one_batch(order, epoch):
    everything = {(shard, i) for shard, n in enumerate(order.counts) for i in range(n)}
    seen = epoch_of(order, epoch)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= everything
    assert len(everything) - len(seen) < order.global_batch_size


@settings(max_examples=40, deadline=None)
@given(orders(), st.integers(0, 5))
def test_what_one_epoch_leaves_out_the_next_one_has(order, epoch):
    everything = {(shard, i) for shard, n in enumerate(order.counts) for i in range(n)}
    left_out = everything - set(epoch_of(order, epoch))
    assert left_out <= set(epoch_of(order, epoch + 1))


def test_every_sample_is_left_out_equally_often():
    order = Order([3, 5, 2], seed=1, global_batch_size=8)
    counted = Counter(pair for epoch in range(50) for pair in epoch_of(order, epoch))
    assert set(counted.values()) == {40}


@settings(max_examples=40, deadline=None)
@given(orders(), st.integers(1, 8), st.integers(1, 3), st.integers(0, 40))
def test_ranks_and_micro_batches_are_slices_of_one_list(order, world_size, accumulate, step):
    whole = order.batch(step)
    again = Order(
        order.counts, seed=order.seed, global_batch_size=order.global_batch_size, lanes=order.lanes, window=order.window
    )
    cuts = np.linspace(0, order.global_batch_size, world_size * accumulate + 1).astype(int).tolist()
    parts = [again.batch(step, start, stop) for start, stop in itertools.pairwise(cuts)]
    for field in ("shard", "sample", "position", "rng"):
        joined = np.concatenate([getattr(part, field) for part in parts])
        assert (joined == getattr(whole, field)).all()


@settings(max_examples=40, deadline=None)
@given(orders(), st.integers(0, 40))
def test_a_batch_takes_equally_many_from_every_lane_and_a_lane_keeps_its_shards(order, step):
    first = step // order.steps_per_epoch * order.steps_per_epoch
    lanes: list[list[int]] = [[] for _ in range(order.lanes)]
    for s in range(first, first + order.steps_per_epoch):
        for lane, shards in zip(lanes, np.split(order.batch(s).shard, order.lanes), strict=True):
            lane.extend(shards.tolist())
    # Equal runs of the layout: all lanes together touch every shard, plus at most one cut per lane and two in a shard.
    assert sum(len(set(lane)) for lane in lanes) <= np.count_nonzero(order.counts) + order.lanes + 2


def test_a_window_is_at_most_k_shards_and_comes_one_after_the_other():
    order = Order([10] * 40, seed=0, global_batch_size=1, window=4)
    shards = [shard for shard, _ in epoch_of(order, 0)]
    position = {shard: [i for i, s in enumerate(shards) if s == shard] for shard in range(40)}
    spread = sorted(max(p) - min(p) for p in position.values())
    assert spread[-2] < 40, "all but the shard that the layout starts in lie within one window of 4 x 10 samples"
    assert np.mean(spread) > 20, "and are shuffled through it"


def test_epochs_and_seeds_differ_and_repeat():
    counts = [50, 50, 50]
    a, b = (Order(counts, seed=seed, global_batch_size=30) for seed in (0, 1))
    assert epoch_of(a, 0) != epoch_of(a, 1) != epoch_of(b, 1)
    assert epoch_of(a, 3) == epoch_of(Order(counts, seed=0, global_batch_size=30), 3)
    assert set(a.batch(0).rng.tolist()).isdisjoint(a.batch(5).rng.tolist())


def test_one_shard_does_not_give_the_same_lanes_each_epoch():
    order = Order([100], seed=0, global_batch_size=10, lanes=10)
    lane_of = [{i: place % 10 for place, (_, i) in enumerate(epoch_of(order, epoch))} for epoch in range(6)]
    together = [frozenset(i for i in range(100) if lanes[i] == lanes[0]) for lanes in lane_of]
    assert len(set(together)) >= 4


@pytest.mark.parametrize("lanes", [1, 7])
def test_every_sample_is_equally_likely_at_every_place(lanes):
    found = np.zeros((7, 7))
    for epoch in range(1000):
        order = Order([7], seed=epoch, global_batch_size=7, lanes=lanes, window=2)
        for place, (_, sample) in enumerate(epoch_of(order, 0)):
            found[place, sample] += 1
    expected = 1000 / 7
    assert ((found - expected) ** 2 / expected).sum() < 80  # chi-square, 36 degrees of freedom: 0.1% point is 68


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    out = permute(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert sorted(out.tolist()) == list(range(size))


def test_permute_handles_windows_of_a_hundred_million():
    n = 10**8
    out = permute(np.arange(5000), np.full(5000, n), np.full(5000, 3, dtype=np.uint64))
    assert out.min() >= 0 and out.max() < n and len(np.unique(out)) == 5000
    assert abs(out.mean() / n - 0.5) < 0.03


@settings(max_examples=50, deadline=None)
@given(orders(), st.integers(0, 30), st.integers(0, 30))
def test_a_replacement_is_a_sample_of_the_same_lane_and_always_the_same(order, step, attempt):
    draws = order.batch(step)
    for place, position in enumerate(draws.position.tolist()):
        shard, sample = order.replacement(draws.epoch, position, attempt)
        assert (shard, sample) == order.replacement(draws.epoch, position, attempt)
        assert 0 <= sample < order.counts[shard]
        if attempt < 24:  # from the window, then the lane
            lane = place // (order.global_batch_size // order.lanes)
            first = draws.epoch * order.steps_per_epoch
            steps = range(first, first + order.steps_per_epoch)
            slots = [np.split(np.arange(order.global_batch_size), order.lanes)[lane] for _ in steps]
            members = {
                (int(d.shard[i]), int(d.sample[i]))
                for d, slot in zip(map(order.batch, steps), slots, strict=True)
                for i in slot
            }
            assert (shard, sample) in members


def test_replacements_of_one_place_differ():
    order = Order([100] * 8, seed=0, global_batch_size=8)
    assert len({order.replacement(0, 5, attempt) for attempt in range(8)}) >= 7


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([], {"global_batch_size": 1}, "no samples"),
        ([0, 0], {"global_batch_size": 1}, "no samples"),
        ([5, 4], {"global_batch_size": 10}, "between 1 and the number of samples, 9"),
        ([5], {"global_batch_size": 0}, "between 1 and"),
        ([50], {"global_batch_size": 10, "lanes": 4}, "lanes 4 must divide global_batch_size 10.*take 10"),
        ([50], {"global_batch_size": 10, "lanes": 0}, "lanes 0"),
        ([50], {"global_batch_size": 10, "window": 0}, "window 0"),
    ],
)
def test_bad_input(counts, options, message):
    with pytest.raises(DataError, match=message):
        Order(counts, seed=0, **options)


def test_default_lanes():
    assert [default_lanes(b) for b in (1, 7, 64, 128, 96, 4096, 127, 134)] == [1, 7, 64, 64, 48, 64, 1, 2]


def test_a_batch_anywhere_costs_the_tables_of_its_epoch_and_one_batch(monkeypatch):
    """Of 100 million samples: nothing goes through the samples, or through the steps before."""
    order = Order([10_000] * 10_000, seed=0, global_batch_size=4096)
    epochs, permuted, lay_out = [], [], order._lay_out
    monkeypatch.setattr(order, "_lay_out", lambda epoch: epochs.append(epoch) or lay_out(epoch))
    monkeypatch.setattr(
        order_module, "permute", lambda index, *rest: permuted.append(len(index)) or permute(index, *rest)
    )
    order.batch(10_000_000)
    assert epochs == [10_000_000 // order.steps_per_epoch] and permuted == [4096]


def test_tables_are_of_shards_not_samples_and_those_of_former_epochs_go():
    order = Order([10_000] * 1000, seed=0, global_batch_size=4096)
    sizes = []
    for epoch in range(10):
        for step in (0, order.steps_per_epoch - 1):
            order.batch(epoch * order.steps_per_epoch + step)
        tables = [np.concatenate(np.atleast_2d(a)) for table in order._epochs.values() for a in vars(table).values()]
        sizes.append(sum(array.size for array in [order.counts, order._first_sample, *tables]))
    assert len(order._epochs) <= 2 and max(sizes) < 20 * 1000
    assert max(sizes[1:]) - min(sizes[1:]) < 100


def test_order_of_a_hundred_million_samples_is_fast():
    start = time.process_time()  # of this process alone: others may need the machine
    order = Order([10_000] * 10_000, seed=0, global_batch_size=4096)
    order.batch(10 * order.steps_per_epoch + 12_345)
    assert time.process_time() - start < 1  # resuming anywhere; 10 ms on an idle core
    times = []
    for step in range(20):
        start = time.process_time()
        order.batch(10 * order.steps_per_epoch + 12_346 + step)
        times.append(time.process_time() - start)
    assert min(times) < 5e-3  # under 1 ms on an idle core
