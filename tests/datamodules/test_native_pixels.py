"""Every kind of deep image to the last bit, and what is refused."""

import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from datamodules.decode import any_pixels, decode_image
from datamodules.native_pixels import BadImageError, SeveralImagesError, native_pixels
from tests.datamodules.deep_images import npy, png, tiff, tiff_pages, values


@pytest.mark.parametrize("c", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["npy", "tif", "pages", "planar", "zlib", "lzw", "big", ">"])
def test_tiffs_and_arrays_keep_every_bit(c, bits, kind):
    pixels = values(c, bits)
    if kind == "npy":
        data, extension = npy(pixels), "npy"
    elif kind == "pages":
        data, extension = tiff_pages([pixels[:, :, i] for i in range(c)]), "tif"
    else:
        options = {
            "planar": {"planarconfig": "separate", "photometric": "minisblack"} if c > 1 else {},
            "zlib": {"compression": "zlib", "predictor": True}, "lzw": {"compression": "lzw"},
            "big": {"bigtiff": True}, ">": {"byteorder": ">"},
        }.get(kind, {})  # fmt: skip
        planar = kind == "planar" and c > 1
        if planar:
            file = io.BytesIO()
            tifffile.imwrite(file, np.moveaxis(pixels, -1, 0), **options)
            data, extension = file.getvalue(), "tiff"
        else:
            data, extension = tiff(pixels, **options), "tiff"
    found = native_pixels(data, extension)
    assert found.values.dtype == pixels.dtype and not found.alpha
    assert np.array_equal(found.values, pixels)
    assert found.values.flags.c_contiguous


@pytest.mark.parametrize("c", [1, 3, 4])
def test_sixteen_bit_png(c):
    pixels = values(c)
    found = native_pixels(png(pixels), "png")
    assert np.array_equal(found.values, pixels) and found.alpha == (c == 4)


