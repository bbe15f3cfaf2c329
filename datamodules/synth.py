"""Drawn images as shards: `trivit shards synth`, the data that is always at hand.

The class is a shape. Neither pixels nor colours give it away: place, size, turn, colours, texture and background are
drawn independently of it, every shape covers the same area, and nearest neighbours on pixels or on colour histograms
stay within twice chance (a test holds that). A network that looks at edges knows it, so that learning shows. Each has
`.jpg`, `.cls` (index of the shape), `.txt` (a true caption), `.json` (the values of `ATTRIBUTES`, and numbers), and
`.mask.png` (1 = object, 0 = background).
"""

import io
import json
import os
import time
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.console import tell
from datamodules.drawing import draw
from datamodules.errors import DataError
from datamodules.manifest import MANIFEST, Manifest, load_manifest
from datamodules.pack_plan import default_samples_per_shard
from datamodules.shard_entry import Shard, describe_shard
from datamodules.shard_writer import LOCK, ShardFile, begin_set, finish_set, note_progress, remove_leftovers, shard_name
from datamodules.sidecars import cannot_write, locked
from datamodules.synth_scene import ATTRIBUTES, SIDE, SPLITS, Only, Scene, held_out, scene
from datamodules.synth_shapes import SHAPES, distance_table
from datamodules.workers import Tick, spread

__all__ = ["ATTRIBUTES", "SHAPES", "SPLITS", "held_out", "synth"]

EDITION = 1  # of the pictures: a change to any pixel or caption needs a new one
SMALLEST, LARGEST = 16, 1024
_TICK = 50


def synth(
    dst: str | os.PathLike[str], *, samples: int = 20_000, size: int = 64, seed: int = 0, split: str = "all",
    only: Only = (), samples_per_shard: int | None = None, workers: int | None = None,
) -> Manifest:  # fmt: skip
    """Draw a set of `samples` images of `size` x `size` pixels into the folder `dst`, on all cores.

    Sample i depends on (seed, split, i) alone: its scene is the same at every size, its pixels are the same on every
    machine. Interrupted, the same call goes on where it stopped; when all is there it only says so.

    Args:
        dst: absent, empty, or from the same call before.
        samples: how many.
        size: pixels per side, 16 to 1024.
        seed: another one gives other images.
        split: "all" draws every pair of shape and colour. "train" and "test" leave one colour of each shape out
            (`held_out`), and "test_unseen" draws these pairs only. Splits of one seed share no image.
        only: (attribute, value), ...: all images have these; shape and colour cannot be chosen.
        samples_per_shard: 1000 when None, fewer for small sets, so that there are several shards.
        workers: processes; all cores when None.

    Raises:
        DataError: for values out of range, a folder that holds something else, and when the disk is full.
    """
    for name, value, low, high in (
        ("samples", samples, 1, 10**9), ("size", size, SMALLEST, LARGEST), ("seed", seed, 0, 2**63 - 1),
        ("samples-per-shard", samples_per_shard, 1, 10**9), ("workers", workers, 1, 10**4),
    ):  # fmt: skip
        if value is not None and not low <= value <= high:
            raise DataError(f"--{name} goes from {low} to {high}, not {value}")
    if split not in SPLITS:
        raise DataError(f"--split is one of {', '.join(SPLITS)}, not {split!r}")
    free = {name: values for name, values in ATTRIBUTES.items() if name not in ("shape", "colour")}
    for what, kind in only:
        if kind not in free.get(what, ()):
            may = f"{what} is one of {', '.join(free[what])}" if what in free else f"names one of {', '.join(free)}"
            raise DataError(f"--only {what}={kind}: {may}")
    dst = Path(dst)
    samples_per_shard = samples_per_shard or default_samples_per_shard(samples)
    made_by = (
        f"synth samples={samples} size={size} seed={seed} split={split} samples_per_shard={samples_per_shard} "
        f"edition={EDITION}" + "".join(f" {name}={value}" for name, value in only)
    )
    if (finished := _finished(dst, made_by)) is not None:
        tell(f"{dst}: all {samples} images are there already")
        return finished
    jobs = [
        _Job(
            dst / shard_name("synth", number),
            number,
            range(samples)[first : first + samples_per_shard],
            size,
            seed,
            split,
            tuple(only),
        )
        for number, first in enumerate(range(0, samples, samples_per_shard))
    ]
    notes = begin_set(dst, made_by)
    try:
        with locked(dst / LOCK, wait=False):
            remove_leftovers(dst)
            done = {note["number"]: Shard(**note["shard"]) for note in notes}
            shards = _draw_shards(dst, jobs, done, workers)
            members = dict.fromkeys(("cls", "jpg", "json", "mask.png", "txt"), samples)
            manifest = Manifest(dst, tuple(shards[job.number] for job in jobs), SHAPES, members, made_by)
            finish_set(manifest)
    except OSError as error:
        raise DataError(cannot_write(dst / "a shard", error)) from error
    except KeyboardInterrupt:
        tell(f"interrupted: {dst} is unfinished; the same command goes on from here")
        raise
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    tell(f"{dst}: {samples} samples, {len(SHAPES)} classes, {len(jobs)} shards, {megabytes:.1f} MB")
    return manifest


