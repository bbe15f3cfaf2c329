"""Images that are in train and in test, by the checksums that packing left in the indexes; nothing is read again."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.manifest import Manifest, load_manifest
from datamodules.tar_index import PLAIN_IMAGES, read_index
from evaluation.set_facts import remembered


def shared_images(train: Path, test: Path, cache_dir: Path | None = None) -> int:
    """How many test images have size and CRC-32 of a train image; foreign tars and remote ones do not tell (0).

    The indexes are read once for each state of the two sets, and again where one of them could not be read.

    Args:
        train, test: folders of shards.
        cache_dir: see `remembered`.
    """
    sets = load_manifest(train), load_manifest(test)

    def count() -> tuple[int, bool]:
        (seen, all_seen), (asked, all_asked) = (_marks(each) for each in sets)
        return int(np.isin(asked, seen).sum()), all_seen and all_asked

    found: int = remembered("shared images 2", [each.fingerprint for each in sets], count, cache_dir)
    return found


def _marks(manifest: Manifest) -> tuple[NDArray[np.uint64], bool]:
    """Size and checksum of every image as one number, and whether every index could be read."""
    marks, whole = [np.zeros(0, np.uint64)], True
    for number in range(0 if manifest.url else len(manifest.shards)):
        try:
            index = read_index(manifest.path(number))
        except (DataError, OSError):  # a shard that is lost is told elsewhere
            whole = False
            continue
        if "crc32" in index.arrays:
            images = [i for i, extension in enumerate(index.extensions) if extension in PLAIN_IMAGES]
            rows = np.isin(index.arrays["extension"], images)
            size, crc32 = (index.arrays[name][rows].astype(np.uint64) for name in ("size", "crc32"))
            marks.append(size << np.uint64(32) | crc32)
    return np.concatenate(marks), whole
