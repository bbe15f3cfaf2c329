import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from datamodules.bad_samples import BadSamples
from datamodules.errors import DataError
from datamodules.manifest import Manifest, load_manifest
from datamodules.order import Order
from datamodules.recipes import DINORecipe, MAERecipe
from datamodules.shard_entry import Shard
from datamodules.shard_reader import BadSampleError, ShardReader
from datamodules.stream import StepLoader, TrainStream


class PlainReader(ShardReader):
    """A data set that exists only as numbers; some samples of it are bad."""

    def __init__(self, counts, bad=frozenset()):
        shards = tuple(Shard(f"{i}.tar", count, 0, "") for i, count in enumerate(counts))
        super().__init__(Manifest(Path("nowhere"), shards))
        self.bad = bad
        self.read = 0

    def image(self, shard, sample):
        self.read += 1
        if (shard, sample) in self.bad:
            raise BadSampleError(self.name(shard), f"{sample}", "it is bad")
        return f"{sample}", (torch.arange(48) * 5 + shard * 31 + sample).to(torch.uint8).view(3, 4, 4)


RECIPES = [
    MAERecipe(2), DINORecipe(3, local_views=2, local_size=2), DINORecipe(3, local_views=1, local_size=2, color=None)
]  # fmt: skip


def loader_of(
    reader, order, steps, *, rank=0, world_size=1, accumulate=1, workers=0, account=None, recipe=RECIPES[0]
):  # fmt: skip
    stream = TrainStream(order, reader, recipe, rank=rank, world_size=world_size, accumulate=accumulate)
    account = account or BadSamples(None, 1.0, order.num_samples, Path("nowhere"))
    start, stop = steps.start * accumulate, steps.stop * accumulate
    return StepLoader(stream, start=start, stop=stop, workers=workers, pin_memory=False, bad_samples=account)


def global_batches(reader, order, steps, world_size, accumulate, workers, recipe=RECIPES[0]):
    """Every optimiser step's batch, put together from all ranks' micro-batches; `workers` of each rank."""
    layout = {"world_size": world_size, "accumulate": accumulate, "recipe": recipe}
    ranks = [list(loader_of(reader, order, steps, rank=r, workers=workers[r], **layout)) for r in range(world_size)]
    batches = []
    for i in range(len(steps)):
        parts = [part for rank in ranks for part in rank[i * accumulate : (i + 1) * accumulate]]
        assert {(part["step"], part["epoch"]) for part in parts} == {(steps[i], steps[i] // order.steps_per_epoch)}
        keys = [key for part in parts for key in part["key"]]
        axis = {name: len(recipe.views) > 1 for name in parts[0] if name.startswith(recipe.views)}  # of the samples
        names = ["rng", "position", *axis]
        tensors = [torch.cat([torch.as_tensor(part[n]) for part in parts], int(axis.get(n, False))) for n in names]
        batches.append((keys, *tensors))
    return batches


@st.composite
def settings_of_a_run(draw):
    world_size, accumulate, size = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch = world_size * accumulate * size
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda counts: sum(counts) >= batch))
    lanes = draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0]))
    seed, window = draw(st.integers(0, 9)), draw(st.integers(1, 4))
    order = Order(counts, seed=seed, global_batch_size=batch, lanes=lanes, window=window)
    bad = draw(st.sets(st.tuples(st.integers(0, 7), st.integers(0, 29)), max_size=3))
    first = draw(st.integers(0, 2 * order.steps_per_epoch))
    return order, frozenset(bad), range(first, first + 3), world_size, accumulate


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    settings_of_a_run(), st.lists(st.sampled_from([0, 0, 0, 1, 3]), min_size=8, max_size=8), st.sampled_from(RECIPES)
)
@example(
    (Order([30, 7, 25], seed=1, global_batch_size=16, lanes=4), frozenset({(0, 3)}), range(2, 5), 8, 2),
    [3] * 8,
    RECIPES[0],
)
def test_the_global_batch_is_the_same_list_on_any_ranks_and_workers(run, workers, recipe):
    """Samples and all that is random about them: crops, flips, parameters of colours, and the keys of later draws."""
    order, bad, steps, world_size, accumulate = run
    reader = PlainReader(order.counts, bad if len(bad) < order.num_samples / 4 else frozenset())
    alone = global_batches(reader, order, steps, 1, 1, [0], recipe)
    together = global_batches(reader, order, steps, world_size, accumulate, workers, recipe)
    for (keys, *tensors), (other_keys, *other_tensors) in zip(alone, together, strict=True):
        assert keys == other_keys
        assert all(map(torch.equal, tensors, other_tensors))
    for step, (keys, rng, position, *_) in zip(steps, alone, strict=True):
        draws = order.batch(step)
        assert rng.tolist() == draws.rng.tolist() and position.tolist() == draws.position.tolist()
        for key, shard, sample in zip(keys, draws.shard.tolist(), draws.sample.tolist(), strict=True):
            assert key == f"{shard}.tar/{sample}" or (shard, sample) in reader.bad


def test_real_shards_with_and_without_workers(picture_set):
    manifest = load_manifest(picture_set)
    order = Order(manifest.counts, seed=3, global_batch_size=12)
    runs = [
        global_batches(ShardReader(manifest), order, range(4, 10), world_size, 2, workers)
        for world_size, workers in ((1, [0]), (2, [2, 1]))
    ]
    for (keys, *tensors), (other_keys, *other_tensors) in zip(*runs, strict=True):
        assert keys == other_keys
        assert all(map(torch.equal, tensors, other_tensors))


