"""The index of a shard: where each sample's members lie in its tar, kept in a sidecar so that a tar is walked once.

A sample is a run of neighbouring members with one key, as in webdataset: `a/b.mask.png` has the key `a/b` (up to the
first dot of the base name) and the extension `mask.png` (the rest, in lower case).
"""

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
from datamodules.sidecars import read_sidecar, write_sidecar
from datamodules.tar_walk import walk_tar

FORMAT = 1
INDEX_SUFFIX = ".idx"
PLAIN_IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})
_MOST_FINDINGS = 1000
_ORDINARY = bytes(range(0x20, 0x7F)).replace(b"\\", b"") + bytes(range(0x80, 0x100))


class Member(NamedTuple):
    """One file of a sample: where its data lies in the tar (bytes), and its checksum if our writer made the shard."""

    offset: int
    size: int
    crc32: int | None


class Finding(NamedTuple):
    """Something wrong: in which shard, under which key (empty: the shard itself), of which kind, and what exactly."""

    shard: str
    key: str
    kind: str
    detail: str


class ShardIndex:
    """Keys and members of one shard as a few arrays; s = samples, m = members, in the order of the tar.

    `path`: the tar; `tar_bytes`: its size when indexed; `findings`: what is wrong with it.
    """

    def __init__(
        self, path: str, tar_bytes: int, extensions: tuple[str, ...], arrays: dict[str, NDArray[Any]],
        findings: tuple[Finding, ...] = (),
    ) -> None:  # fmt: skip
        self.path = path
        self.tar_bytes = tar_bytes
        self.extensions = extensions
        self.findings = findings
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

    def begins_like(self, other: "ShardIndex") -> bool:
        """Whether `other` is this index cut off somewhere: the same members as far as it goes."""
        m = len(other._offset)
        return m <= len(self._offset) and all(
            np.array_equal(mine[:m], theirs)
            for mine, theirs in ((self._offset, other._offset), (self._size, other._size))
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
        findings = _Findings(Path(path).name)
        if tar_bytes == 0:
            findings.note("empty file", "", "0 bytes")
        walk = walk_tar(fd, tar_bytes, findings.note)
    finally:
        os.close(fd)
    _note_odd_names(walk.names, findings)
    extensions, arrays = _group(walk.names, walk.offsets, walk.sizes, findings)
    return ShardIndex(path, tar_bytes, extensions, arrays, findings.all())


def read_index(tar_path: str | os.PathLike[str]) -> ShardIndex:
    """The index of a tar from its sidecar `NAME.tar.idx`, which is made when it is missing or the tar's size differs.

    A tar that was cut keeps its old index, so that the lost samples are missed instead of forgotten.

    Raises:
        DataError: as `scan_tar`, or when the sidecar can be written nowhere.
    """
    tar_path = os.fspath(tar_path)
    sidecar = Path(tar_path + INDEX_SUFFIX)
    try:
        tar_bytes = Path(tar_path).stat().st_size
    except OSError as error:
        raise DataError(cannot_read(tar_path, error)) from error
    former = []
    for _, data in read_sidecar(sidecar):
        try:
            former.append(ShardIndex.from_bytes(tar_path, data))
        except ValueError:
            continue
        if former[-1].tar_bytes == tar_bytes:
            return former[-1]
    index = scan_tar(tar_path)
    for old in former:
        if old.tar_bytes > tar_bytes and old.begins_like(index):
            lost = Finding(
                Path(tar_path).name, "", "truncated", f"{tar_bytes} bytes are left of {old.tar_bytes}, "
                f"and {len(index)} samples of {len(old)}",
            )  # fmt: skip
            return ShardIndex(tar_path, tar_bytes, old.extensions, old.arrays, (*old.findings, lost))
    write_sidecar(sidecar, index.to_bytes())
    return index


def open_tar(path: str) -> int:
    """A file descriptor for reading; the caller closes it. DataError when this is no readable, uncompressed file."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise DataError(f"{path} is not a file: give a .tar")
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(cannot_read(path, error)) from error
    magic = os.pread(fd, 6, 0)
    if magic[:2] == b"\x1f\x8b" or magic[:3] == b"BZh" or magic[:4] == b"\x28\xb5\x2f\xfd" or magic == b"\xfd7zXZ\0":
        os.close(fd)
        raise DataError(f"{path} is compressed: unpack it first (images hardly shrink, and it cannot be read by index)")
    return fd


def cannot_read(path: str | os.PathLike[str], error: OSError) -> str:
    """One line for the user that says why a file cannot be read."""
    reasons: dict[type[OSError], str] = {
        FileNotFoundError: "does not exist",
        PermissionError: "may not be read: ask its owner or change its permissions",
        NotADirectoryError: "does not exist (a part of this path is a file)",
    }
    return f"{os.fspath(path)} {reasons.get(type(error), f'cannot be read: {error.strerror or error}')}"


class _Findings:
    """Collects findings of one shard, up to a number that a person would still read."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.found: list[Finding] = []
        self.more: Counter[str] = Counter()

    def note(self, kind: str, key: str, detail: str) -> None:
        if len(self.found) < _MOST_FINDINGS:
            self.found.append(Finding(self.shard, key, kind, detail))
        else:
            self.more[kind] += 1

    def all(self) -> tuple[Finding, ...]:
        rest = (Finding(self.shard, "", kind, f"and {n} more of this kind") for kind, n in self.more.items())
        return (*self.found, *rest)


def _note_odd_names(names: list[bytes], findings: _Findings) -> None:
    """Names that would leave the folder, or that no terminal should print; their samples stay."""
    blob = b"\0" + b"\0".join(names) + b"\0"
    try:
        blob.decode()
        if b".." not in blob and b"\0/" not in blob and len(blob.translate(None, _ORDINARY)) == len(names) + 1:
            return
    except UnicodeDecodeError:
        pass
    for name in names:
        text = name.decode("utf-8", "backslashreplace")
        if name.startswith(b"/") or b".." in name.split(b"/"):
            findings.note("unsafe name", text, "points outside of the folder; only a name here, never written to disk")
        elif name.translate(None, _ORDINARY):
            findings.note("odd name", text.encode("unicode_escape").decode(), "control characters or backslashes")
        elif text.encode() != name:
            findings.note("odd name", text, "not UTF-8")


def _group(
    names: list[bytes], offsets: list[int], sizes: list[int], findings: _Findings
) -> tuple[tuple[str, ...], dict[str, NDArray[Any]]]:
    """Members to samples: neighbours of one key belong together."""
    ids: dict[bytes, int] = {}  # extension as spelt -> number
    numbers: dict[bytes, int] = {}  # extension in lower case -> number
    keys: list[bytes] = []
    first: list[int] = []
    extension: list[int] = []
    skipped: list[int] = []
    key = b""
    for i, name in enumerate(names):
        slash = name.rfind(b"/")
        dot = name.find(b".", slash + 1)
        if dot < slash + 2 or (name[:2] == b"__" and _is_meta(name)):
            skipped.append(i)
            continue
        spelt = name[dot + 1 :]
        number = ids.get(spelt)
        if number is None:
            number = ids[spelt] = numbers.setdefault(spelt.lower(), len(numbers))
        if name[:dot] != key:
            key = name[:dot]
            keys.append(key)
            first.append(len(extension))
        extension.append(number)
    first.append(len(extension))
    for i in skipped:
        if not _is_meta(names[i]):
            findings.note("no sample", _text(names[i]), "its name is not KEY.EXTENSION")
    arrays: dict[str, NDArray[Any]] = {
        "first": np.array(first, np.uint32),
        "extension": np.array(extension, np.uint32),
        "offset": np.delete(np.array(offsets, np.int64), skipped),
        "size": np.delete(np.array(sizes, np.int64), skipped),
        "key_end": np.cumsum(np.fromiter(map(len, keys), np.uint32, len(keys)), dtype=np.uint32),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
    }
    extensions = tuple(map(_text, numbers))
    if len(set(keys)) < len(keys):
        counted = Counter(keys)
        for key in dict.fromkeys(key for key in keys if counted[key] > 1):
            findings.note("repeated key", _text(key), f"{counted[key]} samples have it")
    if len(keys) < len(extension):
        _first_of_each(extensions, arrays, keys, findings)
    return extensions, arrays


def _first_of_each(
    extensions: tuple[str, ...], arrays: dict[str, NDArray[Any]], keys: list[bytes], findings: _Findings
) -> None:
    """Note samples with two members of one extension, or two plain images, and keep the first of the former.

    Two images under one key are usually two samples that lost theirs: `7.a.jpg` and `7.b.jpg` have the key `7`.
    """
    sample = np.repeat(np.arange(len(keys)), np.diff(arrays["first"].astype(np.int64)).astype(np.int64))
    pair = sample * len(extensions) + arrays["extension"]
    kept = np.sort(np.unique(pair, return_index=True)[1])
    if len(kept) < len(pair):
        for i in np.setdiff1d(np.arange(len(pair)), kept):
            again = extensions[arrays["extension"][i]]
            kind = "two images" if again in PLAIN_IMAGES else "repeated member"
            findings.note(kind, _text(keys[sample[i]]), f"a second .{again} under one key; the first is used")
        arrays |= {name: arrays[name][kept] for name in ("extension", "offset", "size")}
        sample = sample[kept]
        arrays["first"] = np.searchsorted(sample, np.arange(len(keys) + 1)).astype(np.uint32)
    plain = np.array([extension in PLAIN_IMAGES for extension in extensions])[arrays["extension"]]
    for i in np.flatnonzero(np.bincount(sample[plain], minlength=1) > 1):
        findings.note("two images", _text(keys[i]), "under one key; the first is used")


def _is_meta(name: bytes) -> bool:
    """Names like __this__ and what lies below them, which webdataset passes over."""
    head = name.split(b"/")[0]
    return len(head) > 4 and head.startswith(b"__") and head.endswith(b"__")


def _text(name: bytes) -> str:
    """A name as text that can always be printed."""
    return name.decode("utf-8", "backslashreplace")