class _Job(NamedTuple):
    """One shard to draw."""

    path: Path
    number: int
    indices: range
    size: int
    seed: int
    split: str
    only: Only


def _finished(dst: Path, made_by: str) -> Manifest | None:
    """The manifest in `dst` when the same call has finished there before."""
    if not (dst / MANIFEST).is_file():
        return None
    manifest = load_manifest(dst)
    if manifest.made_by != made_by:
        other = manifest.made_by or "of unknown origin"
        raise DataError(f"{dst} already holds another set ({other}): delete it, or choose another folder")
    return manifest


def _draw_shards(dst: Path, jobs: list[_Job], done: dict[int, Shard], workers: int | None) -> dict[int, Shard]:
    """Draw the shards that are not there yet, and note each one as it is finished."""
    shards = {
        job.number: done[job.number]
        for job in jobs
        if job.number in done and job.path.is_file() and job.path.stat().st_size == done[job.number].bytes
    }
    left = [job for job in jobs if job.number not in shards]
    if shards:
        tell(f"going on: {len(shards)} of {len(jobs)} shards are done")
    import_module("webdataset.writer")  # once here, so that no worker has to import torch for itself
    for shape in SHAPES:
        distance_table(shape)  # and no worker has to work these out again
    began = time.monotonic()
    total, to_do = (sum(len(job.indices) for job in some) for some in (jobs, left))
    with tqdm(total=total, initial=total - to_do, desc="drawing", unit="img", smoothing=0.1, disable=None) as bar:
        for job, shard in spread(_draw_shard, left, workers=workers, tick=bar.update):
            note_progress(dst, {"number": job.number, "shard": vars(shard)})
            shards[job.number] = shard
    seconds = max(time.monotonic() - began, 1e-3)
    tell(f"{to_do} images in {seconds:.1f} s, {to_do / seconds:.0f} a second")
    return shards


def _draw_shard(job: _Job, tick: Tick) -> Shard:
    """Draw and write one shard; DataError when it cannot be written."""
    try:
        file = ShardFile(job.path)
        try:
            for count, index in enumerate(job.indices, 1):
                file.write(f"{index:08d}", draw_sample(job.seed, index, job.size, job.split, job.only))
                if count % _TICK == 0:
                    tick(_TICK)
            tick(len(job.indices) % _TICK)
            return describe_shard(file.close())
        finally:
            file.abort()
    except OSError as error:
        raise DataError(cannot_write(job.path, error)) from error


def draw_sample(seed: int, index: int, size: int, split: str = "all", only: Only = ()) -> dict[str, bytes]:
    """One sample: extension -> bytes."""
    what = scene(seed, index, split, only)
    image, mask = draw(what, size)
    return {
        "jpg": _encoded(image, "JPEG", quality=95, subsampling=0),
        "cls": str(SHAPES.index(what.attributes["shape"])).encode(),
        "txt": what.caption.encode(),
        "json": json.dumps(_about(what)).encode(),
        "mask.png": _encoded(mask, "PNG", compress_level=1),
    }


def _encoded(pixels: NDArray[np.uint8], kind: str, **options: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def _about(what: Scene) -> dict[str, object]:
    """The attributes, and numbers: degrees clockwise; centre and radius (of the circle of equal area) over the side."""
    return what.attributes | {
        "degrees": what.degrees,
        "rgb": what.fill,
        "centre": [round(what.x / SIDE, 4), round(what.y / SIDE, 4)],
        "radius": round(what.radius / SIDE, 4),
    }
