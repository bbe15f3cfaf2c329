"""One shard of a pack, as a worker process writes it."""

import io
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datamodules.errors import DataError
from datamodules.pack_plan import Entry, Job
from datamodules.shard_entry import Shard, describe_shard
from datamodules.shard_writer import ShardFile, check_sample
from datamodules.sidecars import cannot_write
from datamodules.sources import SourceReader
from datamodules.tar_samples import ARRAY
from datamodules.text_files import checked_text, kind_of
from datamodules.workers import Tick

if TYPE_CHECKING:
    from datamodules.native_pixels import Pixels

_TICK = 20


class Packed(NamedTuple):
    """What became of a shard: None when none of its images could be read.

    `skipped`, `skipped_texts`: name and reason of images, and of texts beside images, that could not be read.
    """

    shard: Shard | None
    members: dict[str, int]
    skipped: list[tuple[str, str]]
    skipped_texts: list[tuple[str, str]]

    def to_note(self) -> list[Any]:
        """As JSON."""
        return [self.shard and vars(self.shard), self.members, self.skipped, self.skipped_texts]

    @classmethod
    def from_note(cls, note: list[Any]) -> "Packed":
        """From JSON."""
        shard, members, *lists = note
        skipped, texts = ([(name, reason) for name, reason in each] for each in (*lists, [])[:2])
        return cls(shard and Shard(**shard), members, skipped, texts)


def pack_shard(job: Job, tick: Tick) -> Packed:
    """Read, check, perhaps shrink, and write the images of one shard.

    Raises:
        DataError: when the shard cannot be written; an image or a text that cannot be read is only skipped.
    """
    reader = SourceReader(job.source)
    skipped: list[tuple[str, str]] = []
    skipped_texts: list[tuple[str, str]] = []
    ticked = 0
    try:
        file = ShardFile(job.path)
        try:
            for count, entry in enumerate(job.entries, 1):
                try:
                    extension, data = _read(reader, job, entry)
                except Exception as error:  # whatever a decoder or a file system finds to complain about
                    skipped.append((entry.image.name, _reason(error)))
                else:
                    members = {extension: data} | _labels_and_texts(entry)
                    members |= _texts_beside(reader, entry, skipped_texts)
                    check_sample(entry.key, members)
                    file.write(entry.key, members)
                if count - ticked == _TICK:
                    tick(_TICK)
                    ticked = count
            tick(len(job.entries) - ticked)
            if not file.samples:
                return Packed(None, {}, skipped, skipped_texts)
            index = file.close()
        finally:
            file.abort()
    except OSError as error:
        raise DataError(cannot_write(job.path, error)) from error
    finally:
        reader.close()
    return Packed(describe_shard(index), dict(index.extension_counts()), skipped, skipped_texts)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{error}" or type(error).__name__


def shrink(pixels: "Pixels", shorter: int, quality: int) -> tuple[str, bytes]:
    """Extension and bytes of an image with `shorter` pixels on its shorter side (bicubic, antialiased).

    8 bits of grey or colour become a JPEG without transparency, anything else an array (.npy, [h w c]), which loses no
    more than the resizing does.
    """
    from PIL import Image as Pillow

    from datamodules.crops import resize
    from datamodules.decode import as_asked

    height, width, channels = pixels.values.shape
    scale = shorter / min(height, width)
    size = max(shorter, round(height * scale)), max(shorter, round(width * scale))
    channels -= pixels.alpha
    out = io.BytesIO()
    if pixels.values.dtype == np.uint8 and channels in (1, 3):
        shown = pixels.values[:, :, :3] if channels == 3 else pixels.values[:, :, 0]
        Pillow.fromarray(shown).resize(size[::-1], Pillow.Resampling.BICUBIC).save(out, "JPEG", quality=quality)
        return "jpg", out.getvalue()
    deep = pixels.values.dtype == np.uint16
    small = resize(as_asked(pixels, channels, 16 if deep else 8), *size).permute(1, 2, 0).numpy()
    np.save(out, np.round(small * 257).astype(np.uint16) if deep else small, allow_pickle=False)
    return ARRAY, out.getvalue()


def _read(reader: SourceReader, job: Job, entry: Entry) -> tuple[str, bytes]:
    """Extension and bytes of an image that the loader will be able to decode, given its channels and bits."""
    from datamodules.decode import any_pixels

    extension = entry.image.name.rpartition(".")[2].lower()
    data = reader.read(entry.image)
    pixels = any_pixels(data, extension)
    if job.resize is None or min(pixels.values.shape[:2]) <= job.resize:
        return extension, data
    return shrink(pixels, job.resize, job.quality)


def _labels_and_texts(entry: Entry) -> dict[str, bytes]:
    """The members beside the image."""
    members = {} if entry.label < 0 else {"cls": str(entry.label).encode()}
    if entry.captions:
        members["txt"] = entry.captions[0].encode()
    if len(entry.captions) > 1:
        members["json"] = json.dumps({"captions": entry.captions}, ensure_ascii=False).encode()
    return members


def _texts_beside(reader: SourceReader, entry: Entry, skipped: list[tuple[str, str]]) -> dict[str, bytes]:
    """The members from files beside the image; those that are no texts go to `skipped`."""
    members = {}
    for text in entry.texts:
        try:
            members[kind_of(text)] = checked_text(reader.read(text), kind_of(text))
        except (OSError, ValueError) as error:
            skipped.append((text.name, _reason(error)))
    return members
