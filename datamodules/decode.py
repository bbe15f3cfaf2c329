"""Bytes of an image file to pixels: whitelisted formats only, hostile ones refused before they cost memory.

JPEG, nearly all there is in practice, goes through torchvision (libjpeg-turbo, a quarter faster than Pillow);
everything else, and what torchvision refuses, through Pillow. The pixels agree with `Image.open(...).convert("RGB")`,
which drops an alpha channel and takes the first frame of an animation; on top of it EXIF rotation is applied, and
16-bit grey is scaled where Pillow would saturate. Other channels or bits than 3 and 8 begin with `native_pixels`.

Axes: h, w = rows and columns of the upright image, c = channels.
"""

import contextlib
import io
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode

from datamodules.native_pixels import (
    MAX_PIXELS,
    PIL_FORMATS,
    BadImageError,
    Pixels,
    SeveralImagesError,
    deep_grey,
    native_pixels,
    refuse_bomb,
)
from datamodules.tar_samples import ARRAY, PLAIN_IMAGES

__all__ = ["MAX_PIXELS", "BadImageError", "JpegHeader", "any_pixels", "as_asked", "decode_image", "read_jpeg_header"]

# torchvision 0.29 deprecates `io.decode_jpeg`, with a warning at every call that takes as long as a small image; the
# operator below it is the same decoder. Without it (a later torchvision) Pillow decodes JPEGs, too.
_DECODE_JPEG = getattr(torch.ops.image, "decode_jpeg", None)
_RGB, _GREY = ImageReadMode.RGB.value, ImageReadMode.GRAY.value

_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EXIF, _START_OF_SCAN = 0xE1, 0xDA
_MOST_MARKERS = 10_000
_SAMPLES = 277  # the tag of TIFF


class JpegHeader(NamedTuple):
    """What the markers before the first scan say."""

    height: int
    width: int
    components: int
    exif: bool


def decode_image(data: bytes | bytearray, extension: str, channels: int = 3, bits: int = 8) -> Tensor:
    """Decode one image -> [c h w], channels innermost in memory unless EXIF turned it.

    A JPEG or PNG under another image extension is accepted: ImageNet has such files.

    Args:
        data: the file.
        extension: of the file, in lower case.
        channels: how many are wanted. Colour becomes grey as in Pillow, grey becomes colour by repeating, transparency
            is dropped; a file with any other number is refused.
        bits: 8: uint8; 16: float32 with the full precision of the file in the same units, 0..255 (value / 257).

    Raises:
        BadImageError: for another extension, damaged or truncated data, too many pixels, or other channels.
    """
    if extension not in PLAIN_IMAGES and extension != ARRAY:
        raise BadImageError(f".{extension} is not an image extension")
    usual = channels == 3 and bits == 8
    header = read_jpeg_header(data)
    if header is not None:
        refuse_bomb(header.height, header.width)
        if header.components in (1, 3) and _DECODE_JPEG is not None:
            try:
                encoded = torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=torch.uint8)
                image: Tensor = _DECODE_JPEG(encoded, _GREY if channels == 1 else _RGB, header.exif)
                return image if usual else as_asked(Pixels(image.permute(1, 2, 0).numpy()), channels, bits)
            except RuntimeError:
                pass  # Pillow either knows better or says in plainer words what is wrong
    if usual and data and extension != ARRAY and (found := _rgb_by_pillow(data)) is not None:
        return torch.from_numpy(found).permute(2, 0, 1)
    return as_asked(native_pixels(data, extension), channels, bits)


def any_pixels(data: bytes | bytearray, extension: str) -> Pixels:
    """Decode one image as the file has it, or, where that is more than one image, as `decode_image` has it.

    Raises:
        BadImageError: when no channels and bits whatever could be asked for.
    """
    if read_jpeg_header(data) is None:
        with contextlib.suppress(SeveralImagesError):
            return native_pixels(data, extension)
    return _rgb(data, extension)


def as_asked(pixels: Pixels, channels: int, bits: int) -> Tensor:
    """Pixels of a file -> [channels h w], uint8 or (16 bits) float32 in 0..255, as `decode_image` says."""
    values = pixels.values
    if pixels.alpha and channels != values.shape[2]:
        values = values[:, :, :-1]
    if values.shape[2] == 1 and channels == 3:
        values = np.repeat(values, 3, axis=2)
    elif values.shape[2] == 3 and channels == 1:
        values = _luma(values)
    height, width, c = values.shape
    if c != channels:
        raise BadImageError(f"{c} channels of {width} x {height} pixels in the file, {channels} were asked for")
    if bits == 16:
        scaled = values.astype(np.float32)
        values = scaled / np.float32(257) if values.dtype == np.uint16 else scaled
    elif values.dtype == np.uint16:
        values = (values >> 8).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(values)).permute(2, 0, 1)


def read_jpeg_header(data: bytes | bytearray) -> JpegHeader | None:
    """Size, components and whether there is an EXIF segment; None when this is not a JPEG or it ends before that.

    Raises:
        BadImageError: megabytes of padding or of empty segments, which Pillow, too, would walk through for half a
            minute.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, exif = 2, False
    for _ in range(_MOST_MARKERS):
        if at + 9 >= len(data) or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker in _FRAME_HEADERS:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return JpegHeader(height, width, data[at + 9], exif)
        if marker == _START_OF_SCAN:
            return None
        exif = exif or marker == _EXIF
        # 0xFF may be repeated as padding
        at += 1 if marker == 0xFF else 2 if marker in _WITHOUT_LENGTH else 2 + (data[at + 2] << 8 | data[at + 3])
    raise BadImageError(f"over {_MOST_MARKERS} markers and bytes of padding come before the image")


def _rgb(data: bytes | bytearray, extension: str) -> Pixels:
    return Pixels(decode_image(data, extension).permute(1, 2, 0).numpy())


def _rgb_by_pillow(data: bytes | bytearray) -> NDArray[np.uint8] | None:
    """uint8 [h w 3]; None for a TIFF whose channels are three pages."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=PIL_FORMATS) as image:
                refuse_bomb(image.height, image.width)
                if _channels_are_pages(image):
                    return None
                image.load()
                return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"no image in a known format (begins with {bytes(data[:8])!r})") from error
    except Exception as error:  # a decoder given hostile bytes raises whatever it likes
        raise BadImageError(f"{type(error).__name__}: {error}".replace("\n", " ")) from error


def _channels_are_pages(image: Any) -> bool:
    """As ImageJ writes a TIFF; other pages of a TIFF are pages, and the first of them is taken."""
    return bool(image.format == "TIFF" and image.n_frames == 3 and image.tag_v2.get(_SAMPLES, 1) == 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    deep = deep_grey(image)
    return (image if deep is None else Image.fromarray((deep >> 8).astype(np.uint8))).convert("RGB")


def _luma(values: NDArray[Any]) -> NDArray[Any]:
    """Colour to grey, to the last bit as Pillow's mode L (ITU-R 601). [h w 3] -> [h w 1]."""
    wide = values.astype(np.uint32)
    grey = wide[:, :, 0] * 19595 + wide[:, :, 1] * 38470 + wide[:, :, 2] * 7471  # of 65536
    return ((grey + 0x8000) >> 16).astype(values.dtype)[:, :, None]
