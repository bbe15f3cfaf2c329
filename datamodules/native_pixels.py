"""Image files to pixels as the files have them: any number of channels, 8 or 16 bits, for data that is no photograph.

PNG and TIFF with 16 bits, TIFF with channels in one page or one page per channel, and `.npy` arrays; everything else as
Pillow opens it. Nothing is unpickled, and sizes are refused before they cost memory.

Axes: h, w = rows and columns of the upright image, c = channels.
"""

import io
import logging
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from datamodules.tar_samples import ARRAY

MAX_PIXELS = 89_478_485
"""Larger images are refused: 256 MiB of RGB, also Pillow's own limit."""

PIL_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
for _name in ("tifffile", "PIL.TiffImagePlugin"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # what is wrong becomes the reason of a bad sample
_BITS, _SAMPLES, _ORIENTATION = 258, 277, 274  # tags of TIFF
_MOST_PAGES = 4096
_AS_THEY_ARE = frozenset({"L", "LA", "RGB", "RGBA"})


class BadImageError(Exception):
    """These bytes are no image that can be used; the message says why in a few words."""


class SeveralImagesError(BadImageError):
    """A file with pages that cannot be the channels of one image."""


class Pixels(NamedTuple):
    """uint8 or uint16 [h w c]; whether the last channel is the transparency of a picture."""

    values: NDArray[Any]
    alpha: bool = False


def native_pixels(data: bytes | bytearray, extension: str) -> Pixels:
    """Decode one image of a known extension without giving anything up.

    Raises:
        BadImageError: damaged, of another kind of numbers than uint8 and uint16, or too large.
        SeveralImagesError: see there.
    """
    if not data:
        raise BadImageError("empty")
    try:
        if extension == ARRAY:
            return Pixels(_array(data))
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10":
            return _deep_png(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Image.open(io.BytesIO(data), formats=PIL_FORMATS) as image:
                    if _pillow_keeps_all(image):
                        return _from_pillow(image)
            except UnidentifiedImageError as error:
                if data[:4] not in _TIFF:
                    raise BadImageError(f"no image in a known format (begins with {bytes(data[:8])!r})") from error
        return Pixels(_tiff(data))
    except BadImageError:
        raise
    except Exception as error:  # a decoder given hostile bytes raises whatever it likes
        raise BadImageError(f"{type(error).__name__}: {error}".replace("\n", " ")) from error


def refuse_bomb(height: int, width: int, bytes_per_pixel: int = 3) -> None:
    """BadImageError for more pixels, or bytes of them, than any image needs."""
    if height * width * max(3, bytes_per_pixel) > 3 * MAX_PIXELS:
        much = f" of {bytes_per_pixel} bytes" if bytes_per_pixel > 3 else ""
        raise BadImageError(f"{width} x {height} pixels{much} are more than {MAX_PIXELS} of 3 bytes: refused")


def deep_grey(image: Image.Image) -> NDArray[np.uint16] | None:
    """The 16-bit values [h w] of a grey image; None for another one. BadImageError for 32 bits."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("I", "F"):
        raise BadImageError(f"32-bit pixels ({image.mode}) have no fixed range: convert them to 8 or 16 bits")
    return None


def _from_pillow(image: Image.Image) -> Pixels:
    refuse_bomb(image.height, image.width)
    image.load()
    # Of an upright image that would be the same one, without its format.
    upright = image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    if (deep := deep_grey(upright)) is not None:
        return Pixels(deep[:, :, None])
    if upright.mode not in _AS_THEY_ARE:
        upright = upright.convert("L" if upright.mode == "1" else "RGB")
    values = np.array(upright)
    return Pixels(values.reshape(*values.shape[:2], -1), upright.mode in ("LA", "RGBA"))


def _pillow_keeps_all(image: Image.Image) -> bool:
    """Whether Pillow reads every page, channel and bit; of many a TIFF it does not."""
    if image.format != "TIFF":
        return True
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    samples = tags.get(_SAMPLES, 1)
    whole = samples == 1 or (samples == len(image.getbands()) and max(tags.get(_BITS, (1,))) <= 8)
    return whole and getattr(image, "n_frames", 1) == 1


def _deep_png(data: bytes | bytearray) -> Pixels:
    """A 16-bit PNG. Of colour Pillow keeps the high bytes only; told that the low ones come first, it keeps these.

    torchvision's decoder would do it at once, but damaged files crash the process (0.29).
    """
    halves = []
    for order in ("B", "L"):
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            refuse_bomb(image.height, image.width, 8)
            if image.mode.startswith("I;16"):
                return _from_pillow(image)
            tile = image.tile[0]
            if tile.args != f"{image.mode};16B":
                raise BadImageError("a 16-bit PNG of grey with transparency: convert it to grey alone")
            image.tile = [tile._replace(args=f"{image.mode};16{order}")]
            image.load()
            halves.append(np.array(ImageOps.exif_transpose(image)))
    high, low = halves
    return Pixels(high.astype(np.uint16) << 8 | low, alpha=high.shape[2] == 4)


def _array(data: bytes | bytearray) -> NDArray[Any]:
    """An array file of NumPy, checked by hand: `np.load` would unpickle, and allocate before it looks."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, kind = read(file)
    if kind.newbyteorder("=") not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise BadImageError(f"an array of {kind}: only uint8 and uint16 have a fixed range")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImageError(f"an array of shape {list(shape)}: images are [h w] or [h w c]")
    height, width, channels = (*shape, 1)[:3]
    refuse_bomb(height, width, channels * kind.itemsize)
    here = len(data) - file.tell()
    if here != height * width * channels * kind.itemsize:
        raise BadImageError(f"an array of shape {list(shape)} and {kind} in {here} bytes")
    flat = np.frombuffer(data, kind, offset=file.tell())
    values = flat.reshape(shape, order="F" if columns_first else "C").reshape(height, width, channels)
    return np.array(values, kind.newbyteorder("="), order="C")


def _tiff(data: bytes | bytearray) -> NDArray[Any]:
    """The channels of a TIFF: samples of its page, or pages of one sample each. Overviews and masks are passed over."""
    try:
        import tifffile
    except ImportError as error:
        raise BadImageError('this kind of TIFF needs the tifffile package: pip install "trivit[tiff]"') from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        every: Any = file.pages
        if len(every) > _MOST_PAGES:
            raise BadImageError(f"more than {_MOST_PAGES} pages")
        pages = [page for page in every if not (page.is_reduced or page.is_mask)]
        first = pages[0]
        height, width, samples = first.imagelength, first.imagewidth, first.samplesperpixel
        if any(page.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)) for page in pages):
            raise BadImageError(f"pixels of {first.dtype} have no fixed range: convert them to uint8 or uint16")
        alike = all(page.shape == first.shape and page.dtype == first.dtype for page in pages)
        if not alike or (samples > 1 and len(pages) > 1):
            raise SeveralImagesError(f"{len(pages)} pages, the first of {list(first.shape)}: not one image")
        if first.axes not in ("YX", "YXS", "SYX"):
            raise BadImageError(f"axes {first.axes} of {list(first.shape)}: only rows, columns and channels are known")
        refuse_bomb(height, width, samples * len(pages) * first.dtype.itemsize)
        planes = [page.asarray(maxworkers=1) for page in pages]
        if first.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            planes = [np.iinfo(plane.dtype).max - plane for plane in planes]
        orientation = int(first.tags.valueof(_ORIENTATION, 1))
    values = np.stack(planes, -1) if samples == 1 else planes[0]
    if first.axes == "SYX":
        values = np.moveaxis(values, 0, -1)
    if values.shape != (height, width, samples * len(pages)):
        raise BadImageError(f"contradicts itself: {list(values.shape)} for {[height, width, samples * len(pages)]}")
    return np.ascontiguousarray(_upright(values, orientation))


def _upright(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo the orientation of TIFF and EXIF, 1 to 8. [h w c], rows and columns swapped from 5 on."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    down = orientation in (3, 4, 7, 8)
    right = orientation in (2, 3, 6, 7)
    return values[:: -1 if down else 1, :: -1 if right else 1]
