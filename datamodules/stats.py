"""Mean and standard deviation of the channels of a set, for normalisation: `trivit shards stats`.

Values are counted, not summed, so that the numbers are exact and do not depend on the order or the number of processes.

Axes: c = channels, v = possible values (256 or 65536).
"""

import os
from dataclasses import dataclass, replace
from importlib import import_module
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.bad_samples import BadSample
from datamodules.console import one_line, table, tell
from datamodules.errors import DataError
from datamodules.manifest import Manifest, load_manifest
from datamodules.open_shards import open_shards
from datamodules.workers import Tick, spread

SAMPLES = 10_000
_REMOTE_SHARDS = 8
"""So many evenly spread shards of a remote set are fetched; samples drawn from all of it would fetch all of it."""
_SEED = 0
_JOB = 200
_TICK = 20
_BLOCKS = " ▁▂▃▄▅▆▇█"
_BINS = 32


@dataclass(frozen=True)
class ChannelStats:
    """How often each value occurs in each channel, int64 [c v], over all pixels of `images` images; `bad` ones."""

    counts: NDArray[np.int64]
    images: int
    bad: tuple[BadSample, ...]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of each channel, in [0, 1]."""
        mean: NDArray[np.float64] = self.counts @ self._values / self.counts.sum(axis=1)
        return mean

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation (of the population) of each channel, in [0, 1]."""
        away = (self._values - self.mean[:, None]) ** 2
        spread_: NDArray[np.float64] = np.sqrt((self.counts * away).sum(axis=1) / self.counts.sum(axis=1))
        return spread_

    def quantile(self, share: float) -> NDArray[np.int64]:
        """The value that this share of a channel's pixels does not exceed, in units of the file."""
        reached = self.counts.cumsum(axis=1) >= np.maximum(1, share * self.counts.sum(axis=1, keepdims=True))
        value: NDArray[np.int64] = reached.argmax(axis=1)
        return value

    @property
    def _values(self) -> NDArray[np.float64]:
        return np.linspace(0, 1, self.counts.shape[1])


def channel_stats(
    root: str | os.PathLike[str], *, samples: int = SAMPLES, channels: int = 3, bits: int = 8,
    workers: int | None = None,
) -> ChannelStats:  # fmt: skip
    """Count the values of `samples` images of a set, drawn at random but the same every time, on all cores.

    Of a remote set of many shards, only those in some evenly spread ones.

    Args:
        root: shards, or images as `open_shards` takes them.
        samples: all there are, when these are fewer.
        channels, bits: of the images, see `decode_image`.
        workers: processes; all cores when None.

    Raises:
        DataError: for values out of range, no set, or not a single image that could be read.
    """
    for name, value in {"samples": samples, "channels": channels}.items():
        if value < 1:
            raise DataError(f"--{name} must be at least 1, not {value}")
    if bits not in (8, 16):
        raise DataError(f"--bits is 8 or 16, not {bits}")
    manifest = load_manifest(open_shards(root))
    if manifest.url and len(manifest.shards) > _REMOTE_SHARDS:
        tell(f"drawn from {_REMOTE_SHARDS} of the {len(manifest.shards)} shards, which are fetched for that")
        some = np.linspace(0, len(manifest.shards) - 1, _REMOTE_SHARDS).astype(int).tolist()
        manifest = replace(manifest, shards=tuple(manifest.shards[i] for i in some), classes=(), members={})
    jobs = _jobs(manifest, samples, channels, bits)
    import_module("datamodules.shard_reader")  # once here, so that no worker has to import torch for itself
    counts = np.zeros((channels, 1 << bits), np.int64)
    bad: list[BadSample] = []
    total = sum(len(job.samples) for job in jobs)
    with tqdm(total=total, desc="reading", unit="img", disable=None, leave=False) as bar:
        for _, (found, unread) in spread(_count, jobs, workers=workers, tick=bar.update):
            counts += found
            bad += unread
    bad.sort()
    if len(bad) == total:
        raise DataError(
            f"none of the {total} images of {manifest.name} can be read as {channels} channels of {bits} bits (first: "
            f"{bad[0].shard}, {bad[0].key}: {bad[0].reason}); --channels and --bits say what to read"
        )
    return ChannelStats(counts, total - len(bad), tuple(bad))


