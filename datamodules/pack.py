"""Packing images into shards: shuffled, on all cores, interrupted and continued; what cannot be read is named."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datamodules.captions import captions_of, read_captions
from datamodules.console import one_line, tell
from datamodules.errors import DataError
from datamodules.manifest import MANIFEST, UNFINISHED, Manifest
from datamodules.pack_plan import Job, default_samples_per_shard, plan
from datamodules.pack_shard import Packed, pack_shard
from datamodules.shard_writer import LOCK, begin_set, finish_set, note_progress, remove_leftovers
from datamodules.sidecars import cannot_write, locked, write_aside
from datamodules.sources import Source, list_source
from datamodules.workers import spread

SKIPPED = "skipped.tsv"


def pack(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], *, resize: int | None = None, quality: int = 90,
    captions: str | os.PathLike[str] | None = None, samples_per_shard: int | None = None, workers: int | None = None,
) -> Manifest:  # fmt: skip
    """Pack class folders, a flat folder, or a tar of either into shuffled shards in the folder `dst`.

    Interrupted, the same call goes on where it stopped; finished, it does nothing. The bytes of the images stay as they
    are unless `resize` is given; those that cannot be decoded are left out, counted, and listed in `skipped.tsv`.
    Says on stderr what it does.

    Args:
        src: the images; folders above all of them mean nothing, the next ones are the classes.
        dst: absent, empty, or an interrupted try.
        resize: shrink images to this many pixels on the shorter side, as JPEG; smaller ones stay as they are.
        quality: of these JPEGs.
        captions: a table of file names and captions (`captions.py`); several captions for one image become a JSON
            member `{"captions": [...]}` beside the first one in `.txt`.
        samples_per_shard: 1000 when None, fewer for small sets, so that there are several shards.
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
    source = list_source(src)
    if dst.resolve().is_relative_to(source.path.resolve()):
        raise DataError(f"{dst} lies inside of {source.path}: choose a folder outside of the images")
    for note in source.notes[:5]:
        tell(note)
    texts: list[list[str]] = [[] for _ in source.images]
    if captions is not None:
        texts = captions_of(source, read_captions(Path(captions)), Path(captions))
        tell(f"{sum(map(bool, texts))} of {len(texts)} images have a caption")
    samples_per_shard = samples_per_shard or default_samples_per_shard(len(source.images))
    jobs = plan(source, texts, dst, resize=resize, quality=quality, samples_per_shard=samples_per_shard)
    made_by = (
        f"pack {source.path.name} resize={resize} quality={quality if resize else None} "
        f"samples_per_shard={samples_per_shard} images={len(source.images)} content={_digest(source, texts)}"
    )
    if (before := _finished(dst)) and before.made_by == made_by:
        tell(f"{dst}: holds these {before.num_samples} samples already, nothing to do")
        return before
    notes = begin_set(dst, made_by)
    try:
        with locked(dst / LOCK, wait=False):
            remove_leftovers(dst)
            packed = _pack_shards(dst, jobs, notes, workers)
            return _finish(dst, source, [packed[job.number] for job in jobs], made_by)
    except OSError as error:
        raise DataError(cannot_write(dst / "a shard", error)) from error
    except KeyboardInterrupt:
        tell(f"interrupted: {dst} is unfinished; the same command goes on from here")
        raise


def _pack_shards(dst: Path, jobs: list[Job], notes: list[dict[str, Any]], workers: int | None) -> dict[int, Packed]:
    """Write the shards that are not there yet; shard number -> what became of it."""
    packed: dict[int, Packed] = {}
    for note in notes:
        result = Packed.from_note(note["packed"])
        path = jobs[note["number"]].path
        if result.shard is None or (path.is_file() and path.stat().st_size == result.shard.bytes):
            packed[note["number"]] = result
    left = [job for job in jobs if job.number not in packed]
    if not left:
        return packed
    if packed:
        tell(f"going on: {len(packed)} of {len(jobs)} shards are done")
    for module in ("webdataset.writer", "datamodules.decode"):
        import_module(module)  # once here, so that no worker has to import torch for itself
    began = time.monotonic()
    total, to_do = sum(len(job.entries) for job in jobs), sum(len(job.entries) for job in left)
    with tqdm(total=total, initial=total - to_do, desc="packing", unit="img", smoothing=0.1, disable=None) as bar:
        for job, result in spread(pack_shard, left, workers=workers, tick=bar.update):
            note_progress(dst, {"number": job.number, "packed": result.to_note()})
            packed[job.number] = result
    seconds = time.monotonic() - began
    tell(f"{to_do} images in {seconds:.1f} s, {to_do / seconds:.0f} a second")
    return packed


def _finish(dst: Path, source: Source, packed: Sequence[Packed], made_by: str) -> Manifest:
    """The manifest, the list of what was skipped, and a word about both."""
    skipped = [(one_line(name), one_line(reason)) for result in packed for name, reason in result.skipped]
    shards = tuple(result.shard for result in packed if result.shard is not None)
    if not shards:
        name, reason = skipped[0]
        raise DataError(f"none of the {len(skipped)} images in {source.path} can be read (first: {name}: {reason})")
    if skipped:
        write_aside(dst / SKIPPED, "".join(f"{name}\t{reason}\n" for name, reason in skipped).encode())
        tell(f"left out {len(skipped)} images that cannot be read (all in {dst / SKIPPED}):")
        for name, reason in skipped[:5]:
            tell(f"  {name}: {reason}")
    if source.ignored:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in source.ignored.most_common(4))
        tell(f"passed over {source.ignored.total()} files that are no images ({kinds})")
    members = sum((Counter(result.members) for result in packed), Counter[str]())
    manifest = Manifest(dst, shards, source.classes, dict(sorted(members.items())), made_by)
    finish_set(manifest)
    labelled = f"{len(source.classes)} classes" if source.classes else "no labels"
    megabytes = sum(shard.bytes for shard in shards) / 1e6
    tell(f"{dst}: {manifest.num_samples} samples, {labelled}, {len(shards)} shards, {megabytes:.1f} MB")
    return manifest


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
