"""Reading single samples out of shards: some open tars, positioned reads, and one kind of error for all damage."""

import contextlib
import os
import resource
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from datamodules.class_labels import LABEL, class_number
from datamodules.decode import BadImageError, decode_image
from datamodules.errors import DataError, DataFailure
from datamodules.manifest import Manifest
from datamodules.remote_set import fetch
from datamodules.shard_cache import touch
from datamodules.tar_index import PLAIN_IMAGES, Member, ShardIndex, read_index
from datamodules.tar_samples import ARRAY

MAX_BYTES = 1 << 30
"""A larger image file is refused: no decoder needs it, and one member must not fill the memory."""

_RETRY_AFTER = (0.1, 0.5, 2.0)
_TRY_A_LOST_SHARD_AGAIN_AFTER = 10.0
_SECONDS_BETWEEN_TOUCHES = 1.0
_MOST_EVICTIONS_IN_A_ROW = 5
Value = TypeVar("Value")


class BadSampleError(Exception):
    """A sample that cannot be used: in which shard (file name), under which key, and why.

    `passing`: its bytes could not be had, or are not those that were packed, so that the same set may give it later.
    """

    def __init__(self, shard: str, key: str, reason: str, passing: bool = False) -> None:
        super().__init__(shard, key, reason, passing)
        self.shard, self.key, self.reason, self.passing = shard, key, reason, passing


