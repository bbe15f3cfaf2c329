"""The first images of a run's order, cut as in evaluation: a small set that stays the same, for measuring on the way.

Axes: c = channels, s = side of the crop.
"""

from collections.abc import Iterator

from torch import Tensor

from datamodules.crops import center_crop, resize_shorter_side
from datamodules.manifest import Manifest
from datamodules.order import Order
from datamodules.shard_reader import BadSampleError, ShardReader


def first_images(
    order: Order, manifest: Manifest, count: int, *, crop_size: int, resize: int, channels: int = 3, bits: int = 8
) -> Iterator[Tensor]:
    """Up to `count` images [c s s] of the first steps of `order`, without augmentation, read one by one when asked for.

    They depend on data and seed alone. Bad samples are passed over. Nothing is fetched for it: where a tar of a remote
    set is not in the cache (any more), there are no further images.

    Args:
        order, manifest: of the run's data.
        count: how many; fewer when the set is smaller.
        crop_size: side of the central crop, pixels.
        resize: the shorter side is first resized to this (bicubic, antialiased), pixels.
        channels, bits: of the images, see `decode_image`.
    """
    reader = ShardReader(manifest, channels=channels, bits=bits)
    batch = order.global_batch_size
    count = min(count, order.steps_per_epoch * batch)
    for start in range(0, count, batch):
        draws = order.batch(start // batch, 0, min(batch, count - start))
        for shard, sample in zip(draws.shard.tolist(), draws.sample.tolist(), strict=True):
            if manifest.url and not manifest.path(shard).exists():
                return
            try:
                image = reader.image(shard, sample)[1]
            except BadSampleError:
                continue
            yield center_crop(resize_shorter_side(image, resize), crop_size)
