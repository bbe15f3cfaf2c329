"""Images that are in train and in test, by the checksums that packing left in the indexes; nothing is read again."""

import contextlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.manifest import Manifest, load_manifest
from datamodules.tar_index import PLAIN_IMAGES, read_index
from evaluation.set_facts import remembered


def shared_images(train: Path, test: Path) -> int:
    """How many test images have size and CRC-32 of a train image; foreign tars and remote ones do not tell (0).

    The indexes are read once for each state of the two sets.
    """
    sets = load_manifest(train), load_manifest(test)
    found: int = remembered(
        "shared images 1", [each.fingerprint for each in sets],
        lambda: int(np.isin(_marks(sets[1]), _marks(sets[0])).sum()),
    )  # fmt: skip
    return found


def _marks(manifest: Manifest) -> NDArray[np.uint64]:
    """Size and checksum of every image as one number."""
    marks = [np.zeros(0, np.uint64)]
    for number in range(0 if manifest.url else len(manifest.shards)):
        with contextlib.suppress(DataError, OSError):  # a shard that is lost is told elsewhere
            index = read_index(manifest.path(number))
            if "crc32" in index.arrays:
                images = [i for i, extension in enumerate(index.extensions) if extension in PLAIN_IMAGES]
                rows = np.isin(index.arrays["extension"], images)
                size, crc32 = (index.arrays[name][rows].astype(np.uint64) for name in ("size", "crc32"))
                marks.append(size << np.uint64(32) | crc32)
    return np.concatenate(marks)
