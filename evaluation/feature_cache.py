"""Features on disk: an entry for each encoder, data set and precision, whole or made again, within a limit of space.

Axes: n = images, d = channels of a feature vector.
"""

import contextlib
import io
import json
import shutil
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CACHE_LIMIT_BYTES = 50 << 30
DAY = 86_400  # seconds; what is in the making is younger
X, LABEL, KEYS, ABOUT = "x.float32", "label.npy", "keys.json", "about.json"
_State = tuple[tuple[int, int, int], ...]
CHECKED: dict[Path, _State] = {}
"""Entries that this process has written or checked, and how their files were then."""


class SummedFile:
    """A new file and the CRC-32 of what was written to it, so that it need not be read for that."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.crc32 = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        self._file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    def __enter__(self) -> "SummedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Entry(NamedTuple):
    """x float32 [n d] (memory-mapped), label int64 [n], key of each image, and how many could not be read."""

    x: NDArray[np.float32]
    label: NDArray[np.int64]
    key: Sequence[str]
    bad: int


def finish_entry(
    place: Path, x_crc32: int, width: int, label: NDArray[np.int64], key: Sequence[str], bad: int
) -> None:  # fmt: skip
    """Write what belongs to the features that lie in `place` already; an entry is one when about.json is there."""
    sums = {X: x_crc32}
    labels = io.BytesIO()
    np.save(labels, label)
    for name, content in ((LABEL, labels.getvalue()), (KEYS, json.dumps(key, ensure_ascii=False).encode())):
        with SummedFile(place / name) as file:
            file.write(content)
            sums[name] = file.crc32
    about = {"images": len(key), "width": width, "bad": bad, "crc32": sums}
    (place / ABOUT).write_text(json.dumps(about))


def put(new: Path, place: Path) -> None:
    """Give a finished entry its name; if another process was faster, its entry stays."""
    try:
        new.rename(place)
    except OSError:
        if (place / ABOUT).exists():
            return
        shutil.rmtree(place)  # half removed, by a process that was killed
        new.rename(place)
    CHECKED[place] = _state(place)


def is_whole(place: Path) -> bool:
    """Whether an entry is there as it was written; a damaged one is told, removed, and made again.

    The checksums of a large one take seconds, and many ask for the same: a process looks at them once, and again when a
    file has changed its size or time since.
    """
    if not (place / ABOUT).exists():
        return False
    try:
        before = _state(place)
        if CHECKED.get(place) == before:
            return True
        sums = json.loads((place / ABOUT).read_text())["crc32"]
        if all(file_crc32(place / name) == sums[name] for name in (X, LABEL, KEYS)):
            CHECKED[place] = before
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    print(f"the cached features in {place} are damaged and are computed again", file=sys.stderr)
    shutil.rmtree(place, ignore_errors=True)
    return False


def read_entry(place: Path) -> Entry:
    """What `finish_entry` wrote, without looking at checksums."""
    about = json.loads((place / ABOUT).read_text())
    shape = (about["images"], about["width"])
    return Entry(
        np.memmap(place / X, dtype=np.float32, mode="r", shape=shape), np.load(place / LABEL),
        json.loads((place / KEYS).read_text()), about["bad"],
    )  # fmt: skip


def shrink(cache_dir: Path, keep: Path) -> None:
    """Remove the entries unused for longest until the cache is below its limit; readers keep what they have open.

    And what processes that were killed have left, a day later.
    """
    for left in cache_dir.glob(".partial-*"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - DAY:
                shutil.rmtree(left, ignore_errors=True)
    entries = sorted((p for p in cache_dir.iterdir() if (p / ABOUT).exists()), key=lambda p: p.stat().st_mtime)
    sizes = {p: sum(file.stat().st_size for file in p.iterdir()) for p in entries}
    total = sum(sizes.values())
    for entry in entries:
        if total <= CACHE_LIMIT_BYTES:
            break
        if entry != keep:
            gone = entry.with_name(f".partial-{entry.name}")  # at once no entry any more, should this process be killed
            with contextlib.suppress(OSError):
                entry.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            total -= sizes[entry]


def file_crc32(file: Path) -> int:
    """Of all bytes of a file."""
    found = 0
    with file.open("rb") as data:
        while block := data.read(1 << 24):
            found = zlib.crc32(block, found)
    return found


def _state(place: Path) -> _State:
    """Size, time and number of each file of an entry."""
    files = [(place / name).stat() for name in (X, LABEL, KEYS, ABOUT)]
    return tuple((file.st_size, file.st_mtime_ns, file.st_ino) for file in files)