def test_arrays_of_any_layout():
    pixels = values(3)
    assert np.array_equal(native_pixels(npy(pixels[:, :, 0]), "npy").values, pixels[:, :, :1])
    assert np.array_equal(native_pixels(npy(np.asfortranarray(pixels)), "npy").values, pixels)
    assert np.array_equal(native_pixels(npy(pixels.astype(">u2")), "npy").values, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_deep_tiff(orientation):
    pixels = values(3)
    deep = native_pixels(tiff(pixels, extratags=[(274, 3, 1, orientation, True)]), "tif").values
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray((pixels >> 8).astype(np.uint8)).save(file, "PNG", exif=exif)
    assert np.array_equal(deep >> 8, native_pixels(file.getvalue(), "png").values)


def test_white_is_zero():
    pixels = values(1)
    data = tiff(65535 - np.repeat(pixels, 5, 2), photometric="miniswhite", planarconfig="contig")
    assert np.array_equal(native_pixels(data, "tif").values, np.repeat(pixels, 5, 2))


def test_overviews_are_no_channels():
    pixels = values(4)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(pixels, photometric="minisblack", planarconfig="contig")
        writer.write(pixels[::2, ::2], photometric="minisblack", planarconfig="contig", subfiletype=1)
    assert np.array_equal(native_pixels(file.getvalue(), "tif").values, pixels)


@pytest.mark.parametrize(
    ("mode", "shape"), [("1", (20, 30, 1)), ("L", (20, 30, 1)), ("LA", (20, 30, 2)), ("P", (20, 30, 3)),
                        ("RGB", (20, 30, 3)), ("RGBA", (20, 30, 4)), ("CMYK", (20, 30, 3)), ("YCbCr", (20, 30, 3))],
)  # fmt: skip
def test_ordinary_pictures(mode, shape):
    image = Image.fromarray(values(3, 8)).convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    found = native_pixels(file.getvalue(), "png")
    assert found.values.shape == shape and found.values.dtype == np.uint8 and found.alpha == (mode in ("LA", "RGBA"))


def test_several_pictures_are_not_one():
    two = tiff_pages([values(1)[:, :, 0], values(1, size=(9, 9))[:, :, 0]])
    with pytest.raises(SeveralImagesError, match=r"2 pages, the first of \[20, 30\]: not one image"):
        native_pixels(two, "tif")
    assert any_pixels(two, "tif").values.shape == (20, 30, 3), "the loader takes the first page, as it always did"


def huge_npy(shape: str) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(1000)


def huge_tiff(c: int) -> bytes:
    data = bytearray(tiff(values(c)))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = file.pages.first.tags
        for name in ("ImageWidth", "ImageLength"):
            tag = tags[name]
            data[tag.valueoffset : tag.valueoffset + 4] = (
                (60_000).to_bytes(2 if tag.dtype == 3 else 4, "little").ljust(4, b"\0")
            )
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "extension", "message"),
    [
        (huge_npy("(60000, 60000, 3)"), "npy", "60000 x 60000 pixels are more than"),
        (huge_npy("(2000, 2000, 4000)"), "npy", "2000 x 2000 pixels of 4000 bytes are more than"),
        (huge_npy("(100, 100)"), "npy", r"shape \[100, 100\] and uint8 in 1000 bytes"),
        (huge_npy("(10, 99)"), "npy", r"shape \[10, 99\] and uint8 in 1000 bytes"),
        (huge_npy("(-10, -100)"), "npy", "images are"),
        (huge_npy("(1000,)"), "npy", r"shape \[1000\]: images are \[h w\] or \[h w c\]"),
        (huge_npy("(0, 1000)"), "npy", "images are"),
        (huge_npy("__import__('os').abort()"), "npy", "ValueError"),
        (npy(np.zeros((3, 3), np.float32)), "npy", "an array of float32: only uint8 and uint16"),
        (npy(np.zeros((3, 3), np.int16)), "npy", "an array of int16"),
        (npy(np.array([[None]])), "npy", "an array of object"),
        (b"\x93NUMPY", "npy", "."),
        (b"", "npy", "empty"),
        (b"cos\nsystem\n(S'false'\ntR.", "npy", "magic string"),
        (png(values(3), claimed=(60_000, 60_000)), "png", "bomb"),
        (png(values(3), claimed=(8_000, 6_000)), "png", "6000 x 8000 pixels of 8 bytes"),
        (png(values(3))[:300], "png", "."),
        (png(values(2)), "png", "grey with transparency"),
        (huge_tiff(5), "tif", "pixels of 10 bytes are more than|60000 x 60000"),
        (huge_tiff(3), "tif", "bomb"),
        (tiff(values(5).astype(np.float32)), "tif", "pixels of float32 have no fixed range"),
        (tiff(values(5).astype(np.int32)), "tif", "pixels of int32 have no fixed range"),
        (tiff(values(5))[:700], "tif", "."),
        (b"II*\0" + bytes(50), "tif", "."),
    ],
)
def test_what_is_refused(data, extension, message):
    for decode in (native_pixels, any_pixels, lambda d, e: decode_image(d, e, 5, 16)):
        with pytest.raises(BadImageError, match=message) as caught:
            decode(data, extension)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make", [tiff, npy, lambda v: png(v[:, :, :3]), lambda v: tiff_pages(list(v.transpose(2, 0, 1)))]
)
def test_random_damage_never_gives_another_exception(make):
    data = make(values(5))
    extension = "npy" if make is npy else "tif"
    generator = np.random.default_rng(0)
    bad = 0
    for _ in range(150):
        hurt = bytearray(data)
        for at in [*generator.integers(0, len(data), 2), generator.integers(0, 200)]:
            hurt[at] = generator.integers(256)
        try:
            assert decode_image(hurt, extension, 5, 16).dtype == torch.float32
        except BadImageError:
            bad += 1
    assert bad


def test_without_tifffile_the_reason_names_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(BadImageError, match=r'pip install "trivit\[tiff\]"'):
        decode_image(tiff(values(5)), "tif", 5, 16)
    assert decode_image(tiff(values(3, 8)), "tif").shape == (3, 20, 30), "the usual ones need nothing"
