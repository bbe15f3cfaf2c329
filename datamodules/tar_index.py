"""The index of a shard: where each sample's members lie in its tar, kept in a sidecar so that a tar is walked once."""

import contextlib
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from datamodules.errors import DataError
from datamodules.sidecars import read_sidecar, still_good, write_sidecar
from datamodules.tar_samples import PLAIN_IMAGES, Finding, Findings, group_members, note_odd_names
from datamodules.tar_walk import walk_tar

FORMAT = 1
INDEX_SUFFIX = ".idx"
ROWS = ("first", "extension", "offset", "size", "key_end", "keys")
"""The arrays that say which samples lie where, without the checksums."""
__all__ = [
    "INDEX_SUFFIX", "PLAIN_IMAGES", "ROWS", "Finding", "Member", "ShardIndex", "cannot_read", "open_tar", "read_index",
    "scan_tar",
]  # fmt: skip


class Member(NamedTuple):
    """One file of a sample: where its data lies in the tar (bytes), and its checksum if our writer made the shard."""

    offset: int
    size: int
    crc32: int | None


class ShardIndex:
    """Keys and members of one shard as a few arrays; s = samples, m = members, in the order of the tar.

    `path`: the tar; `tar_bytes`: its size when indexed; `findings`: what is wrong with it; `lost`: numbers of samples
    that it had, and of which a member's header has been destroyed since.
    """

    def __init__(
        self, path: str, tar_bytes: int, extensions: tuple[str, ...], arrays: dict[str, NDArray[Any]],
        findings: tuple[Finding, ...] = (), lost: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        self.path = path
        self.tar_bytes = tar_bytes
        self.extensions = extensions
        self.findings = findings
        self.lost = lost
        self.arrays = arrays
        self._first = arrays["first"]  # uint32 [s+1]: first member of each sample
        self._extension = arrays["extension"]  # uint32 [m]: into `extensions`
        self._offset = arrays["offset"]  # int64 [m]
        self._size = arrays["size"]  # int64 [m]
        self._crc32 = arrays.get("crc32")  # uint32 [m], only from our writer
        self._key_end = arrays["key_end"]  # uint32 [s]: end of each key in `_keys`
        self._keys = arrays["keys"].tobytes()

    def __len__(self) -> int:
        return len(self._key_end)

    def key(self, i: int) -> str:
        """Key of sample `i`; bytes that are not UTF-8 appear as \\xNN."""
        start = int(self._key_end[i - 1]) if i else 0
        return self._keys[start : int(self._key_end[i])].decode("utf-8", "backslashreplace")

    def members(self, i: int) -> dict[str, Member]:
        """Extension -> member of sample `i`, in the order of the tar."""
        first, last = int(self._first[i]), int(self._first[i + 1])
        crc32 = [None] * (last - first) if self._crc32 is None else self._crc32[first:last].tolist()
        rows = zip(
            self._extension[first:last].tolist(), self._offset[first:last].tolist(), self._size[first:last].tolist(),
            crc32, strict=True,
        )  # fmt: skip
        return {self.extensions[extension]: Member(offset, size, crc) for extension, offset, size, crc in rows}

    def extension_counts(self) -> Counter[str]:
        """How many members there are of each extension."""
        counts = np.bincount(self._extension, minlength=len(self.extensions)).tolist()
        return Counter(dict(zip(self.extensions, counts, strict=True)))

    def extension_bytes(self) -> Counter[str]:
        """Bytes of all members of each extension."""
        sums = np.zeros(len(self.extensions), np.int64)
        np.add.at(sums, self._extension, self._size)
        return Counter(dict(zip(self.extensions, sums.tolist(), strict=True)))

    def with_crc32(self, crc32: list[int]) -> "ShardIndex":
        """The same index with the checksum of every member."""
        arrays = self.arrays | {"crc32": np.array(crc32, np.uint32)}
        return ShardIndex(self.path, self.tar_bytes, self.extensions, arrays, self.findings)

    def damaged_to(self, other: "ShardIndex") -> frozenset[int] | None:
        """If `other` can be this index after damage to its tar, the samples that lost a header; else None.

        Then it has the same members at the same places, as far as it has any. One more or of another name may be there
        for each corrupt header, which may have held a long name, or have stood before a member of the same name.
        Members behind the end of a tar that was cut are not meant: reading them tells.
        """
        if other.tar_bytes > self.tar_bytes:
            return None
        mine = [self._rows(i) for i in range(len(self))]
        left = {row for i in range(len(other)) for row in other._rows(i)}
        strangers = left.difference(*mine)
        if len(strangers) > sum(finding.kind == "corrupt header" for finding in other.findings):
            return None
        gone = ({row for row in rows if row[2] + row[3] <= other.tar_bytes} - left for rows in mine)
        return frozenset(i for i, rows in enumerate(gone) if rows)

    def _rows(self, i: int) -> set[tuple[str, str, int, int]]:
        """Key, extension, offset and size of each member of sample `i`."""
        return {(self.key(i), extension, member.offset, member.size) for extension, member in self.members(i).items()}

    def same_members(self, other: "ShardIndex") -> bool:
        """Whether both have the same samples at the same places."""
        return self.extensions == other.extensions and all(
            np.array_equal(self.arrays[name], other.arrays[name]) for name in ROWS
        )

    def to_bytes(self) -> bytes:
        """The sidecar file: safetensors with one JSON text as metadata; the same bytes for the same index."""
        about = {"format": FORMAT, "tar_bytes": self.tar_bytes, "extensions": self.extensions,
                 "findings": [finding[1:] for finding in self.findings]}  # fmt: skip
        return save(self.arrays, metadata={"trivit": json.dumps(about)})

    @classmethod
    def from_bytes(cls, path: str, data: bytes) -> "ShardIndex":
        """Read a sidecar file for the tar `path`; ValueError when it is none of this format."""
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"]["trivit"])
            if about["format"] != FORMAT:
                raise ValueError(f"index format {about['format']}")
            findings = tuple(Finding(Path(path).name, *finding) for finding in about["findings"])
            return cls(path, about["tar_bytes"], tuple(about["extensions"]), load(data), findings)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"not an index: {error}") from error


