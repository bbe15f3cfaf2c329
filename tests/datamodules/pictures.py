"""Small shards of pictures for the tests of the stream."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.shard_writer import ShardWriter


def jpeg(number: int, size: tuple[int, int] = (20, 24)) -> bytes:
    """A small photograph-like image, another one for each number."""
    y, x = np.mgrid[: size[0], : size[1]]
    planes = [128 + 100 * np.sin(x / (3 + number % 7) + k + number) * np.cos(y / 5) for k in range(3)]
    file = io.BytesIO()
    Image.fromarray(np.stack(planes, -1).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_pictures(folder: Path, samples: int, per_shard: int, classes: int = 3) -> Path:
    """Shards of `samples` pictures with the keys 00000, 00001, ... and labels that go round."""
    with ShardWriter(folder, samples_per_shard=per_shard, classes=[f"class {i}" for i in range(classes)]) as writer:
        for i in range(samples):
            writer.write(f"{i:05d}", {"jpg": jpeg(i), "cls": str(i % classes).encode()})
    return folder
