"""What probes on images learn from and are scored on.

Axes: n = train images, t = test images.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.manifest import load_manifest
from datamodules.shard_reader import BadSampleError, ShardReader
from evaluation.features import Precision

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ImageData:
    """Images to learn from and to score on, and what is known of them.

    `train_rows`, `test_rows`: numbers of the samples that count in the order of their manifest, [n] and [t], with their
    keys "SHARD/KEY" and their labels in the numbering of train. `drop_unknown`: of masks, pixels of classes that train
    lacks are left out. `cache_dir`: of what is known of whole sets, see `remembered`.
    """

    train: Path
    train_rows: Ints
    train_key: Sequence[str]
    train_label: Ints
    test: Path
    test_rows: Ints
    test_key: Sequence[str]
    test_label: Ints
    classes: int
    device: str = "cpu"
    workers: int | None = None
    batch_size: int = 256
    precision: Precision = "float32"
    progress: bool = True
    drop_unknown: bool = False
    cache_dir: Path | None = None

    def held_out(self, rows: Ints) -> "ImageData":
        """Those of the train images (positions in train_rows) to score on in place of test."""
        return replace(
            self, test=self.train, test_rows=self.train_rows[rows], test_label=self.train_label[rows],
            test_key=[self.train_key[i] for i in rows],
        )  # fmt: skip


def parts_of(batch_size: int, most: int) -> tuple[int, int]:
    """A batch and the images of it that an encoder sees at a time, a divisor of it and at most `most`, both even.

    A batch without a divisor of a useful size becomes a little smaller. A batch of one image stays.
    """
    if batch_size == 1:
        return 1, 1
    batch_size, most = batch_size // 2 * 2, max(2, min(most, batch_size) // 2 * 2)
    part = next(size for size in range(most, 0, -2) if batch_size % size == 0)
    return (batch_size, part) if 4 * part >= most else (batch_size // most * most, most)


def rows_of(root: Path, keys: Sequence[str]) -> Ints:
    """Numbers of the samples with these keys "SHARD/KEY" in the order of the set, which is theirs, too."""
    manifest = load_manifest(root)
    if len(keys) == manifest.num_samples:
        return np.arange(len(keys), dtype=np.int64)
    reader, left, row, found = ShardReader(manifest), iter([*keys, ""]), 0, []
    wanted = next(left)
    for shard, described in enumerate(manifest.shards):
        for sample in range(described.samples):
            with contextlib.suppress(BadSampleError):
                if f"{reader.name(shard)}/{reader.key(shard, sample)}" == wanted:
                    found.append(row)
                    wanted = next(left)
            row += 1
    return np.array(found, np.int64)
