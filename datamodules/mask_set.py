"""Images with masks (`.mask.png`, one class number a pixel), cut alike.

Axes: b = images, c = channels, s = side of the crop, h w = rows and columns of an image.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.bad_samples import BadSample
from datamodules.crops import center_crop, flip, resize_shorter_side
from datamodules.errors import DataError
from datamodules.labelled_batches import shuffled
from datamodules.loader import default_workers, iterate
from datamodules.manifest import load_manifest
from datamodules.rng import sample_keys, uniform
from datamodules.shard_reader import BadSampleError, ShardReader

MASK = "mask.png"
IGNORE = 255
_FLIP = 2  # purpose of the random number, as in `recipes`

Ints = NDArray[np.int64]


class MaskBatches(Dataset[dict[str, Any]]):
    """Batches {"image": [b c s s], "mask": int64 [b s s], "key"} by number; what has no mask of its size is left out.

    `lost` names the samples that `batches` left out when they last came, and that may be readable another time
    (`BadSampleError.passing`).

    Args:
        root: a folder of shards.
        crop_size, resize: sides of the central crop, and before it of the shorter side, pixels.
        batch_size: images in a batch.
        seed: None: every image once and in order; else shuffled epochs without end, half of the images mirrored.
        channels, bits: of the images, see `decode_image`.

    Raises:
        DataError: the set has no masks.
    """

    def __init__(
        self, root: Path, *, crop_size: int, resize: int, batch_size: int, seed: int | None = None, channels: int = 3,
        bits: int = 8,
    ) -> None:  # fmt: skip
        manifest = load_manifest(root)
        if not manifest.members.get(MASK):
            raise DataError(f"{manifest.name} has no masks: segmentation needs a .{MASK} beside each image")
        self.reader = ShardReader(manifest, channels=channels, bits=bits)
        self.crop_size, self.resize, self.batch_size, self.seed = crop_size, resize, batch_size, seed
        self.rows = np.arange(manifest.num_samples, dtype=np.int64)
        self.starts = np.cumsum(manifest.counts) - manifest.counts
        self._epoch, self._order = -1, self.rows
        self._lost: dict[int, BadSample] = {}

    @property
    def lost(self) -> list[BadSample]:
        """Samples that could not be read when they last came: over many epochs each fails once on some server."""
        return list(self._lost.values())

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def batches(
        self, steps: int | None = None, workers: int | None = None, on_accelerator: bool = False
    ) -> Iterator[Any]:
        """So many batches, by default those of one epoch, from worker processes; empty ones are passed over."""
        workers = default_workers(on_accelerator=on_accelerator) if workers is None else workers
        numbers = range(len(self) if steps is None else steps)
        for batch in iterate(self, numbers, workers=workers, pin_memory=on_accelerator):
            for row in batch.pop("read"):
                self._lost.pop(row, None)
            self._lost |= batch.pop("lost")
            if batch["key"]:
                yield batch

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, place = divmod(number, len(self))
        if self.seed is not None and epoch != self._epoch:
            counts = self.reader.manifest.counts
            self._epoch, self._order = epoch, shuffled(self.rows, counts, self.seed, epoch)
        images, masks, keys, read, lost = [], [], [], list[int](), dict[int, BadSample]()
        for position in range(place * self.batch_size, min((place + 1) * self.batch_size, len(self.rows))):
            row = int(self._order[position])
            try:
                found = self.pair(row)
            except BadSampleError as error:
                lost.update((row, bad) for bad in _passing(error))
                continue
            read.append(row)
            if found is None:
                continue
            key, image, mask = found
            image = center_crop(resize_shorter_side(image, self.resize), self.crop_size)
            mask = center_crop(_resize_mask(mask, self.resize), self.crop_size)
            if self.seed is not None and uniform(sample_keys(self.seed, epoch, np.array([position])), _FLIP, 1) < 0.5:
                image, mask = flip(image), flip(mask)
            images.append(image)
            masks.append(mask[0])
            keys.append(key)
        if not keys:
            return {"key": [], "read": read, "lost": lost}
        both = {"image": torch.stack(images), "mask": torch.stack(masks).long()}
        return {**both, "key": keys, "read": read, "lost": lost}

    def pair(self, row: int) -> tuple[str, Tensor, Tensor] | None:
        """Key "SHARD/KEY", image [c h w] and mask [1 h w] of a sample by its number in the set; None without a mask.

        Raises:
            BadSampleError: its image or mask cannot be read.
        """
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        sample = row - int(self.starts[shard])
        key, image = self.reader.image(shard, sample)
        mask = read_mask(self.reader, shard, sample, (image.shape[1], image.shape[2]))
        return None if mask is None else (f"{self.reader.name(shard)}/{key}", image, mask)


def read_mask(reader: ShardReader, shard: int, sample: int, size: tuple[int, int]) -> Tensor | None:
    """Class numbers [1 h w] of a sample's pixels; None without a mask, or with one that has not that size."""
    data = reader.member(shard, sample, MASK)
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as file:
            if (file.height, file.width) != size:
                return None
            pixels = np.array(file)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return None
    return torch.from_numpy(pixels.astype(np.int32))[None] if pixels.ndim == 2 else None


class MaskClasses(NamedTuple):
    """In how many masks each class is, by class, 255 (ignored) aside; and samples that another time may be readable."""

    masks: dict[int, int]
    lost: list[BadSample]


def mask_classes(
    images: MaskBatches, workers: int | None = None, done: Callable[[int], object] = lambda _: None
) -> MaskClasses:
    """What is in the masks that `images` gives, whole ones before any crop; images are read, too, to know which count.

    Args:
        images: of the set.
        workers: processes; None takes the cores there are.
        done: called with numbers of samples.
    """
    workers = default_workers(on_accelerator=False) if workers is None else workers
    masks, lost = Counter[int](), list[BadSample]()
    for batch in iterate(_Counted(images), range(len(images)), workers=workers, pin_memory=False):
        masks.update(batch["classes"])
        lost += batch["lost"]
        done(batch["samples"])
    del masks[IGNORE]
    return MaskClasses(dict(sorted(masks.items())), lost)


class _Counted(Dataset[dict[str, Any]]):
    """What each batch adds to `MaskClasses`."""

    def __init__(self, images: MaskBatches) -> None:
        self.images = images

    def __getitem__(self, number: int) -> dict[str, Any]:
        classes: list[int] = []
        lost: list[BadSample] = []
        size = self.images.batch_size
        rows = self.images.rows[number * size : (number + 1) * size].tolist()
        for row in rows:
            try:
                found = self.images.pair(row)
            except BadSampleError as error:
                lost += _passing(error)
                continue
            classes += [] if found is None else np.unique(found[2]).tolist()
        return {"classes": classes, "lost": lost, "samples": len(rows)}


def _passing(error: BadSampleError) -> list[BadSample]:
    """The sample, if it may be readable another time."""
    return [BadSample(error.shard, error.key, error.reason, 0)] if error.passing else []


def _resize_mask(mask: Tensor, size: int) -> Tensor:
    """As `resize_shorter_side`, by the nearest pixel."""
    height, width = mask.shape[1:]
    if min(height, width) == size:
        return mask
    new = (size, int(size * width / height)) if height < width else (int(size * height / width), size)
    resized = torch.nn.functional.interpolate(mask[None].float(), new, mode="nearest-exact")[0]
    return resized.to(mask.dtype)