def stats_command(root: str | os.PathLike[str], *, samples: int, channels: int, bits: int) -> int:
    """Print mean, deviation, range and histogram of every channel, and the options of a run; returns 0."""
    found = channel_stats(root, samples=samples, channels=channels, bits=bits)
    total = load_manifest(open_shards(root)).num_samples
    part = f"{found.images:,} of {total:,} images" if found.images < total else f"all {total:,} images"
    print(f"{root}: {part} read, {found.counts[0].sum():,} pixels")
    if found.bad:
        first = found.bad[0]
        tell(f"left out {len(found.bad)} images that cannot be read, first: {first.shard}, {first.key}: "
             f"{one_line(first.reason)}")  # fmt: skip
    low, high = int(found.quantile(0).min()), int(found.quantile(1).max())
    quantiles = [found.quantile(share).tolist() for share in (0, 0.01, 0.5, 0.99, 1)]
    bars = (_bars(row[low : high + 1]) for row in found.counts)
    rows = zip(range(1, channels + 1), map(_short, found.mean), map(_short, found.std), *quantiles, bars, strict=True)
    print(table(("channel", "mean", "std", "least", "1%", "median", "99%", "most", f"from {low} to {high}"), rows))
    if constant := [i + 1 for i in range(channels) if found.std[i] == 0]:
        tell(f"channel {', '.join(map(str, constant))} is the same everywhere: 1 stands for its deviation of 0")
    options = f"--data.channels {channels} " if channels != 3 else ""
    options += f"--data.bits {bits} " if bits != 8 else ""
    mean = ", ".join(map(_short, found.mean))
    std = ", ".join(_short(value or 1.0) for value in found.std)
    print(f'\n{options}--data.mean "[{mean}]" --data.std "[{std}]"')
    return 0


class _Job(NamedTuple):
    """Some samples of one shard, which is the only one in `manifest`."""

    manifest: Manifest
    samples: list[int]
    channels: int
    bits: int


def _jobs(manifest: Manifest, samples: int, channels: int, bits: int) -> list[_Job]:
    """Choose samples and deal them out."""
    count = manifest.num_samples
    chosen = np.arange(count)
    if samples < count:
        chosen = np.sort(np.random.default_rng(_SEED).choice(count, samples, replace=False, shuffle=False))
    ends = np.cumsum(manifest.counts)
    shard = np.searchsorted(ends, chosen, side="right")
    sample = chosen - (ends - manifest.counts)[shard]
    jobs = []
    for number in np.unique(shard).tolist():
        alone = replace(manifest, shards=(manifest.shards[number],), classes=(), members={})
        of_shard = sample[shard == number].tolist()
        jobs += [_Job(alone, of_shard[first : first + _JOB], channels, bits) for first in range(0, len(of_shard), _JOB)]
    return jobs


def _count(job: _Job, tick: Tick) -> tuple[NDArray[np.int64], list[BadSample]]:
    """Values int64 [c v] of the samples of a job, and those that cannot be read."""
    from datamodules.shard_reader import BadSampleError, ShardReader

    reader = ShardReader(job.manifest, channels=job.channels, bits=job.bits)
    levels = 1 << job.bits
    counts = np.zeros((job.channels, levels), np.int64)
    bad = []
    for done, sample in enumerate(job.samples, 1):
        try:
            image = reader.image(0, sample)[1]
        except BadSampleError as error:
            bad.append(BadSample(error.shard, error.key, error.reason, 0))
        else:
            values = image if job.bits == 8 else (image * 257).round().int()
            counts += [np.bincount(channel.flatten().numpy(), minlength=levels) for channel in values]
        if done % _TICK == 0:
            tick(_TICK)
    tick(len(job.samples) % _TICK)
    return counts, bad


def _short(value: float) -> str:
    """Four digits that count."""
    return f"{value:.4g}"


def _bars(counts: NDArray[np.int64]) -> str:
    """A histogram in one line; roots, so that what is rare shows, too."""
    heights = np.sqrt([part.sum() for part in np.array_split(counts, min(_BINS, len(counts)))])
    return "".join(_BLOCKS[i] for i in np.ceil(heights / heights.max() * (len(_BLOCKS) - 1)).astype(int))
