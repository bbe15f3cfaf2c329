"""Evaluation data: every sample once, in order, resized and cropped in the middle.

Axes: b = images, s = side of the crop.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.bad_samples import BadSample
from datamodules.batches import empty_images
from datamodules.crops import center_crop, resize_shorter_side
from datamodules.errors import DataError
from datamodules.loader import check_workers, default_workers, iterate
from datamodules.manifest import load_manifest
from datamodules.order import Ints
from datamodules.prefetch import Prefetcher
from datamodules.shard_reader import BadSampleError, ShardReader

log = logging.getLogger("trivit")
_BATCHES_AHEAD = 16


class EvaluationLoader:
    """Iterates over {"image": [b c s s], "label": int64 [b] (-1: unknown), "key": list of "SHARD/KEY"}.

    Images are uint8, or float32 in 0..255 where 16 bits are read. Bad samples are left out; after an iteration `bad`
    names them, and `lost` those of them that may be there another time (`BadSampleError.passing`). `manifest` describes
    the data set, and `len()` is the number of batches.
    """

    def __init__(
        self, root: Path, *, crop_size: int, resize: int, batch_size: int, workers: int, limit: int | None,
        pin_memory: bool, channels: int, bits: int, share: tuple[int, int],
        rows: Ints | None,
    ) -> None:  # fmt: skip
        self.manifest = load_manifest(root)
        self.workers, self.pin_memory = workers, pin_memory
        self.bad: list[BadSample] = []
        self.lost: list[BadSample] = []
        count = self.manifest.num_samples
        chosen: Ints = np.arange(count, dtype=np.int64) if rows is None else np.sort(rows)
        if limit is not None and limit < count:
            chosen = np.arange(limit, dtype=np.int64) * count // limit  # spread out: neighbours may be of one class
        ends = np.cumsum(self.manifest.counts)
        shard = np.searchsorted(ends, chosen, side="right")
        sample = chosen - (ends - self.manifest.counts)[shard]
        cuts = range(batch_size, len(chosen), batch_size)
        places = list(zip(np.split(shard, cuts), np.split(sample, cuts), strict=True))
        part, parts = share
        places = places[len(places) * part // parts : len(places) * (part + 1) // parts]
        self._batches = _Batches(ShardReader(self.manifest, channels=channels, bits=bits), places, crop_size, resize)

    def __len__(self) -> int:
        return len(self._batches.places)

    @property
    def num_images(self) -> int:
        """Samples in the batches, bad ones included."""
        return sum(len(shard) for shard, _ in self._batches.places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.bad, self.lost = [], []
        for batch in iterate(self._batches, range(len(self)), workers=self.workers, pin_memory=self.pin_memory):
            self.bad += batch.pop("bad")
            self.lost += batch.pop("lost")
            if batch["key"]:
                yield batch
        if self.bad:
            first = self.bad[0]
            log.warning(
                "%s: %d bad samples left out, the first one: %s, %s: %s",
                self.manifest.name, len(self.bad), first.shard, first.key, first.reason,
            )  # fmt: skip


def evaluation_loader(
    root: str | os.PathLike[str], *, crop_size: int, resize: int, batch_size: int = 256, workers: int | None = None,
    limit: int | None = None, pin_memory: bool = False, channels: int = 3, bits: int = 8,
    share: tuple[int, int] = (0, 1), rows: Ints | None = None,
) -> EvaluationLoader:  # fmt: skip
    """Read a folder of shards for evaluation.

    Args:
        root: the folder.
        crop_size: side of the central crop, pixels.
        resize: the shorter side is first resized to this (bicubic, antialiased), pixels.
        batch_size: images in a batch; the last one may hold fewer.
        workers: processes; None takes the cores there are.
        limit: read only so many samples, spread evenly over the set.
        pin_memory: put the batches where an accelerator can fetch them.
        channels, bits: of the images, see `decode_image`.
        share: (i, n): only the i-th of n parts of the batches, in order.
        rows: only the samples of these numbers, in the order of the set; not together with `limit`.

    Raises:
        DataError: for numbers that make no sense, or a folder without samples.
    """
    if not 1 <= crop_size <= resize:
        raise DataError(f"crop_size {crop_size} must be at least 1 and at most resize, which is {resize}")
    if batch_size < 1:
        raise DataError(f"batch_size {batch_size} must be at least 1")
    if limit is not None and limit < 1:
        raise DataError(f"limit {limit} must be at least 1")
    check_workers(workers)
    if workers is None:
        workers = default_workers(on_accelerator=pin_memory)
    return EvaluationLoader(
        Path(root), crop_size=crop_size, resize=resize, batch_size=batch_size, workers=workers, limit=limit,
        pin_memory=pin_memory, channels=channels, bits=bits, share=share, rows=rows,
    )  # fmt: skip


class _Batches(Dataset[dict[str, Any]]):
    """Batches by number; `places` holds the shard and sample numbers of each."""

    def __init__(self, reader: ShardReader, places: list[tuple[Ints, Ints]], crop_size: int, resize: int) -> None:
        self.reader, self.places, self.crop_size, self.resize = reader, places, crop_size, resize
        self._prefetcher = Prefetcher(reader.manifest) if reader.manifest.url else None
        self._wanted: list[int] = []

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._prefetcher is not None:
            wanted = np.unique(np.concatenate([shard for shard, _ in self.places[index : index + _BATCHES_AHEAD]]))
            if wanted.tolist() != self._wanted:
                self._wanted = wanted.tolist()
                self._prefetcher.want(self._wanted)
        places = list(zip(*(column.tolist() for column in self.places[index]), strict=True))
        dtype = torch.uint8 if self.reader.bits == 8 else torch.float32
        images = empty_images(len(places), self.reader.channels, self.crop_size, self.crop_size, dtype)
        labels: list[int] = []
        keys: list[str] = []
        bad: list[BadSample] = []
        lost: list[BadSample] = []
        for shard, sample in places:
            try:
                key, image = self.reader.image(shard, sample)
                label = self.reader.label(shard, sample)
            except BadSampleError as error:
                bad.append(BadSample(error.shard, error.key, error.reason, 0))
                lost += bad[-1:] if error.passing else []
                continue
            images[len(keys)] = center_crop(resize_shorter_side(image, self.resize), self.crop_size)
            labels.append(label)
            keys.append(f"{self.reader.name(shard)}/{key}")
        found = {"image": images[: len(keys)], "label": torch.tensor(labels, dtype=torch.int64), "key": keys}
        return {**found, "bad": bad, "lost": lost}
