"""Packing images into shards: shuffled, on all cores, interrupted and continued; what cannot be read is named."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datamodules.captions import captions_of, read_captions
from datamodules.console import one_line, tell
from datamodules.errors import DataError
from datamodules.manifest import MANIFEST, SKIPPED, UNFINISHED, Manifest
from datamodules.pack_plan import Job, Settings, default_samples_per_shard, make_entries, plan
from datamodules.pack_shard import Packed, pack_shard
from datamodules.shard_entry import Shard
from datamodules.shard_writer import LOCK, begin_set, finish_set, note_progress, remove_leftovers
from datamodules.sidecars import cannot_write, locked, write_aside
from datamodules.sources import Source, list_source
from datamodules.text_files import SKIPPED_TEXTS, kind_of
from datamodules.workers import spread


def pack(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], *, resize: int | None = None, quality: int = 90,
    captions: str | os.PathLike[str] | None = None, columns: Mapping[str, str | None] | None = None,
    samples_per_shard: int | None = None, extend: bool = False, workers: int | None = None,
) -> Manifest:  # fmt: skip
    """Pack class folders, a flat folder, a tar of either, or a table of paths into shuffled shards in the folder `dst`.

    Interrupted, the same call goes on where it stopped; finished, it does nothing. The bytes of the images stay as they
    are unless `resize` is given; those that cannot be decoded are left out, counted, and listed in `skipped.tsv`.
    Says on stderr what it does.

    Args:
        src: the images; folders above all of them mean nothing, the next ones are the classes. A `.txt` (its caption)
            and a `.json` of an image's name beside it go with it. Or a table, see `table_source.list_table`.
        dst: absent, empty, or an interrupted try.
        resize: shrink images to this many pixels on the shorter side, as JPEG (other than 8-bit grey and colour: as
            .npy); smaller ones stay as they are.
        quality: of these JPEGs.
        captions: a table of file names and captions (`captions.py`), instead of texts beside the images; several
            captions for one image become a JSON member `{"captions": [...]}` beside the first one in `.txt`.
        columns: of a table `src`: "image", "caption", "label" -> name of the column; usual names are found without.
        samples_per_shard: 1000 when None, fewer for small sets, so that there are several shards.
        extend: `dst` is a finished set, to which the images are added, see `pack_extend.extend_set`.
        workers: processes; all cores when None.

    Raises:
        DataError: for whatever is wrong with these paths and values, and when the disk is full.
    """
    for name, value in {"resize": resize, "samples-per-shard": samples_per_shard}.items():
        if value is not None and value < 1:
            raise DataError(f"--{name} must be at least 1, not {value}")
    if not 1 <= quality <= 100:
        raise DataError(f"--quality goes from 1 to 100, not {quality}")
    dst = Path(dst)
    source = list_source(src, columns)
    if source.path.is_dir() and dst.resolve().is_relative_to(source.path.resolve()):
        raise DataError(f"{dst} lies inside of {source.path}: choose a folder outside of the images")
    for note in source.notes[:5]:
        tell(note)
    texts = _captions(source, captions)
    if captions is not None:
        source = replace(source, texts=(), lone_texts=())
    settings = Settings(resize, quality, samples_per_shard or default_samples_per_shard(len(source.images)))
    made_by = (
        f"pack {source.path.name} resize={resize} quality={quality if resize else None} "
        f"samples_per_shard={settings.samples_per_shard} images={len(source.images)} content={_digest(source, texts)}"
    )
    try:
        if extend:
            from datamodules.pack_extend import extend_set  # which stands on this file

            return extend_set(dst, source, texts, settings, made_by, workers)
        if (before := _finished(dst)) and made_by in before.made_by:
            tell(f"{dst}: holds these {len(source.images)} samples already, nothing to do")
            return before
        notes = begin_set(dst, made_by)
        with locked(dst / LOCK, wait=False):
            remove_leftovers(dst)
            packed = pack_jobs(dst, plan(source.root, make_entries(source, texts), dst, settings), notes, workers)
            shards, members, skipped = sum_up(source, packed)
            texts_left = left_texts(source, packed)
            for name, lines in ((SKIPPED, skipped), (SKIPPED_TEXTS, texts_left)):
                if lines:
                    write_aside(dst / name, lines)
            manifest = Manifest(dst, shards, source.classes, members, made_by)
            finish_set(manifest)
            report(manifest, source, skipped, texts_left)
            return manifest
    except OSError as error:
        raise DataError(cannot_write(dst / "a shard", error)) from error
    except KeyboardInterrupt as interrupt:
        state = "as it was before" if extend else "unfinished"
        raise KeyboardInterrupt(f"interrupted: {dst} is {state}; the same command goes on from here") from interrupt


def pack_jobs(dst: Path, jobs: list[Job], notes: list[dict[str, Any]], workers: int | None) -> list[Packed]:
    """Write the shards that `notes` does not tell of yet, noting each in the set `dst`; what became of every job."""
    packed: dict[int, Packed] = {}
    for note in notes:
        result = Packed.from_note(note["packed"])
        path = jobs[note["number"]].path
        if result.shard is None or (path.is_file() and path.stat().st_size == result.shard.bytes):
            packed[note["number"]] = result
    left = [job for job in jobs if job.number not in packed]
    if packed and left:
        tell(f"going on: {len(packed)} of {len(jobs)} shards are done")
    if left:
        for module in ("webdataset.writer", "datamodules.decode", "datamodules.crops"):
            import_module(module)  # once here, so that no worker has to import torch for itself
        began = time.monotonic()
        total, to_do = sum(len(job.entries) for job in jobs), sum(len(job.entries) for job in left)
        with tqdm(total=total, initial=total - to_do, desc="packing", unit="img", smoothing=0.1, disable=None) as bar:
            for job, result in spread(pack_shard, left, workers=workers, tick=bar.update):
                note_progress(dst, {"number": job.number, "packed": result.to_note()})
                packed[job.number] = result
        seconds = time.monotonic() - began
        tell(f"{to_do} images in {seconds:.1f} s, {to_do / seconds:.0f} a second")
    return [packed[job.number] for job in jobs]


def sum_up(source: Source, packed: Sequence[Packed]) -> tuple[tuple[Shard, ...], dict[str, int], bytes]:
    """The shards that were written, how many samples have each extension, and the lines of `skipped.tsv`.

    Raises:
        DataError: when no image could be read.
    """
    skipped = [*source.skipped, *(entry for result in packed for entry in result.skipped)]
    lines = _lines(skipped)
    shards = tuple(result.shard for result in packed if result.shard is not None)
    if not shards:
        name, reason = lines[0].rstrip("\n").split("\t")
        raise DataError(f"none of the {len(skipped)} images in {source.path} can be read (first: {name}: {reason})")
    members = sum((Counter(result.members) for result in packed), Counter[str]())
    return shards, dict(sorted(members.items())), "".join(lines).encode()


def left_texts(source: Source, packed: Sequence[Packed]) -> bytes:
    """The lines of `skipped_texts.tsv`: texts that cannot be read, and those that lie beside no image."""
    return "".join(_lines([*(text for result in packed for text in result.skipped_texts), *source.lone_texts])).encode()


def _lines(skipped: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{one_line(name)}\t{one_line(reason)}\n" for name, reason in skipped]


def report(manifest: Manifest, source: Source, skipped: bytes, texts_left: bytes) -> None:
    """What was left out, and what is there now."""
    what = "rows or images" if source.path != source.root else "images"  # of a table
    for left, told, place in (
        (skipped, f"{what} that cannot be read", SKIPPED), (texts_left, "texts", SKIPPED_TEXTS)
    ):  # fmt: skip
        if lines := left.decode().splitlines():
            tell(f"left out {len(lines)} {told} (all in {manifest.root / place}):")
            for line in lines[:5]:
                tell("  " + line.replace("\t", ": ", 1))
    if source.ignored:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in source.ignored.most_common(4))
        tell(f"passed over {source.ignored.total()} files that are no images ({kinds})")
    numbered = "labels without names" if manifest.members.get("cls") else "no labels"
    labelled = f"{len(manifest.classes)} classes" if manifest.classes else numbered
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    tell(
        f"{manifest.root}: {manifest.num_samples} samples, {labelled}, {len(manifest.shards)} shards, "
        f"{megabytes:.1f} MB"
    )


def _captions(source: Source, table: str | os.PathLike[str] | None) -> list[list[str]]:
    """The captions of each image, from a table or from the source itself."""
    own = [list(captions) for captions in source.captions]
    if table is not None:
        if any(own):
            raise DataError(f"{source.path} holds captions, and so does {table}: leave --captions out, or name another "
                            "--caption-column")  # fmt: skip
        own = captions_of(source, read_captions(Path(table)), Path(table))
    if table is not None or any(own):
        tell(f"{sum(map(bool, own))} of {len(own)} images have a caption")
    if any(source.texts):
        kinds = ", ".join(f"{n} .{kind}" for kind, n in _kinds(source).items())
        use = "are packed with them" if table is None else f"are not packed: {table} has the captions"
        having = f"{sum(map(bool, source.texts))} of {len(source.images)} images have texts beside them ({kinds})"
        tell(f"{having}, which {use}")
    return own or [[] for _ in source.images]


def _kinds(source: Source) -> Counter[str]:
    return Counter(sorted(kind_of(text) for texts in source.texts for text in texts))


def _finished(dst: Path) -> Manifest | None:
    """The manifest of a finished set in `dst`, if there is one that is whole."""
    try:
        if (dst / UNFINISHED).exists():
            return None
        manifest = Manifest.from_bytes(dst, (dst / MANIFEST).read_bytes())
        whole = all(manifest.path(i).stat().st_size == shard.bytes for i, shard in enumerate(manifest.shards))
    except (OSError, ValueError):
        return None
    return manifest if whole else None


def _digest(source: Source, texts: list[list[str]]) -> str:
    """Changes when the images or their captions do."""
    return hashlib.sha256(f"{source.digest()}{json.dumps(texts)}".encode()).hexdigest()[:12]