def scan_tar(path: str | os.PathLike[str]) -> ShardIndex:
    """Index a tar by walking over its headers; the sidecar is neither read nor written.

    Raises:
        DataError: when the file is missing, unreadable, no regular file, or compressed.
    """
    path = os.fspath(path)
    fd = open_tar(path)
    try:
        tar_bytes = os.fstat(fd).st_size
        findings = Findings(Path(path).name)
        if tar_bytes == 0:
            findings.note("empty file", "", "0 bytes")
        walk = walk_tar(fd, tar_bytes, findings.note)
    finally:
        os.close(fd)
    note_odd_names(walk.names, findings)
    extensions, arrays = group_members(walk.names, walk.offsets, walk.sizes, findings)
    return ShardIndex(path, tar_bytes, extensions, arrays, findings.all())


def read_index(tar_path: str | os.PathLike[str]) -> ShardIndex:
    """The index of a tar from its sidecar `NAME.tar.idx`, made anew when it is missing or the tar is another one.

    A tar of another size is another one, and a newer one may be. But one that was cut or damaged keeps its old index,
    so that the lost samples are missed instead of forgotten.

    Raises:
        DataError: as `scan_tar`, or when the sidecar can be written nowhere.
    """
    tar_path = os.fspath(tar_path)
    sidecar = Path(tar_path + INDEX_SUFFIX)
    tar = _stat(tar_path)
    former: list[tuple[Path, ShardIndex]] = []
    for place, data in read_sidecar(sidecar):
        with contextlib.suppress(ValueError, OSError):
            index = ShardIndex.from_bytes(tar_path, data)
            if index.tar_bytes == tar.st_size and place.stat().st_mtime_ns >= tar.st_mtime_ns:
                return index
            former.append((place, index))
    index = scan_tar(tar_path)
    for place, old in former:
        if old.tar_bytes == index.tar_bytes and old.same_members(index):
            still_good(sidecar, place, old.to_bytes())  # the tar was only copied or touched
            return old
        if (lost := old.damaged_to(index)) is not None:
            kind, detail = "damaged", f"{len(lost)} of {len(old)} samples have lost a header"
            if index.tar_bytes < old.tar_bytes:
                kind = "truncated"
                detail = f"{index.tar_bytes} bytes are left of {old.tar_bytes}, {len(index)} samples of {len(old)}"
            found = (*old.findings, Finding(Path(tar_path).name, "", kind, detail))
            return ShardIndex(tar_path, index.tar_bytes, old.extensions, old.arrays, found, lost)
    write_sidecar(sidecar, index.to_bytes())
    return index


def open_tar(path: str) -> int:
    """A file descriptor for reading; the caller closes it. DataError when this is no readable, uncompressed file."""
    if not stat.S_ISREG(_stat(path).st_mode):
        raise DataError(f"{path} is not a file: give a .tar")
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(cannot_read(path, error)) from error
    magic = os.pread(fd, 6, 0)
    if magic[:2] == b"\x1f\x8b" or magic[:3] == b"BZh" or magic[:4] == b"\x28\xb5\x2f\xfd" or magic == b"\xfd7zXZ\0":
        os.close(fd)
        raise DataError(f"{path} is compressed: unpack it first (images hardly shrink, and it cannot be read by index)")
    return fd


def _stat(path: str) -> os.stat_result:
    """Size and times of a tar; one of a remote set is fetched first when it is not in the cache."""
    try:
        with contextlib.suppress(FileNotFoundError):
            return Path(path).stat()
        from datamodules.remote_set import fetch  # which indexes what it fetched

        fetch(Path(path))
        return Path(path).stat()
    except OSError as error:
        raise DataError(cannot_read(path, error)) from error


def cannot_read(path: str | os.PathLike[str], error: OSError) -> str:
    """One line for the user that says why a file cannot be read."""
    reasons: dict[type[OSError], str] = {
        FileNotFoundError: "does not exist",
        PermissionError: "may not be read: ask its owner or change its permissions",
        NotADirectoryError: "does not exist (a part of this path is a file)",
    }
    return f"{os.fspath(path)} {reasons.get(type(error), f'cannot be read: {error.strerror or error}')}"
