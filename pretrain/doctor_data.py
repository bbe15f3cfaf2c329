"""Whether a training set fits the ranks of a run, and how fast it is read."""

import time
from collections.abc import Iterator

import torch

from datamodules.errors import DataError
from datamodules.remote import is_remote
from datamodules.shard_datamodule import ShardDataModule
from pretrain.findings import Finding

READING_SECONDS = 3.0
FEWEST_BATCHES, MOST_BATCHES = 2, 64


def training_set(data: ShardDataModule, world_size: int) -> Iterator[Finding]:
    """What is in it, and what is wrong with it; DataError when it cannot be read at all."""
    data.setup("fit")
    manifest, order = data.manifest, data.order
    left_out = f", {data.num_skipped:,} more could not be packed" if data.num_skipped else ""
    yield Finding(
        "ok",
        f"{manifest.num_samples:,} images in {len(manifest.shards):,} shards, {data.steps_per_epoch:,} steps an "
        f"epoch{left_out}",
    )
    if broken := sum(shard.findings for shard in manifest.shards):
        yield Finding("wrong", f"{broken} findings in the tars: trivit shards verify {data.train} lists them")
    if order.lanes % world_size:
        fits = [n for n in range(world_size, 513, world_size) if data.global_batch_size % n == 0]
        remedy = f"; --data.lanes {fits[0]} keeps each node to its own shards" if fits else ""
        yield Finding("note", f"{order.lanes} lanes for {world_size} ranks: ranks share lanes{remedy}")
    if len(manifest.shards) < world_size:
        yield Finding(
            "note",
            f"{len(manifest.shards)} shards for {world_size} ranks: several read the same tar, which a shared disk may "
            "feel; pack with fewer --samples-per-shard",
        )


def reading_rate(data: ShardDataModule) -> float | None:
    """Images a second that one core of this machine reads, decodes and augments; None: a remote set, not tried."""
    if is_remote(data.train):
        return None
    stream = data.stream()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has it
    try:
        stream[0]
        done, start = 0, time.perf_counter()
        while done < FEWEST_BATCHES or (time.perf_counter() - start < READING_SECONDS and done < MOST_BATCHES):
            done += 1
            if stream[done]["bad"]:
                raise DataError(f"images of {data.train} cannot be read: trivit shards verify {data.train} lists them")
        return done * stream.micro_batch / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
