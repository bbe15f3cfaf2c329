"""From the members of a tar to samples, and what is odd about their names.

A sample is a run of neighbouring members with one key, as in webdataset: `a/b.mask.png` has the key `a/b` (up to the
first dot of the base name) and the extension `mask.png` (the rest, in lower case).
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PLAIN_IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})
"""Extensions of images as such; `mask.png` and the like are something else."""

ARRAY = "npy"
"""Extension of arrays [h w] or [h w c], uint8 or uint16: images where a sample has no other, else mostly embeddings."""

_MOST_FINDINGS = 1000
_ORDINARY = bytes(range(0x20, 0x7F)).replace(b"\\", b"") + bytes(range(0x80, 0x100))


class Finding(NamedTuple):
    """Something wrong: in which shard, under which key (empty: the shard itself), of which kind, and what exactly."""

    shard: str
    key: str
    kind: str
    detail: str


class Findings:
    """Collects findings of one shard, up to a number that a person would still read."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.found: list[Finding] = []
        self.more: Counter[str] = Counter()

    def note(self, kind: str, key: str, detail: str) -> None:
        """Take up a finding, or only count it."""
        if len(self.found) < _MOST_FINDINGS:
            self.found.append(Finding(self.shard, key, kind, detail))
        else:
            self.more[kind] += 1

    def all(self) -> tuple[Finding, ...]:
        """The findings, and how many more there were."""
        rest = (Finding(self.shard, "", kind, f"and {n} more of this kind") for kind, n in self.more.items())
        return (*self.found, *rest)


def note_odd_names(names: list[bytes], findings: Findings) -> None:
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


def group_members(
    names: list[bytes], offsets: list[int], sizes: list[int], findings: Findings
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
    extensions: tuple[str, ...], arrays: dict[str, NDArray[Any]], keys: list[bytes], findings: Findings
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
