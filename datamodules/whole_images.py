"""Whole images squeezed into a square, with the place of what is on them: boxes, or the extent of a mask.

Axes: b = images, c = channels, s = side of the square.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.crops import resize
from datamodules.loader import default_workers, iterate
from datamodules.manifest import load_manifest
from datamodules.mask_set import IGNORE, read_mask
from datamodules.shard_reader import BadSampleError, ShardReader


class WholeImages(Dataset[dict[str, Any]]):
    """Batches {"image": [b c s s], "key": list, "size": int64 [b 2], "mask_box": float64 [b 4]} by number.

    `size` is the height and width of the file in pixels, `mask_box` x0, y0, x1, y1 around what a mask marks (any class
    but 0 and 255) in pixels, x1 and y1 excluded; NaN without one. Bad samples are left out.

    Args:
        root: a folder of shards.
        side: of the square, pixels.
        batch_size: images in a batch.
        channels, bits: of the images, see `decode_image`.
    """

    def __init__(self, root: Path, *, side: int, batch_size: int, channels: int = 3, bits: int = 8) -> None:
        self.reader = ShardReader(load_manifest(root), channels=channels, bits=bits)
        self.side, self.batch_size = side, batch_size
        counts = self.reader.manifest.counts
        self.starts, self.count = np.cumsum(counts) - counts, int(counts.sum())

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def batches(self, workers: int | None = None, on_accelerator: bool = False) -> Iterator[dict[str, Any]]:
        """All of them from worker processes; empty ones are passed over."""
        workers = default_workers(on_accelerator=on_accelerator) if workers is None else workers
        for batch in iterate(self, range(len(self)), workers=workers, pin_memory=on_accelerator):
            if batch["key"]:
                yield batch

    def __getitem__(self, number: int) -> dict[str, Any]:
        images: list[Tensor] = []
        keys, sizes, boxes = [], [], []
        for row in range(number * self.batch_size, min((number + 1) * self.batch_size, self.count)):
            shard = int(np.searchsorted(self.starts, row, side="right")) - 1
            sample = row - int(self.starts[shard])
            try:
                key, image = self.reader.image(shard, sample)
                mask = read_mask(self.reader, shard, sample, (image.shape[1], image.shape[2]))
            except BadSampleError:
                continue
            images.append(resize(image, self.side, self.side))
            keys.append(f"{self.reader.name(shard)}/{key}")
            sizes.append(image.shape[1:])
            boxes.append(_extent(mask))
        if not keys:
            return {"key": []}
        return {"image": torch.stack(images), "key": keys, "size": torch.tensor(sizes),
                "mask_box": torch.tensor(boxes, dtype=torch.float64)}  # fmt: skip


def _extent(mask: Tensor | None) -> tuple[float, float, float, float]:
    marked = None if mask is None else (mask[0] != 0) & (mask[0] != IGNORE)
    if marked is None or not marked.any():
        return (float("nan"),) * 4
    rows, columns = marked.any(1).nonzero(), marked.any(0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
