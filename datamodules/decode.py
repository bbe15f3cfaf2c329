"""Bytes of an image file to pixels: whitelisted formats only, hostile ones refused before they cost memory.

JPEG, nearly all there is in practice, goes through torchvision (libjpeg-turbo, a quarter faster than Pillow);
everything else, and what torchvision refuses, through Pillow. The pixels agree with `Image.open(...).convert("RGB")`,
which drops an alpha channel and takes the first frame of an animation; on top of it EXIF rotation is applied, and
16-bit grey is scaled where Pillow would saturate.

Axes: h, w = rows and columns of the upright image.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode

from datamodules.tar_index import PLAIN_IMAGES

MAX_PIXELS = 89_478_485
"""Larger images are refused: 256 MiB of pixels, also Pillow's own limit."""

# torchvision 0.29 deprecates `io.decode_jpeg`, with a warning at every call that takes as long as a small image; the
# operator below it is the same decoder. Without it (a later torchvision) Pillow decodes JPEGs, too.
_DECODE_JPEG = getattr(torch.ops.image, "decode_jpeg", None)
_RGB = ImageReadMode.RGB.value

_PIL_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EXIF, _START_OF_SCAN = 0xE1, 0xDA


class BadImageError(Exception):
    """These bytes are no image that can be used; the message says why in a few words."""


class JpegHeader(NamedTuple):
    """What the markers before the first scan say."""

    height: int
    width: int
    components: int
    exif: bool


def decode_image(data: bytes | bytearray, extension: str) -> Tensor:
    """Decode one image -> uint8 [3 h w], channels innermost in memory unless EXIF turned it.

    A JPEG or PNG under another image extension is accepted: ImageNet has such files.

    Raises:
        BadImageError: for another extension, damaged or truncated data, or too many pixels.
    """
    if extension not in PLAIN_IMAGES:
        raise BadImageError(f".{extension} is not an image extension")
    if not data:
        raise BadImageError("empty")
    header = read_jpeg_header(data)
    if header is not None:
        _refuse_bomb(header.height, header.width)
        if header.components in (1, 3) and _DECODE_JPEG is not None:
            try:
                encoded = torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=torch.uint8)
                image: Tensor = _DECODE_JPEG(encoded, _RGB, header.exif)
                return image
            except RuntimeError:
                pass  # Pillow either knows better or says in plainer words what is wrong
    return _decode_with_pillow(data)


def read_jpeg_header(data: bytes | bytearray) -> JpegHeader | None:
    """Size, components and whether there is an EXIF segment; None when this is not a JPEG or it ends before that."""
    if data[:2] != b"\xff\xd8":
        return None
    at, exif = 2, False
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAME_HEADERS:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return JpegHeader(height, width, data[at + 9], exif)
        if marker == _START_OF_SCAN:
            return None
        exif = exif or marker == _EXIF
        # 0xFF may be repeated as padding
        at += 1 if marker == 0xFF else 2 if marker in _WITHOUT_LENGTH else 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _decode_with_pillow(data: bytes | bytearray) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_PIL_FORMATS) as image:
                _refuse_bomb(image.height, image.width)
                image.load()
                pixels = np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"no image in a known format (begins with {bytes(data[:8])!r})") from error
    except Exception as error:  # a decoder given hostile bytes raises whatever it likes
        raise BadImageError(f"{type(error).__name__}: {error}".replace("\n", " ")) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImageError(f"32-bit pixels ({image.mode}) have no fixed range: convert them to 8 or 16 bits")
    return image.convert("RGB")


def _refuse_bomb(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImageError(f"{width} x {height} pixels are more than {MAX_PIXELS}: refused")