class ShardReader:
    """Random access to the samples of a data set, by shard number and sample number.

    Args:
        manifest: of the data set.
        open_shards: how many shards are kept open, up to half of what the system allows a process; one more closes
            the one that was unused for longest.
        channels, bits: of the images, see `decode_image`.
    """

    def __init__(self, manifest: Manifest, open_shards: int = 64, channels: int = 3, bits: int = 8) -> None:
        self.manifest, self.channels, self.bits = manifest, channels, bits
        self.open_shards = min(open_shards, _allowed_files() // 2)
        self._open: OrderedDict[int, _OpenShard | _RemoteShard] = OrderedDict()
        self._lost: dict[int, tuple[float, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_lost": {}}

    def image(self, shard: int, sample: int) -> tuple[str, Tensor]:
        """Key of a sample and its pixels [c h w]. BadSampleError when it has no image that can be used.

        An array (.npy) is taken for the image where there is no other: beside one it is usually an embedding.
        """
        key, members = self._find(shard, sample)
        extension = next((extension for extension in members if extension in PLAIN_IMAGES), ARRAY)
        if extension not in members:
            raise self._bad(shard, key, f"no image, only {', '.join(members)}")
        member = members[extension]
        data = self._read(shard, key, member)
        try:
            return key, decode_image(data, extension, self.channels, self.bits)
        except BadImageError as error:
            reason = f"{extension}: {error}"
            damaged = member.crc32 is not None and member.crc32 != zlib.crc32(data)
            if damaged:
                reason += " (checksum differs: damaged after it was packed)"
            raise self._bad(shard, key, reason, passing=damaged) from error

    def label(self, shard: int, sample: int) -> int:
        """Class index of a sample, -1 without one. BadSampleError when the label is neither that nor a class's name."""
        key, members = self._find(shard, sample)
        if LABEL not in members:
            return -1
        content = bytes(self._read(shard, key, members[LABEL]))
        number = class_number(content, self._class_numbers)
        if number is None:
            raise self._bad(shard, key, f"cls: {content[:40]!r} is no index of a class ({self._remedy})")
        return number

    def member(self, shard: int, sample: int, extension: str) -> bytearray | None:
        """What a sample has under an extension; None when it has nothing. BadSampleError when it cannot be read."""
        key, members = self._find(shard, sample)
        return self._read(shard, key, members[extension]) if extension in members else None

    def key(self, shard: int, sample: int) -> str:
        """Key of a sample. BadSampleError when the shard has lost it."""
        return self._find(shard, sample)[0]

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return self.manifest.shards[shard].name

    @property
    def _remedy(self) -> str:
        """What to do about a name that the manifest does not know: one of before names were collected has none."""
        lists = "a .cls holds a number, or a name that classes.txt, one on each line, or manifest.json lists"
        anew = "an old manifest.json is made anew, with names, once it is deleted"
        upload = f", by `trivit shards inspect DIR`; upload it, and delete {self.manifest.root}"
        return f"{lists}; {anew}{upload if self.manifest.url else ''}"

    @cached_property
    def _class_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.manifest.classes)}

    def _find(self, shard: int, sample: int) -> tuple[str, dict[str, Member]]:
        index = self._shard(shard, f"#{sample}").index
        if sample >= len(index):
            raise self._bad(shard, f"#{sample}", f"the shard has only {len(index)} samples left", passing=True)
        if sample in index.lost:
            raise self._bad(shard, index.key(sample), "one of its headers is destroyed", passing=True)
        return index.key(sample), index.members(sample)

    def _read(self, shard: int, key: str, member: Member) -> bytearray:
        if member.size > MAX_BYTES:
            raise self._bad(shard, key, f"{member.size} bytes are more than {MAX_BYTES}: refused")
        data = bytearray(member.size)
        for pause in (*_RETRY_AFTER, None):
            try:
                done = self._shard(shard, key).read_into(data, member.offset)
                break
            except DataFailure:
                raise
            except DataError as error:  # evicted from the cache, and now it cannot be fetched again
                self._open.pop(shard, None)
                raise self._bad(shard, key, f"{error}", passing=True) from error
            except OSError as error:  # a network file system: the file may be there again after opening it anew
                self._open.pop(shard, None)
                if pause is None:
                    raise self._bad(shard, key, f"cannot be read: {error.strerror}", passing=True) from error
                time.sleep(pause)
        if done < member.size:
            raise self._bad(shard, key, f"cut off: {done} of {member.size} bytes are left", passing=True)
        return data

    def _shard(self, shard: int, key: str) -> "_OpenShard | _RemoteShard":
        found = self._open.get(shard)
        if found is not None:
            self._open.move_to_end(shard)
            return found
        until, why = self._lost.get(shard, (0.0, ""))
        if time.monotonic() < until:
            raise self._bad(shard, key, why, passing=True)
        try:
            found = self._open_shard(shard)
        except DataFailure:
            raise
        except (DataError, OSError) as error:
            # Its other samples are not made to wait as long.
            self._lost[shard] = time.monotonic() + _TRY_A_LOST_SHARD_AGAIN_AFTER, f"{error}"
            raise self._bad(shard, key, f"{error}", passing=True) from error
        while len(self._open) >= self.open_shards:
            self._open.popitem(last=False)
        self._open[shard] = found
        return found

    def _open_shard(self, shard: int) -> "_OpenShard | _RemoteShard":
        path = os.fspath(self.manifest.path(shard))
        kind = _RemoteShard if self.manifest.url else _OpenShard
        for pause in _RETRY_AFTER:
            try:
                return kind(path)
            except (DataError, OSError) as error:
                if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
                    raise
                if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
                    raise
                time.sleep(pause)
        return kind(path)

    def _bad(self, shard: int, key: str, reason: str, passing: bool = False) -> BadSampleError:
        return BadSampleError(self.name(shard), key, reason, passing)


def _allowed_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


class _OpenShard:
    """A file descriptor that lives as long as this object, and the index."""

    def __init__(self, path: str) -> None:
        self.index: ShardIndex = read_index(path)
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, data: bytearray, offset: int) -> int:
        """Fill `data` from this place of the tar; returns how many bytes there were."""
        return os.preadv(self.fd, [data], offset)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class _RemoteShard:
    """A tar in the cache, open only while it is read: once evicted it takes no space, and is fetched when needed."""

    def __init__(self, path: str) -> None:
        self.path, self._touched = Path(path), 0.0
        self.index: ShardIndex = self._despite_eviction(self._read_index)

    def read_into(self, data: bytearray, offset: int) -> int:
        """As `_OpenShard`; DataError when it must be fetched and cannot be."""
        fd = self._despite_eviction(lambda: os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            if time.monotonic() > self._touched + _SECONDS_BETWEEN_TOUCHES:
                touch(fd)
                self._touched = time.monotonic()
            return os.preadv(fd, [data], offset)
        finally:
            os.close(fd)

    def _read_index(self) -> ShardIndex:
        try:
            return read_index(self.path)
        except DataError as error:
            raise (error.__cause__ if isinstance(error.__cause__, FileNotFoundError) else error) from None

    def _despite_eviction(self, action: Callable[[], Value]) -> Value:
        for _ in range(_MOST_EVICTIONS_IN_A_ROW):
            with contextlib.suppress(FileNotFoundError):
                return action()
            fetch(self.path)
        return action()
