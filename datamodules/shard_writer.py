"""Writing shards: webdataset's TarWriter underneath, the same bytes every time, whole or absent, indexed as written."""

import contextlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from datamodules.class_labels import LabelKinds, labels_of, named_by_labels
from datamodules.errors import DataError
from datamodules.manifest import MANIFEST, UNFINISHED, Manifest
from datamodules.shard_entry import Shard, describe_shard
from datamodules.sidecars import cannot_write, locked, write_aside
from datamodules.tar_index import INDEX_SUFFIX, ShardIndex, scan_tar

LOCK = ".lock"
LONGEST_NAME = 100
"""Bytes of key and extension together that every tar format holds without extension headers."""


class ShardFile:
    """One tar being written under another name; `close` indexes it, checksums included, and gives it its own."""

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter  # imports torch: some seconds

        self.path = path
        self.aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self.crc32: list[int] = []
        self.samples = 0
        self._file = self.aside.open("wb")
        self._tar: Any = TarWriter(self._file, encoder=False, mtime=0, user="", group="")

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample. OSError when the disk is full."""
        self._tar.write({"__key__": key} | dict(members))
        self.crc32 += [zlib.crc32(members[extension]) for extension in sorted(members)]  # TarWriter sorts, too
        self.samples += 1

    def close(self) -> ShardIndex:
        """Finish the tar, put its index and then itself in place, and return the index."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = scan_tar(self.aside).with_crc32(self.crc32)
        index.path = str(self.path)
        if index.findings or len(index) != self.samples:
            raise RuntimeError(f"{self.path}: what was written does not read back: {index.findings[:1]}")
        write_aside(self.path.with_name(self.path.name + INDEX_SUFFIX), index.to_bytes())
        self.aside.replace(self.path)
        return index

    def abort(self) -> None:
        """Leave nothing behind."""
        self._tar.tarstream.fileobj.closed = True  # or tarfile complains on deletion that it cannot write its end
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self.aside.unlink()


