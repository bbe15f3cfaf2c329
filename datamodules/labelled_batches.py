"""Shuffled, augmented, labelled batches for probes that learn from images; what is drawn follows from the seed alone.

Axes: b = images, c = channels, s = side of a view.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.errors import DataError
from datamodules.loader import default_workers, iterate
from datamodules.manifest import load_manifest
from datamodules.recipes import Recipe
from datamodules.rng import sample_keys
from datamodules.shard_reader import BadSampleError, ShardReader

WINDOW = 32
"""Shards that are read, and their samples shuffled, together."""

Ints = NDArray[np.int64]


def labelled_batches(
    root: str | os.PathLike[str], recipe: Recipe, *, rows: Ints, batch_size: int, steps: int, seed: int,
    workers: int | None = None, on_accelerator: bool = False, channels: int = 3, bits: int = 8,
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """Yield `steps` batches {"image": [b c s s] as the recipe makes them, "label": int64 [b]}.

    Each row comes once an epoch; what does not fill a batch is left out, another part each epoch. Bad samples, and
    those without a label, are left out, so that a batch may be smaller.

    Args:
        root: a folder of shards.
        recipe: makes one view, "image".
        rows: numbers of the samples to learn from, in the order of the manifest.
        batch_size: images in a batch; not more than there are rows.
        steps: batches.
        seed: of order and views.
        workers: processes; None takes the cores there are.
        on_accelerator: batches are put where it can fetch them.
        channels, bits: of the images, see `decode_image`.

    Raises:
        DataError: fewer rows than a batch, or no readable sample in one.
    """
    if not 1 <= batch_size <= len(rows):
        raise DataError(f"a batch of {batch_size} images needs as many to learn from, there are {len(rows)}")
    reader = ShardReader(load_manifest(root), channels=channels, bits=bits)
    dataset = _Labelled(reader, recipe, np.sort(rows), batch_size, seed)
    workers = default_workers(on_accelerator=on_accelerator) if workers is None else workers
    for batch in iterate(dataset, range(steps), workers=workers, pin_memory=on_accelerator):
        if not len(batch["label"]):
            raise DataError(f"a whole batch of {root} cannot be read: see trivit shards verify {root}")
        yield batch


def shuffled(rows: Ints, counts: Ints, seed: int, epoch: int, window: int = WINDOW) -> Ints:
    """A permutation of sorted rows: shards in random order, their samples shuffled within `window` shards."""
    rng = np.random.default_rng([seed, epoch])
    shard = np.searchsorted(np.cumsum(counts), rows, side="right")
    place = np.empty(len(counts), np.int64)
    place[rng.permutation(len(counts))] = np.arange(len(counts))
    return rows[np.lexsort((rng.random(len(rows)), place[shard] // window))]


class _Labelled(Dataset[dict[str, Any]]):
    """Batches by step."""

    def __init__(self, reader: ShardReader, recipe: Recipe, rows: Ints, batch_size: int, seed: int) -> None:
        self.reader, self.recipe, self.rows = reader, recipe, rows
        self.batch_size, self.seed = batch_size, seed
        self.counts = reader.manifest.counts
        self.starts = np.cumsum(self.counts) - self.counts
        self._epoch, self._order = -1, rows

    def __getitem__(self, step: int) -> dict[str, Any]:
        epoch, place = divmod(step, len(self.rows) // self.batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(self.rows, self.counts, self.seed, epoch)
        first = place * self.batch_size
        positions = np.arange(first, first + self.batch_size, dtype=np.int64)
        images, labels, kept = [], [], []
        for position in positions:
            row = self._order[position]
            shard = int(np.searchsorted(self.starts, row, side="right")) - 1
            sample = int(row - self.starts[shard])
            try:
                label = self.reader.label(shard, sample)
                image = self.reader.image(shard, sample)[1] if label >= 0 else None
            except BadSampleError:
                continue
            if image is not None:
                images.append(image)
                labels.append(label)
                kept.append(position)
        if not images:
            return {"label": torch.zeros(0, dtype=torch.int64)}
        keys = sample_keys(self.seed, epoch, np.array(kept, np.int64))
        return {"image": self.recipe(images, keys)["image"], "label": torch.tensor(labels, dtype=torch.int64)}
