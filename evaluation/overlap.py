"""Images that are in train and in test, by the checksums that packing left in the indexes; nothing is read again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.manifest import Manifest, load_manifest
from datamodules.tar_index import PLAIN_IMAGES, read_index
from evaluation.ranks import one_decimal
from evaluation.set_facts import remembered

MOST_SHARED = 5.0
"""Percent of the test images: with more of them in train, as many points may be too much; no verdict rests on that."""


def overlap(train: Path, test: Path, images: int, cache_dir: Path | None = None) -> dict[str, Any] | None:
    """What a protocol says of test images that are in train: `images`, `percent` and a `note`; None without any.

    Args:
        train, test: folders of shards.
        images: of test.
        cache_dir: see `remembered`.
    """
    same = train.resolve() == test.resolve()
    both = images if same else shared_images(train, test, cache_dir)
    if not both or not images:
        return None
    percent = 100 * both / images
    note = "train and test are the same images, so the scores say little"
    if not same:
        share = one_decimal(percent)
        note = f"{both:,} test images ({share}%) are in train, too; scores may be as much too good"
    return {"images": both, "percent": percent, "note": note}


def overlap_note(result: Mapping[str, Any]) -> str:
    """The note of `overlap` in a result's protocol, "" without one."""
    return str(result.get("protocol", {}).get("shared_images", {}).get("note", ""))


def no_verdict(result: Mapping[str, Any]) -> str:
    """The note, where so many test images are in train that no verdict may rest on a result; else ""."""
    percent = float(result.get("protocol", {}).get("shared_images", {}).get("percent", 0))
    return overlap_note(result) if percent > MOST_SHARED else ""


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
