"""One shard of a pack, as a worker process writes it."""

import io
import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.manifest import Shard, describe_shard
from datamodules.pack_plan import Entry, Job
from datamodules.shard_writer import ShardFile, check_sample
from datamodules.sidecars import cannot_write
from datamodules.sources import SourceReader
from datamodules.workers import Tick

_TICK = 20


class Packed(NamedTuple):
    """What became of a shard: None when none of its images could be read; name and reason of those that could not."""

    shard: Shard | None
    members: dict[str, int]
    skipped: list[tuple[str, str]]

    def to_note(self) -> list[Any]:
        """As JSON."""
        return [self.shard and vars(self.shard), self.members, self.skipped]

    @classmethod
    def from_note(cls, note: list[Any]) -> "Packed":
        """From JSON."""
        shard, members, skipped = note
        return cls(shard and Shard(**shard), members, [(name, reason) for name, reason in skipped])


def pack_shard(job: Job, tick: Tick) -> Packed:
    """Read, check, perhaps shrink, and write the images of one shard.

    Raises:
        DataError: when the shard cannot be written; an image that cannot be read is only skipped.
    """
    reader = SourceReader(job.source)
    skipped: list[tuple[str, str]] = []
    ticked = 0
    try:
        file = ShardFile(job.path)
        try:
            for count, entry in enumerate(job.entries, 1):
                try:
                    extension, data = _read(reader, job, entry)
                except Exception as error:  # whatever a decoder or a file system finds to complain about
                    skipped.append((entry.image.name, f"{error}" or type(error).__name__))
                else:
                    members = {extension: data} | _labels_and_texts(entry)
                    check_sample(entry.key, members)
                    file.write(entry.key, members)
                if count - ticked == _TICK:
                    tick(_TICK)
                    ticked = count
            tick(len(job.entries) - ticked)
            if not file.samples:
                return Packed(None, {}, skipped)
            index = file.close()
        finally:
            file.abort()
    except OSError as error:
        raise DataError(cannot_write(job.path, error)) from error
    finally:
        reader.close()
    return Packed(describe_shard(index), dict(index.extension_counts()), skipped)


def shrink(pixels: NDArray[np.uint8], shorter: int, quality: int) -> bytes:
    """An image uint8 [h w 3] as JPEG with `shorter` pixels on its shorter side (bicubic, antialiased)."""
    from PIL import Image as Pillow

    height, width = pixels.shape[:2]
    scale = shorter / min(height, width)
    size = max(shorter, round(width * scale)), max(shorter, round(height * scale))
    out = io.BytesIO()
    Pillow.fromarray(pixels).resize(size, Pillow.Resampling.BICUBIC).save(out, "JPEG", quality=quality)
    return out.getvalue()


def _read(reader: SourceReader, job: Job, entry: Entry) -> tuple[str, bytes]:
    """Extension and bytes of an image that the loader will be able to decode."""
    from datamodules.decode import decode_image

    extension = entry.image.name.rpartition(".")[2].lower()
    data = reader.read(entry.image)
    pixels = decode_image(data, extension)
    if job.resize is None or min(pixels.shape[1:]) <= job.resize:
        return extension, data
    return "jpg", shrink(pixels.permute(1, 2, 0).numpy(), job.resize, job.quality)


def _labels_and_texts(entry: Entry) -> dict[str, bytes]:
    """The members beside the image."""
    members = {} if entry.label < 0 else {"cls": str(entry.label).encode()}
    if entry.captions:
        members["txt"] = entry.captions[0].encode()
    if len(entry.captions) > 1:
        members["json"] = json.dumps({"captions": entry.captions}, ensure_ascii=False).encode()
    return members
