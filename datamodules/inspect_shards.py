"""A look at a set of shards: counts, sizes, keys, members, classes, and a contact sheet."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from datamodules.class_labels import MOST_BYTES
from datamodules.console import one_line, table, tell
from datamodules.contact_sheet import contact_sheet, save_sheet
from datamodules.errors import DataError
from datamodules.manifest import Manifest, load_manifest
from datamodules.open_shards import named_tars
from datamodules.tar_index import PLAIN_IMAGES, ShardIndex, open_tar, read_index
from datamodules.tar_samples import ARRAY

if TYPE_CHECKING:
    from torch import Tensor

SHEET = "contact_sheet.png"
_SHEET_IMAGES = 64
_MOST_LABELS = 200_000
_MOST_CLASSES = 60
_BAR = 30
_REMOTE_SHARDS = 8


class _Picture(NamedTuple):
    """An image [c h w] as `decode_image`, None when it cannot be read; label, key or fault; caption."""

    pixels: "Tensor | None"
    text: str
    caption: str


def inspect_command(root: str | os.PathLike[str], sheet: str | os.PathLike[str] | None = None) -> int:
    """Print what the shards in `root` hold, write a contact sheet (default: `root`/contact_sheet.png), return 0.

    Raises:
        DataError: as `load_manifest`, or when the sheet cannot be written.
    """
    manifest = load_manifest(named_tars(root) or root)
    counts = manifest.counts
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(f"{manifest.name}: {manifest.num_samples:,} samples in {len(counts)} shards, {megabytes:,.1f} MB")
    made_by = f"; made by: {manifest.made_by}" if manifest.made_by else ""
    print(f"samples per shard: {counts.min()} to {counts.max()}; hash {manifest.hash}{made_by}")
    if damaged := sum(shard.findings for shard in manifest.shards):
        print(f"{damaged} findings in the tars: trivit shards verify {manifest.name} lists them")

    if manifest.url and len(manifest.shards) > _REMOTE_SHARDS:
        print(f"looked at: {_REMOTE_SHARDS} of the {len(manifest.shards)} shards, which are fetched for that")
        some = np.linspace(0, len(manifest.shards) - 1, _REMOTE_SHARDS).astype(int).tolist()
        manifest = replace(manifest, shards=tuple(manifest.shards[i] for i in some), members={})
    rows, labels, keys = _survey(manifest)
    print(f"\nkeys: {one_line(', '.join(keys))}\n")
    print(table(("extension", "samples", "share", "mean bytes", "MB"), rows))
    if labels:
        print(f"\n{_histogram(manifest, labels)}")
    pictures = _pictures(manifest)
    if captions := [picture.caption for picture in pictures if picture.caption]:
        print("\ncaptions, for example:", *map(one_line, captions[:3]), sep="\n  ")
    sides = np.array([picture.pixels.shape[1:] for picture in pictures if picture.pixels is not None])
    if len(sides):
        height, width = np.median(sides, axis=0)
        shorter = sides.min(axis=1)
        print(
            f"\n{len(sides)} images looked at: {width:.0f} x {height:.0f} pixels (median), "
            f"shorter side {shorter.min()} to {shorter.max()}; {_kinds(pictures)}"
        )
    place = Path(sheet) if sheet is not None else manifest.root / SHEET
    save_sheet(contact_sheet([(picture.pixels, picture.text) for picture in pictures]), place)
    print(f"contact sheet: {place}")
    return 0


def _survey(manifest: Manifest) -> tuple[list[tuple[str, int, str, int, str]], Counter[str], list[str]]:
    """One pass over the indexes: a row per extension, how often each label occurs, some keys.

    Labels come from evenly spread shards when there are very many.
    """
    samples, sizes, labels = Counter[str](), Counter[str](), Counter[str]()
    keys: list[str] = []
    step = max(1, manifest.members.get("cls", 0) // _MOST_LABELS)
    for shard in tqdm(range(len(manifest.shards)), desc="reading", unit="shard", disable=None, leave=False, delay=0.5):
        try:
            index = read_index(manifest.path(shard))
        except DataError as error:
            tell(f"{error}")
            continue
        samples += index.extension_counts()
        sizes += index.extension_bytes()
        if len(index):
            keys = keys[:3] + [index.key(i) for i in (0, 1, 2, len(index) - 1) if i < len(index)]
        if shard % step == 0:
            labels += _labels(index)
    if not keys:
        raise DataError(f"{manifest.name}: no shard could be read")
    rows = [
        (f".{name}", n, f"{100 * n / manifest.num_samples:.1f}%", round(sizes[name] / n), f"{sizes[name] / 1e6:.1f}")
        for name, n in samples.most_common()
    ]
    return rows, labels, [*keys[:3], "...", keys[-1]]


def _labels(index: ShardIndex) -> Counter[str]:
    """How often each label occurs in a shard."""
    members = [index.members(i).get("cls") for i in range(len(index))]
    fd = open_tar(index.path)
    try:
        return Counter(_label(os.pread(fd, min(m.size, MOST_BYTES), m.offset)) for m in members if m is not None)
    finally:
        os.close(fd)


def _label(data: bytes) -> str:
    """A label as text."""
    return one_line(data.decode("utf-8", "replace"))


def _histogram(manifest: Manifest, labels: Counter[str]) -> str:
    """A table of classes with bars; the largest and smallest when there are many."""
    names = {str(number): name for number, name in enumerate(manifest.classes)}
    most = max(labels.values())
    in_order = sorted(labels.items(), key=lambda item: (item[0] not in names, item[0].zfill(9)))
    rows = [(names.get(label, label), n, "#" * max(1, round(_BAR * n / most))) for label, n in in_order]
    if len(rows) > _MOST_CLASSES:
        rows.sort(key=lambda row: -row[1])
        median = round(float(np.median([row[1] for row in rows])))
        rows = [*rows[:10], (f"median of {len(rows)}", median, ""), *rows[-10:]]
    part = f" in {labels.total():,} samples" if labels.total() < manifest.members.get("cls", 0) else ""
    return f"{len(labels)} classes{part}\n{table(('class', 'samples', ''), rows)}"


def _pictures(manifest: Manifest) -> list[_Picture]:
    """Evenly spread samples."""
    from datamodules.decode import BadImageError, any_pixels, as_asked

    starts = np.concatenate([[0], np.cumsum(manifest.counts)])
    pictures = []
    for position in np.linspace(0, starts[-1] - 1, min(_SHEET_IMAGES, int(starts[-1]))).astype(int):
        shard = int(np.searchsorted(starts, position, side="right")) - 1
        try:
            key, data = _read(manifest.path(shard), int(position - starts[shard]))
            extension = next((extension for extension in data if extension in PLAIN_IMAGES), ARRAY)
            native = any_pixels(data.get(extension, b""), extension)
            bits = 8 * native.values.dtype.itemsize
            pixels = as_asked(native, native.values.shape[2] - native.alpha, bits)
        except (BadImageError, DataError) as error:
            pictures.append(_Picture(None, f"{error}", ""))
            continue
        label = _label(data.get("cls", b""))
        known = label.isdecimal() and int(label) < len(manifest.classes)
        text = manifest.classes[int(label)] if known else label or key
        pictures.append(_Picture(pixels, text, data.get("txt", b"").decode("utf-8", "replace")))
    return pictures


def _kinds(pictures: list[_Picture]) -> str:
    """Channels and bits of images, the most frequent first."""
    kinds = Counter(
        f"{len(p.pixels)} channel{'s' if len(p.pixels) > 1 else ''} of {16 if p.pixels.is_floating_point() else 8} bits"
        for p in pictures
        if p.pixels is not None
    )
    return ", ".join(f"{kind} ({n})" if len(kinds) > 1 else kind for kind, n in kinds.most_common())


def _read(tar: Path, i: int) -> tuple[str, dict[str, bytes]]:
    """Key and members of one sample."""
    index = read_index(tar)
    if i >= len(index):
        raise DataError(f"{tar} has only {len(index)} samples")
    fd = open_tar(str(tar))
    try:
        return index.key(i), {name: os.pread(fd, m.size, m.offset) for name, m in index.members(i).items()}
    finally:
        os.close(fd)
