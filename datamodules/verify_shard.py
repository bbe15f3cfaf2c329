"""Everything that can be wrong with one shard: headers, index, checksums, labels, texts, images."""

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.class_labels import LABEL, class_number, label_name
from datamodules.errors import DataError
from datamodules.shard_entry import Shard, describe_shard
from datamodules.sidecars import read_sidecar
from datamodules.tar_index import INDEX_SUFFIX, PLAIN_IMAGES, Finding, Member, ShardIndex, open_tar, scan_tar
from datamodules.tar_samples import ARRAY
from datamodules.workers import Tick

CAPTION = "txt"
_CODE = frozenset({"pyd", "so", "pth", "pt", "pkl", "pickle", "pyc"})
_TICK_BYTES = 1 << 22


class ShardToVerify(NamedTuple):
    """A tar, what the manifest says about it, and the numbers of the classes by name; both None without a manifest."""

    path: Path
    listed: Shard | None
    classes: Mapping[str, int] | None


class VerifiedShard(NamedTuple):
    """What was found in a shard, and what is needed to compare it with others.

    `keys`, `contents`: a 64-bit hash of each sample's key and of its members; `present`: extension -> samples with it.
    """

    findings: list[Finding]
    samples: int
    keys: NDArray[np.uint64]
    contents: NDArray[np.uint64]
    present: Counter[str]


def verify_shard(task: ShardToVerify, tick: Tick) -> VerifiedShard:
    """Read a whole shard and check all of it; `tick` counts bytes."""
    name = task.path.name
    try:
        index = scan_tar(task.path)
        fd = open_tar(str(task.path))
    except DataError as error:
        nothing = np.array([], np.uint64)
        return VerifiedShard([Finding(name, "", "unreadable", f"{error}")], 0, nothing, nothing, Counter())
    findings = list(index.findings)
    checked = _check_index(task, index, findings)
    keys, contents = [], []
    unticked = left = os.fstat(fd).st_size
    try:
        for i in range(len(index)):
            key, members = index.key(i), index.members(i)
            data = {extension: os.pread(fd, member.size, member.offset) for extension, member in members.items()}
            wrong = _check_sample(data, task.classes)
            wrong += _check_sums(checked.members(i) if checked is not None else members, data)
            findings += [Finding(name, key, kind, detail) for kind, detail in wrong]
            keys.append(_hash64(key.encode()))
            contents.append(_hash64(*(part for item in sorted(data.items()) for part in (item[0].encode(), item[1]))))
            left -= sum(512 + len(part) for part in data.values())
            if unticked - left > _TICK_BYTES:
                tick(unticked - left)
                unticked = left
    finally:
        os.close(fd)
    tick(unticked)  # with headers, padding and the end of the tar
    hashes = np.array(keys, np.uint64), np.array(contents, np.uint64)
    return VerifiedShard(findings, len(index), *hashes, index.extension_counts())


def _check_index(task: ShardToVerify, index: ShardIndex, findings: list[Finding]) -> ShardIndex | None:
    """Compare sidecar and manifest with the tar; the sidecar's index when its rows are those of the tar, else None."""
    name = task.path.name
    same = None
    for place, data in read_sidecar(Path(f"{task.path}{INDEX_SUFFIX}")):
        try:
            sidecar = ShardIndex.from_bytes(str(task.path), data)
        except ValueError as error:
            findings.append(Finding(name, "", "damaged index", f"{place}: {error}; delete it, it will be made anew"))
            continue
        if sidecar.tar_bytes == index.tar_bytes and describe_shard(sidecar).digest == describe_shard(index).digest:
            same = same or sidecar
        elif (lost := sidecar.damaged_to(index)) is not None:
            if sidecar.tar_bytes > index.tar_bytes:
                whole = len(sidecar) - len(index)
                detail = f"{index.tar_bytes} of {sidecar.tar_bytes} bytes are left, {whole} whole samples are lost"
                findings.append(Finding(name, "", "cut off", detail))
            detail = f"{place.name} lists it, but one of its headers is destroyed"
            findings += [Finding(name, sidecar.key(i), "lost sample", detail) for i in sorted(lost)]
        else:
            detail = f"{place} describes {len(sidecar)} samples in {sidecar.tar_bytes} bytes, not {len(index)} in "
            findings.append(Finding(name, "", "wrong index", f"{detail}{index.tar_bytes}; delete it"))
    listed = task.listed
    if listed is not None and (listed.samples, listed.bytes) != (len(index), index.tar_bytes):
        detail = f"{listed.samples} samples, {listed.bytes} bytes are listed; {len(index)}, {index.tar_bytes} are there"
        findings.append(Finding(name, "", "differs from manifest", detail))
    elif listed is not None and listed.digest != describe_shard(index).digest:
        findings.append(Finding(name, "", "differs from manifest", "as many samples and bytes, but other members"))
    return same


def _check_sums(members: Mapping[str, Member], data: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Members whose bytes are not those that were written."""
    return [
        ("wrong checksum", f".{extension}: {member.size} bytes, CRC-32 {zlib.crc32(data[extension]):08x}, "
         f"written as {member.crc32:08x}")
        for extension, member in members.items()
        if member.crc32 is not None and zlib.crc32(data[extension]) != member.crc32
    ]  # fmt: skip


def _check_sample(data: Mapping[str, bytes], classes: Mapping[str, int] | None) -> list[tuple[str, str]]:
    """What is wrong with the members of one sample, as (kind, detail)."""
    wrong = []
    shape: tuple[int, int] | None = None
    images = [extension for extension in data if extension in PLAIN_IMAGES] or [ARRAY] * (ARRAY in data)
    if not images:
        wrong.append(("no image", f"only {', '.join(f'.{extension}' for extension in data)}"))
    for extension in images:
        found = _decode(data[extension], extension)
        if isinstance(found, str):
            wrong.append(("bad image", f".{extension}: {found}"))
        else:
            shape = shape or found
    for extension, content in data.items():
        if extension.rpartition(".")[2] in _CODE:
            wrong.append(("code", f".{extension} can run code in other programs; it is never read here"))
        elif extension == "mask.png":
            found = _decode(content, "png")
            if isinstance(found, str):
                wrong.append(("bad mask", found))
            elif shape and found != shape:
                wrong.append(("bad mask", f"{found[1]} x {found[0]} for an image {shape[1]} x {shape[0]}"))
        elif problem := _check_text(extension, content, classes):
            wrong.append(problem)
    return wrong


def _check_text(extension: str, content: bytes, classes: Mapping[str, int] | None) -> tuple[str, str] | None:
    """What is wrong with a label, a caption or a JSON member."""
    try:
        if extension == LABEL:
            named = classes is None and label_name(content) is not None
            if not named and class_number(content, classes or {}) is None:
                known = f"none of the {len(classes)} classes" if classes else "no number of a class"
                return "bad label", f"{content[:40]!r} is {known}"
        elif extension == CAPTION and not content.decode().strip():
            return "bad caption", "empty"
        elif extension == "json":
            json.loads(content)
    except UnicodeDecodeError as error:
        return "bad caption", f"not UTF-8: {error.reason}"
    except ValueError as error:
        return "bad JSON", f"{content[:40]!r}: {error}"
    return None


def _decode(data: bytes, extension: str) -> tuple[int, int] | str:
    """Height and width of an image, or what is wrong with it."""
    from datamodules.decode import BadImageError, any_pixels

    try:
        height, width, _ = any_pixels(data, extension).values.shape
    except BadImageError as error:
        return f"{error}"
    return height, width


def _hash64(*parts: bytes) -> int:
    """A 64-bit hash over parts of known order."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")
