"""Images of any number of channels and of 8 or 16 bits as files of several kinds."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from datamodules.shard_writer import ShardWriter

Values = NDArray[Any]


def values(c: int, bits: int = 16, size: tuple[int, int] = (20, 30), seed: int = 0) -> Values:
    """Smooth pixels [h w c] with a little noise, another image for each seed."""
    y, x = np.mgrid[: size[0], : size[1]]
    noise = np.random.default_rng(seed).random((*size, c))
    planes = [0.5 + 0.4 * np.sin(x / (3 + seed % 5) + k + seed) * np.cos(y / (4 + k)) for k in range(c)]
    scaled = (np.stack(planes, -1) + 0.05 * noise) * ((1 << bits) - 1)
    return scaled.astype(np.uint8 if bits == 8 else np.uint16)


def npy(pixels: Values) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def tiff(pixels: Values, **options: Any) -> bytes:
    """One page; of more than three channels each sample is one."""
    kinds = {1: {"photometric": "minisblack"}, 3: {"photometric": "rgb"}}
    kind = kinds.get(pixels.shape[2], {"photometric": "minisblack", "planarconfig": "contig"})
    file = io.BytesIO()
    tifffile.imwrite(file, pixels[:, :, 0] if pixels.shape[2] == 1 else pixels, **(kind | options))
    return file.getvalue()


def tiff_pages(pages: list[Values]) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in pages:
            writer.write(page, photometric="minisblack", metadata=None)
    return file.getvalue()


def png(pixels: Values, claimed: tuple[int, int] | None = None) -> bytes:
    """A 16-bit PNG, which Pillow cannot write in colour; `claimed` is the size in its header."""
    height, width, c = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    size = claimed or (height, width)
    header = struct.pack(">IIBBBBB", size[1], size[0], 16, {1: 0, 2: 4, 3: 2, 4: 6}[c], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def write_deep(root: Any, c: int, bits: int, samples: int = 64, kind: str = "npy") -> list[Values]:
    """A labelled set of two classes in shards of 20; returns its pixels."""
    made = [values(c, bits, (24, 28), seed) for seed in range(samples)]
    write = {"npy": npy, "tif": tiff, "png": png}[kind]
    with ShardWriter(root, samples_per_shard=20, classes=["even", "odd"]) as writer:
        for i, pixels in enumerate(made):
            writer.write(f"{i:04d}", {kind: write(pixels), "cls": b"%d" % (i % 2)})
    return made