def test_a_replaced_sample_keeps_its_slot_and_its_randomness():
    counts = [20] * 6
    order = Order(counts, seed=0, global_batch_size=12, lanes=3)
    bad = frozenset((2, i) for i in range(20))
    stream, clean = (TrainStream(order, PlainReader(counts, b), MAERecipe(2)) for b in (bad, frozenset()))
    replaced = []
    for step in range(order.steps_per_epoch):
        batch, expected = stream[step], clean[step]
        assert batch["rng"].tolist() == expected["rng"].tolist()
        for key, other in zip(batch["key"], expected["key"], strict=True):
            if other.startswith("2.tar/"):
                replaced.append(other)
                assert not key.startswith("2.tar/")
            else:
                assert key == other
        assert {entry.shard for entry in batch["bad"]} <= {"2.tar"}
    assert sorted(replaced) == sorted(f"2.tar/{i}" for i in range(20))


def test_all_bad_samples_are_counted_named_and_stop_the_run_beyond_the_budget(tmp_path):
    counts, path = [50] * 4, tmp_path / "bad.jsonl"
    bad = frozenset({(0, 7), (3, 1), (3, 2)})
    order = Order(counts, seed=0, global_batch_size=10)
    reader, epoch = PlainReader(counts, bad), range(order.steps_per_epoch)
    account = BadSamples(path, 0.015, 200, tmp_path)
    assert len(list(loader_of(reader, order, epoch, workers=2, account=account))) == 20
    named = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(entry["shard"], entry["key"]) for entry in named} == {("0.tar", "7"), ("3.tar", "1"), ("3.tar", "2")}
    assert len(named) == account.count == 3

    again = BadSamples(path, 0.014, 200, tmp_path)
    with pytest.raises(DataError, match=r"3 bad samples in .*more than data.bad_sample_budget"):
        list(loader_of(reader, order, range(20, 40), workers=2, account=again))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_without_a_good_sample_stops_at_once_in_one_line(workers):
    counts = [5, 5]
    reader = PlainReader(counts, frozenset((shard, i) for shard in range(2) for i in range(5)))
    with pytest.raises(DataError, match=r"none of 32 samples tried in nowhere could be read, .*it is bad") as e:
        list(loader_of(reader, Order(counts, seed=0, global_batch_size=2), range(3), workers=workers))
    assert "\n" not in str(e.value)


def test_shard_deleted_while_running(own_pictures):
    manifest = load_manifest(own_pictures)
    order = Order(manifest.counts, seed=0, global_batch_size=4)
    account = BadSamples(None, 0.5, 40, own_pictures)
    batches = iter(loader_of(ShardReader(manifest), order, range(30), account=account))
    for _ in range(10):
        next(batches)
    manifest.path(1).unlink()
    reader = ShardReader(manifest)  # as in a worker that had not opened it yet
    for batch in loader_of(reader, order, range(10, 30), account=account):
        assert len(batch["key"]) == 4 and not any("shard-000001" in key for key in batch["key"])
    assert account.count == 10


def test_fewer_shards_than_lanes_ranks_and_workers(own_pictures):
    manifest = load_manifest(own_pictures)
    order = Order(manifest.counts, seed=0, global_batch_size=40, lanes=20)
    (keys, *_), = global_batches(ShardReader(manifest), order, range(1), 8, 1, [0] * 8)  # fmt: skip
    assert len(set(keys)) == 40


def test_one_sample_in_all():
    batches = global_batches(PlainReader([1]), Order([1], seed=0, global_batch_size=1), range(5), 1, 1, [2])
    assert [keys for keys, *_ in batches] == [["0.tar/0"]] * 5
    assert len({int(rng) for _, rng, *_ in batches}) == 5


@settings(max_examples=25, deadline=None)
@given(settings_of_a_run(), st.integers(0, 10**12))
def test_a_start_anywhere_reads_what_its_first_batch_needs_and_nothing_else(run, step):
    order, *_, world_size, accumulate = run
    reader = PlainReader(order.counts)
    loader = loader_of(
        reader, order, range(step, step + 3), rank=world_size - 1, world_size=world_size, accumulate=accumulate
    )
    first = next(iter(loader))
    assert (first["step"], reader.read) == (step, loader.stream.micro_batch)


def test_length_is_that_of_the_whole_run():
    loader = loader_of(PlainReader([50]), Order([50], seed=0, global_batch_size=10), range(3, 8), accumulate=2)
    assert len(loader) == 16
    assert [batch["step"] for batch in loader] == [3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert list(loader_of(PlainReader([50]), Order([50], seed=0, global_batch_size=10), range(8, 8))) == []


def test_indivisible_batch():
    with pytest.raises(DataError, match="global_batch_size 10 cannot be divided by 3 ranks times 1"):
        TrainStream(Order([50], seed=0, global_batch_size=10), PlainReader([50]), MAERecipe(2), world_size=3)


def test_augmentation_follows_the_position_not_the_sample(picture_set):
    manifest = load_manifest(picture_set)
    order = Order(manifest.counts, seed=3, global_batch_size=20)
    stream = TrainStream(order, ShardReader(manifest), MAERecipe(16))
    first = dict(zip(stream[0]["key"], stream[0]["image"], strict=True))
    again = {}
    for step in range(order.steps_per_epoch, 2 * order.steps_per_epoch):
        again |= dict(zip(stream[step]["key"], stream[step]["image"], strict=True))
    both = first.keys() & again.keys()
    assert len(both) > 10
    assert np.mean([torch.equal(first[key], again[key]) for key in both]) == 0
