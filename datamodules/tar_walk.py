"""The members of a tar, found by reading its headers only: ustar, GNU long names, PAX; never extracts, never follows.

Reads with `pread`, not through a memory map: a map of a file that is cut meanwhile kills the process with SIGBUS.
Ordinary headers are taken many at a time as a table [h 512] of bytes, h = headers; the rest one by one.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
_ZERO = bytes(BLOCK)
_WINDOW = 1 << 19
_HEADERS_AT_ONCE = 4096
_LARGE_MEMBER = 1 << 14
_MOST_PATIENCE = 1000
_LONGEST_EXTENSION = 1 << 20
_SPECIAL = {"1": "link", "2": "link", "3": "device", "4": "device", "6": "device"}
_PAX_MATTERS = (b"path=", b"size=", b"GNU.")
_MAGIC = np.frombuffer(b"ustar", np.uint8)
_OCTAL = 8 ** np.arange(10, -1, -1, dtype=np.int64)

Note = Callable[[str, str, str], None]
"""Called as note(kind, name, detail) for whatever is wrong."""


class Walk(NamedTuple):
    """The regular files of a tar in their order: raw names, where their data begins, how long it is."""

    names: list[bytes]
    offsets: list[int]
    sizes: list[int]


_Headers = tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint8]]
"""Where headers begin [h], the headers [h 512], and the block after each header of PAX records [x 512]."""


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
    patience = 1  # how many headers to take one by one before trying many again; tars full of PAX headers raise it
    while position < tar_bytes:
        taken = len(walk.names)
        position = _take_many(fd, tar_bytes, position, walk)
        if len(walk.names) > taken + 3:
            patience = 1
            continue
        patience = min(2 * patience, _MOST_PATIENCE)
        for _ in range(patience):
            if position < tar_bytes:
                position, extended = _take_one(fd, tar_bytes, position, extended, walk, note)
            if position < 0:
                return walk
        while extended != _Extended() and 0 <= position < tar_bytes:
            position, extended = _take_one(fd, tar_bytes, position, extended, walk, note)
        if position < 0:
            return walk
    note("no end marker", "", f"the tar stops at byte {tar_bytes} without the two empty blocks that end one: cut off?")
    return walk


def _take_many(fd: int, tar_bytes: int, position: int, walk: Walk) -> int:
    """Take up ordinary files from `position` on, as far as their headers are in order; returns where that ends.

    A PAX header before a file is in order when it holds nothing that matters here, but times and owners, say:
    webdataset writes one before every member.
    """
    large = bool(walk.sizes) and sum(walk.sizes[-16:]) > 16 * _LARGE_MEMBER
    starts, table, pax = (_read_headers if large else _read_window)(fd, tar_bytes, position)
    if not len(starts) or starts[0] != position:
        return position

    kinds = table[:, 156]
    digits = table[:, 124:135].astype(np.int64) - ord("0")
    sizes = digits @ _OCTAL
    after = starts + BLOCK + (sizes + 511 & -512)
    checksum = np.einsum("ij->i", table, dtype=np.uint32).astype(np.int64) + 8 * ord(" ")
    checksum -= table[:, 148:156].sum(axis=1, dtype=np.int64)
    stored = (table[:, 148:154].astype(np.int64) - ord("0")) @ _OCTAL[5:]
    in_order = (
        (table[:, 257:262] == _MAGIC).all(axis=1)
        & ((digits >= 0) & (digits <= 7)).all(axis=1)
        & ((kinds == ord("0")) | ((kinds == ord("x")) & (sizes <= BLOCK)))
        & (table[:, 0] != 0)
        & (stored == checksum)
        & (after <= tar_bytes)
    )
    in_order[1:] &= after[:-1] == starts[1:]
    if any(keyword in pax.tobytes() for keyword in _PAX_MATTERS):
        matters = [any(keyword in row.tobytes() for keyword in _PAX_MATTERS) for row in pax]
        in_order[np.flatnonzero(kinds == ord("x"))[matters]] = False
    good = int(np.append(in_order, False).argmin())
    files = np.flatnonzero(kinds[:good] == ord("0"))
    if not len(files):
        return position

    names: list[bytes] = np.ascontiguousarray(table[files, :100]).view("S100").ravel().tolist()
    for i in np.flatnonzero(table[files, 345]):
        names[i] = _name(table[files[i]].tobytes())
    if b"\0" in b"".join(names):  # rests of older names behind the end of a shorter one
        names = [name.split(b"\0")[0] for name in names]
    walk.names.extend(names)
    walk.offsets.extend((starts[files] + BLOCK).tolist())
    walk.sizes.extend(sizes[files].tolist())
    return int(after[files[-1]])


def _read_window(fd: int, tar_bytes: int, position: int) -> _Headers:
    """What looks like headers in the bytes from `position` on; good when many members are small.

    Candidates only: a member may hold another tar. The chain of sizes sorts them out.
    """
    chunk = os.pread(fd, _WINDOW, position)
    blocks = np.frombuffer(chunk[: len(chunk) // BLOCK * BLOCK], np.uint8).reshape(-1, BLOCK)
    at = np.flatnonzero((blocks[:-1, 257] == _MAGIC[0]) & (blocks[:-1, 258] == _MAGIC[1]))
    table = blocks[at]
    return position + BLOCK * at, table, blocks[at[table[:, 156] == ord("x")] + 1]


def _read_headers(fd: int, tar_bytes: int, position: int) -> _Headers:
    """Headers from `position` on, following sizes without checking them, and without reading the data between."""
    headers: list[bytes] = []
    starts: list[int] = []
    pax: list[bytes] = []
    while len(headers) < _HEADERS_AT_ONCE and position < tar_bytes:
        header = os.pread(fd, 3 * BLOCK, position)  # perhaps a PAX header, its one block, and the file's header
        for _ in range(2):
            try:
                size = int(header[124:135], 8)
            except ValueError:
                size = -1
            if len(header) < 2 * BLOCK or size < 0:
                position = tar_bytes
                break
            headers.append(header[:BLOCK])
            starts.append(position)
            position += BLOCK + (size + 511 & -512)
            if header[156] != ord("x"):
                break
            pax.append(header[BLOCK : 2 * BLOCK])
            header = header[2 * BLOCK :] + bytes(BLOCK)
            if size > BLOCK:
                break
    table, blocks = (np.frombuffer(b"".join(rows), np.uint8).reshape(-1, BLOCK) for rows in (headers, pax))
    return np.array(starts, np.int64), table, blocks


def _checksum_fits(header: bytes) -> bool:
    """Whether the header's checksum is right; old tars summed signed bytes."""
    stored = _number(header[148:156])
    rest = header[:148] + b" " * 8 + header[156:]
    return len(header) == BLOCK and (stored == sum(rest) or stored == sum(b - 256 if b > 127 else b for b in rest))


def _number(field: bytes) -> int | None:
    """A number of a header, octal or base-256 (large files); None when it is neither."""
    if field and field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        value = int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None
    return value if value >= 0 else None


def _name(header: bytes) -> bytes:
    """Name of one header, the prefix of POSIX (not of GNU, which keeps times there) put before it."""
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _take_one(
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
        for i in np.flatnonzero((blocks[:, 257:262] == _MAGIC).all(axis=1)):
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
