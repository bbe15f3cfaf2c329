"""The members of a tar, found by reading its headers only: ustar, GNU long names, PAX; never extracts, never follows.

Reads with `pread`, not through a memory map: a map of a file that is cut meanwhile kills the process with SIGBUS.
Checksums are verified for whole blocks of headers at once, because one by one they would be most of the work.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BLOCK = 512
_ZERO = bytes(BLOCK)
_REGULAR = frozenset({ord("0"), 0, ord("7")})
_HEADERS_AT_ONCE = 4096
_WINDOW = 1 << 16
_LONGEST_EXTENSION = 1 << 20
_SPECIAL = {"1": "link", "2": "link", "3": "device", "4": "device", "6": "device"}
_OCTAL_POWERS = 8 ** np.arange(5, -1, -1, dtype=np.int64)

Note = Callable[[str, str, str], None]
"""Called as note(kind, name, detail) for whatever is wrong."""


class Walk(NamedTuple):
    """The regular files of a tar in their order: raw names, where their data begins, how long it is."""

    names: list[bytes]
    offsets: list[int]
    sizes: list[int]


class _Extended(NamedTuple):
    """What GNU and PAX headers say about the member that follows them."""

    name: bytes | None = None
    size: int | None = None
    sparse: bool = False


def walk_tar(fd: int, tar_bytes: int, note: Note) -> Walk:
    """All regular files of the open tar `fd`; what is wrong goes to `note`, and reading goes on where it can.

    After a corrupt header the walk searches for the next valid one; what lies between is lost, and noted.
    Links, devices and sparse files are noted and left out, folders are passed over.
    """
    walk = Walk([], [], [])
    position, extended = 0, _Extended()
    while position < tar_bytes:
        headers, position = _regular_run(fd, tar_bytes, position, walk) if extended == _Extended() else ([], position)
        walk.names.extend(_names(headers, good := _leading_good(headers)))
        if good < len(headers):  # sizes after a wrong header cannot be believed either
            position = walk.offsets[len(walk.names)] - BLOCK
            del walk.offsets[len(walk.names) :], walk.sizes[len(walk.names) :]
        if good < len(headers) or (position < tar_bytes and len(headers) < _HEADERS_AT_ONCE):
            position, extended = _unusual(fd, tar_bytes, position, extended, walk, note)
            if position < 0:
                return walk
    note("no end marker", "", f"the tar stops at byte {tar_bytes} without the two empty blocks that end one: cut off?")
    return walk


def _regular_run(fd: int, tar_bytes: int, position: int, walk: Walk) -> tuple[list[bytes], int]:
    """Follow ordinary headers from `position` without checking them; append to `walk`, stop at anything unusual."""
    headers: list[bytes] = []
    add_header, add_offset, add_size = headers.append, walk.offsets.append, walk.sizes.append
    base, chunk, hits, reach = position, b"", 0, _WINDOW
    while len(headers) < _HEADERS_AT_ONCE:
        at = position - base
        header = chunk[at : at + BLOCK]
        if len(header) < BLOCK:
            # Small members: a window holds many headers. Large ones: read the headers alone.
            reach = _WINDOW if hits > 2 or not headers else BLOCK if hits < 2 and reach == _WINDOW else reach
            base, chunk, hits = position, os.pread(fd, reach, position), 0
            header = chunk[:BLOCK]
            if len(header) < BLOCK:
                break
        hits += 1
        if header[156] not in _REGULAR or not header[0]:
            break
        try:
            size = int(header[124:135], 8)
        except ValueError:
            break
        data = position + BLOCK
        after = data + (size + 511 & -512)
        if after > tar_bytes or size < 0 or header[99] == 47 or header[156] == 0:
            break
        add_header(header)
        add_offset(data)
        add_size(size)
        position = after
    return headers, position


def _leading_good(headers: list[bytes]) -> int:
    """How many headers at the front have the right checksum."""
    if not headers:
        return 0
    table = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    total = np.einsum("ij->i", table, dtype=np.uint32).astype(np.int64)
    total += 8 * ord(" ") - table[:, 148:156].sum(axis=1, dtype=np.int64)
    digits = table[:, 148:154].astype(np.int64) - ord("0")
    stored = digits @ _OCTAL_POWERS
    for i in np.flatnonzero((digits < 0).any(axis=1) | (digits > 7).any(axis=1) | (stored != total)):
        if not _checksum_fits(headers[i]):  # other spellings of the number, signed sums of old tars
            return int(i)
    return len(headers)


def _checksum_fits(header: bytes) -> bool:
    """Whether the header's checksum is right; old tars summed signed bytes."""
    stored = _number(header[148:156])
    rest = header[:148] + b" " * 8 + header[156:]
    return len(header) == BLOCK and stored in (sum(rest), sum(b - 256 if b > 127 else b for b in rest))


def _number(field: bytes) -> int | None:
    """A number of a header, octal or base-256 (large files); None when it is neither."""
    if field and field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        value = int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None
    return value if value >= 0 else None