class ShardWriter:
    """Writes a whole set, one sample after the other, and its manifest on a clean exit.

    Until then a file `unfinished.jsonl` marks the folder, so that a half-written set is never taken for a whole one;
    the same writer (by `made_by`) then begins anew. Samples are written in the order given: shuffle before.

    Args:
        dst: the folder; made if necessary.
        samples_per_shard: the last shard may hold fewer.
        classes: names of the labels in `cls` members; of labels that are names themselves the set collects them.
        prefix: shards are called PREFIX-000000.tar and so on.
        made_by: what makes the set, with its settings, for the manifest and for messages.

    Raises:
        DataError: when the folder holds another set or cannot be written, or the disk is full.
    """

    def __init__(
        self, dst: str | os.PathLike[str], *, samples_per_shard: int = 1000, classes: Sequence[str] = (),
        prefix: str = "shard", made_by: str = "",
    ) -> None:  # fmt: skip
        if samples_per_shard < 1:
            raise DataError(f"a shard needs at least 1 sample, not {samples_per_shard}")
        self.dst = Path(dst)
        self.samples_per_shard = samples_per_shard
        self.classes = tuple(classes)
        self.prefix = prefix
        self.made_by = made_by
        self.manifest: Manifest | None = None
        self._shards: list[Shard] = []
        self._members: Counter[str] = Counter()
        self._labels: list[LabelKinds] = []
        self._keys: set[int] = set()
        self._file: ShardFile | None = None
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> "ShardWriter":
        begin_set(self.dst, self.made_by)
        self._lock.enter_context(locked(self.dst / LOCK, wait=False))
        remove_leftovers(self.dst)
        for old in self.dst.glob(f"{self.prefix}-*.tar*"):
            old.unlink()
        return self

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample: extension -> bytes. ValueError for a key that is unsafe, too long or was there before."""
        check_sample(key, members)
        if hash(key) in self._keys:
            raise ValueError(f"the key {key!r} was written before")
        self._keys.add(hash(key))
        try:
            if self._file is None:
                self._file = ShardFile(self.dst / shard_name(self.prefix, len(self._shards)))
            self._file.write(key, members)
            if self._file.samples == self.samples_per_shard:
                self._close_shard()
        except OSError as error:
            raise DataError(cannot_write(self.dst / "a shard", error)) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._close_shard()
                classes = self.classes or named_by_labels(self.dst, self._labels, ())
                self.manifest = Manifest(
                    self.dst, tuple(self._shards), classes, dict(sorted(self._members.items())), self.made_by
                )
                finish_set(self.manifest)
        except OSError as failure:
            raise DataError(cannot_write(self.dst / MANIFEST, failure)) from failure
        finally:
            if self._file is not None:
                self._file.abort()
            self._lock.close()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        index = self._file.close()
        self._file = None
        self._shards.append(describe_shard(index))
        self._members += index.extension_counts()
        self._labels.append(labels_of(index))


def shard_name(prefix: str, number: int) -> str:
    """File name of a shard; names sort like numbers."""
    return f"{prefix}-{number:06d}.tar"


def check_sample(key: str, members: Mapping[str, bytes]) -> None:
    """ValueError when a sample could not be read back under this key and these extensions, or the key is unsafe."""
    parts = key.split("/")
    if "." in parts[-1] or any(part in ("", ".", "..") for part in parts) or not key.isprintable() or "\\" in key:
        raise ValueError(f"{key!r} is no key: no dots in the base name, no '..', no empty parts, nothing unprintable")
    for extension in members:
        name = f"{key}.{extension}"
        if not extension or extension != extension.lower() or extension[0] == "_" or "/" in extension:
            raise ValueError(f"{extension!r} is no extension: lower case, no slash, no underscore in front")
        if len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"{name!r} has more than {LONGEST_NAME} bytes")
    if not members:
        raise ValueError(f"the sample {key!r} has no members")


def begin_set(dst: Path, made_by: str) -> list[dict[str, Any]]:
    """Mark a folder as unfinished; returns what the same command noted there before it was interrupted.

    Raises:
        DataError: when the folder holds a finished set, one begun by another command, or cannot be written.
    """
    try:
        dst.mkdir(parents=True, exist_ok=True)
        present = {entry.name for entry in dst.iterdir()}
        if UNFINISHED not in present:
            if MANIFEST in present or any(name.endswith(".tar") for name in present):
                raise DataError(f"{dst} already holds shards: choose an empty folder, --extend of pack adds to a set")
            write_aside(dst / UNFINISHED, json.dumps({"made_by": made_by}).encode() + b"\n")
            return []
        lines = (dst / UNFINISHED).read_bytes().splitlines(keepends=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{dst} is a file: give a folder for the shards") from error
    except OSError as error:
        raise DataError(cannot_write(dst, error)) from error
    try:
        head, *notes = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last may be cut off
        before = head["made_by"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{dst / UNFINISHED} is damaged: delete {dst}, or choose another folder") from error
    if before != made_by:
        raise DataError(f"{dst} was begun by another command or from other files ({before}): delete it, or choose "
                        "another folder")  # fmt: skip
    return notes


def note_progress(dst: Path, note: dict[str, Any]) -> None:
    """Note something in the unfinished set that `begin_set` gives back after an interruption."""
    with (dst / UNFINISHED).open("a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")
        file.flush()
        os.fsync(file.fileno())


def remove_leftovers(dst: Path) -> None:
    """Delete what writers that were killed left half-written."""
    for old in dst.glob(".*.partial"):
        old.unlink()


def finish_set(manifest: Manifest) -> None:
    """Write the manifest and take the mark away."""
    if not manifest.num_samples:
        raise DataError(f"{manifest.root}: no sample was written")
    write_aside(manifest.root / MANIFEST, manifest.to_bytes())
    (manifest.root / UNFINISHED).unlink()
    (manifest.root / LOCK).unlink(missing_ok=True)
