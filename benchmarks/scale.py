"""What a huge data set costs before and while training: 10,000 shards of 10,000 samples, of which only names are real.

One tar, empty but of the right length, and its index have 10,000 names each (hard links), and a manifest lists them.
A process of its own starts on that as a run does, and asks for the order and the index entries of batches from all over
10 epochs, with 64 lanes on a single rank, which keeps as many shards open as it gets. Against the limits that we set.

Run: python -m benchmarks.scale
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.memory import resident_mib
from benchmarks.table import Row, show
from datamodules.manifest import MANIFEST, Manifest, load_manifest
from datamodules.order import Order
from datamodules.shard_entry import Shard, describe_shard
from datamodules.shard_reader import ShardReader
from datamodules.tar_index import INDEX_SUFFIX, ShardIndex

SHARDS, SAMPLES, BATCH, EPOCHS = 10_000, 10_000, 4096, 10
BATCHES_AN_EPOCH = 40  # of 24,414, spread over it: what one leaves behind shows
IMAGE_BYTES = 10_240


def measure() -> list[Row]:
    """Seconds and memory at the start, milliseconds of a batch's order, memory that 10 epochs leave behind."""
    with tempfile.TemporaryDirectory() as folder:
        simulate(Path(folder))
        began = time.time()
        command = [sys.executable, "-m", "benchmarks.scale", "--child", folder]
        child = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    found = json.loads(child.stdout)
    setting = f"{SHARDS:,} shards, {SHARDS * SAMPLES:,} samples"
    return [
        Row("start", f"{setting}, with Python's imports", "s", found["ready"] - began, 10, "the limit"),
        Row("start", setting, "MB in all", found["memory"], 1000, "the limit"),
        Row("resume at step 10,000,000", setting, "ms", found["resume"], 1000, "the limit"),
        Row("order of the next batch", f"batch {BATCH}", "CPU ms", found["order"], 1, "the limit"),
        Row("memory left by epochs 2 to 10", setting, "MB", max(found["grown"], 0.1), 10, "the limit"),
    ]


def simulate(folder: Path, shards: int = SHARDS, samples: int = SAMPLES) -> None:
    """A set of shards as `trivit shards pack` leaves it, but for what is in the tars."""
    member = 512 + IMAGE_BYTES
    arrays = {
        "first": np.arange(samples + 1, dtype=np.uint32), "extension": np.zeros(samples, np.uint32),
        "offset": 512 + member * np.arange(samples, dtype=np.int64), "size": np.full(samples, IMAGE_BYTES, np.int64),
        "crc32": np.zeros(samples, np.uint32), "key_end": 9 * np.arange(1, samples + 1, dtype=np.uint32),
        "keys": np.frombuffer("".join(f"{i:09d}" for i in range(samples)).encode(), np.uint8),
    }  # fmt: skip
    index = ShardIndex("", member * samples + 1024, ("jpg",), arrays)
    digest, names = describe_shard(index).digest, [f"shard-{i:06d}.tar" for i in range(shards)]
    with (folder / names[0]).open("wb") as tar:
        tar.truncate(index.tar_bytes)
    (folder / f"{names[0]}{INDEX_SUFFIX}").write_bytes(index.to_bytes())
    for name in names[1:]:
        (folder / name).hardlink_to(folder / names[0])
        (folder / f"{name}{INDEX_SUFFIX}").hardlink_to(folder / f"{names[0]}{INDEX_SUFFIX}")
    listed = tuple(Shard(name, samples, index.tar_bytes, digest) for name in names)
    (folder / MANIFEST).write_bytes(Manifest(folder, listed, members={"jpg": shards * samples}).to_bytes())


def _child(folder: Path) -> dict[str, float]:
    """Start as a run does, then go through the epochs."""
    manifest = load_manifest(folder)
    order = Order(manifest.counts, seed=0, global_batch_size=BATCH)
    order.batch(0)
    ready, memory = time.time(), resident_mib("VmHWM") * 2**20 / 1e6
    start = time.perf_counter()
    Order(manifest.counts, seed=0, global_batch_size=BATCH).batch(10_000_000)
    resume = 1e3 * (time.perf_counter() - start)
    reader = ShardReader(manifest, open_shards=order.lanes * (order.window + 1))
    seconds, after = [], []
    for epoch in range(EPOCHS):
        for step in np.linspace(0, order.steps_per_epoch - 1, BATCHES_AN_EPOCH, dtype=int).tolist():
            start = time.process_time()  # other load on the machine would count, too, by the clock
            draws = order.batch(epoch * order.steps_per_epoch + step)
            seconds.append(time.process_time() - start)
            for shard, sample in zip(draws.shard[::16].tolist(), draws.sample[::16].tolist(), strict=True):
                reader._find(shard, sample)
        after.append(_resident())
    return {
        "ready": ready, "memory": memory, "resume": resume, "order": 1e3 * statistics.median(seconds),
        "grown": after[-1] - after[0],
    }  # fmt: skip


def _resident() -> float:
    """Memory of this process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Print the table; with --child, what a process finds, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(_child(arguments.child)) if arguments.child else show(measure()))


if __name__ == "__main__":
    main()