def _names(headers: list[bytes], good: int) -> list[bytes]:
    """The names of the first `good` headers."""
    if not good:
        return []
    table = np.frombuffer(b"".join(headers[:good]), np.uint8).reshape(-1, BLOCK)
    names: list[bytes] = np.ascontiguousarray(table[:, :100]).view("S100").ravel().tolist()
    for i in np.flatnonzero(table[:, 345]):
        names[i] = _name(headers[i])
    return [name.split(b"\0")[0] for name in names] if any(b"\0" in name for name in names) else names


def _name(header: bytes) -> bytes:
    """Name of one header, the prefix of POSIX (not of GNU, which keeps times there) put before it."""
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _unusual(
    fd: int, tar_bytes: int, position: int, extended: _Extended, walk: Walk, note: Note
) -> tuple[int, _Extended]:
    """One header of any kind; returns the position after it (-1: the tar ends here) and what it says about the next."""
    header = os.pread(fd, BLOCK, position)
    if header == _ZERO:
        _look_behind_end(fd, tar_bytes, position, note)
        return -1, _Extended()
    if len(header) < BLOCK:
        note("truncated", "", f"the tar stops inside a header at byte {position}")
        return -1, _Extended()
    size = _number(header[124:136])
    if not _checksum_fits(header) or size is None:
        return _resynchronise(fd, tar_bytes, position, note), _Extended()
    kind = chr(header[156])
    raw_name = _name(header) if extended.name is None else extended.name
    name = raw_name.decode("utf-8", "backslashreplace")
    size = size if extended.size is None else extended.size
    data = position + BLOCK
    after = data + (size + 511 & -512)
    if kind in "LKxgX":
        if size > _LONGEST_EXTENSION or data + size > tar_bytes:
            note("corrupt header", name, f"an extension header of {size} bytes at byte {position}")
            return _resynchronise(fd, tar_bytes, position, note), _Extended()
        return after, _extend(extended, kind, os.pread(fd, size, data))
    if kind in "07\0" and not (kind == "\0" and raw_name.endswith(b"/")) and not extended.sparse:
        if data + size > tar_bytes:
            note("truncated", name, f"its {size} bytes begin at byte {data}, the tar has only {tar_bytes}")
            return -1, _Extended()
        walk.names.append(raw_name)
        walk.offsets.append(data)
        walk.sizes.append(size)
        return after, _Extended()
    if kind in _SPECIAL:
        target = header[157:257].split(b"\0")[0].decode("utf-8", "backslashreplace")
        note(_SPECIAL[kind], name, f"never followed{f' (to {target})' if target else ''}")
        return data, _Extended()
    if kind not in "5\0":
        note("unreadable member", name, "sparse file" if kind == "S" or extended.sparse else f"of tar type {kind!r}")
    return (data if kind in "5\0" else after), _Extended()


def _extend(extended: _Extended, kind: str, data: bytes) -> _Extended:
    """Take up a GNU long name (L; K is a link's target) or PAX records (x; g is for all members and adds nothing)."""
    if kind == "L":
        return extended._replace(name=data.split(b"\0")[0])
    if kind not in "xX":
        return extended
    while data:  # "LENGTH KEYWORD=VALUE\n", LENGTH counts itself
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) + 2 < int(length) <= len(data):
            break
        keyword, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if keyword == b"path":
            extended = extended._replace(name=value)
        elif keyword == b"size" and value.isdigit():
            extended = extended._replace(size=int(value))
        elif keyword.startswith(b"GNU.sparse"):
            extended = extended._replace(sparse=True)
        data = data[int(length) :]
    return extended


def _resynchronise(fd: int, tar_bytes: int, position: int, note: Note) -> int:
    """Note a corrupt header and return the position of the next valid one, -1 when there is none."""
    at = position + BLOCK
    while at < tar_bytes:
        chunk = os.pread(fd, 1 << 22, at)
        blocks = np.frombuffer(chunk[: len(chunk) // BLOCK * BLOCK], np.uint8).reshape(-1, BLOCK)
        for i in np.flatnonzero((blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(axis=1)):
            if _checksum_fits(blocks[i].tobytes()):
                note("corrupt header", "", f"at byte {position}: {at + i * BLOCK - position} bytes are lost")
                return int(at + i * BLOCK)
        if not len(blocks):
            break
        at += len(blocks) * BLOCK
    note("corrupt header", "", f"at byte {position}: nothing readable after it, {tar_bytes - position} bytes are lost")
    return -1


def _look_behind_end(fd: int, tar_bytes: int, position: int, note: Note) -> None:
    """Note data behind the end marker: other readers would not see it."""
    at = position
    while chunk := os.pread(fd, 1 << 22, at):
        if chunk.strip(b"\0"):
            note("data after the end", "", f"the tar ends at byte {position} of {tar_bytes}, but more data follows")
            return
        at += len(chunk)
