"""Reading single samples out of shards: some open tars, positioned reads, and one kind of error for all damage."""

import os
import resource
import time
import zlib
from collections import OrderedDict
from typing import Any

from torch import Tensor

from datamodules.decode import BadImageError, decode_image
from datamodules.errors import DataError
from datamodules.manifest import Manifest
from datamodules.tar_index import PLAIN_IMAGES, Member, ShardIndex, read_index
from datamodules.tar_samples import ARRAY

MAX_BYTES = 1 << 30
"""A larger image file is refused: no decoder needs it, and one member must not fill the memory."""

_RETRY_AFTER = (0.1, 0.5, 2.0)
_TRY_A_LOST_SHARD_AGAIN_AFTER = 10.0


class BadSampleError(Exception):
    """A sample that cannot be used: in which shard (file name), under which key, and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason


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
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
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
            if member.crc32 is not None and member.crc32 != zlib.crc32(data):
                reason += " (checksum differs: damaged after it was packed)"
            raise self._bad(shard, key, reason) from error

    def label(self, shard: int, sample: int) -> int:
        """Class index of a sample, -1 without one. BadSampleError when the label is no number of a class."""
        key, members = self._find(shard, sample)
        if "cls" not in members:
            return -1
        text = bytes(self._read(shard, key, members["cls"])[:20])
        try:
            label = int(text)
        except ValueError:
            label = -1
        if label < 0 or (self.manifest.classes and label >= len(self.manifest.classes)):
            raise self._bad(shard, key, f"cls: {text!r} is no index of a class")
        return label

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return self.manifest.shards[shard].name

    def _find(self, shard: int, sample: int) -> tuple[str, dict[str, Member]]:
        index = self._shard(shard, f"#{sample}").index
        if sample >= len(index):
            raise self._bad(shard, f"#{sample}", f"the shard has only {len(index)} samples left")
        return index.key(sample), index.members(sample)

    def _read(self, shard: int, key: str, member: Member) -> bytearray:
        if member.size > MAX_BYTES:
            raise self._bad(shard, key, f"{member.size} bytes are more than {MAX_BYTES}: refused")
        data = bytearray(member.size)
        for pause in (*_RETRY_AFTER, None):
            try:
                done = os.preadv(self._shard(shard, key).fd, [data], member.offset)
                break
            except OSError as error:  # a network file system: the file may be there again after opening it anew
                self._open.pop(shard, None)
                if pause is None:
                    raise self._bad(shard, key, f"cannot be read: {error.strerror}") from error
                time.sleep(pause)
        if done < member.size:
            raise self._bad(shard, key, f"cut off: {done} of {member.size} bytes are left")
        return data

    def _shard(self, shard: int, key: str) -> "_OpenShard":
        found = self._open.get(shard)
        if found is not None:
            self._open.move_to_end(shard)
            return found
        until, why = self._lost.get(shard, (0.0, ""))
        if time.monotonic() < until:
            raise self._bad(shard, key, why)
        try:
            found = self._open_shard(shard)
        except (DataError, OSError) as error:
            # Its other samples are not made to wait as long.
            self._lost[shard] = time.monotonic() + _TRY_A_LOST_SHARD_AGAIN_AFTER, f"{error}"
            raise self._bad(shard, key, f"{error}") from error
        while len(self._open) >= self.open_shards:
            self._open.popitem(last=False)
        self._open[shard] = found
        return found

    def _open_shard(self, shard: int) -> "_OpenShard":
        path = os.fspath(self.manifest.path(shard))
        for pause in _RETRY_AFTER:
            try:
                return _OpenShard(path)
            except (DataError, OSError) as error:
                if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
                    raise
                if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
                    raise
                time.sleep(pause)
        return _OpenShard(path)

    def _bad(self, shard: int, key: str, reason: str) -> BadSampleError:
        return BadSampleError(self.name(shard), key, reason)


def _allowed_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


class _OpenShard:
    """A file descriptor that lives as long as this object, and the index."""

    def __init__(self, path: str) -> None:
        self.index: ShardIndex = read_index(path)
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)
