"""What the stream itself costs: samples of 10 KB through torch's DataLoader without decoding, beside webdataset's own.

Both read the same shards in one worker, shuffled, and hand over batches of bytes with their keys; webdataset shuffles
shards and 1,000 samples. Turns alternate within one run; counted is the CPU time of the worker and of the main process
together, in microseconds a sample; reported are the medians.

Run: python -m benchmarks.bytes_only
"""

import resource
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.table import Row, compared, show
from datamodules.batches import empty_images
from datamodules.loader import iterate
from datamodules.manifest import load_manifest
from datamodules.order import Order
from datamodules.recipes import Recipe
from datamodules.shard_reader import ShardReader
from datamodules.shard_writer import ShardWriter
from datamodules.stream import TrainStream

SAMPLES, EPOCHS, BYTES, BATCH, TURNS = 20_000, 4, 10_240, 100, 3
BATCHES = SAMPLES * EPOCHS // BATCH  # of a turn: enough that starting a worker does not count


class _Bytes(ShardReader):
    """Hands over the bytes of a sample as they are."""

    def image(self, shard: int, sample: int) -> tuple[str, Tensor]:
        key, members = self._find(shard, sample)
        return key, torch.frombuffer(self._read(shard, key, members["bin"]), dtype=torch.uint8)


class _Stack(Recipe):
    """A batch of bytes."""

    crop_size, views = 1, ("image",)

    def __call__(self, images: Iterable[Tensor], keys: NDArray[np.int64]) -> dict[str, Any]:
        batch = empty_images(len(keys), 1, 1, BYTES)[:, 0, 0]
        for row, image in zip(batch, images, strict=True):
            row.copy_(image)
        return {"image": batch}


def measure() -> list[Row]:
    """One row: microseconds a sample, ours and webdataset's."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rng = np.random.default_rng(0)
        with ShardWriter(folder, samples_per_shard=1000) as writer:
            for i in range(SAMPLES):
                writer.write(f"{i:08d}", {"bin": rng.bytes(BYTES)})
        manifest = load_manifest(folder)
        stream = TrainStream(Order(manifest.counts, seed=0, global_batch_size=BATCH), _Bytes(manifest), _Stack())
        tars = sorted(str(path) for path in folder.glob("*.tar"))
        ours, theirs = [], []
        for turn in range(TURNS):
            theirs.append(_cost(partial(_webdataset, tars, turn)))
            steps = range(turn * BATCHES, (turn + 1) * BATCHES)
            ours.append(_cost(partial(iterate, stream, steps, workers=1)))
    return [
        compared(
            "stream", f"bytes only, {BYTES // 1024} KB samples, 1 worker", "CPU us per sample",
            ours, theirs, "webdataset's pipeline",
        )
    ]  # fmt: skip


def _webdataset(tars: list[str], seed: int) -> Iterable[Any]:
    dataset = wds.WebDataset(tars, shardshuffle=100, seed=seed).shuffle(1000, seed=seed).to_tuple("bin", "__key__")
    batched = dataset.map_tuple(lambda data: torch.frombuffer(bytearray(data), dtype=torch.uint8)).batched(BATCH)
    return DataLoader(batched.repeat(EPOCHS), batch_size=None, num_workers=1)


def _cost(make: Callable[[], Iterable[Any]]) -> float:
    before, batches = _cpu_seconds(), 0
    for _ in make():
        batches += 1
    assert batches == BATCHES
    return 1e6 * (_cpu_seconds() - before) / (BATCHES * BATCH)


def _cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(show(measure()))


if __name__ == "__main__":
    main()
